"""What leaves a model computes the same for a reader who knows only `lora_alpha / r`, and comes back as it was.

Oracles: the scaling formulas by hand, and stock PEFT with the portable config on the same base.
"""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, gpt2, llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_qlora import QLoRAConfig, quantize_model
from hf_qlora.layers import fold
from hf_qlora.layers.errors import FoldError
from hf_qlora.quant.checks import BaseModelError


ALPHA, RANK = 8, 4
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, "down_proj": 16},
    "alpha_pattern": {"q_proj": 3, "up_proj": 32.5, r"layers\.0\.mlp\.down_proj": 1},
}
# A product or quotient in fp32 and its inverse: two roundings of 2^-24.
INVERSE = 1.2e-7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads."""
    torch.set_num_threads(1)


def adapted(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    values = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(llama() if model is None else model, QLoRAConfig(**values)).eval()


def native(model: PeftModel) -> dict[str, Tensor]:
    """The tensors as they are in memory, under the names that PEFT writes."""
    found = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}
    assert found
    return found


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, *({name: PATTERNS[name]} for name in PATTERNS), PATTERNS], ids=repr)
def test_factors_are_the_quotient_of_two_scalings(use_rslora: bool, patterns: dict[str, Any]) -> None:
    model = adapted(use_rslora=use_rslora, **patterns)
    found = fold.factors(model, model.peft_config["default"], "default")
    ranks = {"v_proj": 2, "1.self_attn.q_proj": 6, "down_proj": 16} if "rank_pattern" in patterns else {}
    alphas = {"q_proj": 3, "up_proj": 32.5, "0.mlp.down_proj": 1} if "alpha_pattern" in patterns else {}
    seen = 0
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            seen += 1
            r = next((value for tail, value in ranks.items() if name.endswith(tail)), RANK)
            alpha = next((value for tail, value in alphas.items() if name.endswith(tail)), ALPHA)
            c = (alpha / math.sqrt(r) if use_rslora else alpha / r) / (ALPHA / r)
            assert found.get(name, 1.0) == pytest.approx(c, rel=1e-12), name
            assert (name in found) == (abs(c - 1) > 1e-9), name
            assert layer.scaling["default"] == pytest.approx(c * ALPHA / r, rel=1e-12), name  # PEFT's own
    assert seen == 14


PORTABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"use_rslora": True}),
    "alpha_pattern": ("llama", {"alpha_pattern": PATTERNS["alpha_pattern"]}),
    "patterns + rslora": ("llama", {"use_rslora": True, **PATTERNS}),
    "dora + rslora": ("llama", {"use_dora": True, "use_rslora": True, **PATTERNS}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "lora_bias": ("qwen2", {"lora_bias": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
    "Conv1D": ("gpt2", {"use_rslora": True, "alpha_pattern": {"c_attn": 3}}),
    "Conv2d": ("vit", {"target_modules": ["projection"], "use_rslora": True, "alpha_pattern": {"projection": 3}}),
    "experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "use_rslora": True}),
    "target_parameters": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed")
@pytest.mark.parametrize("name", PORTABLE)
def test_stock_computes_the_same_from_the_portable_tensors(name: str) -> None:
    """Stock PEFT, given the portable config and tensors, on the same codes."""
    family, settings = PORTABLE[name]
    (architecture,) = [each for each in ARCHITECTURES if each.name == family]
    base, inputs = architecture.make(), architecture.inputs()
    model = adapted(copy.deepcopy(base), **settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key and key.endswith("bias"):
                parameter.normal_()
    stock = get_peft_model(quantize_model(base), model.peft_config["default"].portable_form())
    assert type(stock.peft_config["default"]) is LoraConfig
    with stock.disable_adapter():
        plain = logits(stock, inputs)
    result = set_peft_model_state_dict(stock, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    expected = logits(model, inputs)
    assert relative(expected, plain) > 1e-3, "the adapter does nothing"
    # c moved from the scaling into B: a rounding of each product, through two layers.
    assert relative(logits(stock, inputs), expected) <= 1e-5


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_rslora": True, **PATTERNS}], ids=["rslora", "all"])
def test_unfold_inverts_fold(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    by = fold.factors(model, model.peft_config["default"], "default")
    tensors = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    there = fold.fold(tensors, by, "default")
    back = fold.unfold(there, by, "default")
    assert there.keys() == back.keys() == tensors.keys()
    changed = {name for name in tensors if not torch.equal(there[name], tensors[name])}
    assert changed == {f"{module}.lora_B.default.weight" for module in by}
    for name, tensor in tensors.items():
        assert relative(back[name], tensor) <= INVERSE, name


def test_only_what_is_scaled_is_folded() -> None:
    """lora_B, its bias and the embedding's; not lora_A, a magnitude, or another adapter's tensor."""
    by = {"m.q": 2.0}
    scaled = ("m.q.lora_B.me.weight", "m.q.lora_B.me.bias", "m.q.lora_embedding_B.me")
    other = ("m.q.lora_A.me.weight", "m.q.lora_B.you.weight", "m.k.lora_B.me.weight", "m.q.lora_B.not_me.weight")
    other += ("m.q.lora_magnitude_vector.me.weight", "m.q.lora_embedding_A.me", "am.q.lora_B.me.weight")
    tensors = {name: torch.ones(2) for name in scaled + other}
    folded = fold.fold(tensors, by, "me")
    assert {name: float(tensor[0]) for name, tensor in folded.items()} == dict.fromkeys(scaled, 2.0) | dict.fromkeys(
        other, 1.0
    )
    unfolded = fold.unfold(tensors, by, "me")
    assert {name for name, tensor in unfolded.items() if float(tensor[0]) == 0.5} == set(scaled)


def test_a_changed_scale_is_not_folded() -> None:
    """`set_scale`, `scale_layer` and `rescale_adapter_scale` hold for a time; a file must not keep them."""
    model = adapted(use_rslora=True, **PATTERNS)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    expected = get_peft_model_state_dict(model)

    def same() -> bool:
        found = get_peft_model_state_dict(model)
        return all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    for layer in layers:
        layer.set_scale("default", 0.25)
    assert same()
    for layer in layers:
        layer.set_scale("default", 1.0)
        layer.scale_layer(3.0)
    assert same()
    for layer in layers:
        layer.unscale_layer()
    with rescale_adapter_scale(model, 0.5):
        assert same()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_folded_in_fp32(dtype: torch.dtype) -> None:
    model = adapted(use_rslora=True, alpha_pattern={"q_proj": 4.0})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    by = fold.factors(model, model.peft_config["default"], "default")
    before = native(model)
    assert {round(c, 12) for c in by.values()} == {2.0}  # √4; q_proj has alpha 4 of 8, so 1: not folded
    for name, tensor in get_peft_model_state_dict(model).items():
        if "lora_B" in name and name.removesuffix(".lora_B.weight") in by:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name].float() * 2), name
        else:
            assert tensor.dtype == dtype
            assert torch.equal(tensor, before[name]), name


def test_odd_factors_of_half_precision_survive() -> None:
    """√6 times a bfloat16 has no bfloat16 value: folded in bfloat16 it would come back changed."""
    model = adapted(r=6, use_rslora=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    before = {name: tensor.clone() for name, tensor in native(model).items()}
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert all(torch.equal(tensor.bfloat16(), before[name]) for name, tensor in native(model).items())


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 7, "v_proj": 1}}, {"r": 3, "lora_alpha": 0.7}])
def test_stock_scaling_is_left_alone_to_the_bit(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    assert fold.factors(model, model.peft_config["default"], "default") == {}
    found, expected = get_peft_model_state_dict(model), native(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].data_ptr() == tensor.data_ptr(), name  # not even a copy


def test_portable_false_keeps_the_native_form() -> None:
    model = adapted(use_rslora=True, portable=False, **PATTERNS)
    config = model.peft_config["default"]
    assert fold.factors(model, config, "default") == {}
    expected = native(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in get_peft_model_state_dict(model).items())
    values = config.to_portable_dict()
    assert values["use_rslora"] is True
    assert values["alpha_pattern"] == PATTERNS["alpha_pattern"]
    stock = config.portable_form()
    assert (stock.use_rslora, stock.alpha_pattern) == (True, PATTERNS["alpha_pattern"])


def test_stock_adapters_are_never_folded() -> None:
    base = quantize_model(llama())
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False, target_modules=["q_proj"])
    )
    assert fold.factors(model, model.peft_config["default"], "default") == {}
    expected = native(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_state_dict_round_trip_gives_the_function_back(make: Any) -> None:
    base, inputs = make(), {"input_ids": tokens()}
    settings = {"use_rslora": True, "alpha_pattern": {"q_proj": 3, "c_attn": 5}}
    model = adapted(copy.deepcopy(base), **settings)
    other = adapted(base, **settings)
    assert relative(logits(other, inputs), logits(model, inputs)) > 1e-3
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(other, state)
    found, expected = native(other), native(model)
    for name, tensor in expected.items():
        assert relative(found[name], tensor) <= INVERSE, name
    assert relative(logits(other, inputs), logits(model, inputs)) <= 1e-5
    again = get_peft_model_state_dict(other)
    assert all(relative(again[name], tensor) <= 2 * INVERSE for name, tensor in state.items())


def test_the_callers_tensors_are_not_changed() -> None:
    model = adapted(use_rslora=True)
    state = get_peft_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    set_peft_model_state_dict(model, state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_each_adapter_is_folded_by_its_own_factors() -> None:
    model = adapted(use_rslora=True)
    second = QLoRAConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", second)
    state = get_peft_model_state_dict(model, adapter_name="second")
    assert set(fold.factors(model, second, "second").values()) == {3.0}
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        own = parameters[name.replace(".weight", ".second.weight")]
        assert torch.equal(tensor, own * 3 if "lora_B" in name else own), name


def test_native_form_on_request_and_only_there() -> None:
    model = adapted(use_rslora=True)
    expected = native(model)
    folded = get_peft_model_state_dict(model)
    with fold.exchange("native"):
        found = get_peft_model_state_dict(model)
        with fold.exchange("portable", "a file", True):
            assert fold.current_exchange() == fold.Exchange("portable", "a file", True)
            inner = get_peft_model_state_dict(model)
        assert fold.current_exchange().form == "native"
        elsewhere: list[fold.Exchange] = []
        thread = threading.Thread(target=lambda: elsewhere.append(fold.current_exchange()))
        thread.start()
        thread.join()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(inner[name], tensor) for name, tensor in folded.items())
    assert elsewhere == [fold.Exchange()]
    with pytest.raises(RuntimeError, match="anything"), fold.exchange("native"):
        raise RuntimeError("anything")
    assert fold.current_exchange() == fold.Exchange()


def test_compiled_layers_are_folded_too() -> None:
    """torch.compile puts `_orig_mod` into the names of what it wraps."""
    model = adapted(use_rslora=True, alpha_pattern={r"layers\.0\..*q_proj": 3})
    expected = get_peft_model_state_dict(model)
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    found = {n.replace("_orig_mod.", ""): tensor for n, tensor in get_peft_model_state_dict(model).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("swapped_in", [{}, {"rank_pattern": PATTERNS["rank_pattern"]}, {"lora_alpha": 2}], ids=repr)
def test_after_a_hot_swap_layers_and_config_agree(swapped_in: dict[str, Any]) -> None:
    """PEFT has set the tensors, scaled by a rank of its own; a model made from the config must be alike."""
    model = adapted(use_rslora=True, **PATTERNS)
    config = model.peft_config["default"]
    new = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **swapped_in})
    fold.after_hot_swap(model, "default", config, new)
    assert config.use_rslora is False
    made = get_peft_model(llama(), copy.deepcopy(config))
    twins = {name: layer for name, layer in made.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            r = (
                6
                if name.endswith("1.self_attn.q_proj")
                else {"v_proj": 2, "down_proj": 16}.get(name.split(".")[-1], 4)
            )
            assert layer.r["default"] == twins[name].r["default"] == r, name
            own = r if "rank_pattern" in swapped_in else RANK  # what the tensors were trained with, padded or not
            scaling = swapped_in.get("lora_alpha", ALPHA) / own
            assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12), name
            assert twins[name].scaling["default"] == pytest.approx(scaling, rel=1e-12), name


@pytest.mark.parametrize("portable", [True, False])
def test_the_file_says_whether_it_is_folded_not_the_config_given_with_it(portable: bool, tmp_path: Path) -> None:
    """Changing `portable` on a config read from a file changes how it will be saved, not what is read."""
    base = llama()
    config = QLoRAConfig(r=4, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False, portable=portable)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    given = QLoRAConfig.from_pretrained(tmp_path)
    given.portable = not portable
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=given)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        difference = (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert difference <= 1e-5  # folding rounds once in fp32


def test_a_model_whose_quantization_was_interrupted_is_refused() -> None:
    model = llama()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, on_layer=stop)
    with pytest.raises(BaseModelError, match="interrupted"):
        get_peft_model(model, QLoRAConfig(r=4, target_modules="all-linear"))


def test_scales_whose_tensors_are_not_there_are_not_lost_in_silence(tmp_path: Path) -> None:
    model = adapted(use_rslora=True)
    tensors = {name.replace("q_proj", "other"): t for name, t in model.state_dict().items()}
    with pytest.raises(FoldError, match=r"q_proj and 1 others.*portable=False"):
        model.save_pretrained(tmp_path, state_dict=tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_wrapped_layers_are_folded_too(wrapper: str) -> None:
    model = adapted(use_rslora=True)
    expected = get_peft_model_state_dict(model)
    by = fold.factors(model, model.peft_config["default"], "default")
    with fold.exchange("native"):
        found = get_peft_model_state_dict(model)
    wrapped = {
        name.replace("self_attn.", f"self_attn.{wrapper}").replace(".weight", ".default.weight"): tensor
        for name, tensor in found.items()
    }
    folded = fold.fold(wrapped, by, "default")
    assert len(folded) == len(expected)
    for tensor, same in zip(folded.values(), expected.values(), strict=True):
        assert torch.equal(tensor, same)
