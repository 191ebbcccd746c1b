"""The LoRA layer over an NF4 base: PEFT's, with a merge that is exact and undone exactly.

PEFT merges by adding ΔW to the dequantized weight and quantizing the sum again. ΔW is far below the step between two
codes, so that nearly all of it is lost, and unmerging leaves another base than before. Here

    merged weight = dequantized W + Σ ΔW, added in float32, rounded once to the base's dtype,

is a dense layer of the class the base was made from. It stands in the base layer's place while merged; unmerging puts
the packed layer, the same object, back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.kernels.functional import add_adapters, frozen_linear
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.forward import inference_adapters, step_adapters, step_forward, traced_forward
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit


class Linear4bit(PeftLinear4bit):
    """A LoRA layer over `quant.linear4bit.Linear4bit`; made from PEFT's by `adopt`, never constructed."""

    base_layer: Any
    merged_adapters: list[str]
    # The packed base layer while a dense one stands in its place; in a tuple, so that it is no submodule then.
    _packed: tuple[BaseLinear4bit, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to x, (..., in_features); the result has x's dtype."""
        if args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        plain = inference_adapters(self, x)
        if plain is not None:
            return add_adapters(base(x), x, plain)
        adapters = step_adapters(self)
        if adapters is None:
            result = super().forward(x)
            return result
        dtype = base.product_dtype(x)
        if torch.compiler.is_compiling():
            return traced_forward(x, dtype, _product(base, dtype), adapters).to(x.dtype)
        return step_forward(x, dtype, lambda: base.product_weight(dtype), base.bias, adapters).to(x.dtype)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, onto: Tensor | None = None
    ) -> None:
        """Put a dense layer with the adapters' ΔW added in the base layer's place.

        Args:
            safe_merge: check that the result is finite before using it.
            adapter_names: the adapters to merge; the active ones by default.
            onto (`torch.Tensor`, (out_features, in_features)): add ΔW to this weight and in its dtype, instead of the
                dequantized one.

        Raises:
            MergeError: an adapter with `lora_bias`, or (with `safe_merge`) a result that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self.check_mergeable("This layer", names, safe_merge=False)
        packed = self._packed[0] if self.merged else self.base_layer
        base = packed.wide_weight().float() if onto is None else onto.float()
        dtype = packed.state.dtype if onto is None else onto.dtype
        weight = self.add_to(base, self.merged_adapters + names).to(dtype)
        if safe_merge:
            _check_finite("This layer", names, weight)
        self.base_layer, self._packed = packed.to_dense(weight), (packed,)
        self.merged_adapters = self.merged_adapters + names

    def check_mergeable(self, layer_name: str, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what `merge` would raise, without merging; `layer_name` is for the message."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.lora_A and name not in self.merged_adapters]
        if any(self.lora_bias[name] for name in names):
            raise MergeError(
                f"{layer_name} has an adapter with lora_bias=True, which cannot be merged on a 4-bit base: the merged "
                "model would need biases that its architecture may lack. Keep it unmerged, or load it on a dense base "
                "(quantization=None) and merge there."
            )
        if safe_merge:
            packed = self._packed[0] if self.merged else self.base_layer
            weight = self.add_to(packed.wide_weight().float(), self.merged_adapters + names)
            _check_finite(layer_name, names, weight.to(packed.state.dtype))

    def unmerge(self) -> None:
        """Put the packed base layer back; nothing is computed."""
        if self.merged:
            dense, packed = self.base_layer.weight, self._packed[0]
            self._restore(packed)
            if (packed.weight.device, packed.state.dtype) != (dense.device, dense.dtype):
                packed.to(dense.device, dense.dtype)  # where the model went while merged

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter, (out_features, in_features), in float32 whatever the adapter's dtype."""
        product: Tensor = self.lora_B[adapter].weight.float() @ self.lora_A[adapter].weight.float()
        scaling: float = self.scaling[adapter]
        return product * scaling

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight held while merged, else 0."""
        return int(self.base_layer.weight.nbytes) if self._packed else 0

    def add_to(self, base: Tensor, names: list[str]) -> Tensor:
        """A weight with the adapters of `names` added.

        Args:
            base (`torch.Tensor`, (out_features, in_features), float32).
        """
        weight = base
        for name in names:
            variant, delta = self.lora_variant.get(name), self.get_delta_weight(name)
            if variant is None:
                weight = weight + delta
            elif isinstance(variant, DoraLinearVariant):
                # arXiv 2402.09353; the norm is that of the base and this adapter alone
                magnitude = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(base, delta, scaling=1).detach()
                weight = (magnitude.weight / norm)[:, None] * (weight + delta)
            else:
                weight = variant.merge_safe(self, name, weight)
        return weight.detach()

    def follow_base(self) -> None:
        """Become, in place, the layer over a dense base layer: `model.dequantize()` has made it so."""
        transposed = isinstance(self.base_layer, Conv1D)
        self.fan_in_fan_out = self.is_target_conv_1d_layer = transposed
        for magnitude in self.lora_magnitude_vector.values():
            if hasattr(magnitude, "fan_in_fan_out"):  # DoRA's
                magnitude.fan_in_fan_out = transposed
        layer: Any = self
        layer.__class__ = Linear

    def _restore(self, packed: BaseLinear4bit) -> None:
        self.base_layer = packed
        self._packed, self.merged_adapters = (), []


def _product(base: BaseLinear4bit, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The frozen layer in a dtype, which under autocast is not its own."""
    if dtype == base.compute_dtype:
        return base
    bias = None if base.bias is None else base.bias.to(dtype)
    return lambda x: frozen_linear(x, lambda: base.product_weight(dtype), bias)


def _check_finite(layer_name: str, names: list[str], weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise MergeError(f"{layer_name}: merging {names} gives NaN or infinite weights; an adapter is broken.")


class Linear(PeftLinear):
    """A LoRA layer over a dense, frozen `nn.Linear` or `Conv1D`; made from PEFT's by `adopt`, never constructed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to x, (..., in_features); under autocast the result has its dtype."""
        weight = self.base_layer.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind := x.device.type) else weight.dtype
        serves = not (args or kwargs) and not weight.requires_grad and (dtype != weight.dtype or dtype == x.dtype)
        plain = inference_adapters(self, x) if serves else None
        if plain is not None:
            return add_adapters(self.base_layer(x), x, plain)
        adapters = step_adapters(self) if serves else None
        if adapters is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if torch.compiler.is_compiling():
            return traced_forward(x, dtype, partial(_dense, self.base_layer, dtype), adapters)
        transposed = isinstance(self.base_layer, Conv1D)

        def unpack() -> Tensor:
            dense: Tensor = weight.detach().to(dtype)
            return dense.t() if transposed else dense

        return step_forward(x, dtype, unpack, self.base_layer.bias, adapters)


def _dense(base: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    """A frozen `nn.Linear` or `Conv1D`, in `dtype`."""
    weight = base.weight.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    return nn.functional.linear(x, weight.t() if isinstance(base, Conv1D) else weight, bias)


def adopt(model: nn.Module) -> None:
    """Give PEFT's LoRA layers over linear layers our classes, in place, stock adapters with them."""
    for module in model.modules():
        if type(module) is PeftLinear4bit and isinstance(module.base_layer, BaseLinear4bit) and not module.merged:
            module.__class__ = Linear4bit
        elif type(module) is PeftLinear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = Linear
