"""What is said of one layer: its step, its error and what is left of ΔW.

Oracles: steps and errors counted weight by weight in Python, on levels written in the specification.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import gpt2, llama
from merging import adapted
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_qlora import NF4Config, quantize_model
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import measure
from hf_qlora.quant.codebook import NF4_LEVELS
from hf_qlora.quant.dequantize import block_scales, dequantize_weight
from hf_qlora.quant.packing import quantize_weight


def brute_force_step(packed: Tensor, absmax: list[float], block_size: int, numel: int) -> float:
    total = 0.0
    for i in range(numel):
        byte = int(packed.flatten()[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        below = NF4_LEVELS[code] - NF4_LEVELS[code - 1] if code else None
        above = NF4_LEVELS[code + 1] - NF4_LEVELS[code] if code < 15 else None
        gaps = [gap for gap in (below, above) if gap is not None]
        total += (sum(gaps) / len(gaps) * absmax[i // block_size]) ** 2
    return math.sqrt(total / numel)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (3, 50), (3, 25)], ids=["whole blocks", "a short last block", "odd"])
def test_the_step_is_the_width_of_each_weights_cell(shape: tuple[int, int], double_quant: bool) -> None:
    packed, state = quantize_weight(torch.randn(shape), NF4Config(double_quant=double_quant))
    scales = block_scales(state).tolist()
    expected = brute_force_step(packed, scales, 64, state.shape.numel())
    assert measure.step_rms(packed, state) == pytest.approx(expected, rel=1e-5)  # fp32 squares of widths


def test_the_scales_are_those_that_weights_are_read_with() -> None:
    weight = torch.randn(4, 64)
    packed, state = quantize_weight(weight, NF4Config())
    largest = dequantize_weight(packed, state).abs().amax(1)  # the level ±1 in each block
    torch.testing.assert_close(block_scales(state), largest, rtol=1e-6, atol=0)


def layer_of(model: nn.Module, name: str, **settings: Any) -> LoraLayer:
    peft_model = adapted(model, **settings)
    found = peft_model.get_base_model().get_submodule(name)
    assert isinstance(found, LoraLayer)
    return found


@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["NF4", "dense"])
@pytest.mark.parametrize(
    ("make", "name"), [(llama, "model.layers.0.mlp.up_proj"), (gpt2, "transformer.h.0.attn.c_attn")]
)
def test_the_trained_weight_is_base_plus_scaled_product(make: Any, name: str, quantization: Any) -> None:
    layer: Any = layer_of(make(), name, quantization=quantization, use_rslora=True)
    W, T = measure.trained_weights(layer, ["default"])
    A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    expected = W.double() + 8 / 2 * (B @ A)  # alpha 8, rank 4
    assert T.dtype == torch.float32
    torch.testing.assert_close(T.double(), expected, rtol=0, atol=1e-6)  # one fp32 rounding of numbers below 1
    assert torch.equal(W, measure.plain_weight(layer.get_base_layer()))
    assert not layer.merged


def dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def test_error_noise_and_signal_on_weights_that_are_counted_by_hand() -> None:
    W, T, M = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 6.0]]), torch.tensor([[3.0, 5.0]])
    found = measure.compare("layer", dense(W), (W, T), dense(M))
    assert found.delta_norm == 2
    assert found.relative_delta == pytest.approx(2 / 5)
    assert found.error == pytest.approx(1 / math.sqrt(45))
    assert found.noise == pytest.approx(1 / 2)
    assert found.signal == pytest.approx(1 / 2)  # half of ΔW is in M
    assert found.steps is None


def test_an_adapter_of_zero_has_no_signal_and_no_noise() -> None:
    W = torch.tensor([[3.0, 4.0]])
    found = measure.compare("layer", dense(W), (W, W.clone()), dense(W))
    assert (found.error, found.noise, found.signal) == (0, None, None)


def test_a_merged_weight_that_is_not_finite_is_named() -> None:
    W = torch.ones(1, 2)
    with pytest.raises(MergeError, match=r"model\.layer: .*NaN"):
        measure.compare("model.layer", dense(W), (W, W + 1), dense(torch.tensor([[1.0, math.nan]])))


def test_signal_flatters_where_rounding_is_large_and_noise_does_not() -> None:
    """A dense base that is rounded for the first time: the errors do not depend on a ΔW far below a step."""
    torch.manual_seed(0)
    W = torch.randn(256, 256)
    T = W + 0.01 * torch.randn(256, 256)
    merged = quantize_model(nn.Sequential(dense(T.clone())))[0]
    found = measure.compare("q", dense(W), (W, T), merged)
    assert found.steps is not None
    assert found.steps < 0.1
    # 65,536 errors of rms 0.09 against a ΔW of 0.01: ⟨error, ΔW⟩/‖ΔW‖² has a deviation of 0.09·√2/0.01/256 = 0.05.
    assert found.signal == pytest.approx(1, abs=0.2)
    assert found.noise is not None
    assert found.noise > 5
