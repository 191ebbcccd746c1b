"""The settings of checkpointing: which layers keep their activations for backward, and where."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.checkpoint import checkpoint

from hf_qlora.config.amounts import bytes_given
from hf_qlora.validation import ConfigError


MODES = ("full", "budget", "offload")
OURS = ("mode", "budget_bytes", "chunk_size")
_TORCHS = inspect.signature(checkpoint).parameters.keys() - {"function", "args", "kwargs"} | {"preserve_rng_state"}


@dataclass(frozen=True)
class Checkpointing:
    """What `enable_checkpointing`, a config or `gradient_checkpointing_kwargs` ask for.

    Attributes:
        mode: of `MODES`, or None: layers keep what they keep.
        budget_bytes: for mode "budget"; a text such as "4GiB" becomes its number of bytes.
        chunk_size: rows of an MLP at a time, or None.
        options: for `torch.utils.checkpoint.checkpoint`.

    Raises:
        ConfigError: a mode or a number that is not allowed, or settings that do not go together.
    """

    mode: str | None = "full"
    budget_bytes: int | None = None
    chunk_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} of checkpointing is not known; choose one of {(*MODES, None)}.")
        if self.chunk_size is not None and (type(self.chunk_size) is not int or self.chunk_size < 1):
            raise ConfigError(f"chunk_size={self.chunk_size!r} of checkpointing must be a positive integer, or None.")
        if self.budget_bytes is not None:
            object.__setattr__(self, "budget_bytes", bytes_given(self.budget_bytes, "budget_bytes"))
        if (self.mode == "budget") != (self.budget_bytes is not None):
            raise ConfigError(
                f"checkpointing with mode={self.mode!r} and budget_bytes={self.budget_bytes!r}: a budget needs both "
                "mode='budget' and budget_bytes, the bytes that all layers together may keep for backward."
            )
        if self.mode != "full" and self.options.get("use_reentrant"):
            raise ConfigError(f"mode={self.mode!r} needs use_reentrant=False; leave use_reentrant out.")
        if not self.options.get("preserve_rng_state", True):
            raise ConfigError(
                "preserve_rng_state=False draws other dropout masks in backward than in forward, so that gradients "
                "are wrong. Leave it out."
            )

    @classmethod
    def of(cls, value: str | Mapping[str, Any]) -> Checkpointing:
        """From a mode, or a dict of `mode`, `budget_bytes` and `chunk_size`, as a config has it."""
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or not value.keys() <= set(OURS):
            raise ConfigError(
                f"checkpointing={value!r} must be one of {MODES}, or a dict of some of {OURS}, such as "
                "{'mode': 'budget', 'budget_bytes': '4GiB'}."
            )
        return cls(**value)

    @classmethod
    def of_keywords(cls, keywords: Mapping[str, Any]) -> Checkpointing | None:
        """From `gradient_checkpointing_kwargs`; None where they have nothing of ours."""
        own = {name: keywords[name] for name in OURS if name in keywords}
        options = {name: value for name, value in keywords.items() if name not in OURS}
        unknown = options.keys() - _TORCHS
        if own and unknown:
            raise ConfigError(
                f"{', '.join(sorted(unknown))}: not known beside {', '.join(own)} in the settings of checkpointing; "
                f"choose from {(*OURS, *sorted(_TORCHS))}."
            )
        return cls(**own, options=options) if own else None

    def keywords(self) -> dict[str, Any]:
        """As `gradient_checkpointing_kwargs` have it."""
        return {**{name: getattr(self, name) for name in OURS}, **self.options}
