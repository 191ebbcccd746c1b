"""How the base is quantized."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hf_qlora.validation import ConfigError, matches


if typing.TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

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


def _as_compute_dtype(value: Any) -> torch.dtype | None:
    name = str(value).removeprefix("torch.")
    if value is None:
        return None
    if isinstance(value, str | torch.dtype) and name in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[name]
    raise ConfigError(f"compute_dtype={value!r} is not supported; choose one of {tuple(COMPUTE_DTYPES)} or None.")
