"""LoRA scaled by depth computes (α/r) · f · g · a · B A, starts as the base, and is an ordinary adapter on disk.

Oracles: the profiles' formulas by hand, finite differences in float64, and stock PEFT reading the file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, Architecture, gpt2, llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig, quantize_model
from hf_qlora.config.adaptive_depth import DEPTH_PROFILES
from hf_qlora.layers import depth
from hf_qlora.layers.depth_scale import DepthScale
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.norms import weight_norm
from hf_qlora.layers.profile import layer_index
from hf_qlora.validation import ConfigError


LAYERS = 4
SAME = 1e-5  # fp32 sums of some hundred products in another order, through four layers
WITHOUT_DEPTH = {"bert": ["pooler.dense"], "albert": ["pooler", "embedding_hidden_mapping_in"]}
# The others' experts are parameters: test_experts_are_refused_by_name.
FAMILIES = [family for family in ARCHITECTURES if family.name not in ("mixtral", "qwen2_moe")]
DIFFERENT = 1e-3
BASES = {"nf4": {}, "dense": {"quantization": None}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def config(**settings: Any) -> AdaptiveDepthLoRAConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return AdaptiveDepthLoRAConfig(**{**values, **settings})


def base() -> nn.Module:
    torch.manual_seed(0)
    return llama(num_hidden_layers=LAYERS)


def trained(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """Every trainable tensor, θ among them, has some value."""
    peft_model = get_peft_model(base() if model is None else model, config(init_lora_weights=False, **settings))
    return shake(peft_model, "default")


def shake(model: PeftModel, adapter: str) -> PeftModel:
    with torch.no_grad():
        for scale in depth.scales(model, adapter).values():
            scale.bias.copy_(torch.randn(1))
    return model.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def scale_values(model: nn.Module) -> dict[str, float]:
    return {name: scale.value for name, scale in depth.scales(model, "default").items()}


# --- the formula -----------------------------------------------------------------------------------------------------


PROFILES = {
    "linear": [1, 3 / 4, 2 / 4, 1 / 4],
    "reverse": [1 / 4, 2 / 4, 3 / 4, 1],
    "constant": [1, 1, 1, 1],
    "cosine": [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
    "rsqrt": [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 1 / 2],
}


@pytest.mark.parametrize("profile", [*DEPTH_PROFILES, "list"])
@pytest.mark.parametrize("normalized", [False, True])
def test_profiles_are_their_formulas(profile: str, normalized: bool) -> None:
    expected = PROFILES.get(profile, [0.5, 2.0, 1.0, 7])
    given = expected if profile == "list" else profile
    model = get_peft_model(base(), config(depth_profile=given, normalize_depth=normalized))
    mean = sum(expected) / LAYERS if normalized else 1.0
    found = scale_values(model)
    assert len(found) == 2 * LAYERS
    for name, value in found.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        assert value == pytest.approx(expected[layer] / mean, rel=1e-12)


@pytest.mark.parametrize("kind", BASES)
def test_an_adapted_layer_computes_the_formula(kind: str) -> None:
    model = trained(gain_bound=0.7, use_rslora=True, **BASES[kind])
    for layer in (m for m in model.modules() if "default" in getattr(m, "lora_variant", {})):
        x = torch.randn(3, layer.in_features)
        scale = layer.lora_magnitude_vector["default"]
        theta = scale.bias.double().item()
        c = scale.profile * math.exp(0.7 * math.tanh(theta / 0.7)) * 8 / math.sqrt(4)
        A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
        expected = layer.base_layer(x).double() + c * x.double() @ A.T @ B.T
        assert relative(layer(x).double(), expected) <= 1e-6


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_at_the_start_the_output_is_the_bases(family: Architecture, kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = family.make(), family.inputs()
    given = AdaptiveDepthLoRAConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=WITHOUT_DEPTH.get(family.name),
        task_type=family.task_type,
        **BASES[kind],
        **family.options,
    )
    adapted = get_peft_model(model, given).eval()
    assert depth.scales(adapted, "default")
    with torch.no_grad():
        found = adapted(**inputs).logits
        with adapted.disable_adapter():
            assert torch.equal(found, adapted(**inputs).logits)


@pytest.mark.parametrize("name", ["t5", "vit", "bert", "gpt2"])
def test_every_family_has_a_depth(name: str) -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == name]
    model = get_peft_model(
        family.make(),
        AdaptiveDepthLoRAConfig(
            r=2,
            target_modules="all-linear",
            exclude_modules=WITHOUT_DEPTH.get(family.name),
            task_type=family.task_type,
            learn_gain=False,
            **family.options,
        ),
    )
    stacks: dict[str, set[float]] = {}
    inner = model.get_base_model()
    for layer_name, scale in depth.scales(inner, "default").items():
        found = layer_index(inner, layer_name)
        assert found is not None
        stack, _, L = found
        assert L == 2
        stacks.setdefault(stack, set()).add(round(scale.value, 9))
    assert all(values == {round(4 / 3, 9), round(2 / 3, 9)} for values in stacks.values())
    assert len(stacks) == (2 if name == "t5" else 1)  # encoder and decoder, each by itself


def test_gradients_are_those_of_finite_differences() -> None:
    model = trained(quantization=None).double()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    scale = layer.lora_magnitude_vector["default"]
    scale.bias.data = scale.bias.data.double()
    x = torch.randn(3, layer.in_features, dtype=torch.float64)

    def output(theta: Tensor) -> Tensor:
        with torch.no_grad():
            scale.bias.copy_(theta)
        return layer(x).square().sum()

    theta = scale.bias.detach().clone()
    output(theta).backward()
    step = 1e-6
    numeric = (output(theta + step) - output(theta - step)) / (2 * step)
    assert scale.bias.grad is not None
    assert scale.bias.grad.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_the_gain_is_bounded_and_starts_at_one() -> None:
    scale = DepthScale(1.0, config(gain_bound=0.5), torch.device("cpu"))
    assert scale.value == 1.0
    assert scale().item() == 1.0
    for theta, bound in ((1e6, math.exp(0.5)), (-1e6, math.exp(-0.5))):
        scale.restore(theta, 1.0, None, 0)
        assert scale.value == pytest.approx(bound)


def test_without_a_learned_gain_there_is_no_parameter() -> None:
    model = get_peft_model(base(), config(learn_gain=False))
    assert not any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
    assert set(scale_values(model).values()) == {8 / 5, 6 / 5, 4 / 5, 2 / 5}


# --- training --------------------------------------------------------------------------------------------------------


def test_theta_learns_without_weight_decay_in_float32(tmp_path: Path) -> None:
    model = get_peft_model(base().to(torch.bfloat16), config(init_lora_weights=False))
    trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), weight_decay=0.5, use_cpu=True, report_to="none"))
    undecayed = {id(p) for p in trainer.create_optimizer().param_groups[1]["params"]}
    thetas = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    assert len(thetas) == 2 * LAYERS
    for name, theta in thetas.items():
        assert theta.requires_grad, name
        assert theta.dtype == torch.float32
        assert id(theta) in undecayed
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(theta.grad is not None and theta.grad.abs() > 0 for theta in thetas.values())


def test_a_second_adapter_starts_frozen_with_its_own_profile() -> None:
    model = trained()
    model.add_adapter("second", config(depth_profile="reverse"))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second" in name)
    model.set_adapter("second")
    assert {p.requires_grad for name, p in model.named_parameters() if "vector.second" in name} == {True}
    first, second = (depth.scales(model, name) for name in ("default", "second"))
    assert first.keys() == second.keys()
    assert [scale.profile for scale in first.values()] != [scale.profile for scale in second.values()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, ids = trained(lora_dropout=0.3), tokens()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_fixed_profile_under_adam_is_a_learning_rate_for_each_layer() -> None:
    """B of a layer scaled by f moves, times f, as B of an unscaled one with f times the learning rate does.

    To rounding and Adam's ε: its step does not know the size of the gradient, which f has multiplied.
    """
    rate, steps = 1e-2, 5
    scaled = get_peft_model(base(), config(learn_gain=False))
    plain = get_peft_model(base(), QLoRAConfig(**_plain_fields(config())))
    plain.load_state_dict(
        {n: p for n, p in scaled.state_dict().items() if "lora_" in n and "vector" not in n}, strict=False
    )
    f = {name: scale.value for name, scale in depth.scales(scaled, "default").items()}
    moving = {}
    for model in (scaled, plain):
        groups = []
        for name, p in model.named_parameters():
            p.requires_grad_("lora_B" in name)
            if "lora_B" in name:
                factor = 1.0 if model is scaled else f[name.removesuffix(".lora_B.default.weight")]
                groups.append({"params": [p], "lr": rate * factor})
        moving[model] = torch.optim.Adam(groups, eps=1e-12)
    for step in range(steps):
        torch.manual_seed(step)
        ids = tokens()
        for model, optimizer in moving.items():
            optimizer.zero_grad()
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    found, expected = dict(scaled.named_parameters()), dict(plain.named_parameters())
    for name, value in f.items():
        key = f"{name}.lora_B.default.weight"
        # Adam divides tiny gradients by their own size, so that a rounding of theirs can turn a whole step.
        error = (found[key] * value - expected[key]).norm() / expected[key].norm()
        assert error < 0.01, name


def _plain_fields(given: AdaptiveDepthLoRAConfig) -> dict[str, Any]:
    plain = given.without_depth()
    return {name: value for name, value in vars(plain).items() if name in QLoRAConfig.__dataclass_fields__}


# --- merging and other adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_merge_equals_forward_and_unmerges(kind: str) -> None:
    model, ids = trained(**BASES[kind]), tokens()
    expected = logits(model, ids)
    model.merge_adapter()
    assert relative(logits(model, ids), expected) <= SAME
    model.unmerge_adapter()
    assert relative(logits(model, ids), expected) <= SAME
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, ids), expected) <= SAME


def test_gpt2_merges_too() -> None:
    model, ids = trained(gpt2(), target_modules=["c_attn", "c_proj"]), tokens()
    expected = logits(model, ids)
    assert relative(logits(model.merge_and_unload(), ids), expected) <= SAME


def test_lora_bias_is_scaled_and_not_merged() -> None:
    model = trained(lora_bias=True, quantization=None, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x, scale = torch.randn(3, layer.in_features), layer.lora_magnitude_vector["default"].value
    torch.nn.init.normal_(layer.lora_B["default"].bias)
    plain = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert relative(layer(x), layer.base_layer(x) + scale * plain) <= 1e-6
    assert abs(scale - 1) > DIFFERENT
    with pytest.raises(MergeError, match="lora_bias"):
        model.merge_adapter()


def test_mixed_batches_use_each_adapters_scale() -> None:
    model, ids = trained(), tokens()
    model.add_adapter("second", config(depth_profile="reverse", init_lora_weights=False))
    shake(model, "second")
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(logits(model, ids))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "second"]).logits
    for row in range(2):
        assert relative(mixed[row], alone[row][row]) <= SAME


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_adapter_includes_the_scales(combination: str) -> None:
    model, ids = trained(), tokens()
    expected = logits(model, ids)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type=combination)
    model.set_adapter("sum")
    assert relative(logits(model, ids), expected) <= 1e-4  # the SVD's own accuracy
    assert type(model.peft_config["sum"]) is QLoRAConfig
    assert not depth.scales(model, "sum")


def test_deleting_an_adapter_deletes_its_scales() -> None:
    model = trained()
    model.add_adapter("second", config())
    model.delete_adapter("default")
    assert not depth.scales(model, "default")
    assert depth.scales(model, "second")


# --- on disk ---------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "gain_bound": 0.3,
    },
    "no gain": {"learn_gain": False, "depth_profile": [1.0, 2.0, 0.5, 4.0]},
    "dense": {"quantization": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_split_comes_back(name: str, tmp_path: Path) -> None:
    model, ids = trained(**SETTINGS[name]), tokens()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    expected_config, found_config = model.peft_config["default"], again.peft_config["default"]
    settings = {f.name for f in dataclasses.fields(AdaptiveDepthLoRAConfig)} - {"inference_mode", "record"}
    # An initialisation that has been is not repeated; PEFT has made sets of the names.
    for field in settings - {"init_lora_weights", "base_model_name_or_path"}:
        assert getattr(found_config, field) == getattr(expected_config, field), field
    assert scale_values(again) == scale_values(model)
    assert relative(logits(again, ids), logits(model, ids)) <= SAME
    expected = dict(model.named_parameters())
    for key, tensor in again.named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=0)
    again.save_pretrained(tmp_path / "again")
    once, twice = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    for key, tensor in once.items():
        torch.testing.assert_close(twice[key], tensor, rtol=1e-6, atol=0)


def test_the_file_is_an_ordinary_adapter(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    record = values.pop("hf_qlora")
    assert record["type"] == "AdaptiveDepthLoRAConfig"
    assert len(record["depth"]) == 2 * LAYERS
    LoraConfig(**values)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}


STOCK = """
import sys
sys.modules["hf_qlora"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(ids)["ids"]).logits}, out)
"""


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_stock_peft_computes_the_same_without_the_package(tmp_path: Path) -> None:
    model, ids = trained(quantization=None, use_rslora=True), tokens()
    model.save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    save_file({"ids": ids}, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "ids", "logits")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, capture_output=True)
    assert relative(load_file(tmp_path / "logits")["logits"], logits(model, ids)) <= SAME


@pytest.mark.parametrize("way", ["AutoModel", "load_adapter"])
def test_transformers_loads_it_folded(way: str, tmp_path: Path) -> None:
    model, ids = trained(), tokens()
    model.save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    if way == "AutoModel":
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        again = base()
        again.load_adapter(str(tmp_path / "adapter"))
    assert relative(logits(again, ids), logits(model, ids)) <= SAME
    assert not depth.scales(again, "default")
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert relative(logits(third, ids), logits(model, ids)) <= SAME


@pytest.mark.parametrize("into", ["depth", "plain"])
def test_a_hot_swapped_adapter_is_not_folded_twice(into: str, tmp_path: Path) -> None:
    source, ids = trained(depth_profile="rsqrt"), tokens()
    source.save_pretrained(tmp_path / "new")
    given = config() if into == "depth" else config().without_depth()
    model = shake(get_peft_model(base(), given), "default")
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    expected = logits(source, ids)
    assert relative(logits(model, ids), expected) <= SAME
    model.save_pretrained(tmp_path / "swapped")
    again = PeftModel.from_pretrained(base(), tmp_path / "swapped")
    assert relative(logits(again, ids), expected) <= SAME
    assert relative(logits(again.merge_and_unload(), ids), expected) <= SAME


def test_a_state_dict_round_trip_keeps_the_function() -> None:
    model, ids = trained(), tokens()
    expected = logits(model, ids)
    tensors = get_peft_model_state_dict(model)
    assert not any("magnitude" in name for name in tensors)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in (p for n, p in twin.named_parameters() if "lora_A" in n or "lora_B" in n):
            p.zero_()
    assert not [k for k in set_peft_model_state_dict(twin, tensors).missing_keys if "lora_" in k]
    assert relative(logits(twin, ids), expected) <= SAME


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "learn_gain": False}], ids=["gain", "fixed"])
def test_resume_equals_uninterrupted(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokens()[0] for _ in range(12))]

    def run(folder: Path, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(7)
        model = get_peft_model(base(), config(lora_dropout=0.1, **settings))
        arguments = tf.TrainingArguments(
            str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        tf.Trainer(model, arguments, train_dataset=rows).train(**more)
        return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    straight = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    if settings.get("learn_gain", True):
        assert any(tensor.abs().sum() > 0 for name, tensor in straight.items() if "vector" in name)


def test_loftq_starts_from_what_quantizing_lost_with_any_scale() -> None:
    model, ids = get_peft_model(base(), config(init_lora_weights="loftq")), tokens()
    plain = get_peft_model(base(), config(init_lora_weights="loftq").without_depth())
    assert relative(logits(model, ids), logits(plain, ids)) <= SAME


def test_layers_pattern_says_what_a_layer_is_and_survives(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            towers = [nn.ModuleDict({"steps": nn.ModuleList(Block() for _ in range(3))}) for _ in range(2)]
            self.towers = nn.ModuleList(towers)

    given = AdaptiveDepthLoRAConfig(r=2, target_modules=r".*inner\.\d", layers_pattern="steps", learn_gain=False)
    model = get_peft_model(Net(), given)
    values = {name: round(s.value, 6) for name, s in depth.scales(model.get_base_model(), "default").items()}
    assert values["towers.0.steps.2.inner.1"] == round(0.5, 6)
    assert set(values.values()) == {1.5, 1.0, 0.5}
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["layers_pattern"] is None  # with it, and without layers_to_transform, PEFT would refuse the file
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert scale_values(again) == scale_values(model)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth_profile": "quadratic"}, "quadratic.*linear"),
        ({"depth_profile": []}, "positive"),
        ({"depth_profile": [1.0, -1.0, 1.0, 1.0]}, "positive"),
        ({"depth_profile": [1.0, math.nan, 1.0, 1.0]}, "positive"),
        ({"depth_profile": [1.0, math.inf]}, "positive"),
        ({"depth_profile": [True, 1.0]}, "positive"),
        ({"depth_profile": 3}, "depth_profile=3"),
        ({"gain_bound": 0}, "gain_bound=0"),
        ({"gain_bound": 1000}, "at most 10"),
        ({"depth_profile": [1e308, 1e308]}, "between"),
        ({"depth_profile": [1e-46, 1.0]}, "between"),
        ({"depth_profile": {1.0, 2.0}}, "a list of Python numbers"),
        ({"layers_pattern": 3}, "layers_pattern=3"),
        ({"gain_lr_ratio": -1.0}, "gain_lr_ratio"),
        ({"attention": "entropy"}, "entropy.*concentration"),
        ({"learn_gain": "yes"}, "learn_gain"),
        ({"use_dora": True}, "use_dora.*forward"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa", "quantization": None}, "pissa"),
        ({"portable": False}, "portable"),
    ],
)
def test_what_a_config_cannot_say_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth_profile": [1.0, 2.0]}, "2 numbers.*4 layers"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is in no numbered layer.*constant"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is adapted by .*Embedding"),
        ({"target_modules": ["q_proj"], "layers_pattern": "nope"}, "in no numbered layer"),
    ],
    ids=["length", "head", "embedding", "pattern"],
)
def test_what_cannot_be_scaled_is_named_before_the_base_is_touched(settings: dict[str, Any], words: str) -> None:
    model = base()
    with pytest.raises(ConfigError, match=words):
        get_peft_model(model, config(**settings))
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_a_head_has_the_constant_profile() -> None:
    model = get_peft_model(base(), config(target_modules=["q_proj", "lm_head"], depth_profile="constant"))
    assert set(scale_values(model).values()) == {1.0}


def test_experts_are_refused_by_name() -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == "mixtral"]
    with pytest.raises(ConfigError, match=r"experts is adapted by .*ParamWrapper"):
        get_peft_model(family.make(), config(target_modules=["w1", "w2", "w3"]))


@pytest.mark.parametrize("value", [[], "x", {"a": 1}, {"a": {"theta": 1.0}}, "attention=0"])
def test_a_damaged_record_is_refused(value: Any, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    if value == "attention=0":
        value = {name: {**found, "attention": 0.0} for name, found in values["hf_qlora"]["depth"].items()}
    values["hf_qlora"]["depth"] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="depth"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_quantized_base_gets_scales_too() -> None:
    model, ids = quantize_model(base()), tokens()
    expected = logits(model, ids)
    adapted = get_peft_model(model, config())
    assert torch.equal(logits(adapted, ids), expected)


def test_loading_with_low_memory_gives_the_same(tmp_path: Path) -> None:
    model, ids = trained(), tokens()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    assert scale_values(again) == scale_values(model)
    assert relative(logits(again, ids), logits(model, ids)) <= SAME


def test_conversion_that_would_lose_the_scale_is_refused() -> None:
    assert not trained().supports_lora_conversion()


def test_a_weighted_adapter_of_a_stock_one_first_includes_the_scales() -> None:
    model, ids = trained(quantization=None), tokens()
    expected = logits(model, ids)
    model.add_adapter("stock", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    model.add_weighted_adapter(["stock", "default"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert relative(logits(model, ids), expected) <= SAME


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    shake(get_peft_model(base(), config(r=8, init_lora_weights=False)), "default").save_pretrained(tmp_path)
    model, ids = trained(), tokens()
    expected = logits(model, ids)
    with pytest.raises(ValueError, match="another shape"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, ids), expected)


def test_scales_stay_in_float32_whatever_the_model_is_cast_to(tmp_path: Path) -> None:
    model, ids = trained(quantization=None), tokens()
    expected = scale_values(model)
    model.to(torch.bfloat16).float()
    assert scale_values(model) == expected
    assert {scale().dtype for scale in depth.scales(model, "default").values()} == {torch.float32}
    found = logits(model, ids)
    assert relative(logits(model.merge_and_unload(), ids), found) <= SAME


def test_saving_other_scales_than_the_models_is_refused(tmp_path: Path) -> None:
    """As an average over steps would be: the file's JSON would remember the model's."""
    model = trained()
    averaged = {name: tensor * 0.5 if "lora_" in name else tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="Load it into the model first"):
        model.save_pretrained(tmp_path, state_dict=averaged)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())


def test_a_bias_that_cannot_be_merged_is_found_before_the_first_layer() -> None:
    model = trained(quantization=None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.add_adapter("b", config(lora_bias=True, quantization=None))
    with pytest.raises(MergeError, match="lora_bias"):
        model.merge_adapter(["default", "b"])
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in before.items())


def test_a_pattern_of_layers_survives_transformers(tmp_path: Path) -> None:
    model, ids = trained(layers_pattern="layers"), tokens()
    model.save_pretrained(tmp_path)
    again = base()
    again.load_adapter(str(tmp_path))
    assert relative(logits(again, ids), logits(model, ids)) <= SAME


# --- what others bring -----------------------------------------------------------------------------------------------


def test_a_layer_that_merges_in_its_own_way_is_refused() -> None:
    """As PEFT's for torchao do: what they merge asks no variant, so the scale would be lost in silence."""

    class Own(lora.Linear):
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            self.get_base_layer().weight.data += self.get_delta_weight("default")

    custom = config(quantization=None)
    custom._register_custom_module({nn.Linear: Own})
    model = base()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"q_proj.*cannot be scaled by depth"):
        get_peft_model(model, custom)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("path", ["from_pretrained", "load_adapter"])
def test_a_stock_adapter_under_a_depth_config_computes_what_it_did(tmp_path: Path, path: str) -> None:
    targets = config().target_modules
    stock = get_peft_model(base(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    stock.save_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        expected = stock.eval()(input_ids=ids).logits
        plain = base().eval()(input_ids=ids).logits
    if path == "from_pretrained":
        model = PeftModel.from_pretrained(base(), tmp_path, config=config(r=2, quantization=None))
    else:
        model = get_peft_model(base(), config(r=2, quantization=None, init_lora_weights=False))
        for scale in depth.scales(model, "default").values():
            scale.restore(0.3, 1.0, None, 0)
        model.load_adapter(tmp_path, "default")
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits
    # the division by the scale and its multiplication round once each
    assert (found - expected).abs().max() <= 1e-5 * (expected - plain).abs().max()


def test_the_norm_of_an_8_bit_weight_is_not_that_of_its_codes() -> None:
    dense = nn.Linear(64, 32, bias=False)
    packed = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    packed.load_state_dict(dense.state_dict())
    packed = packed.to("cpu")
    packed(torch.randn(2, 64))  # which is when bitsandbytes quantizes on a CPU
    # 8 bits for the largest of each row: an error of 1 % at most
    assert weight_norm(packed) == pytest.approx(float(dense.weight.detach().norm()), rel=0.01)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [AdaptiveDepthLoRAConfig, QLoRAConfig])
def test_settings_given_on_reading_are_taken_whichever_class_reads(tmp_path: Path, reader: type[QLoRAConfig]) -> None:
    get_peft_model(base(), config()).save_pretrained(tmp_path)
    read = reader.from_pretrained(tmp_path, quantization=None, depth_profile="reverse")
    assert isinstance(read, AdaptiveDepthLoRAConfig)
    assert (read.quantization, read.depth_profile) == (None, "reverse")
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=reader.from_pretrained(tmp_path, quantization=None))
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules())


def test_a_json_that_another_program_has_written_is_read(tmp_path: Path) -> None:
    """jq and JavaScript write 1 for 1.0."""
    model = get_peft_model(base(), config(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    for number in values["hf_qlora"]["depth"].values():
        assert number["attention"] == 1.0
        number["attention"], number["theta"] = 1, 0
    path.write_text(json.dumps(values))
    ids = tokens()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(base(), tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    number["theta"] = "much"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"depth\['.*_proj'\].*'much'"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("theta", [math.nan, math.inf])
def test_a_scale_that_diverged_is_not_saved(tmp_path: Path, theta: float) -> None:
    model = get_peft_model(base(), config(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    name, scale = next(iter(depth.scales(model, "default").items()))
    scale.bias.data.fill_(theta)
    with pytest.raises(ValueError, match=f"{name}.*diverged"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before


def test_going_on_with_other_settings_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(base(), config(depth_profile="rsqrt")).save_pretrained(tmp_path)
    model = get_peft_model(base(), config(depth_profile="reverse"))
    model.load_adapter(tmp_path, "default")
    assert "depth_profile='reverse', was 'rsqrt'" in caplog.text
    caplog.clear()
    model = get_peft_model(base(), config(depth_profile="rsqrt"))
    model.load_adapter(tmp_path, "default")
    assert "other settings" not in caplog.text
