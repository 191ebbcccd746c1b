"""The 4-bit layer computes what its codes say, keeps nothing for backward, merges exactly and unmerges to the byte.

Oracles: bitsandbytes' own layer on the same codes, with its CPU repacking off; fp64 arithmetic on the dequantized
weight; and the unmerged model for the merged one.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, Architecture, gpt2, llama, tokens
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_qlora import NF4Config, QLoRAConfig, quantize_model
from hf_qlora.kernels.emulated import is_emulated
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.linear import Linear4bit as LoraLinear4bit
from hf_qlora.merge.measure import trained_weights
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.linear4bit import Linear4bit


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A merged model rounds W + ΔW once where the unmerged one adds two products: differences of a few fp32 roundings
# (6e-8) of sums over 128 to 256 products, through two layers. 1e-4 is promised; 1e-5 holds.
MERGED = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads."""
    torch.set_num_threads(1)


def nf4_layer(bias: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> Linear4bit:
    layer = nn.Linear(128, 96, bias=bias, dtype=dtype)
    quantize_model(nn.Sequential(layer), NF4Config(**settings))
    assert isinstance(layer, Linear4bit)
    return layer


def stock_layer(layer: Linear4bit) -> bnb.nn.Linear4bit:
    """bitsandbytes' own layer with the same codes."""
    stock = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.compute_dtype
    )
    stock.weight = copy.deepcopy(layer.weight)
    if layer.bias is not None:
        stock.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    stock.support_avx512bf16_for_cpu = False
    return stock


def adapted(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """A model with an adapter that is not zero."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(llama() if model is None else model, QLoRAConfig(**values)).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def lora_layers(model: nn.Module) -> dict[str, LoraLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- forward and backward of the base layer --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 128), (2, 3, 128), (1, 128), (1, 1, 128)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradient_equal_bitsandbytes(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer = nf4_layer(bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    results = []
    for module in (layer, stock_layer(layer)):
        given = x.clone().requires_grad_()  # without a gradient bitsandbytes takes one token to a bfloat16 kernel
        y = module(given)
        y.square().sum().backward()
        results.append((y.detach(), given.grad))
    (y, dx), (y_stock, dx_stock) = results
    assert y.dtype == dx.dtype == dtype
    # The same weight in the same product: at most the order of addition differs.
    step = torch.finfo(dtype).eps
    assert_close(y, y_stock, rtol=2 * step, atol=2 * step)
    assert_close(dx, dx_stock, rtol=4 * step, atol=4 * step * float(dx_stock.abs().max()))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(6, 128), (2, 3, 128), (1, 128), (128,), (0, 128), (2, 0, 128)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients_equal_fp64(dtype: torch.dtype, shape: tuple[int, ...], train: bool) -> None:
    """On the dequantized weight, with a bias that is trained; for vectors and empty batches too."""
    layer = nf4_layer(dtype=dtype).train(train)
    layer.bias.requires_grad_()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, layer.dequantize(), layer.bias))
    y64 = nn.functional.linear(x64, w64, b64)
    y64.backward(g.double())
    assert y.shape == y64.shape
    # One rounding of the result, and of 128 products summed in fp32 (bfloat16 and float16) or in dtype (fp32).
    step = torch.finfo(dtype).eps
    for found, expected in ((y, y64), (x.grad, x64.grad), (layer.bias.grad, b64.grad)):
        assert found.dtype == dtype
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        assert_close(found.double(), expected, rtol=0, atol=4 * step * scale)


def product(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """In float32, and rounded once, where the processor does not multiply in x's dtype."""
    if is_emulated(x):
        return nn.functional.linear(x.float(), W.float(), bias.float()).to(x.dtype)
    return nn.functional.linear(x, W, bias)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_compute_dtype_is_that_of_the_product_alone(dtype: torch.dtype, compute_dtype: str) -> None:
    layer = nf4_layer(dtype=dtype, compute_dtype=compute_dtype)
    x = torch.randn(5, 128, dtype=dtype)
    compute = getattr(torch, compute_dtype)
    exact = copy.deepcopy(layer).float().dequantize()
    expected = product(x.to(compute), exact.to(compute), layer.bias.to(compute))
    assert torch.equal(layer(x), expected.to(dtype))
    assert layer.bias.dtype == dtype  # bitsandbytes would cast it for good


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_equals_bitsandbytes_under_autocast(dtype: torch.dtype) -> None:
    layer = nf4_layer(dtype=dtype)
    stock, x = stock_layer(layer), torch.randn(6, 128, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), stock(x.requires_grad_())
    assert found.dtype == expected.dtype == dtype
    expected_bits = product(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(found, expected_bits.to(dtype))
    assert_close(found, expected, rtol=2**-7, atol=2**-7)  # two units of bfloat16: it may round bias and sum apart


def test_the_eval_forward_leaves_the_weight_alone() -> None:
    """Also where the flag says that bitsandbytes may repack, as it does on AVX512-BF16 processors."""
    layer = nf4_layer().eval()
    layer.support_avx512bf16_for_cpu = True
    data, state, x = layer.weight.data.clone(), layer.weight.quant_state, torch.randn(4, 128)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    assert layer.weight.quant_state is state
    assert not getattr(state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data, data)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


class _Saved:
    """The distinct storages that autograd keeps between forward and backward, by size in bytes."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def __enter__(self) -> _Saved:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_base_layer_keeps_nothing_for_backward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nf4_layer(dtype=dtype)
    made: list[weakref.ref[Tensor]] = []
    product_weight = Linear4bit.product_weight

    def watched(self: Linear4bit, *args: Any) -> Tensor:
        weight = product_weight(self, *args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Linear4bit, "product_weight", watched)
    x = torch.randn(32, 128, dtype=dtype, requires_grad=True)
    with _Saved() as saved:
        y = layer(x)
    assert not saved.bytes
    assert [weight() for weight in made] == [None], "the dense weight is made once and let go"
    y.sum().backward()
    assert [weight() for weight in made] == [None, None]


def test_an_adapted_layer_keeps_its_input_and_no_copy() -> None:
    """In fp32, where no cast is due: x itself, s = x Aᵀ, (tokens, r), and the adapter."""
    model = adapted(nn.ModuleDict({"q": nn.Linear(128, 96)}), target_modules=["q"])
    layer, x = model.base_model.model["q"], torch.randn(64, 128, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    with _Saved() as saved:
        layer.train()(x)
    kept = {pointer: size for pointer, size in saved.bytes.items() if pointer not in own}
    assert x.untyped_storage().data_ptr() in saved.bytes
    assert sum(kept.values()) <= 64 * 4 * 4


def test_the_forward_of_an_adapted_layer_is_base_plus_scaled_product() -> None:
    model = adapted(nn.ModuleDict({"q": nn.Linear(128, 96)}), target_modules=["q"], use_rslora=True)
    layer, x = model.base_model.model["q"], torch.randn(7, 128)
    A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.dequantize().double() + 8 / 4**0.5 * (B @ A)
    expected = nn.functional.linear(x.double(), weight, layer.base_layer.bias.double())
    assert_close(layer(x).double(), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "after an eval forward with packing allowed"])
@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_merge_equals_forward(family: Architecture, evaluated: bool) -> None:
    model = adapted(family.make(), task_type=family.task_type, **family.options)
    layers = lora_layers(model)
    assert layers
    inputs = family.inputs()
    with torch.no_grad():
        if evaluated:
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    module.support_avx512bf16_for_cpu = True
            model(**inputs)
        model.merge_adapter()
        assert all(type(layer.base_layer) is layer._packed[0].source_cls for layer in layers.values())
        merged = model(**inputs).logits
        model.unmerge_adapter()
        expected = model(**inputs).logits
        assert relative(merged, expected) <= MERGED
        assert relative(model.merge_and_unload()(**inputs).logits, expected) <= MERGED


def test_merge_changes_the_function_of_the_base() -> None:
    """What the laws above are worth: the adapters they use matter."""
    model, ids = adapted(), tokens()
    with model.disable_adapter():
        plain = logits(model, ids)
    assert relative(logits(model, ids), plain) > 0.05


def test_unmerge_puts_the_same_packed_objects_back() -> None:
    model, ids = adapted(), tokens()
    layers = lora_layers(model)
    packed = {name: (layer.base_layer, layer.base_layer.weight) for name, layer in layers.items()}
    pointers = {name: layer.base_layer.weight.data_ptr() for name, layer in layers.items()}
    before, expected = state_bytes(model), logits(model, ids)
    for _ in range(10):
        model.merge_adapter()
        assert not any(isinstance(layer.base_layer, bnb.nn.Linear4bit) for layer in layers.values())
        logits(model, ids)
        model.unmerge_adapter()
    for name, layer in layers.items():
        assert layer.base_layer is packed[name][0]
        assert layer.base_layer.weight is packed[name][1]
        assert layer.base_layer.weight.data_ptr() == pointers[name]
        assert layer.base_layer.weight.quant_state is layer.base_layer.quant_state
    assert state_bytes(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_training_goes_on_after_unmerging() -> None:
    model, ids = adapted(), tokens()

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.merge_adapter()
    logits(model, ids)
    model.unmerge_adapter()
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def two_adapters(second: dict[str, Any] | None = None, **first: Any) -> PeftModel:
    model = adapted(**first)
    values = {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model.add_adapter("second", QLoRAConfig(**{**values, **(second or {})}))
    return model.eval()


def merged_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.clone() for name, layer in lora_layers(model).items() if layer.merged}


def test_merging_two_at_once_equals_one_after_the_other() -> None:
    model = two_adapters()
    model.merge_adapter(["default", "second"])
    together = merged_weights(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    apart = merged_weights(model)
    assert together.keys() == apart.keys()
    assert all(torch.equal(apart[name], weight) for name, weight in together.items())
    model.merge_adapter(["second"])  # merging what is merged changes nothing
    assert all(torch.equal(weight, together[name]) for name, weight in merged_weights(model).items())


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({"use_dora": True}, {"use_dora": True}), ({"use_dora": True}, {}), ({}, {"use_dora": True})],
    ids=["plain + plain", "dora + dora", "dora + plain", "plain + dora"],
)
def test_two_merged_adapters_equal_two_active_ones(first: dict[str, Any], second: dict[str, Any]) -> None:
    model, ids = two_adapters(second, **first), tokens()
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.25
    expected = logits(model, ids)
    model.merge_adapter()
    assert relative(logits(model, ids), expected) <= MERGED


def test_an_inactive_adapter_is_merged_by_name() -> None:
    model, ids = two_adapters(), tokens()
    model.set_adapter("second")
    expected = logits(model, ids)
    model.set_adapter("default")
    model.merge_adapter(["second"])
    touched = {name for name, layer in lora_layers(model).items() if layer.merged}
    assert touched == {n for n, layer in lora_layers(model).items() if "second" in layer.lora_A}
    assert all(layer.merged_adapters == ["second"] for n, layer in lora_layers(model).items() if n in touched)
    model.unmerge_adapter()
    assert relative(logits(model.merge_and_unload(adapter_names=["second"]), ids), expected) <= MERGED


def test_dora_merge_equals_forward() -> None:
    model, ids = adapted(use_dora=True), tokens()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # at its start DoRA's magnitude undoes the change of norm
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    expected, before = logits(model, ids), state_bytes(model)
    model.merge_adapter()
    assert relative(logits(model, ids), expected) <= MERGED
    model.unmerge_adapter()
    assert state_bytes(model) == before
    assert relative(logits(model.merge_and_unload(), ids), expected) <= MERGED


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merging_rounds_once(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    """The merged weight is fp32 arithmetic on the dequantized one, rounded to the base's dtype: to the bit."""
    model = adapted(make().to(dtype))
    expected = {}
    for name, layer in lora_layers(model).items():
        A, B = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
        expected[name] = (layer.base_layer.dequantize().float() + B @ A * layer.scaling["default"]).to(dtype)
    model.merge_adapter()
    for name, layer in lora_layers(model).items():
        weight = layer.base_layer.weight
        assert torch.equal(weight.t() if isinstance(layer.base_layer, Conv1D) else weight, expected[name]), name


def test_bfloat16_adapters_merge_in_fp32() -> None:
    """Their product rounded to bfloat16 would lose half the digits of ΔW."""
    model = adapted()
    layer = next(iter(lora_layers(model).values()))
    for part in (layer.lora_A, layer.lora_B):
        part["default"].to(torch.bfloat16)
    A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer.dequantize().double() + 2 * (B @ A)
    layer.merge()
    assert_close(layer.base_layer.weight.double(), expected, rtol=0, atol=1e-6)


def test_merging_says_how_much_memory_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    weights = sum(layer.base_layer.weight.quant_state.shape.numel() for layer in lora_layers(model).values())
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        model.merge_adapter()
    assert f"{4 * weights / 2**20:.0f} MiB" in caplog.text
    assert f"{len(lora_layers(model))} layers" in caplog.text


# --- refused, with nothing changed -----------------------------------------------------------------------------------


def break_last(model: PeftModel, adapter: str) -> None:
    """NaN in the last layer only: all the others could be merged."""
    layer = [layer for layer in lora_layers(model).values() if adapter in layer.lora_B][-1]
    layer.lora_B[adapter].weight.data[0, 0] = float("nan")


def test_safe_merge_of_a_broken_adapter_is_refused_and_merges_nothing() -> None:
    model = adapted()
    break_last(model, "default")
    before = state_bytes(model)
    with pytest.raises(MergeError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert state_bytes(model) == before


def test_safe_merge_of_a_second_broken_adapter_keeps_the_first_merged() -> None:
    model = two_adapters()
    break_last(model, "second")
    model.merge_adapter(["default"])
    before = merged_weights(model)
    with pytest.raises(MergeError, match="second"):
        model.merge_adapter(["second"], safe_merge=True)
    assert all(layer.merged_adapters == ["default"] for layer in lora_layers(model).values())
    after = merged_weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    model.unmerge_adapter()
    assert all(isinstance(layer.base_layer, Linear4bit) for layer in lora_layers(model).values())


def test_safe_merge_of_a_sound_adapter_is_merge() -> None:
    model = adapted()
    model.merge_adapter()
    expected = merged_weights(model)
    model.unmerge_adapter()
    model.merge_adapter(safe_merge=True)
    assert all(torch.equal(weight, expected[name]) for name, weight in merged_weights(model).items())


@pytest.mark.parametrize("unload", [False, True], ids=["merge_adapter", "merge_and_unload"])
def test_lora_bias_is_refused_and_nothing_is_merged(unload: bool) -> None:
    """Where the first layers have another adapter too: these must not stay merged."""
    model, ids = adapted(target_modules=["q_proj", "v_proj"]), tokens()
    model.add_adapter(
        "biased", QLoRAConfig(r=4, target_modules=["down_proj"], lora_bias=True, init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "biased"])
    before, expected = state_bytes(model), logits(model, ids)
    with pytest.raises(MergeError, match=r"lora_bias=True.*quantization=None"):
        model.merge_and_unload() if unload else model.merge_adapter()
    assert state_bytes(model) == before
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_stay_on_a_base_that_was_dequantized(
    make: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    model, ids = adapted(make(), **settings), tokens()
    steps, outputs = [], []
    for dequantize in (False, True):
        if dequantize:
            model.dequantize()
        outputs.append(logits(model, ids))
        model.zero_grad()
        model.train()
        torch.manual_seed(0)  # GPT-2 has dropout
        model(input_ids=ids, labels=ids).loss.backward()
        steps.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    assert relative(outputs[1], outputs[0]) <= MERGED
    assert steps[1].keys() == steps[0].keys()
    # The same products, whose last bits differ and reach small gradients.
    assert all(relative(steps[1][name], gradient) <= 1e-4 for name, gradient in steps[0].items())
    model.merge_adapter()
    assert relative(logits(model, ids), outputs[0]) <= MERGED
    model.unmerge_adapter()
    assert relative(logits(model, ids), outputs[0]) <= MERGED
    assert relative(logits(model.merge_and_unload(), ids), outputs[0]) <= MERGED


def test_dequantizing_while_merged_is_refused() -> None:
    model = adapted(target_modules=["q_proj"])
    model.merge_adapter()
    with pytest.raises(BaseModelError, match=r"2 layers have adapters merged.*unmerge_adapter"):
        model.dequantize()
    model.unmerge_adapter()
    model.dequantize()
    assert not lora_layers(model)


def test_saving_the_base_while_merged_is_refused(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.merge_adapter()
    with pytest.raises(BaseModelError, match=r"merged into 2 layers.*unmerge_adapter"):
        model.base_model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model.unmerge_adapter()
    model.unload().save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


def test_the_adapter_is_saved_alike_merged_or_not(tmp_path: Path) -> None:
    model = adapted(use_rslora=True)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (tmp_path / name / "adapter_model.safetensors" for name in ("before", "merged"))
    assert before.read_bytes() == merged.read_bytes()


# --- while merged ----------------------------------------------------------------------------------------------------


def test_disabling_a_merged_adapter_gives_the_base() -> None:
    model, ids = adapted(), tokens()
    expected = logits(model, ids)
    with model.disable_adapter():
        plain = logits(model, ids)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    assert relative(logits(model, ids), expected) <= MERGED


def test_moving_while_merged_loses_nothing() -> None:
    model, ids = adapted(), tokens()
    before, expected = state_bytes(model), logits(model, ids)
    model.merge_adapter()
    model.to("cpu")
    model.unmerge_adapter()
    assert state_bytes(model) == before
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_model_cast_by_its_user_merges_and_unmerges_in_that_dtype(dtype: torch.dtype, merged_before: bool) -> None:
    """PeftModel.to is not transformers'; it casts all that is not packed."""
    model, ids = adapted(llama().to(torch.bfloat16)), tokens()
    if merged_before:
        model.merge_adapter()
    model.to(dtype)
    if merged_before:
        model.unmerge_adapter()
    expected = logits(model, ids)
    model.merge_adapter()
    logits(model, ids)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    # The sum is rounded once, to 8 or 11 bits, and then through two layers of products.
    assert relative(logits(merged, ids).float(), expected.float()) <= {torch.float32: MERGED}.get(dtype, 2**-5)


def test_a_merged_layer_keeps_the_hooks_of_its_base() -> None:
    model, seen = llama(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("hook"))
    peft_model, ids = get_peft_model(model, QLoRAConfig(r=2, target_modules=["up_proj"])), tokens()
    for step in (peft_model.merge_adapter, peft_model.unmerge_adapter, peft_model.merge_and_unload):
        step()
        seen.clear()
        logits(model, ids)
        assert seen == ["hook"]


def test_a_copy_made_while_merged_unmerges_too() -> None:
    model, ids = adapted(), tokens()
    expected = logits(model, ids)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin, ids), expected)
    assert all(layer.merged for layer in lora_layers(model).values())
    assert not any(layer.merged for layer in lora_layers(twin).values())


def test_unloading_while_merged_gives_the_packed_base() -> None:
    base = quantize_model(llama())
    before = state_bytes(base)
    model = adapted(base)
    model.merge_adapter()
    assert state_bytes(model.unload()) == before


def test_merge_and_unload_of_a_merged_model_is_that_model() -> None:
    model, ids = adapted(), tokens()
    model.merge_adapter()
    expected = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), expected)


def test_deleting_an_adapter_that_is_merged_is_refused() -> None:
    """PEFT refuses it; the packed base must still be there afterwards."""
    model, ids = two_adapters(), tokens()
    expected = logits(model, ids)
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert torch.equal(logits(model, ids), expected)


# --- merge_and_unload ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["dense", "4-bit", "4-bit checkpoint"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nn.Module]:
    """A base as users have it: dense, loaded with a BitsAndBytesConfig, or from a folder saved in 4 bits."""
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    if request.param == "dense":
        yield tf.AutoModelForCausalLM.from_pretrained(folder)
        return
    streamed = tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=NF4Config().to_bitsandbytes(), dtype=torch.float32
    )
    if request.param == "4-bit checkpoint":
        streamed.save_pretrained(tmp_path / "4bit")
        streamed = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    yield streamed


def test_merge_and_unload_leaves_a_dense_model_that_reloads(base: nn.Module, tmp_path: Path) -> None:
    """q and v are adapted, all other layers only quantized: both kinds must become dense."""
    model, ids = adapted(base, target_modules=["q_proj", "v_proj"]), tokens()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_modules()} == {
        name: type(module) for name, module in llama().named_modules()
    }
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert relative(logits(merged, ids), expected) <= MERGED
    for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        assert not getattr(merged, mark, None), mark
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded, ids), logits(merged, ids))
    assert torch.equal(logits(merged.to(torch.float64).to(torch.float32), ids), logits(reloaded, ids))  # casts again


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_nothing_of_training_is_left_behind(end: str) -> None:
    """No hook that makes outputs require a gradient: a forward of a frozen model would keep every activation."""
    model = getattr(adapted(), end)()
    assert not model(input_ids=tokens()).logits.requires_grad


@pytest.mark.parametrize("target", ["all-linear", r".*attn\.c_proj"])
def test_merged_gpt2_has_conv1d_again(target: str, tmp_path: Path) -> None:
    """`attn.c_proj` is square: transposed, it would reload without an error."""
    model, ids = adapted(gpt2(), target_modules=target), tokens()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_modules()} == {
        name: type(module) for name, module in gpt2().named_modules()
    }
    assert relative(logits(merged, ids), expected) <= MERGED
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(merged, ids))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_merged_model_has_the_dtype_of_its_base(dtype: torch.dtype) -> None:
    merged = adapted(llama().to(dtype), target_modules=["q_proj"]).merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}


def test_a_merged_model_can_be_quantized_again() -> None:
    model, ids = adapted(), tokens()
    merged = model.merge_and_unload()
    dense = copy.deepcopy(merged)
    quantize_model(merged)
    weights = {name: m.dequantize() for name, m in merged.named_modules() if isinstance(m, Linear4bit)}
    assert len(weights) == 14
    for name, weight in weights.items():  # NF4's relative error on Gaussian weights is 0.092
        original = dense.get_submodule(name).weight
        assert float((weight - original).norm() / original.norm()) < 0.12
    assert logits(merged, ids).isfinite().all()


def test_a_shared_layer_is_merged_once() -> None:
    """ALBERT uses one layer three times: added once, ΔW is in all of them."""
    (family,) = [family for family in ARCHITECTURES if family.name == "albert"]
    model = adapted(family.make(), task_type=family.task_type)
    model.merge_adapter()
    expected = merged_weights(model)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(re.sub(r"^base_model\.model\.", "", name)).weight, weight), name


def test_merging_under_inference_mode_and_no_grad_is_the_same() -> None:
    weights = []
    for mode in (torch.no_grad, torch.inference_mode, nullcontext):
        torch.manual_seed(0)
        model = adapted()
        with mode():
            model.merge_adapter()
        weights.append(merged_weights(model))
    for one, other in pairwise(weights):
        assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert not any(layer.base_layer.weight.requires_grad for layer in lora_layers(model).values())


@pytest.mark.parametrize(("width", "block_size"), [(96, 64), (128, 256)])
def test_dora_reads_the_weights_that_the_layer_computes_with(width: int, block_size: int) -> None:
    """Rows that are no whole blocks: bitsandbytes alone reads them with wrong scales on some processors."""
    torch.manual_seed(0)
    base = llama(hidden_size=width, intermediate_size=2 * width)
    nf4 = NF4Config(block_size=block_size)
    model = get_peft_model(base, QLoRAConfig(r=2, target_modules="all-linear", use_dora=True, quantization=nf4))
    for layer in lora_layers(model).values():
        norms = layer.base_layer.dequantize().norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)
    ids = tokens()
    expected = logits(model, ids)
    with model.disable_adapter():
        assert relative(expected, logits(model, ids)) <= MERGED
    assert relative(logits(model.merge_and_unload(), ids), expected) <= MERGED


def test_what_is_merged_and_what_dora_scales_is_what_the_layer_multiplies_by() -> None:
    """Of a bfloat16 weight that is multiplied in float32: its values, not rounded to bfloat16."""
    torch.manual_seed(0)
    nf4 = NF4Config(compute_dtype="float32")
    config = QLoRAConfig(r=2, target_modules="all-linear", use_dora=True, quantization=nf4)
    model = get_peft_model(llama().to(torch.bfloat16), config)
    for layer in lora_layers(model).values():
        base, magnitude = layer.base_layer, layer.lora_magnitude_vector["default"].weight
        weight = base(torch.eye(base.in_features)).t()
        torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-6, atol=0)
        assert not torch.allclose(magnitude, base.dequantize().float().norm(dim=1), rtol=1e-6, atol=0)
        W, T = trained_weights(layer, ["default"])  # B is zero
        assert torch.equal(W, weight)
        torch.testing.assert_close(T, weight, rtol=1e-6, atol=1e-7)  # magnitude / norm is 1 but for roundings
        layer.merge()
        assert torch.equal(layer.base_layer.weight, T.to(torch.bfloat16))


def test_a_trained_bias_is_what_it_was_after_merging() -> None:
    model = get_peft_model(
        llama(attention_bias=True).to(torch.bfloat16), QLoRAConfig(r=2, target_modules=["q_proj"], bias="all")
    )
    for name, p in model.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            p.data = p.data.float() + 1e-5
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype
        assert torch.equal(p, before[name])


def test_merging_nothing_merges_nothing() -> None:
    model = two_adapters()
    model.merge_adapter(adapter_names=[])
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_an_adapter_is_added_while_all_layers_are_merged() -> None:
    model, ids = adapted(target_modules="all-linear"), tokens()
    expected = logits(model, ids)
    model.merge_adapter()
    model.add_adapter("second", QLoRAConfig(r=2, target_modules="all-linear"))
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)


def test_doras_norm_follows_a_dense_weight_that_is_changed_unseen() -> None:
    """Through `.data`, as PEFT's merge does: DoRA's direction does not depend on the size of the weight."""
    model = get_peft_model(llama(), QLoRAConfig(r=2, target_modules=["q_proj"], use_dora=True, quantization=None))
    ids = tokens()
    expected = model.train()(input_ids=ids).logits
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().weight.data.mul_(3.0)
    # lora_B is zero, so that the weight is only scaled, and its norm divides that out
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
