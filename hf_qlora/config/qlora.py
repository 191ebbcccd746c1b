"""QLoRA's config, and its way to JSON and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from hf_qlora.config.checkpointing import Checkpointing
from hf_qlora.config.nf4 import NF4Config
from hf_qlora.config.record import FORMAT_VERSION, OF_THE_WEIGHTS, RECORD_KEY, checked_record, write_json
from hf_qlora.validation import CHANGES_BASE, ConfigError, check_honoured_on_nf4, check_types, check_values


logger = logging.getLogger(__name__)

ON_BASE_MISMATCH = ("warn", "error", "ignore")


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
    chunked_loss: bool = field(
        default=True,
        metadata={
            "help": "Compute the cross entropy over a vocabulary in chunks while training; logits are made when read."
        },
    )
    checkpointing: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What layers keep for backward: 'full', 'offload', or a dict of `enable_checkpointing`'s "
            "arguments, as {'mode': 'budget', 'budget_bytes': '4GiB'}. None: as the model has it."
        },
    )
    on_base_mismatch: str = field(
        default="warn",
        metadata={
            "help": "Where the adapter is loaded on another base than it was trained on: 'warn', 'error' or 'ignore'."
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
        check_on_base_mismatch(self.on_base_mismatch)
        if self.checkpointing is not None:
            Checkpointing.of(self.checkpointing)
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
        own = {name: values.pop(name) for name in self.own_fields()}
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
        read = self.record or {}
        values[RECORD_KEY] |= {name: read[name] for name in OF_THE_WEIGHTS if name in read}
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
        own = config_cls.own_fields()
        given = {name: stock.pop(name) for name in own if name in stock}  # by a caller of from_pretrained
        unknown = sorted(name for name in stock if name not in known)
        if unknown:
            _say_once(
                f"adapter_config.json has keys that this PEFT does not know, now ignored: {unknown}. Upgrade peft."
            )
            stock = {name: value for name, value in stock.items() if name not in unknown}
        native = {name: record["originals"][name] for name in _STOCK_SCALING}
        native |= {name: record[name] for name in (*own, "layers_pattern") if name in record}
        if native.get("on_base_mismatch") == "ignore":  # a file may be strict with its reader, not silence a warning
            native["on_base_mismatch"] = "warn"
        try:
            return config_cls(**stock | native | given, record=record)
        except (TypeError, AttributeError, KeyError, ImportError) as error:  # PEFT's, from a sub-config
            raise ConfigError(f"adapter_config.json cannot be read: {error}.") from error

    def is_stock(self) -> bool:
        """Whether a stock tuner computes this adapter: a file's tensors, which are folded, or nothing to fold."""
        if self.record is not None:
            return bool(self.record["folded"])
        return self.without_depth() is self and not (self.folds and (self.use_rslora or self.alpha_pattern))

    def portable_form(self) -> LoraConfig:
        """The stock config that a consumer without this package reads from the file."""
        values = self.to_portable_dict()
        del values[RECORD_KEY]
        return LoraConfig(**values)

    def with_portable_scaling(self) -> QLoRAConfig:
        """A copy without the native scaling, for tensors that are already in the portable form."""
        config = copy.copy(self.without_depth())
        if self.folds:
            config.__dict__.update(_STOCK_SCALING)
        return config

    def without_depth(self) -> QLoRAConfig:
        """The config of the adapter that this one is once its depth scales are folded."""
        return self

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """PEFT's, which takes for settings of the config only those that the class itself declares."""
        hub, settings, others = super()._split_kwargs(kwargs)
        fields = {f.name for config_cls in _classes().values() for f in dataclasses.fields(config_cls)}
        settings |= {name: others.pop(name) for name in list(others) if name in fields}
        return hub, settings, others

    @classmethod
    def own_fields(cls) -> list[str]:
        """The names of the fields that `LoraConfig` has not, and that are for users."""
        stock = {f.name for f in dataclasses.fields(LoraConfig)}
        return [f.name for f in dataclasses.fields(cls) if f.name not in stock and f.name != "record"]


# What a stock reader is to see in the place of what was folded, and of an initialisation that has been.
_STOCK_SCALING: dict[str, Any] = {"use_rslora": False, "alpha_pattern": {}}
_STOCK_INIT: dict[str, Any] = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def check_on_base_mismatch(value: str) -> None:
    """Raise ConfigError for anything but what `on_base_mismatch` may be."""
    if value not in ON_BASE_MISMATCH:
        raise ConfigError(f"on_base_mismatch={value!r} is not known; choose one of {ON_BASE_MISMATCH}.")


def _classes() -> dict[str, type[QLoRAConfig]]:
    """Our config classes and those derived from them."""
    classes: dict[str, type[QLoRAConfig]] = {}
    remaining: list[type[QLoRAConfig]] = [QLoRAConfig]
    while remaining:
        cls = remaining.pop()
        classes[cls.__name__] = cls
        remaining += cls.__subclasses__()
    return classes


def _class_named(name: str) -> type[QLoRAConfig]:
    """The config class of that name; nothing is imported by name."""
    classes = _classes()
    if name not in classes:
        raise ConfigError(
            f"The adapter's config type is {name!r}; this version knows {sorted(classes)}. Upgrade hf-qlora, or "
            "import the module that defines it first."
        )
    return classes[name]


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
