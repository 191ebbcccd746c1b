"""One config on every architecture, alone and among other adapters, through every way of loading and swapping.

Oracles: stock PEFT on the same quantized base (names, shapes and initial values of what is trained), ΔW by its
formula, and the function a model computed before it was saved, swapped or merged.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, SIZES, VOCAB, Architecture, gpt2, llama, tokens
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.testing import assert_close

from hf_qlora import NF4Config, QLoRAConfig, QLoRAModel, quantize_model
from hf_qlora.layers.linear import Linear4bit as LoraLinear4bit
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.validation import ConfigError


# Folding and unfolding round lora_B twice, 6e-8 each; merging rounds W + ΔW once. Through two layers of sums over 128
# to 256 products these grow to a few 1e-6 of the largest logit.
SAME = 1e-5
DIFFERENT = 1e-3

PATTERNS = {
    "rank_pattern": {"q_proj": 2, "query": 2, "c_attn": 2, "q": 2},
    "alpha_pattern": {"v_proj": 3, "value": 3, "c_fc": 3, "v": 3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "bias": {"bias": "lora_only"},
}
# PEFT has no DoRA for parameters that are no module's weight, and finds experts by parameter.
WITHOUT_DORA = ("mixtral", "qwen2_moe")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:.*bias.*disable_adapter"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads."""
    torch.set_num_threads(1)


def architecture(name: str) -> Architecture:
    (found,) = [family for family in ARCHITECTURES if family.name == name]
    return found


def config(**settings: Any) -> QLoRAConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return QLoRAConfig(**{"init_lora_weights": False, **values})


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), config(**settings)).eval()


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, **options).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def delta(layer: LoraLayer, adapter: str) -> Tensor:
    """ΔW by its formula, from PEFT's own scaling."""
    A, B = (part[adapter].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    return layer.scaling[adapter] * (B @ A)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, so that adapters know where their base is."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> nn.Module:
    """Dense; not to be changed."""
    return tf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def ids() -> Tensor:
    return tokens()


# --- every architecture ----------------------------------------------------------------------------------------------

CASES = [
    pytest.param(family, variant, id=f"{family.name}-{variant}")
    for family in ARCHITECTURES
    for variant in VARIANTS
    if not (variant == "dora" and family.name in WITHOUT_DORA)
]


def family_config(family: Architecture, variant: str, kind: type[LoraConfig] = QLoRAConfig, **more: Any) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": family.task_type}
    return kind(**{**values, **family.options, **VARIANTS[variant], **more})


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_what_is_trained_is_what_stock_peft_trains(family: Architecture, variant: str) -> None:
    """Names, shapes and initial values, on the same codes."""
    base = family.make()
    stock_base = quantize_model(copy.deepcopy(base), skip=["classifier"])
    torch.manual_seed(1)
    ours = get_peft_model(base, family_config(family, variant))
    torch.manual_seed(1)
    stock = get_peft_model(stock_base, family_config(family, variant, LoraConfig))
    found, expected = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, stock))
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    assert isinstance(ours.base_model, QLoRAModel)
    own = ours.peft_config["default"]
    assert (own.target_modules, own.target_parameters) == (
        stock.peft_config["default"].target_modules,
        stock.peft_config["default"].target_parameters,
    )


@pytest.mark.parametrize(
    ("task", "make", "head"),
    [
        ("TOKEN_CLS", tf.BertForTokenClassification, "classifier"),
        ("QUESTION_ANS", tf.BertForQuestionAnswering, "qa_outputs"),
    ],
)
@pytest.mark.parametrize("every", ["all-linear", "All-Linear"])
def test_all_linear_layers_are_all_but_the_head_that_is_saved_whole(
    every: str, task: str, make: Any, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock PEFT learns of this head when it has adapted it, and fails; told of it by the user, it does this."""
    base = make(tf.BertConfig(**SIZES, vocab_size=VOCAB)).eval()
    settings: dict[str, Any] = {"r": 4, "target_modules": every, "task_type": task}
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(**settings, modules_to_save=[head]))
    config = QLoRAConfig(**settings, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, stock))
    assert trained == expected
    assert config.modules_to_save is not None
    assert len(config.modules_to_save) == len(set(config.modules_to_save))
    again = get_peft_model(copy.deepcopy(base), config)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == expected
    assert "match nothing" not in caplog.text
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{head}.modules_to_save.default.weight").add_(1)
    model.save_pretrained(tmp_path)
    ids = tokens()
    outputs = [m(input_ids=ids)[0].detach() for m in (model, PeftModel.from_pretrained(base, str(tmp_path)).eval())]
    assert_close(outputs[1], outputs[0], rtol=0, atol=SAME * float(outputs[0].abs().max()))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_trained_saved_loaded_and_merged_it_stays_one_function(
    family: Architecture, variant: str, tmp_path: Path
) -> None:
    base, inputs = family.make(), family.inputs()
    model = get_peft_model(copy.deepcopy(base), family_config(family, variant, init_lora_weights=False))

    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, bnb.nn.Linear4bit, Linear4bit) and "lora_" not in name
    }
    dense = {n for n, m in linear.items() if not isinstance(m, Linear4bit)}
    assert {re.sub(r"(\.base_layer|\.original_module|\.modules_to_save\.default)$", "", n) for n in dense} == {
        re.sub(r"(\.base_layer|\.original_module|\.modules_to_save\.default)$", "", n)
        for n in linear
        if set(family.dense) & set(n.split("."))
    }

    model.train()
    model(**inputs).logits.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "lora_" in name:
            assert parameter.grad.abs().sum() > 0, name
    assert not any(p.grad is not None for name, p in model.named_parameters() if name not in trained)
    torch.optim.AdamW(trained.values(), lr=1e-2).step()

    def output(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of.eval()(**inputs).logits

    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert relative(output(quantize_model(base)), expected) > DIFFERENT
    assert relative(output(loaded), expected) <= SAME
    merged = loaded.merge_and_unload()
    assert not any(isinstance(module, bnb.nn.Linear4bit | LoraLayer) for module in merged.modules())
    assert relative(output(merged), expected) <= SAME
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(type(merged).from_pretrained(tmp_path / "merged")), output(merged))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_values_are_stock_pefts(init: Any, base: nn.Module) -> None:
    torch.manual_seed(1)
    ours = adapted(base, init_lora_weights=init)
    torch.manual_seed(1)
    stock = get_peft_model(
        quantize_model(copy.deepcopy(base)), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    )
    found, expected = get_peft_model_state_dict(ours), get_peft_model_state_dict(stock)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_orthogonal_initialisation_is_refused_on_nf4_and_honoured_on_a_dense_base(base: nn.Module) -> None:
    """PEFT's stumbles over 4-bit weights, after the base was changed."""
    with pytest.raises(ConfigError, match="orthogonal"):
        config(init_lora_weights="orthogonal")
    model = adapted(base, init_lora_weights="orthogonal", quantization=None)
    for name, layer in lora_layers(model).items():
        A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        assert_close(B @ A, torch.zeros(B.shape[0], A.shape[1]).double(), rtol=0, atol=1e-6, msg=name)
        assert A.abs().sum() > 0, name
        assert B.abs().sum() > 0, name


# --- what does not match ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["nope", "neither"]}, ["neither", "nope", "q_proj", "down_proj", "all-linear"]),
        ({"target_modules": r".*\.nope"}, ["nope", "q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, ["layers_to_transform': [7]", "q_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["q_proj", "down_proj"]),
    ],
    ids=["names", "regex", "layers", "excluded"],
)
def test_no_match_names_the_layers_and_changes_nothing(
    settings: dict[str, Any], words: list[str], base: nn.Module
) -> None:
    model = copy.deepcopy(base)
    before, classes = state_bytes(model), {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(NoMatchingPeftModuleError) as error:
        get_peft_model(model, config(**settings))
    assert all(word in str(error.value) for word in words)
    assert state_bytes(model) == before
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not hasattr(model, "peft_config")
    assert not hasattr(model.config, "quantization_config")


def test_no_match_of_parameters_changes_nothing(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    before = state_bytes(model)
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(model, config(target_modules=[], target_parameters=["mlp.nope.weight"]))
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert state_bytes(model) == before


def test_no_match_names_conv1d_layers_too() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"c_attn.*c_fc.*c_proj"):
        get_peft_model(gpt2(), config(target_modules=["q_proj"]))


def test_no_match_of_a_second_adapter_keeps_the_first(base: nn.Module, ids: Tensor) -> None:
    model = adapted(base)
    expected = logits(model, ids)
    with pytest.raises(NoMatchingPeftModuleError, match="q_proj") as error:
        model.add_adapter("second", config(target_modules=["nope"]))
    assert "base_layer" not in str(error.value)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, ids), expected)


def test_a_second_adapter_with_another_quantization_is_refused(base: nn.Module, ids: Tensor) -> None:
    model = adapted(base)
    expected = logits(model, ids)
    with pytest.raises(BaseModelError, match=r"'block_size': 64.*'block_size': 128"):
        model.add_adapter("second", config(quantization=NF4Config(block_size=128)))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, ids), expected)


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(base: nn.Module, tmp_path: Path, ids: Tensor) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Two adapters on disk with other scalings and targets, and what each computes; "" is the quantized base."""
    settings: dict[str, dict[str, Any]] = {
        "first": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}},
        "second": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    }
    paths, outputs = {}, {"": logits(quantize_model(copy.deepcopy(base)), ids)}
    for name, values in settings.items():
        model = adapted(base, **values)
        outputs[name] = logits(model, ids)
        paths[name] = tmp_path / name
        model.save_pretrained(paths[name])
    assert all(relative(outputs[a], outputs[b]) > DIFFERENT for a, b in (("first", "second"), ("first", "")))
    return paths, outputs


Pair = tuple[dict[str, Path], dict[str, Tensor]]


def loaded_pair(base: nn.Module, pair: Pair) -> PeftModel:
    model = PeftModel.from_pretrained(copy.deepcopy(base), pair[0]["first"], adapter_name="first")
    model.load_adapter(pair[0]["second"], adapter_name="second")
    return model.eval()


def test_adapters_are_switched_disabled_and_deleted(base: nn.Module, pair: Pair, ids: Tensor) -> None:
    model, outputs = loaded_pair(base, pair), pair[1]
    assert relative(logits(model, ids), outputs["first"]) <= SAME
    model.set_adapter("second")
    assert relative(logits(model, ids), outputs["second"]) <= SAME
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), outputs[""])
    assert relative(logits(model, ids), outputs["second"]) <= SAME
    model.delete_adapter("second")
    assert relative(logits(model, ids), outputs["first"]) <= SAME
    assert not any("second" in layer.lora_A for layer in lora_layers(model).values())
    assert torch.equal(logits(model.unload(), ids), outputs[""])


def test_a_mixed_batch_uses_each_rows_adapter(base: nn.Module, pair: Pair) -> None:
    model, ids = loaded_pair(base, pair), tokens()[:1].repeat(3, 1)
    mixed = logits(model, ids, adapter_names=["first", "__base__", "second"])
    expected = []
    for name in ("first", "second"):
        model.set_adapter(name)
        expected.append(logits(model, ids)[0])
    with model.disable_adapter():
        expected.insert(1, logits(model, ids)[0])
    for row, alone in zip(mixed, expected, strict=True):
        assert relative(row, alone) <= SAME


def test_two_active_adapters_add_up(base: nn.Module, pair: Pair, ids: Tensor) -> None:
    """Against a dense model with both ΔW added to its weights."""
    model = loaded_pair(base, pair)
    model.base_model.set_adapter(["first", "second"])
    dense = quantize_model(copy.deepcopy(base)).dequantize()
    for name, layer in lora_layers(model).items():
        weight = dense.get_submodule(name.removeprefix("base_model.model.")).weight
        for adapter in layer.lora_A:
            weight.data += delta(layer, adapter).float()
    assert relative(logits(model, ids), logits(dense, ids)) <= SAME


def test_adapters_are_saved_and_loaded_together(base: nn.Module, pair: Pair, ids: Tensor, tmp_path: Path) -> None:
    model, outputs = loaded_pair(base, pair), pair[1]
    model.save_pretrained(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir() if path.is_dir()} == {"first", "second"}
    for name in ("first", "second"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / name)
        assert relative(logits(again, ids), outputs[name]) <= SAME


STOCK = {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("four_bit", ["in place", "streamed"])
@pytest.mark.parametrize("order", [("stock", "ours"), ("ours", "stock")], ids=" then ".join)
def test_stock_and_ours_share_a_4bit_base(
    order: tuple[str, str], four_bit: str, base: nn.Module, folder: Path, ids: Tensor, tmp_path: Path
) -> None:
    configs = {"stock": LoraConfig(**STOCK), "ours": config(use_rslora=True)}
    if four_bit == "streamed":
        quantized = tf.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config().to_bitsandbytes(), dtype=torch.float32
        )
        for module in quantized.modules():  # the packing of an eval forward before ours is added is another test's
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
    else:
        quantized = quantize_model(copy.deepcopy(base))
    expected, dense = {}, quantize_model(copy.deepcopy(base)).dequantize()
    model = get_peft_model(quantized, configs[order[0]], adapter_name=order[0]).eval()
    model.add_adapter(order[1], configs[order[1]])
    for name in order:
        model.set_adapter(name)
        twin = copy.deepcopy(dense)
        for key, layer in lora_layers(model).items():
            if name in layer.lora_A:
                twin.get_submodule(key.removeprefix("base_model.model.")).weight.data += delta(layer, name).float()
        expected[name] = logits(twin, ids)
        assert relative(logits(model, ids), expected[name]) <= SAME, name
    assert relative(expected["stock"], expected["ours"]) > DIFFERENT
    assert all(type(layer) is LoraLinear4bit for layer in lora_layers(model).values())  # stock adapters merge well too
    model.set_adapter("stock")
    model.merge_adapter()
    assert relative(logits(model, ids), expected["stock"]) <= SAME
    model.unmerge_adapter()

    model.save_pretrained(tmp_path)
    saved = {name: json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in order}
    assert "hf_qlora" in saved["ours"]
    assert "hf_qlora" not in saved["stock"]
    for name in order:
        again = PeftModel.from_pretrained(quantize_model(copy.deepcopy(base)), tmp_path / name)
        assert relative(logits(again, ids), expected[name]) <= SAME, name


def test_ours_after_stock_on_a_dense_base_is_refused_or_right(base: nn.Module, ids: Tensor) -> None:
    """A stock adapter was trained on the dense base; its own `lora_A` and `lora_B` are linear layers, too."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**STOCK), adapter_name="stock").eval()
    before, stock = state_bytes(model), logits(model, ids)
    try:
        model.add_adapter("ours", config(target_modules=["q_proj", "v_proj"]))
    except (ConfigError, BaseModelError):
        assert state_bytes(model) == before
        assert list(model.peft_config) == ["stock"]
        assert torch.equal(logits(model, ids), stock)
        return
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.dtype == torch.float32 for p in adapters)
    assert relative(logits(model, ids), stock) < 0.5  # NF4 of the base, and no more
    model.set_adapter("ours")
    expected = logits(model, ids)
    model.merge_adapter()
    assert relative(logits(model, ids), expected) <= SAME


def test_a_stock_adapter_on_a_dense_base_stays_stock(base: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**STOCK))
    assert not any(isinstance(module, bnb.nn.Linear4bit | LoraLinear4bit) for module in model.modules())
    stock_on_4bit = get_peft_model(quantize_model(copy.deepcopy(base)), LoraConfig(**STOCK))
    assert {type(layer) for layer in lora_layers(stock_on_4bit).values()} == {PeftLinear4bit}


def test_adding_an_adapter_while_another_is_merged(base: nn.Module, ids: Tensor) -> None:
    model = adapted(base, target_modules=["q_proj"])
    packed = {n: m.base_layer.weight for n, m in lora_layers(model).items()}
    expected = logits(model, ids)
    model.merge_adapter()
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj"]))
    model.unmerge_adapter()
    assert all(lora_layers(model)[name].base_layer.weight is weight for name, weight in packed.items())
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("make", [llama, lambda: nn.ModuleDict({"q": nn.Linear(64, 64)})], ids=["llama", "plain"])
def test_adding_an_adapter_while_everything_is_merged_is_refused_or_right(make: Callable[[], nn.Module]) -> None:
    """No 4-bit layer is left to be seen then, and the merged weights must not be quantized."""
    targets = "all-linear" if make is llama else ["q"]
    model = get_peft_model(make(), config(target_modules=targets, task_type=None))
    packed = {name: layer.base_layer for name, layer in lora_layers(model).items()}
    model.merge_adapter()
    merged = {name: layer.base_layer for name, layer in lora_layers(model).items()}
    try:
        model.add_adapter("second", config(target_modules=targets, task_type=None))
    except (BaseModelError, ConfigError) as error:
        assert "unmerge" in str(error)  # noqa: PT017
        assert list(model.peft_config) == ["default"]
    for name, layer in lora_layers(model).items():
        assert layer.base_layer is (merged if layer.merged else packed)[name]
        assert all(p.is_floating_point() for p in layer.lora_A.parameters())
    model.unmerge_adapter()
    assert all(layer.base_layer is packed[name] for name, layer in lora_layers(model).items())


# --- weighted adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_weighted_adapter_is_the_weighted_sum(
    kind: str, use_rslora: bool, base: nn.Module, ids: Tensor, tmp_path: Path
) -> None:
    """`cat`, and `svd` with the rank to hold it, are the sum of the ΔW; `linear` is PEFT's own approximation, which
    is the sum where both adapters share their `lora_A`. Saved and loaded, it stays the same function."""
    settings = {"use_rslora": use_rslora, "alpha_pattern": {"q_proj": 3}}
    model = adapted(base, **settings)
    model.add_adapter("second", config(**settings))
    if kind == "linear":
        for layer in lora_layers(model).values():
            layer.lora_A["second"].weight.data.copy_(layer.lora_A["default"].weight)
    options = {"svd_rank": 8} if kind == "svd" else {}
    weights = [0.7, 0.7] if kind == "linear" else [0.75, -0.5]
    model.add_weighted_adapter(["default", "second"], weights, "both", combination_type=kind, **options)
    for name, layer in lora_layers(model).items():
        parts = [w * delta(layer, adapter) for w, adapter in zip(weights, ("default", "second"), strict=True)]
        expected = sum(parts)
        if kind == "linear":
            # PEFT adds A and B apart: (√w₁s A + √w₂s A)(√w₁s B₁ + √w₂s B₂) = 2w s A (B₁ + B₂) for equal weights
            expected = 2 * expected
        assert_close(delta(layer, "both"), expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=name)
    model.set_adapter("both")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    assert isinstance(loaded.peft_config["default"], QLoRAConfig)
    assert relative(logits(loaded, ids), expected) <= SAME


def test_adapters_that_began_with_loftq_can_be_combined(base: nn.Module) -> None:
    """The new adapter copies their config; it must not ask for the dense weights again."""
    model = adapted(base, init_lora_weights="loftq")
    model.add_weighted_adapter(["default"], [0.5], "halved", combination_type="cat")
    for name, layer in lora_layers(model).items():
        assert_close(delta(layer, "halved"), 0.5 * delta(layer, "default"), rtol=1e-5, atol=1e-7, msg=name)


# --- hot-swap --------------------------------------------------------------------------------------------------------

SWAPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({}, {"use_rslora": True}),
    "off rslora": ({"use_rslora": True}, {}),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {"v_proj": 5, "q_proj": 1}}),
    "all": (
        {"use_rslora": True, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": False, "alpha_pattern": {r"layers\.0.*up_proj": 30}},
    ),
    "lora_alpha": ({"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 2}),
    "larger rank": ({"r": 4}, {"r": 6, "use_rslora": True}),
    "smaller rank": ({"r": 6, "use_rslora": True}, {"r": 4}),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "other rank_pattern": ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 3}}),
    "not portable": ({"use_rslora": True, "portable": False}, {"use_rslora": True, "portable": False}),
    "not portable, alpha_pattern": (
        {"alpha_pattern": {"q_proj": 3}, "portable": False},
        {"alpha_pattern": {"q_proj": 3}, "portable": False},
    ),
    "to portable": ({"portable": False}, {"use_rslora": True}),
}


@pytest.mark.parametrize("trained", [False, True], ids=["loaded", "trained"])
@pytest.mark.parametrize("name", SWAPS)
def test_hot_swap_is_loading(name: str, trained: bool, base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    """Onto an adapter that was loaded or that was trained here; and swapped, saved and loaded, folded once."""
    old, new = SWAPS[name]
    source = adapted(base, **new)
    expected = logits(source, ids)
    source.save_pretrained(tmp_path / "new")
    model = adapted(base, **old)
    if not trained:
        model.save_pretrained(tmp_path / "old")
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval()
    assert relative(logits(model, ids), expected) > DIFFERENT
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    assert relative(logits(model, ids), expected) <= SAME
    model.save_pretrained(tmp_path / "swapped")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "swapped")
    assert relative(logits(again, ids), expected) <= SAME
    assert relative(logits(again.merge_and_unload(), ids), expected) <= SAME


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3"]}),
        ("gpt2", {}),
    ],
    ids=["target_parameters", "experts", "Conv1D"],
)
def test_hot_swap_of_other_kinds_of_layers(family: str, settings: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    """Experts have r rows of `lora_A` each. (PEFT itself refuses embeddings and DoRA, before anything changes.)"""
    base = architecture(family).make()
    source = adapted(base, use_rslora=True, **settings)
    expected = logits(source, ids)
    source.save_pretrained(tmp_path / "new")
    model = adapted(base, **settings)
    assert relative(logits(model, ids), expected) > DIFFERENT
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    assert relative(logits(model, ids), expected) <= SAME
    model.save_pretrained(tmp_path / "swapped")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "swapped")
    assert relative(logits(again, ids), expected) <= SAME


def test_swapping_back_and_forth_ends_where_it_began(base: nn.Module, pair: Pair, ids: Tensor, tmp_path: Path) -> None:
    paths = {}
    for name, settings in (("a", {"use_rslora": True}), ("b", {"alpha_pattern": {"q_proj": 1}})):
        paths[name] = str(tmp_path / name)
        adapted(base, **settings).save_pretrained(paths[name])
    model = PeftModel.from_pretrained(copy.deepcopy(base), paths["a"])
    hotswap_adapter(model, paths["a"], "default", torch_device="cpu")
    first, tensors = logits(model, ids), get_peft_model_state_dict(model)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    for name in ("b", "a", "b", "a"):
        hotswap_adapter(model, paths[name], "default", torch_device="cpu")
    assert torch.equal(logits(model, ids), first)
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_stock_and_ours_swap_with_each_other(base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    quantized = quantize_model(copy.deepcopy(base))
    stock = get_peft_model(
        copy.deepcopy(quantized),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    ours = adapted(base, target_modules=["q_proj", "v_proj"], use_rslora=True)
    outputs = {"stock": logits(stock, ids), "ours": logits(ours, ids)}
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    hotswap_adapter(ours, str(tmp_path / "stock"), "default", torch_device="cpu")
    hotswap_adapter(stock, str(tmp_path / "ours"), "default", torch_device="cpu")
    assert relative(logits(ours, ids), outputs["stock"]) <= SAME
    assert relative(logits(stock, ids), outputs["ours"]) <= SAME
    ours.save_pretrained(tmp_path / "ours again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours again")
    assert relative(logits(again, ids), outputs["stock"]) <= SAME


# --- ways to load ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path, ids: Tensor, tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter whose config knows its base, with a scaling that must be folded, and what it computes."""
    model = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(folder), config(use_rslora=True, alpha_pattern={"q_proj": 3})
    )
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", logits(model, ids)


def _peft(path: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), path)


def _low_memory(path: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(folder), path, low_cpu_mem_usage=True, is_trainable=True
    )


def _on_4bit(path: Path, folder: Path) -> nn.Module:
    quantization = NF4Config().to_bitsandbytes()
    return PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32), path
    )


def _on_quantized(path: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(quantize_model(tf.AutoModelForCausalLM.from_pretrained(folder)), path)


def _auto_peft(path: Path, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(path)


def _auto_model(path: Path, folder: Path) -> nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(path)


def _auto_model_4bit(path: Path, folder: Path) -> nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=NF4Config().to_bitsandbytes(), dtype=torch.float32
    )


def _load_adapter(path: Path, folder: Path) -> nn.Module:
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(str(path))
    return model


LOADERS: list[Callable[[Path, Path], nn.Module]] = [
    _peft,
    _low_memory,
    _on_4bit,
    _on_quantized,
    _auto_peft,
    _auto_model,
    _auto_model_4bit,
    _load_adapter,
]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__[1:])
def test_every_way_of_loading_gives_the_same_function(
    load: Callable[[Path, Path], nn.Module], saved: tuple[Path, Tensor], folder: Path, ids: Tensor, tmp_path: Path
) -> None:
    """And saved from there it is the same adapter again."""
    path, expected = saved
    model = load(path, folder)
    assert relative(logits(model, ids), expected) <= SAME
    layers = lora_layers(model)
    assert len(layers) == 14
    assert {type(layer) for layer in layers.values()} == {LoraLinear4bit}
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    assert relative(logits(_peft(tmp_path / "again", folder), ids), expected) <= SAME
    assert relative(logits(_auto_model(tmp_path / "again", folder), ids), expected) <= SAME


@pytest.mark.parametrize("load", [_peft, _low_memory, _auto_peft], ids=lambda load: load.__name__[1:])
def test_pefts_loaders_give_the_native_adapter_back(
    load: Callable[[Path, Path], nn.Module], saved: tuple[Path, Tensor], folder: Path
) -> None:
    model = load(saved[0], folder)
    own = model.peft_config["default"]
    assert (own.use_rslora, own.alpha_pattern) == (True, {"q_proj": 3})
    for name, layer in lora_layers(model).items():
        assert layer.scaling["default"] == pytest.approx((3 if "q_proj" in name else 8) / 2), name


def test_loading_on_a_dense_base_says_that_it_quantizes(
    saved: tuple[Path, Tensor], base: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved[0])
    assert "quantized the dense base in place" in caplog.text
    assert "quantization=None" in caplog.text


def test_transformers_loads_two_adapters(base: nn.Module, pair: Pair, ids: Tensor) -> None:
    model, outputs = copy.deepcopy(base), pair[1]
    for name in ("first", "second"):
        model.load_adapter(str(pair[0][name]), adapter_name=name)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert relative(logits(model, ids), outputs[name]) <= SAME
    model.disable_adapters()
    assert torch.equal(logits(model, ids), outputs[""])
    model.enable_adapters()
    model.delete_adapter("second")
    model.set_adapter("first")
    assert relative(logits(model, ids), outputs["first"]) <= SAME


def test_transformers_add_adapter_trains_and_saves(base: nn.Module, ids: Tensor, tmp_path: Path, folder: Path) -> None:
    model = copy.deepcopy(base)
    model.add_adapter(config(use_rslora=True, alpha_pattern={"q_proj": 3}))
    assert {type(layer) for layer in lora_layers(model).values()} == {LoraLinear4bit}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["use_rslora"] is False
    assert values["alpha_pattern"] == {}
    assert values["hf_qlora"]["originals"]["use_rslora"] is True
    for load in (_peft, _load_adapter):
        assert relative(logits(load(tmp_path, folder), ids), expected) <= SAME


@pytest.mark.parametrize("form", ["dense", "4-bit"])
def test_without_quantization_the_base_is_taken_as_it_is(
    form: str, base: nn.Module, folder: Path, ids: Tensor, tmp_path: Path
) -> None:
    """fp4 without nesting is nothing that we make, and yet merges exactly and trains."""
    if form == "dense":
        start = copy.deepcopy(base)
    else:
        quantization = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        start = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    before = state_bytes(start)
    model = get_peft_model(start, config(quantization=None, use_rslora=True)).eval()
    after = state_bytes(model.base_model.model)
    assert all(
        after[name if name in after else re.sub(r"\.(weight|bias)", r".base_layer.\1", name, count=1)] == value
        for name, value in before.items()
    )
    expected = logits(model, ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert QLoRAConfig.from_pretrained(tmp_path).quantization is None
    if form == "dense":
        assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
        assert relative(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), ids), expected) <= SAME
    else:
        assert {type(layer) for layer in lora_layers(model).values()} == {LoraLinear4bit}
    assert relative(logits(model.merge_and_unload(), ids), expected) <= SAME


def test_quantization_can_be_declined_on_loading(base: nn.Module, saved: tuple[Path, Tensor], ids: Tensor) -> None:
    own = QLoRAConfig.from_pretrained(saved[0])
    own.quantization = None
    model = PeftModel.from_pretrained(copy.deepcopy(base), saved[0], config=own)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base, ids))
    assert DIFFERENT < relative(logits(model, ids), saved[1]) < 0.5  # the same ΔW on another base


# --- fields of LoraConfig --------------------------------------------------------------------------------------------


def test_layers_to_transform_adapts_these_and_quantizes_all(base: nn.Module) -> None:
    model = adapted(base, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    assert {name.partition("layers.")[2] for name in lora_layers(model)} == {"1.self_attn.q_proj", "1.mlp.up_proj"}
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14


def test_exclude_modules_are_quantized_and_not_adapted(base: nn.Module) -> None:
    model = adapted(base, target_modules="all-linear", exclude_modules=["down_proj", "up_proj"])
    assert len(lora_layers(model)) == 10
    assert not any(name.endswith(("down_proj", "up_proj")) for name in lora_layers(model))
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "o_proj"])
def test_modules_to_save_are_dense_trained_and_saved(
    module: str, base: nn.Module, ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(base, target_modules=["q_proj"], modules_to_save=[module], use_rslora=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and module in name}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(loaded, ids), expected) <= SAME
    merged = loaded.merge_and_unload()
    assert relative(logits(merged, ids), expected) <= SAME
    weight = merged.get_submodule(next(n for n, _ in merged.named_modules() if n.endswith(module))).weight
    assert torch.equal(weight, next(iter(trained.values())))


def test_trainable_tokens_are_trained_and_saved(base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(base, target_modules=["q_proj"], trainable_token_indices=[int(ids[0, 0]), int(ids[0, 1])])
    (name,) = [name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    parameter = model.get_parameter(name)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert parameter.grad.abs().sum() > 0
    parameter.data.add_(0.1)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(loaded, ids), expected) <= SAME
    assert relative(logits(loaded.merge_and_unload(), ids), expected) <= SAME


def test_target_parameters_adapt_dense_experts(tmp_path: Path) -> None:
    family = architecture("mixtral")
    base, ids = family.make(), tokens()
    model = adapted(
        base,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        use_rslora=True,
    )
    experts = {name for name, p in model.named_parameters() if p.requires_grad and "experts" in name}
    assert len(experts) == 2 * 2 * 2  # layers, parameters, A and B
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in experts)
    expected = logits(model, ids)
    assert relative(logits(quantize_model(copy.deepcopy(base)), ids), expected) > DIFFERENT
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(loaded, ids), expected) <= SAME
    assert relative(logits(loaded.merge_and_unload(), ids), expected) <= SAME


def test_targets_in_skip_modules_are_adapted_dense(base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    """And come back so: the quantization is in the file."""
    model = adapted(base, quantization=NF4Config(skip_modules=("lm_head", "q_proj")), use_rslora=True)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name, layer in lora_layers(loaded).items():
        assert isinstance(layer.base_layer, Linear4bit) == ("q_proj" not in name), name
    assert relative(logits(loaded, ids), expected) <= SAME
    assert relative(logits(loaded.merge_and_unload(), ids), expected) <= SAME


def test_replicated_layers_are_trained_apart(base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(base, layer_replication=[[0, 2], [1, 2]], use_rslora=True)
    assert len(lora_layers(model)) == 21
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(loaded, ids), expected) <= SAME
    assert relative(logits(loaded.merge_and_unload(), ids), expected) <= SAME


def test_a_model_is_adapted_again_after_unloading_and_after_merging(base: nn.Module, ids: Tensor) -> None:
    for end in ("unload", "merge_and_unload"):
        again = get_peft_model(getattr(adapted(base), end)(), config()).eval()
        assert {type(layer) for layer in lora_layers(again).values()} == {LoraLinear4bit}
        expected = logits(again, ids)
        assert relative(logits(again.merge_and_unload(), ids), expected) <= SAME


def test_low_memory_injection_leaves_the_base_in_memory(base: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(base), config(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"meta"}
    packed = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(packed) == 14
    assert all(w.device.type == w.quant_state.absmax.device.type == "cpu" for w in packed)
    expected = quantize_model(copy.deepcopy(base))
    found = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(found[name], p) for name, p in expected.named_parameters())


def test_embedding_adapters_live_beside_a_4bit_base(base: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(base, target_modules=["embed_tokens", "q_proj"], use_rslora=True)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(loaded, ids), expected) <= SAME
    loaded.merge_adapter()
    assert relative(logits(loaded, ids), expected) <= SAME
    loaded.unmerge_adapter()
    assert relative(logits(loaded, ids), expected) <= SAME
    assert relative(logits(loaded.merge_and_unload(), ids), expected) <= SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_masters_on_a_half_precision_base(dtype: torch.dtype, ids: Tensor, base: nn.Module) -> None:
    """And nothing of the base is cast up: embeddings, norms and head keep their dtype."""
    model = get_peft_model(copy.deepcopy(base).to(dtype), config())
    for name, parameter in model.named_parameters():
        expected = torch.float32 if "lora_" in name else torch.uint8 if hasattr(parameter, "quant_state") else dtype
        assert parameter.dtype == expected, name
    out = model.train()(input_ids=ids, labels=ids)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_models_that_are_not_transformers_are_adapted_too(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))

    model = get_peft_model(make(), config(target_modules=["0"], task_type=None, use_rslora=True)).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    assert type(model.base_model.model[0]) is LoraLinear4bit
    assert type(model.base_model.model[2]) is Linear4bit
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert relative(loaded(x), expected) <= SAME
    merged = loaded.merge_and_unload()
    assert [type(module) for module in merged] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not getattr(merged, "is_loaded_in_4bit", False)
    assert relative(merged(x), expected) <= SAME


def test_embeddings_that_return_a_tuple_let_gradients_in() -> None:
    """As Swin's do, with the size of the image."""
    model = tf.SwinForImageClassification(
        tf.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 4], image_size=32, patch_size=2, window_size=4)
    )
    model = get_peft_model(model, QLoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_what_a_packed_layer_returns_may_be_changed_in_place() -> None:
    """As wav2vec2 masks the output of its projection while it trains."""
    model = tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(32,) * 3,
            conv_stride=(4, 4, 4), conv_kernel=(8, 4, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            vocab_size=8, mask_time_prob=0.5, mask_time_length=2, mask_time_min_masks=1,
        )
    )  # fmt: skip
    model = get_peft_model(model, QLoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.train()(input_values=torch.randn(2, 4000), labels=torch.randint(1, 8, (2, 4))).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


# What torch does to whole models


def trained_on(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of a step of a model whose `lora_B` is not zero, and its loss."""
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


def with_adapter(base: nn.Module, seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


# A product of half precision is off by 2^-11 or 2^-8; through two layers and their backward a few of these add up.
NEAR = {torch.float16: 2**-7, torch.bfloat16: 2**-4, torch.float32: 0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_narrow_and_keeps_masters(dtype: torch.dtype, ids: Tensor, base: nn.Module) -> None:
    model = with_adapter(base)
    expected = trained_on(model, ids)
    with torch.autocast("cpu", dtype):
        found = trained_on(model, ids)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)  # it was on
    for name in expected:
        assert found[name].dtype == torch.float32
        assert relative(found[name], expected[name]) <= NEAR[dtype], name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "to"])
def test_a_cast_model_is_trained_in_that_dtype(cast: str, ids: Tensor, base: nn.Module) -> None:
    """Adapters too, which is what was asked for; the codes stay, and cast back the model is near what it was."""
    model = with_adapter(base)
    expected = trained_on(model, ids)
    dtype = {"half": torch.float16, "float": torch.float32}.get(cast, torch.bfloat16)
    model.to(dtype) if cast == "to" else getattr(model, cast)()
    found = trained_on(model, ids)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    for name in expected:
        assert relative(found[name].float(), expected[name]) <= NEAR[dtype], name
    back = trained_on(model.float(), ids)
    for name in expected:  # dense weights and adapters have been rounded
        assert relative(back[name], expected[name]) <= NEAR[dtype], name


def test_transformers_own_casts_stay_refused(base: nn.Module) -> None:
    model = with_adapter(base)
    with pytest.raises(ValueError, match="not supported"):
        model.get_base_model().half()
    with pytest.raises(TypeError, match="NF4 layers compute in"):
        model.double()


def test_a_deep_copy_trains_by_itself(ids: Tensor, base: nn.Module) -> None:
    model = with_adapter(base)
    expected = trained_on(model, ids)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in trained_on(twin, ids).items())
    twin(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert trained_on(twin, ids)["loss"] < expected["loss"]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in trained_on(model, ids).items())


def test_a_whole_state_dict_is_the_whole_model(ids: Tensor, base: nn.Module, tmp_path: Path) -> None:
    """Base and adapter, into a model that had others."""
    model = with_adapter(base)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(7)
    other = with_adapter(type(base)(base.config), seed=7)
    expected = trained_on(model, ids)
    assert not torch.equal(trained_on(other, ids)["loss"], expected["loss"])
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in trained_on(other, ids).items())
