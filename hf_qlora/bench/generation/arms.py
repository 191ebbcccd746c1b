"""What is compared: how each arm's model is made, which base it is compared with, and what it should generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_qlora.bench.train_step.arms import SHAPES, Case, with_stock_layers
from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.generation import fast_generation
from hf_qlora.quant.repacked import obstacle_here


@dataclass(frozen=True)
class Generation(Case):
    """What is generated. Of `Case`, the batch size, the shape, the rank and the seed are used.

    Attributes:
        sequence_length: of the prompt, in tokens.
        new_tokens: generated in each round.
    """

    batch_size: int = 1
    sequence_length: int = 16
    new_tokens: int = 128

    def base(self) -> Any:
        model = self.dense().eval()
        model.generation_config.use_cache = True
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        return model

    def prompt(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.batch_size, self.sequence_length)
        return torch.randint(0, SHAPES[self.shape]["vocab_size"], size, generator=generator)


def as_stock(model: Any) -> Any:
    """As `from_pretrained` gives it: bitsandbytes' own layers, which repack in place where the processor can."""
    for module in with_stock_layers(model).modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
    return model


class Bases:
    """The base in the three forms, each made once and copied."""

    def __init__(self, case: Generation) -> None:
        self.case = case
        self._dense = case.base()
        self._nf4 = quantize_model(copy.deepcopy(self._dense), NF4Config())

    def dense(self) -> Any:
        return copy.deepcopy(self._dense)

    def nf4(self) -> Any:
        return copy.deepcopy(self._nf4)

    def stock(self) -> Any:
        return as_stock(self.nf4())

    def adapted(self, base: nn.Module, config: type[LoraConfig] = QLoRAConfig) -> Any:
        """With an adapter that is not zero, and the same each time."""
        torch.manual_seed(self.case.seed)
        return get_peft_model(base, config(**self.case.lora(), init_lora_weights=False)).eval()


def _merged(bases: Bases) -> Any:
    return bases.adapted(bases.nf4()).merge_and_unload()


@dataclass(frozen=True)
class Arm:
    """One way to generate.

    Attributes:
        build: makes the model.
        base: name of the arm whose time this one's is compared with.
        exact: name of the arm whose tokens this one should generate.
        fast: whether within `fast_generation`.
    """

    name: str
    build: Callable[[Bases], Any]
    base: str
    exact: str
    fast: bool = False

    def way(self, model: Any) -> AbstractContextManager[None]:
        return fast_generation(model) if self.fast else nullcontext()


DENSE, MERGED = "dense", "dense, LoRA merged"
NF4, LORA = "NF4", "NF4 + LoRA"
FAST, FAST_LORA = "NF4, fast_generation", "NF4 + LoRA, fast_generation"
STOCK, STOCK_LORA = "stock NF4", "stock NF4 + LoRA"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(DENSE, Bases.dense, DENSE, DENSE),
        Arm(MERGED, _merged, DENSE, LORA),
        Arm(NF4, Bases.nf4, NF4, NF4),
        Arm(LORA, lambda bases: bases.adapted(bases.nf4()), NF4, LORA),
        Arm(FAST, Bases.nf4, FAST, NF4, fast=True),
        Arm(FAST_LORA, lambda bases: bases.adapted(bases.nf4()), FAST, LORA, fast=True),
        Arm(STOCK, Bases.stock, STOCK, NF4),
        Arm(STOCK_LORA, lambda bases: bases.adapted(bases.stock(), LoraConfig), STOCK, LORA),
    )
}


def possible() -> tuple[str, ...]:
    """The arms that this processor has a kernel for."""
    without = bool(obstacle_here(NF4Config().block_size))
    return tuple(name for name, arm in ARMS.items() if not (arm.fast and without))
