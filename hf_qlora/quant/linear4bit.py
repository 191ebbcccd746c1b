"""The NF4 linear layer: bitsandbytes' `Linear4bit` as storage, with a CPU forward that leaves the weight alone.

bitsandbytes repacks the weight in place at the first eval forward on AVX512-BF16 processors. From then on training
gets no gradient through the layer, merging reads the packed bytes as if they were not, and the scales have been
rounded to bfloat16. So on the CPU this class never calls bitsandbytes' forward: it dequantizes, multiplies, and
forgets the dense weight; within `fast_generation` it has a repacked copy beside it (`quant/repacked.py`). On other
devices bitsandbytes' forward is right, and fast for generation, and is used as it is.

Dense layers and stock 4-bit layers are converted by changing their class in place: the module object stays, and with
it every reference, hook and shared use of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import bitsandbytes as bnb
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.kernels.functional import frozen_linear, without_autocast
from hf_qlora.quant.dequantize import DTYPES, dequantize_weight, product_weight, wide_weight
from hf_qlora.quant.packing import share_tables, unpacked
from hf_qlora.quant.repacked import MAX_ROWS, Repacked
from hf_qlora.quant.scales import load_scales


logger = logging.getLogger(__name__)

# What a layer has beside what every linear layer has.
_OWN_ATTRIBUTES = (
    "source_cls",
    "base_dtype",
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "repacked",
    "in_features",
    "out_features",
)


class Linear4bit(bnb.nn.Linear4bit):
    """An NF4 linear layer, (in_features → out_features), frozen; a subclass of `bitsandbytes.nn.Linear4bit`."""

    source_cls: type[nn.Module]
    compute_dtype: Any
    base_dtype: torch.dtype  # that `compute_dtype` was derived from, where the config chose none
    repacked: Repacked | None = None  # within `fast_generation`; no part of the state, and of no copy

    @property
    def state(self) -> QuantState:
        """How the weight is packed. FSDP replaces the parameter, which then has no state of its own."""
        state: QuantState = getattr(self.weight, "quant_state", None) or self.quant_state
        return state

    @state.setter
    def state(self, state: QuantState) -> None:
        """PEFT's other methods give a layer its own state again, which is how they carry that of 8-bit layers over."""
        self.weight.quant_state = self.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, (..., in_features); the result has x's dtype."""
        dtype = self.product_dtype(x)  # on a GPU for what it refuses alone
        if x.device.type != "cpu":
            result: Tensor = super().forward(x)
            return result
        bias = None if self.bias is None else self.bias.to(dtype)
        repacked = self.repacked  # once: another thread may let go of it
        if repacked is not None and self._is_generating(x, dtype):
            y = repacked.multiply(x.to(dtype), self.weight, self.state)
            return (y if bias is None else y.add_(bias)).to(x.dtype)
        with without_autocast("cpu"):
            return frozen_linear(x.to(dtype), lambda: self.product_weight(dtype), bias).to(x.dtype)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the layer multiplies x in.

        Raises:
            TypeError: x is of whole numbers.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"An NF4 layer ({self.in_features} → {self.out_features}) got inputs of {x.dtype}: this model casts "
                "them to the dtype of the layer's weight, which is packed. Leave the layer, which the traceback "
                'names, dense: NF4Config(skip_modules=("lm_head", "wo")) if it is called wo.'
            )
        kind = x.device.type
        dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.compute_dtype
        return dtype or x.dtype

    def _is_generating(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the repacked form may be used: for a few rows, and nothing that could be training."""
        return (
            dtype == torch.bfloat16
            and not self.training
            and not torch.is_grad_enabled()
            and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
            and not torch.compiler.is_compiling()
        )

    def __getstate__(self) -> dict[str, Any]:
        """What `copy` and `pickle` take: all but the repacked form."""
        return {name: value for name, value in self.__dict__.items() if name != "repacked"}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        table = f"{prefix}weight.quant_map"
        if table in destination:  # not under FSDP
            destination[table] = destination[table].clone()  # shared in memory; safetensors takes no shared tensors

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take codes with their scales, or neither; bitsandbytes takes the codes, which get the layer's own scales."""
        codes = f"{prefix}weight"
        scales = {
            name.removeprefix(f"{codes}."): state_dict[name] for name in state_dict if name.startswith(f"{codes}.")
        }
        rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(f"{codes}.")}
        packed = getattr(self.weight, "quant_state", None) is not None  # under FSDP no scales are saved
        if codes in rest and packed and not scales:
            rest[codes] = self.weight  # which other codes would not fit
            missing_keys += [f"{codes}.{name}" for name in self.state.as_dict(packed=True)]
        elif codes in rest and scales:
            try:
                if local_metadata.get("assign_to_params_buffers"):
                    raise ValueError("assign=True is not supported.")
                _check_codes(rest[codes], self.weight)
                load_scales(self.state, scales)
                share_tables(self.state)
            except (AssertionError, KeyError, ValueError) as error:
                reason = f"it has no {error}." if isinstance(error, KeyError) else error or "unknown scales"
                error_msgs.append(f"{codes} is not loaded: {reason}")
                rest[codes] = self.weight
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Follow the model to another device (`to`, `cuda`) or dtype (`float`, `half`, `to`); the codes stay."""
        dtype = fn(torch.empty(0, dtype=self.state.dtype, device=self.weight.device)).dtype
        if dtype not in DTYPES:
            raise TypeError(
                f"NF4 layers compute in {', '.join(map(str, DTYPES))}, not in {dtype}. What was cast before "
                f"this layer stays so: cast the model to {self.state.dtype} to have it as it was."
            )
        super()._apply(fn, recurse)
        self.follow(dtype)
        share_tables(self.state)
        return self

    def follow(self, dtype: torch.dtype) -> None:
        """Dequantize to `dtype` from now on, and compute in it unless the config chose another."""
        if self.compute_dtype == self.base_dtype:
            self.compute_dtype = dtype
        self.base_dtype = self.state.dtype = dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out_features, in_features), in `dtype` or the dtype it was quantized from."""
        return dequantize_weight(self.weight.data, self.state, dtype)

    def product_weight(self, dtype: torch.dtype) -> Tensor:
        """What the layer multiplies by in a product in `dtype`, (out_features, in_features)."""
        return product_weight(self.weight.data, self.state, dtype)

    def wide_weight(self) -> Tensor:
        """The dense weight, (out_features, in_features), in the wider of its own dtype and that of its products."""
        return wide_weight(self.weight.data, self.state, self.compute_dtype)

    def to_dense(self, weight: Tensor) -> nn.Linear | Conv1D:
        """A new dense layer of the class this one was made from, with its bias and hooks.

        Args:
            weight (`torch.Tensor`, (out_features, in_features)): its weight.
        """
        dense = copy.copy(self)
        dense._parameters = dict(self._parameters)
        return dense.become_dense(weight)

    def become_dense(self, weight: Tensor) -> nn.Linear | Conv1D:
        """Turn this layer, in place, into a dense one of the class it was made from, and let the packed weight go."""
        source_cls, (N, K) = self.source_cls, weight.shape
        with _unhooked(self):
            for name in _OWN_ATTRIBUTES:
                self.__dict__.pop(name, None)
            layer: Any = self
            layer.__class__ = source_cls
            if issubclass(source_cls, Conv1D):
                layer.nf, layer.nx = N, K
                weight = weight.t().contiguous()
            else:
                layer.out_features, layer.in_features = N, K
            self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            bias = self._parameters["bias"]
            if bias is not None and bias.dtype != weight.dtype:  # a copy: the packed layer may come back
                self._parameters["bias"] = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        return cast(nn.Linear | Conv1D, layer)


def dense_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight of a dense layer as (out_features, in_features); a transposed view for `Conv1D`."""
    weight = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def become_linear4bit(
    layer: nn.Linear | Conv1D, packed: Tensor, state: QuantState, compute_dtype: torch.dtype | str | None
) -> Linear4bit:
    """Turn a dense layer into a `Linear4bit` with the given packed weight, in place; the dense weight is let go."""
    converted = _become(layer, type(layer), state.shape, compute_dtype or state.dtype, state.dtype)
    set_packed(converted, packed, state)
    return converted


def set_packed(layer: Linear4bit, packed: Tensor, state: QuantState) -> None:
    """Give a layer its packed weight."""
    # Not through `__setattr__`: PEFT's low_cpu_mem_usage patches parameter registration to move everything to meta.
    layer._parameters["weight"] = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state


def adopt_linear(layer: bnb.nn.Linear4bit, name: str, compute_dtype: torch.dtype | str | None) -> None:
    """Turn a stock `bitsandbytes.nn.Linear4bit` into ours, in place, undoing bitsandbytes' CPU repacking."""
    weight = layer.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        logger.warning(
            "%s was repacked by bitsandbytes in an eval forward on this CPU, which rounds its scales to bfloat16; it "
            "is unpacked, but its weights differ from the checkpoint's by up to 0.4 %%. Load the base anew to avoid "
            "this.",
            name,
        )
        weight.data, weight.quant_state = unpacked(weight.data, state)
    source_cls = getattr(layer, "source_cls", nn.Linear)
    dtype = compute_dtype or layer.compute_dtype or weight.quant_state.dtype
    shape = torch.Size([layer.out_features, layer.in_features])
    layer.quant_state = weight.quant_state
    _become(layer, source_cls, shape, dtype, weight.quant_state.dtype)
    share_tables(weight.quant_state)


def _check_codes(given: Any, own: Tensor) -> None:
    for name in ("shape", "dtype"):
        if getattr(given, name, None) != getattr(own, name):
            raise ValueError(f"its {name} is {getattr(given, name, None)}, and this layer's is {getattr(own, name)}.")


def _become(
    layer: nn.Module, source_cls: type[nn.Module], shape: torch.Size, compute_dtype: Any, base_dtype: torch.dtype
) -> Linear4bit:
    """Change the class of `layer` in place to `Linear4bit` and set what bitsandbytes' own constructor would."""
    with _unhooked(layer):
        layer.__class__ = Linear4bit
        assert isinstance(layer, Linear4bit)
        layer.source_cls = source_cls
        layer.out_features, layer.in_features = shape
        layer.compute_dtype, layer.base_dtype = compute_dtype, base_dtype
        layer.compute_type_is_set = True
        layer.quant_storage = getattr(layer.weight, "quant_storage", torch.uint8)
        layer.support_avx512bf16_for_cpu = False
        layer.requires_grad_(False)
    return layer


@contextmanager
def _unhooked(layer: nn.Module) -> Iterator[None]:
    """Take accelerate's hook, which has bound the class's forward, off while the class changes."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(layer)
        layer.__dict__.pop("forward", None)
    yield
    if hook is not None:
        add_hook_to_module(layer, hook)
