"""The configuration: what a user types, what is refused, and what an adapter's JSON says.

A config has two forms.

* In memory it is *native*: every field as the user set it, so that training continues as it began.
* On disk it is *portable*: the top-level keys are those of a plain `peft.LoraConfig` whose scaling is `lora_alpha / r`
  everywhere (`use_rslora: false`, `alpha_pattern: {}`, `init_lora_weights: true`), because llama.cpp ignores the first
  two and PEFT would re-run the third. What was taken out of the scaling is multiplied into `lora_B`
  (`layers/fold.py`), and the native values stand under the one extra key, `hf_qlora`.

Reading a JSON with that key gives the native config back. Everything is validated here, once; layers trust it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME


if typing.TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RECORD_KEY = "hf_qlora"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Initialisations that overwrite the base weight (PiSSA 2404.02948, OLoRA 2406.01775, CorDA 2406.05223, LoRA-GA
# 2407.05000) or need to read it dense (MiCA 2604.01694).
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
# LoRA variants that PEFT's 4-bit layer ignores without a word.
_NOT_ON_4BIT = ("velora_config", "monteclora_config", "kasa_config", "use_bdlora", "use_qalora", "megatron_config")


class ConfigError(ValueError):
    """A configuration, in memory or in a file, that cannot be honoured; the message says what to do instead."""


@dataclass(frozen=True)
class NF4Config:
    """How the base is quantized: 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314).

    Raises:
        ConfigError: an unknown block size or compute dtype, or a value of the wrong type.
    """

    double_quant: bool = field(
        default=True,
        metadata={"help": "Quantize the block scales too, to 8 bits in blocks of 256: 4.127 bits a weight."},
    )
    block_size: int = field(default=64, metadata={"help": f"Weights that share one scale; one of {BLOCK_SIZES}."})
    compute_dtype: torch.dtype | str | None = field(
        default=None, metadata={"help": "dtype of the matrix products; None is the base model's own."}
    )
    skip_modules: tuple[str, ...] = field(
        default=("lm_head",),
        metadata={
            "help": "Names or dotted suffixes of modules to leave dense, beside output heads, embeddings, tied "
            "weights, routers and `modules_to_save`, which always stay dense."
        },
    )

    quant_type: ClassVar[str] = "nf4"

    def __post_init__(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"double_quant={self.double_quant!r} must be True or False.")
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size={self.block_size!r} is not supported; choose one of {BLOCK_SIZES}.")
        if isinstance(self.skip_modules, str) or not all(isinstance(name, str) for name in self.skip_modules):
            raise ConfigError(f"skip_modules={self.skip_modules!r} must be a tuple of module names, as ('lm_head',).")
        object.__setattr__(self, "skip_modules", tuple(self.skip_modules))
        object.__setattr__(self, "compute_dtype", _as_compute_dtype(self.compute_dtype))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `NF4Config.from_dict` reads it back."""
        return {
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
            "compute_dtype": None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch."),
            "skip_modules": list(self.skip_modules),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NF4Config:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"quant_type"})
        if unknown:
            raise ConfigError(f"Unknown quantization settings {unknown}; known are {sorted(known)}.")
        if values.get("quant_type", cls.quant_type) != cls.quant_type:
            raise ConfigError(f"quant_type={values['quant_type']!r} is not supported; only {cls.quant_type!r} is.")
        names = values.get("skip_modules", ())
        if not isinstance(names, list | tuple):
            raise ConfigError(f"skip_modules={names!r} must be a list of module names.")
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_bitsandbytes(self) -> BitsAndBytesConfig:
        """The `BitsAndBytesConfig` for a streaming `from_pretrained(..., quantization_config=...)`.

        With the default `skip_modules` transformers chooses what stays dense (heads and tied weights); other names are
        passed on, and are then the only ones it skips.

        Raises:
            ConfigError: `block_size` is not 64; transformers cannot stream other block sizes.
        """
        if self.block_size != 64:
            raise ConfigError(
                f"block_size={self.block_size} cannot be streamed: BitsAndBytesConfig has no block size and means 64. "
                "Load the model dense and let get_peft_model or quantize_model convert it in place, or use 64."
            )
        default = NF4Config().skip_modules
        return bitsandbytes_config(self, None if self.skip_modules == default else list(self.skip_modules))


def bitsandbytes_config(config: NF4Config, skip_modules: list[str] | None) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip_modules,
    )


@dataclass
class QLoRAConfig(LoraConfig):
    """LoRA over an NF4 base, in one config: `get_peft_model(model, QLoRAConfig(r=64, target_modules="all-linear"))`.

    Every field of `peft.LoraConfig` works as there. What is saved is an ordinary LoRA adapter (`peft_type: "LORA"`)
    plus one JSON key, `hf_qlora`.

    `init_lora_weights="loftq"` is LoftQ (arXiv 2310.08659) in one iteration: `lora_A` and `lora_B` start as the rank-r
    SVD of W − NF4(W), computed while the dense weight is at hand; the base keeps the codes it would have without
    LoftQ.

    Raises:
        ConfigError: a value out of range, or a setting that an NF4 base cannot honour.
    """

    quantization: NF4Config | dict[str, Any] | None = field(
        default_factory=NF4Config,
        metadata={"help": "How the base is quantized. None: plain LoRA on the base as it is."},
    )
    portable: bool = field(
        default=True,
        metadata={
            "help": "Save with rsLoRA and alpha_pattern folded into lora_B, so that every consumer computes the same."
        },
    )

    # What a file's `hf_qlora` key held, where this config was read from one. Not a field: never written or compared.
    record: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self) -> None:
        _check_values(self)
        if isinstance(self.quantization, Mapping):
            self.quantization = NF4Config.from_dict(self.quantization)
        if self.quantization is None:
            super().__post_init__()
            return
        _check_honoured_on_nf4(self)
        # PEFT's own LoftQ wants scipy and rewrites the base; ours does neither, so PEFT must not prepare for it.
        loftq = {name: self.__dict__[name] for name in ("init_lora_weights", "loftq_config")}
        if loftq["init_lora_weights"] != "loftq":
            super().__post_init__()
            return
        self.__dict__.update(init_lora_weights=True, loftq_config={})
        super().__post_init__()
        self.__dict__.update(loftq)

    def to_dict(self) -> dict[str, Any]:
        """The native config as JSON types; `QLoRAConfig(**values)` reads it back."""
        values: dict[str, Any] = super().to_dict()
        if isinstance(self.quantization, NF4Config):
            values["quantization"] = self.quantization.to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def to_portable_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` says: the keys of a stock `LoraConfig`, and `hf_qlora`."""
        values = self.to_dict()
        originals = {
            name: values[name] for name in ("use_rslora", "alpha_pattern", "init_lora_weights", "loftq_config")
        }
        if self.record is not None:  # the initialisation that this adapter once had
            originals["init_lora_weights"] = self.record["originals"]["init_lora_weights"]
        own = {name: values.pop(name) for name in _OWN_FIELDS}
        values |= {"init_lora_weights": True, "loftq_config": {}}
        if self.portable:
            values |= {"use_rslora": False, "alpha_pattern": {}}
        values[RECORD_KEY] = {
            "format_version": FORMAT_VERSION,
            "type": type(self).__name__,
            **own,
            "originals": originals,
        }
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` in its portable form, whole or not at all."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; pass a folder to save the adapter config in.")
        values = self.to_portable_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_NAME, values)

    @classmethod
    def from_portable_dict(cls, values: Mapping[str, Any]) -> QLoRAConfig:
        """The native config from what `adapter_config.json` says.

        Raises:
            ConfigError: wrong types, unknown settings, or a newer format.
        """
        stock = dict(values)
        record = _checked_record(stock.pop(RECORD_KEY, None))
        config_cls = _class_named(record["type"])
        known = {f.name for f in dataclasses.fields(config_cls)}
        unknown = sorted(name for name in stock if name not in known or name in _OWN_FIELDS)
        if unknown:
            _say_once(
                f"adapter_config.json has keys that this PEFT does not know, now ignored: {unknown}. Upgrade peft."
            )
            stock = {name: value for name, value in stock.items() if name not in unknown}
        native = {name: record["originals"][name] for name in ("use_rslora", "alpha_pattern")}
        native |= {name: record[name] for name in _OWN_FIELDS if name in record}
        merged = stock | native
        hints = typing.get_type_hints(config_cls)
        for name, value in merged.items():
            if not _matches(value, hints[name]):
                raise ConfigError(
                    f"adapter_config.json: {name}={value!r} has the wrong type; expected {_shown(hints[name])}."
                )
        config = config_cls(**merged)
        config.__dict__["record"] = record
        return config

    def portable_form(self) -> LoraConfig:
        """The stock config that a consumer without this package reads from the file."""
        values = self.to_portable_dict()
        del values[RECORD_KEY]
        return LoraConfig(**values)

    def become_portable(self) -> None:
        """Give up the native scaling, in place, for tensors that are already in the portable form."""
        if self.portable:
            self.__dict__.update(use_rslora=False, alpha_pattern={})


_OWN_FIELDS = ("quantization", "portable")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to a temporary name beside `path`, then rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "w") as file:
            json.dump(values, file, indent=2, sort_keys=True)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _as_compute_dtype(value: Any) -> torch.dtype | None:
    if value is None or value in COMPUTE_DTYPES.values():
        return typing.cast("torch.dtype | None", value)
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if isinstance(name, str) and name in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[name]
    raise ConfigError(f"compute_dtype={value!r} is not supported; choose one of {tuple(COMPUTE_DTYPES)} or None.")


def _check_values(config: QLoRAConfig) -> None:
    """Ranges that PEFT checks late, or never."""

    def positive(value: Any, kind: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value > 0

    if not positive(config.r, int):
        raise ConfigError(f"r={config.r!r} must be a positive integer, as r=16.")
    if not positive(config.lora_alpha, (int, float)):
        raise ConfigError(f"lora_alpha={config.lora_alpha!r} must be a positive number, as lora_alpha=16.")
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout={dropout!r} must be a number in [0, 1).")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = getattr(config, name)
        if patterns is None:
            setattr(config, name, {})
        elif not isinstance(patterns, Mapping):
            raise ConfigError(f"{name}={patterns!r} must be a dict from module names to values.")
        for pattern, value in (patterns or {}).items():
            if not positive(value, kind):
                raise ConfigError(f"{name}[{pattern!r}]={value!r} must be positive.")
            _check_pattern(name, pattern)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), str):
            _check_pattern(name, getattr(config, name))
    if not isinstance(config.portable, bool):
        raise ConfigError(f"portable={config.portable!r} must be True or False.")
    if config.quantization is not None and not isinstance(config.quantization, NF4Config | Mapping):
        raise ConfigError(f"quantization={config.quantization!r} must be an NF4Config, its dict, or None.")


def _check_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression: {error}.") from error


def _check_honoured_on_nf4(config: QLoRAConfig) -> None:
    init: Any = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"init_lora_weights={init!r} rewrites the base weight or needs it dense, which an NF4 base is not. Use "
            "'loftq' (base unchanged), True, 'gaussian' or 'orthogonal', or set quantization=None."
        )
    if init == "loftq":
        given = config.loftq_config or {}
        loftq = dict(given) if isinstance(given, Mapping) else vars(given)
        if loftq.get("loftq_iter", 1) != 1 or loftq.get("loftq_bits", 4) != 4:
            raise ConfigError(
                f"loftq_config={loftq} is not supported on NF4: further iterations change the base, and the base has "
                "4 bits. Use loftq_iter=1 and loftq_bits=4, or leave loftq_config out."
            )
        config.loftq_config = loftq
    refused = [name for name in _NOT_ON_4BIT if getattr(config, name, None)]
    if refused:
        raise ConfigError(
            f"{refused} cannot be honoured on an NF4 base: PEFT's 4-bit layers ignore it. Set quantization=None."
        )


def _class_named(name: str) -> type[QLoRAConfig]:
    """The config class of that name among ours; nothing is imported by name."""
    classes: dict[str, type[QLoRAConfig]] = {cls.__name__: cls for cls in (QLoRAConfig, *QLoRAConfig.__subclasses__())}
    if name not in classes:
        raise ConfigError(
            f"The adapter's config type is {name!r}; this version knows {sorted(classes)}. Upgrade hf-qlora."
        )
    return classes[name]


def _checked_record(record: Any) -> dict[str, Any]:
    """The `hf_qlora` key of an adapter_config.json, with the parts that are read below known to be there."""
    if not isinstance(record, dict):
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}={record!r} must be an object.")
    version = record.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}.format_version={version!r} must be a positive integer.")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"The adapter has format_version {version}; this version of hf-qlora reads up to {FORMAT_VERSION}. "
            "Upgrade hf-qlora."
        )
    originals = record.get("originals")
    expected: dict[str, Any] = {"use_rslora": bool, "alpha_pattern": dict, "init_lora_weights": (bool, str)}
    for name, kind in expected.items():
        if not isinstance(originals, dict) or not isinstance(originals.get(name), kind):
            raise ConfigError(f"adapter_config.json: {RECORD_KEY}.originals has no valid {name!r}: {originals!r}.")
    if not isinstance(record.get("type"), str):
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}.type={record.get('type')!r} must be a string.")
    return record


def _matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value can stand for a field of type `hint`: a list for a tuple or set, a dict for a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        # PEFT's Literal for init_lora_weights holds a placeholder, 'pissa_niter_[number of iters]'
        return value in arguments or (isinstance(value, str) and value.startswith("pissa_niter_"))
    if origin in (list, set, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple | set) and all(_matches(item, inner) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (dict, typing.cast(type, hint)))
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
