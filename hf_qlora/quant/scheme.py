"""A way to write weights in 4 bits: levels, the number of weights to a scale, and whether scales are quantized too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from bitsandbytes.functional import QuantState

from hf_qlora.config import NF4Config
from hf_qlora.config.nf4 import BLOCK_SIZES
from hf_qlora.validation import ConfigError


QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256  # scales to a scale; the only value that bitsandbytes supports


@dataclass(frozen=True)
class Scheme:
    """A 4-bit format of bitsandbytes.

    Raises:
        ConfigError: a type or a block size that bitsandbytes does not have.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"quant_type={self.quant_type!r} is not known; choose one of {QUANT_TYPES}.")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size={self.block_size!r} is not supported; choose one of {BLOCK_SIZES}.")

    def __str__(self) -> str:
        return f"{self.quant_type}-{self.block_size}{'-dq' if self.double_quant else ''}"

    def packed_bytes(self, numel: int) -> int:
        """Bytes of the codes and scales of a weight, without the constant tables."""
        blocks = -(-numel // self.block_size)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 if self.double_quant else 4 * blocks
        return -(-numel // 2) + scales

    @classmethod
    def of(cls, source: NF4Config | QuantState) -> Scheme:
        """The scheme that a config asks for, or that a weight is packed in."""
        if isinstance(source, NF4Config):
            return cls(source.quant_type, source.block_size, source.double_quant)
        return cls(source.quant_type, source.blocksize, bool(source.nested))


def grid(config: NF4Config, quant_types: Iterable[str], block_sizes: Iterable[int]) -> list[Scheme]:
    """Every type with every block size, with double quantization and without; that of `config` first."""
    sizes = (config.block_size, *block_sizes)
    found = itertools.starmap(Scheme, itertools.product(quant_types, sizes, (True, False)))
    return list(dict.fromkeys((Scheme.of(config), *found)))
