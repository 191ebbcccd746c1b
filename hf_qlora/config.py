"""The configuration: what a user types, what is refused, and what an adapter's JSON says.

A config has two forms.

* In memory it is *native*: every field as the user set it, so that training continues as it began.
* On disk it is *portable*: the top-level keys are those of a plain `peft.LoraConfig` whose scaling is `lora_alpha / r`
  everywhere (`use_rslora: false`, `alpha_pattern: {}`, `init_lora_weights: true`), because llama.cpp ignores the first
  two and PEFT would re-run the third. What was taken out of the scaling is multiplied into `lora_B`
  (`layers/fold.py`), and the native values stand under the one extra key, `hf_qlora`.

Reading a JSON with that key gives the native config back. Everything is validated when a config is made
(`validation.py`); layers trust it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import os
import threading
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME

from hf_qlora.validation import CHANGES_BASE, ConfigError, check_honoured_on_nf4, check_types, check_values, matches


if typing.TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RECORD_KEY = "hf_qlora"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size={self.block_size!r} is not supported; choose one of {BLOCK_SIZES}.")
        if not matches(self.skip_modules, tuple[str, ...]):
            raise ConfigError(f"skip_modules={self.skip_modules!r} must be a list or tuple of names, as ('lm_head',).")
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
        unknown = sorted(map(str, set(values) - known - {"quant_type"}))
        if unknown:
            raise ConfigError(f"Unknown quantization settings {unknown}; known are {sorted(known)}.")
        if values.get("quant_type", cls.quant_type) != cls.quant_type:
            raise ConfigError(f"quant_type={values['quant_type']!r} is not supported; only {cls.quant_type!r} is.")
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

    record: dict[str, Any] | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "What a file's `hf_qlora` key held, where this config was read from one. Not for users."},
    )

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):  # may be null in a JSON
            if self.__dict__[name] is None:
                self.__dict__[name] = {}
        if not (self.quantization is None or isinstance(self.quantization, NF4Config | Mapping)):
            raise ConfigError(f"quantization={self.quantization!r} must be an NF4Config, its dict, or None.")
        check_values(self)
        check_types(self)
        if isinstance(self.quantization, Mapping):
            self.quantization = NF4Config.from_dict(self.quantization)
        if self.quantization is None:
            super().__post_init__()
            return
        if dataclasses.is_dataclass(self.loftq_config):
            self.__dict__.update(loftq_config=vars(self.loftq_config))
        check_honoured_on_nf4(self)
        # PEFT's own LoftQ wants scipy and rewrites the base; ours does neither, so PEFT must not prepare for it.
        loftq = {name: self.__dict__[name] for name in ("init_lora_weights", "loftq_config")}
        if loftq["init_lora_weights"] != "loftq":
            super().__post_init__()
            return
        self.__dict__.update(init_lora_weights=True, loftq_config={})
        super().__post_init__()
        self.__dict__.update(loftq)

    @property
    def from_file(self) -> bool:
        """Whether this config was read from an adapter's folder."""
        return self.record is not None

    @property
    def folds(self) -> bool:
        """Whether saving folds scales into `lora_B`. With PiSSA and the like a reader's base depends on them."""
        repeated = isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(CHANGES_BASE)
        return self.portable and not repeated

    def to_dict(self) -> dict[str, Any]:
        """The native config as JSON types; `QLoRAConfig(**values)` reads it back."""
        values: dict[str, Any] = super().to_dict()
        del values["record"]
        if isinstance(self.quantization, NF4Config):
            values["quantization"] = self.quantization.to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def to_portable_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` says: the keys of a stock `LoraConfig`, and `hf_qlora`."""
        values = self.to_dict()
        originals = {name: values[name] for name in (*_STOCK_SCALING, *_STOCK_INIT)}
        if self.record is not None:  # the initialisation that this adapter once had
            originals |= {name: self.record["originals"].get(name, values[name]) for name in _STOCK_INIT}
        own = {name: values.pop(name) for name in _OWN_FIELDS}
        if self.quantization is not None:  # else it may be PiSSA or another that a reader must repeat on its base
            values |= _STOCK_INIT
        if self.folds:
            values |= _STOCK_SCALING
        values[RECORD_KEY] = {
            "format_version": FORMAT_VERSION,
            "type": type(self).__name__,
            **own,
            "folded": self.folds,
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
        record = checked_record(stock.pop(RECORD_KEY, None))
        config_cls = _class_named(record["type"])
        known = {f.name for f in dataclasses.fields(config_cls)}
        unknown = sorted(name for name in stock if name not in known or name in _OWN_FIELDS)
        if unknown:
            _say_once(
                f"adapter_config.json has keys that this PEFT does not know, now ignored: {unknown}. Upgrade peft."
            )
            stock = {name: value for name, value in stock.items() if name not in unknown}
        native = {name: record["originals"][name] for name in _STOCK_SCALING}
        native |= {name: record[name] for name in _OWN_FIELDS if name in record}
        try:
            return config_cls(**stock | native, record=record)
        except (TypeError, AttributeError, KeyError, ImportError) as error:  # PEFT's, from a sub-config
            raise ConfigError(f"adapter_config.json cannot be read: {error}.") from error

    def portable_form(self) -> LoraConfig:
        """The stock config that a consumer without this package reads from the file."""
        values = self.to_portable_dict()
        del values[RECORD_KEY]
        return LoraConfig(**values)

    def with_portable_scaling(self) -> QLoRAConfig:
        """A copy without the native scaling, for tensors that are already in the portable form."""
        config = copy.copy(self)
        if self.folds:
            config.__dict__.update(_STOCK_SCALING)
        return config


_OWN_FIELDS = ("quantization", "portable")
# What a stock reader is to see in the place of what was folded, and of an initialisation that has been.
_STOCK_SCALING: dict[str, Any] = {"use_rslora": False, "alpha_pattern": {}}
_STOCK_INIT: dict[str, Any] = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to a temporary name beside `path`, then rename."""
    aside = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        aside.write_text(json.dumps(values, indent=2, sort_keys=True))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _as_compute_dtype(value: Any) -> torch.dtype | None:
    name = str(value).removeprefix("torch.")
    if value is None:
        return None
    if isinstance(value, str | torch.dtype) and name in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[name]
    raise ConfigError(f"compute_dtype={value!r} is not supported; choose one of {tuple(COMPUTE_DTYPES)} or None.")


def _class_named(name: str) -> type[QLoRAConfig]:
    """The config class of that name among ours; nothing is imported by name."""
    classes: dict[str, type[QLoRAConfig]] = {cls.__name__: cls for cls in (QLoRAConfig, *QLoRAConfig.__subclasses__())}
    if name not in classes:
        raise ConfigError(
            f"The adapter's config type is {name!r}; this version knows {sorted(classes)}. Upgrade hf-qlora."
        )
    return classes[name]


def checked_record(record: Any) -> dict[str, Any]:
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
    kinds = {"type": str, "folded": bool, "weights_sha256": str}
    for name, value in record.items():
        if name in kinds and not isinstance(value, kinds[name]):
            raise ConfigError(f"adapter_config.json: {RECORD_KEY}.{name}={value!r} must be a {kinds[name].__name__}.")
    lacking = sorted(kinds.keys() - record.keys() - {"weights_sha256"})
    if lacking:
        raise ConfigError(f"adapter_config.json: {RECORD_KEY} lacks {lacking}.")
    return record


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
