"""`plan_memory`: lay out, trace, and, where asked, solve for the largest batch, sequence or rank that fits."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from hf_qlora.config.amounts import bytes_given
from hf_qlora.config.checkpointing import Checkpointing
from hf_qlora.layers.budget_rule import BudgetTooSmall, number_checkpointed
from hf_qlora.layers.checkpointable import checkpointable_layers
from hf_qlora.train.plan import checkpointing as ckpt
from hf_qlora.train.plan import layout, step
from hf_qlora.train.plan.laid_out import LaidOut
from hf_qlora.train.plan.memory_plan import MemoryPlan
from hf_qlora.train.plan.optimizers import OPTIMIZERS, known_name
from hf_qlora.train.plan.parts import parts
from hf_qlora.train.plan.solve import largest_that_fits
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
SOLVABLE = ("batch_size", "seq_len", "rank")
# What cuBLAS takes from torch's allocator for each of the two threads that multiply: forward's and backward's
# (aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper and newer, else 8 MiB and 128 KiB).
CUBLAS = {True: 2 * 2**25, False: 2 * (2**23 + 2**17)}


def plan_memory(
    model: Any,
    config: LoraConfig | None = None,
    batch_size: int = 1,
    seq_len: int = 1024,
    *,
    optimizer: str = "adamw_torch",
    checkpointing: str | Mapping[str, Any] | None = None,
    autocast: str | torch.dtype | None = None,
    accumulate: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    budget: int | str | None = None,
    largest: str | None = None,
    compare: bool = False,
) -> MemoryPlan:
    """How much memory a training run takes, from shapes alone: no weights are read, and none are made.

    Padding is not planned: sequences are whole, where a mask would add to what attention takes. Nor are fp16's
    gradient scaler and the clipping of gradients. A step is traced as it would run, so that a model whose forward
    depends on values cannot be planned; of experts, those in bfloat16 can.

    Args:
        model: a folder, a Hub id, a model or a config of transformers, or a `PeftModel` (then without `config`).
        config: a `QLoRAConfig`, or a stock `LoraConfig`.
        batch_size, seq_len: of one forward, in sequences and tokens.
        optimizer: as `TrainingArguments(optim=...)`: "adamw_torch", "adamw_torch_fused", "adamw_8bit" (also under its
            other name, "adamw_bnb_8bit"), "paged_adamw_8bit", "paged_adamw_32bit" or "sgd".
        checkpointing: "full", "offload", or a dict of `enable_checkpointing`'s arguments; by default what the
            config says, or what is set in a `PeftModel`.
        autocast: what the forward runs under, as `bf16=True` makes Trainer do.
        accumulate: whether gradients of one forward are there in the next.
        dtype: of the base, where `model` is a folder or an id; by default what its config says.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        budget: bytes, or "24GiB", that the plan is held against.
        largest: "batch_size", "seq_len" or "rank": find the largest that fits the budget, in place of the one given.
        compare: also trace the other modes of checkpointing.

    Raises:
        ConfigError: a setting that is not allowed; a model that cannot be planned; a budget that is too small for one
            sequence, one token or rank 1, with the smallest that works.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in DEVICES:
        raise ConfigError(f"device={device!r} is not known; choose one of {DEVICES}.")
    wanted = ckpt.asked(checkpointing, config, model)
    planner = _Planner(
        model, config, dtype, chosen, optimizer, wanted, layout.dtype_named(autocast, "autocast"), accumulate
    )
    sizes: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a positive integer.")
    _say_too_long(planner, seq_len)
    allowed = None if budget is None else bytes_given(budget, "budget")
    if largest is None:
        return planner.plan(**sizes, budget=allowed, compare=compare)
    if largest not in SOLVABLE:
        raise ConfigError(f"largest={largest!r} is not known; choose one of {SOLVABLE}.")
    if allowed is None:
        raise ConfigError(f"largest={largest!r} needs a budget, such as budget='24GiB'.")

    plans: dict[int, MemoryPlan] = {}

    def peak(number: int) -> float:
        try:
            found = plans[number] = planner.plan(**{**sizes, largest: number})
        except BudgetTooSmall:
            if number == 1:
                raise
            return math.inf
        # That of converting is the same for all numbers, and would only hide how those of steps grow.
        return found.peak_bytes if found.conversion_peak_bytes > allowed else found.step_peak_bytes

    number = largest_that_fits(peak, allowed, largest, planner.limit(largest))
    if compare:
        return planner.plan(**{**sizes, largest: number}, budget=allowed, compare=True)
    return dataclasses.replace(plans[number], budget_bytes=allowed)


def _say_too_long(planner: _Planner, seq_len: int) -> None:
    positions = planner.limit("seq_len")
    if seq_len > positions:
        logger.warning("%s has %d positions, and is planned with %d.", planner.name, positions, seq_len)


@dataclass
class _Planner:
    """Makes plans of one model, config and way to train."""

    model: Any
    config: LoraConfig | None
    dtype: str | torch.dtype | None
    device: str
    optimizer: str
    checkpointing: Checkpointing
    autocast: torch.dtype | None
    accumulate: bool

    def __post_init__(self) -> None:
        self.optimizer = known_name(self.optimizer)
        self.kind = OPTIMIZERS[self.optimizer]
        self.make_base, self.name = layout.base_of(self.model, self.config, self.dtype)
        self._laid_out: dict[int | None, LaidOut] = {}

    def laid_out(self, rank: int | None) -> LaidOut:
        """The model, for a rank that is not the config's; the last one is kept."""
        if rank not in self._laid_out:
            config = self.config
            if rank is not None:
                if config is None:
                    raise ConfigError("The rank of a model that has adapters is given; give the base and a config.")
                config = copy.deepcopy(config)
                config.r = rank
            self._laid_out = {rank: LaidOut.of(self.make_base, config, self.device)}
            ckpt.chunk_mlps(self._laid_out[rank].model, self.checkpointing.chunk_size)
        return self._laid_out[rank]

    def limit(self, largest: str) -> int:
        """Beyond which there is no sense in a batch, a sequence or a rank."""
        base = self.laid_out(None).model.get_base_model()
        if largest == "seq_len":
            return int(getattr(base.config, "max_position_embeddings", None) or 2**20)
        if largest == "rank":
            return int(getattr(base.config, "hidden_size", None) or 2**12)
        return 2**16

    def _dtype(self, model: PeftModel) -> str:
        found = str(model.get_base_model().dtype).removeprefix("torch.")
        return found if self.autocast is None else f"{found}, autocast to {str(self.autocast).removeprefix('torch.')}"

    def plan(
        self, batch_size: int, seq_len: int, rank: int | None = None, budget: int | None = None, compare: bool = False
    ) -> MemoryPlan:
        laid = self.laid_out(rank)
        run = _Run(self, laid, batch_size, seq_len)
        traced = run.traced(self.checkpointing)
        modes: dict[str, dict[str, int]] = {}
        for mode in (None, "full", "offload") if compare and checkpointable_layers(laid.model) else ():
            other = run.traced(Checkpointing(mode, None, self.checkpointing.chunk_size))
            modes[str(mode or "none")] = {"layers": sum(other.kept_by_layer()), "peak": other.peak.size}
        state, paged = run.state_bytes()
        layers = traced.kept_by_layer()
        return MemoryPlan(
            model=self.name,
            device=self.device,
            batch_size=batch_size,
            seq_len=seq_len,
            rank=rank or laid.rank,
            optimizer=self.optimizer,
            checkpointing=ckpt.described(self.checkpointing),
            dtype=self._dtype(laid.model),
            **laid.bytes,
            optimizer_bytes=state,
            paged_bytes=paged,
            layer_bytes=tuple(layers),
            other_kept_bytes=sum(block.size for block in traced.kept) - sum(layers),
            host_bytes=traced.host_bytes,
            conversion_peak_bytes=laid.conversion_peak,
            step_peak_bytes=traced.peak.size,
            peak_stage=traced.peak.stage,
            at_peak=parts(traced.peak, traced.kept),
            modes=modes,
            budget_bytes=budget,
        )


@dataclass
class _Run:
    """Traces of one laid out model, batch and sequence."""

    planner: _Planner
    laid: LaidOut
    batch_size: int
    seq_len: int

    @cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.laid.model.parameters() if parameter.requires_grad]

    def state_bytes(self) -> tuple[int, int]:
        """Of the optimizer: on the device, and paged."""
        kind = self.planner.kind
        if kind.make is None:
            return kind.state_bytes([p.numel() for p in self.trained])
        per_tensor = {"adamw_torch": 2, "adamw_torch_fused": 2}.get(self.planner.optimizer, 0)
        return per_tensor * sum(p.nbytes for p in self.trained), 0

    def traced(self, wanted: Checkpointing) -> step.Traced:
        if wanted.mode is None:
            return self._checkpointed(0)
        number = len(checkpointable_layers(self.laid.model)) or 1
        if wanted.mode == "budget":
            free = self._checkpointed(0)
            inputs = [block.size for block in free.inputs]
            batch = f"a batch of {self.batch_size} × {self.seq_len} tokens"
            number = number_checkpointed(wanted.budget_bytes or 0, free.kept_by_layer(), inputs, batch)
        return self._checkpointed(number, offload=wanted.mode == "offload" and self.planner.device == "cuda")

    def _checkpointed(self, number: int, offload: bool = False) -> step.Traced:
        if number or checkpointable_layers(self.laid.model):
            ckpt.enable(self.laid.model, number, self.planner.device)
        return self._trace(offload)

    def _trace(self, offload: bool) -> step.Traced:
        planner, laid = self.planner, self.laid
        on_cuda = planner.device == "cuda"
        make = planner.kind.make
        resident = {"optimizer": self.state_bytes()[0]} if make is None else {}
        if on_cuda:
            resident["libraries"] = CUBLAS[_is_hopper()]
        with laid.mode:
            inputs = step.inputs_of(laid.model, self.batch_size, self.seq_len)
        optimizer = None if make is None else make(self.trained, on_cuda)
        try:
            return step.run(
                laid.model,
                inputs,
                laid.mode,
                device=planner.device,
                optimizer=optimizer,
                autocast=planner.autocast,
                offload=offload,
                accumulate=planner.accumulate,
                resident=resident,
            )
        except (NotImplementedError, RuntimeError, TypeError) as error:  # of operations that need values
            experts = " Models of experts can be planned in bfloat16 (dtype=)." if "BF16" in str(error) else ""
            raise ConfigError(
                f"A step of {type(laid.model.get_base_model()).__name__} cannot be run without values:{experts} "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error


def _is_hopper() -> bool:
    """Whether the GPU here is Hopper or newer; the planned one, where there is none here, is taken to be."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
