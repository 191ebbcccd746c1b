"""LoftQ in one iteration: the adapter starts as what NF4 lost, and the base is the one without it.

Oracle: the singular value decomposition of W − NF4(W) in fp64, from the dense weight and the packed one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, gpt2, llama, tokens
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import hf_qlora.prepare
from hf_qlora import QLoRAConfig, quantize_model
from hf_qlora.layers.loftq import loftq_factors
from hf_qlora.validation import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads."""
    torch.set_num_threads(1)


def loftq(model: nn.Module, **settings: Any) -> PeftModel:
    values = {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": "loftq", **settings}
    return get_peft_model(model, QLoRAConfig(**values)).eval()


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """(out_features, in_features) in fp64, by name."""
    transposed = {"c_attn", "c_proj", "c_fc"}
    return {
        name: (m.weight.t() if name.rpartition(".")[2] in transposed else m.weight).detach().double()
        for name, m in model.named_modules()
        if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    }


def adapter_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def delta(layer: LoraLayer) -> Tensor:
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * (B @ A)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "alpha_pattern": {"q_proj": 3, "c_attn": 3, r"0\..*down_proj": 40},
        "rank_pattern": {"v_proj": 2, "c_fc": 2, "up_proj": 12},
    },
    "both": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 5, "c_proj": 3}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_adapter_is_the_best_rank_r_approximation_of_the_loss(
    make: Callable[..., nn.Module], variant: str
) -> None:
    base = make()
    weights = dense_weights(base)
    layers = adapter_layers(loftq(base, **VARIANTS[variant]))
    assert layers
    for name, layer in layers.items():
        lost = weights[name] - layer.base_layer.dequantize().double()
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        r = layer.r["default"]
        best = U[:, :r] * S[:r] @ Vh[:r]
        # fp32 SVD: each value is right to 1e-6 of the largest; where two values around the cut are 1 % apart, so are
        # the vectors to a hundred times that.
        assert float((delta(layer) - best).norm()) <= 1e-3 * float(best.norm()), name
        assert float((lost - delta(layer)).norm()) == pytest.approx(float(S[r:].norm()), rel=1e-6), name


def test_both_factors_have_half_of_the_singular_values() -> None:
    """A Aᵀ = S and Bᵀ B = S / scaling²: neither gets a gradient larger than the other's for no reason."""
    weight, quantized = torch.randn(48, 64), torch.randn(48, 64)
    A, B = loftq_factors(weight, quantized, QLoRAConfig(r=8, lora_alpha=4, target_modules=["q"]), "q")
    S = torch.linalg.svdvals((weight - quantized).double())[:8]
    assert torch.allclose((A @ A.T).double(), S.diag(), atol=1e-4)
    assert torch.allclose((B.T @ B).double(), (S / 0.5**2).diag(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_fp32_whatever_the_weight(dtype: torch.dtype) -> None:
    weight, quantized = torch.randn(6, 10).to(dtype), torch.randn(6, 10).to(dtype)
    A, B = loftq_factors(weight, quantized, QLoRAConfig(r=6, lora_alpha=6, target_modules=["q"]), "q")
    assert A.dtype == B.dtype == torch.float32
    assert (A.shape, B.shape) == ((6, 10), (6, 6))
    lost = weight.double() - quantized.double()
    assert torch.allclose(B.double() @ A.double(), lost, atol=1e-5)  # full rank: nothing is lost


@pytest.mark.parametrize(("out_features", "in_features"), [(4, 64), (64, 4), (4, 4)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_rank_above_the_weights_own_is_filled_with_zeros(
    out_features: int, in_features: int, use_rslora: bool
) -> None:
    weight, quantized = torch.randn(out_features, in_features), torch.randn(out_features, in_features)
    config = QLoRAConfig(r=16, lora_alpha=8, use_rslora=use_rslora, target_modules=["q"])
    A, B = loftq_factors(weight, quantized, config, "q")
    assert (A.shape, B.shape) == ((16, in_features), (out_features, 16))
    assert A[4:].count_nonzero() == B[:, 4:].count_nonzero() == 0
    scaling = 8 / math.sqrt(16) if use_rslora else 8 / 16
    assert torch.allclose(scaling * B @ A, weight - quantized, atol=1e-5)


def test_wide_ranks_work_on_a_model() -> None:
    """The adapter then undoes the quantization."""
    base, ids = llama(), tokens()
    expected = logits(base, ids)
    model = loftq(copy.deepcopy(base), r=200)
    assert float((logits(model, ids) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    with model.disable_adapter():
        assert float((logits(model, ids) - expected).abs().max()) >= 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_base_is_the_one_without_loftq(make: Callable[..., nn.Module]) -> None:
    base = make()
    plain = quantize_model(copy.deepcopy(base)).state_dict()
    unloaded = loftq(base).unload().state_dict()
    assert unloaded.keys() == plain.keys()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_model_starts_nearer_to_the_dense_one(make: Callable[..., nn.Module]) -> None:
    """Weights far from Gaussian noise, as trained ones are, are not needed: rank 32 of 128 takes a good part of it."""
    base, ids = make(), tokens()
    expected = logits(base, ids)
    model = loftq(base, r=32)
    error = float((logits(model, ids) - expected).norm())
    with model.disable_adapter():
        plain = float((logits(model, ids) - expected).norm())
    assert error < 0.85 * plain


def test_dora_starts_as_the_same_function() -> None:
    """DoRA's magnitude must be the norm of W + ΔW as LoftQ leaves it, or it rescales every row at once."""
    base, ids = llama(), tokens()
    plain = loftq(copy.deepcopy(base), r=32)
    dora = loftq(base, r=32, use_dora=True)
    assert float((logits(dora, ids) - logits(plain, ids)).abs().max()) <= 1e-5 * float(logits(plain, ids).abs().max())


def test_shared_layers_start_alike() -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == "albert"]
    base = family.make()
    weights = dense_weights(base)
    model = loftq(base, task_type=family.task_type)
    layers = adapter_layers(model)
    assert layers
    for name, layer in layers.items():
        lost = weights[name] - layer.base_layer.dequantize().double()
        assert float((lost - delta(layer)).norm()) < 0.97 * float(lost.norm()), name


def test_every_adapter_tensor_gets_a_gradient() -> None:
    model, ids = loftq(llama()), tokens()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trainable.values())


def test_a_bfloat16_base_keeps_fp32_factors() -> None:
    base = llama().bfloat16()
    weights = dense_weights(base)
    for name, layer in adapter_layers(loftq(base)).items():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        lost = weights[name] - layer.base_layer.dequantize().double()
        assert float((lost - delta(layer)).norm()) < 0.97 * float(lost.norm()), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_does_not_run_it_again(
    low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = llama(), tokens()
    model = loftq(copy.deepcopy(base), use_rslora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # trained
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("LoftQ was run on loading")

    monkeypatch.setattr(hf_qlora.prepare, "loftq_factors", refuse)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert float((logits(loaded, ids) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert loaded.peft_config["default"].init_lora_weights is True
    loaded.save_pretrained(tmp_path / "again")
    again = QLoRAConfig.from_pretrained(tmp_path / "again")
    assert again.record["originals"]["init_lora_weights"] == "loftq"  # what it once was is not forgotten


def test_the_config_still_says_loftq() -> None:
    model = loftq(llama())
    assert model.peft_config["default"].init_lora_weights == "loftq"


def test_a_4bit_base_is_refused_and_left_alone() -> None:
    base = quantize_model(llama())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ConfigError, match=r"loftq.*dense"):
        loftq(base)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_second_adapter_with_loftq_is_refused_and_the_first_stays() -> None:
    model, ids = loftq(llama()), tokens()
    expected = logits(model, ids)
    with pytest.raises(ConfigError, match=r"loftq.*dense"):
        model.add_adapter("second", QLoRAConfig(init_lora_weights="loftq", target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, ids), expected)
