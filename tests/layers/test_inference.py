"""Without gradients an adapted layer computes what PEFT's forward computes, with fewer operations.

Oracles: PEFT's own forward on the same layer; the formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import gpt2, llama, tokens
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers.depth import scale_of
from hf_qlora.layers.forward import inference_adapters
from hf_qlora.layers.linear import Linear, Linear4bit


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "nf4": (llama, {}),
    "dense": (llama, {"quantization": None}),
    "conv1d": (gpt2, {"quantization": None}),
    "nf4 of conv1d, with biases": (gpt2, {}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapted(
    base: str = "nf4", dtype: torch.dtype = torch.bfloat16, config: type[QLoRAConfig] = QLoRAConfig, **settings: Any
) -> PeftModel:
    make, options = BASES[base]
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(make().to(dtype), config(**values | settings)).eval()


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, Linear4bit | Linear)]


def peft_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    stock = PeftLinear4bit if isinstance(layer, Linear4bit) else PeftLinear
    result: Tensor = stock.forward(layer, x, *args, **kwargs)
    return result


def exact(layer: Any, x: Tensor) -> Tensor:
    """Of the base's own result, in float64."""
    result = layer.base_layer(x).double()
    for name in layer.active_adapters:
        scale = scale_of(layer, name)
        c = layer.scaling[name] * (1.0 if scale is None else scale.value)
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        result = result + c * (x.double() @ A.t() @ B.t())
    return result


def second(model: PeftModel, config: type[QLoRAConfig] = QLoRAConfig, **settings: Any) -> None:
    model.add_adapter(
        "second", config(r=3, lora_alpha=9, target_modules="all-linear", init_lora_weights=False, **settings)
    )
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize("adapters", ["one", "two", "gain", "two with gain"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("base", BASES)
def test_it_is_peft_forward_and_the_formula(base: str, dtype: torch.dtype, adapters: str) -> None:
    config = AdaptiveDepthLoRAConfig if "gain" in adapters else QLoRAConfig
    model = adapted(base, dtype, config)
    if "two" in adapters:
        second(model, config, **BASES[base][1])
    for layer in lora_layers(model)[:2]:
        for name in layer.active_adapters if "gain" in adapters else ():
            scale_of(layer, name).restore(0.4, 1.0, None, 0)
        for shape in ((1, 1), (1,), (), (2, 2), (1, 9), (3, 0)):
            check(layer, torch.randn(*shape, layer.in_features).to(dtype))


def check(layer: Any, x: Tensor) -> None:
    given, dtype = x.clone(), x.dtype
    with torch.no_grad():
        assert inference_adapters(layer, x) is not None
        found, stock, formula = layer(x), peft_forward(layer, x), exact(layer, x)
    assert torch.equal(x, given)
    assert found.dtype == stock.dtype == dtype
    assert found.shape == stock.shape
    if x.numel():
        largest = float(formula.abs().max())
        unit = torch.finfo(dtype).eps * largest
        # One rounding for each adapter; with more rows than the rank also of A, B and their product with x.
        error = float((found.double() - formula).abs().max())
        assert error <= (1 if x.numel() <= 3 * x.shape[-1] else 3) * unit + 1e-6 * largest
        assert float((found.double() - stock.double()).abs().max()) <= 4 * unit


def test_a_row_is_nearer_to_the_formula_than_pefts() -> None:
    """PEFT rounds the product and the sum, this the sum alone."""
    layer = lora_layers(adapted())[0]
    x = torch.randn(200, 1, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        errors = [
            sum(float((forward(row).double() - exact(layer, row)).square().sum()) for row in x)
            for forward in (layer, lambda row: peft_forward(layer, row))
        ]
    assert 0 < errors[0] < 0.75 * errors[1]  # half the squared error is expected


@pytest.mark.parametrize("adapter_dtype", FLOATS)
def test_adapters_of_any_dtype(adapter_dtype: torch.dtype) -> None:
    for dtype in FLOATS:
        layer = lora_layers(adapted(dtype=dtype))[0]
        layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
        for rows in (1, 3, 9):
            x = torch.randn(rows, 128).to(dtype)
            with torch.no_grad():
                found, expected = layer(x), exact(layer, x)
            unit = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps)
            assert found.dtype == dtype
            assert float((found.double() - expected).abs().max()) <= 4 * unit * float(expected.abs().max())


def test_strides_of_the_input_do_not_matter() -> None:
    layer = lora_layers(adapted())[0]
    for rows in (1, 3, 9):
        even = torch.randn(rows, 2, 128, dtype=torch.bfloat16)
        for x in (even.transpose(0, 1), even[:, :1], torch.randn(128, rows, dtype=torch.bfloat16).t()):
            with torch.no_grad():
                assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_changed_adapter_is_seen_at_once() -> None:
    """Fused AdamW and `.data` change tensors without a trace; nothing of an adapter is kept between calls."""
    model = adapted()
    layer, x = lora_layers(model)[0], torch.randn(1, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        layer.lora_A["default"].weight.data.copy_(torch.randn(4, 128))
        assert torch.equal(layer(x), peft_forward(layer, x)) or near(layer(x), exact(layer, x))
        layer.set_scale("default", 3.0)
        assert near(layer(x), exact(layer, x))


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).abs().max()) <= 2**-7 * float(expected.abs().max())


# --- what PEFT's forward is for -------------------------------------------------------------------------------------


def _hooked(model: PeftModel) -> None:
    for layer in lora_layers(model):
        layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: 2 * output)


def _hooked_base(model: PeftModel) -> None:
    for layer in lora_layers(model):
        layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def _disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: PeftModel) -> None:
    model.merge_adapter()


def _training(model: PeftModel) -> None:
    model.train()


OTHERS: dict[str, tuple[dict[str, Any], Callable[[PeftModel], None]]] = {
    "hooks on A": ({}, _hooked),
    "hooks on the base": ({}, _hooked_base),
    "disabled": ({}, _disabled),
    "merged": ({}, _merged),
    "training mode": ({}, _training),
    "lora_bias": ({"lora_bias": True}, lambda model: None),
    "dora": ({"use_dora": True}, lambda model: None),
}


@pytest.mark.parametrize("base", ["nf4", "nf4 of conv1d, with biases", "dense"])
@pytest.mark.parametrize("case", OTHERS)
def test_all_else_is_not_served(case: str, base: str) -> None:
    settings, change = OTHERS[case]
    model = adapted(base, torch.float32, **settings)
    change(model)
    for layer in lora_layers(model)[:2]:
        x = torch.randn(2, layer.in_features)
        with torch.no_grad():
            assert inference_adapters(layer, x) is None
            found, expected = layer(x), peft_forward(layer, x)
        # DoRA and training mode have a node of their own; the rest is PEFT's to the bit.
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_and_autocast_are_not_served() -> None:
    layer, x = lora_layers(adapted(dtype=torch.float32))[0], torch.randn(2, 128)
    assert inference_adapters(layer, x) is None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert inference_adapters(layer, x) is None
        assert torch.equal(layer(x), peft_forward(layer, x))


def test_rows_of_different_adapters_are_pefts() -> None:
    model, ids = adapted(dtype=torch.float32), tokens()
    second(model)
    model.set_adapter("default")
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        mixed = model(input_ids=ids, adapter_names=["default", "second"]).logits
        model.set_adapter("second")
        other = model(input_ids=ids).logits
    # The same products in batches of other sizes
    assert torch.allclose(mixed[0], whole[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(mixed[1], other[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[1], other[1], rtol=1e-2, atol=1e-2)


def test_a_hook_on_the_layer_sees_the_whole_result() -> None:
    layer, x = lora_layers(adapted())[0], torch.randn(1, 128, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        assert seen == [] or layer(x) is seen[0]
        found = layer(x)
    assert found is seen[-1]


def test_the_hot_way_is_taken_by_a_whole_model() -> None:
    """No adapted layer asks PEFT's forward: its A and B are not called."""
    model = adapted()
    for layer in lora_layers(model):
        layer.lora_A["default"].forward = layer.lora_B["default"].forward = None
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=tokens()).logits).all()
