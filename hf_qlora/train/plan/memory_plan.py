"""What `plan_memory` finds: numbers of bytes, and how they are shown and kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qlora.config.record import write_json
from hf_qlora.train.plan import report
from hf_qlora.validation import ConfigError


FILE_NAME = "memory_plan.json"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run; `print` shows them.

    Attributes:
        model, device, optimizer, checkpointing: what was planned.
        dtype: of the base's dense weights, and what the forward runs under, where it is autocast.
        batch_size, seq_len, rank: of one forward; the rank that the config has for most layers.
        packed_bytes, dense_bytes: of the base: NF4 codes with their scales at both levels and tables, and the rest.
        adapter_bytes, gradient_bytes: of what is trained, and its gradients.
        optimizer_bytes, paged_bytes: the optimizer's state on the device, and in memory that moves to the host when
            the device is full.
        layer_bytes: what each layer keeps for backward, its input included.
        other_kept_bytes: what else is kept for backward: by embeddings, the head and the loss.
        host_bytes: of the layers' inputs that wait on the host.
        conversion_peak_bytes: while the dense base becomes NF4; 0 where it is not converted.
        step_peak_bytes: of a training step that is not the first.
        peak_stage: what runs then.
        at_peak: the parts of `step_peak_bytes`, by what they are.
        modes: for other ways of checkpointing, the bytes kept by layers and the peak of a step.
        budget_bytes: what it should fit in.
    """

    model: str
    device: str
    batch_size: int
    seq_len: int
    rank: int
    optimizer: str
    checkpointing: str
    dtype: str
    packed_bytes: int
    dense_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    layer_bytes: tuple[int, ...]
    other_kept_bytes: int
    host_bytes: int
    conversion_peak_bytes: int
    step_peak_bytes: int
    peak_stage: str
    at_peak: Mapping[str, int]
    modes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    budget_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The higher of converting and training."""
        return max(self.conversion_peak_bytes, self.step_peak_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget; True without one."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    def __str__(self) -> str:
        return report.text(self)

    def markdown(self) -> str:
        """The parts of the peak as a table."""
        return report.markdown(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the parts of the peak, and the modes of checkpointing, as stacked bars.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: not the name of a .png file.
        """
        report.plot(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, `peak_bytes` among them; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "layer_bytes": list(self.layer_bytes), "peak_bytes": self.peak_bytes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryPlan:
        names = {f.name for f in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name in names}
        try:
            return cls(**{**given, "layer_bytes": tuple(given["layer_bytes"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"This is no memory plan: {error}.") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `memory_plan.json` into a folder, such as that of a saved adapter; the path of the file."""
        path = Path(folder, FILE_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MemoryPlan:
        """The plan that `save` wrote into a folder.

        Raises:
            OSError: there is none.
            ConfigError: the file is no plan.
        """
        path = Path(folder, FILE_NAME)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no memory plan: {error}.") from error
        return cls.from_dict(values if isinstance(values, dict) else {})
