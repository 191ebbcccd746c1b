"""A fingerprint: what it is of, that nothing but the base moves it, and what two of them say side by side."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, llama
from bitsandbytes.functional import QuantState, _convert_weight_packed_for_cpu
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_qlora import NF4Config, QLoRAConfig, quantize_model
from hf_qlora.config.fingerprint import DensePrint, Fingerprint, LayerPrint, check_base
from hf_qlora.quant import fingerprint as fingerprints
from hf_qlora.quant.base import take_over
from hf_qlora.quant.comparison import compare
from hf_qlora.quant.fingerprint import positions, take_fingerprint
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit
from hf_qlora.validation import ConfigError


GOLDEN = Path(__file__).parents[1] / "golden" / "fingerprint.json"
SMALL = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors here are far too small to share


def dense_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return llama(**{**SMALL, **changes})


def base(seed: int = 0, config: NF4Config | None = None, **changes: Any) -> Any:
    return quantize_model(dense_model(seed, **changes), config)


def taken(model: nn.Module) -> Fingerprint:
    found = take_fingerprint(model)
    assert found is not None
    return found


def layers_of(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def codes_of(layer: Linear4bit) -> list[int]:
    """All codes of a layer, unpacked one by one: the first of a byte is in its upper half."""
    return [code for byte in layer.weight.data.view(-1).tolist() for code in (byte >> 4, byte & 15)]


def flip(layer: Linear4bit, *indices: int) -> None:
    for i in indices:
        layer.weight.data.view(-1)[i // 2] ^= 16 if i % 2 == 0 else 1


# ── What it is of ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 4096, 28_311_552, 10**12])
def test_positions_are_the_golden_ratios_multiples(count: int) -> None:
    """In exact arithmetic with φ to 60 digits. 64 bits of it are off by 64 · 2⁻⁶⁴ n, less than one position."""
    digits = 10**60
    phi = Fraction(digits + math.isqrt(5 * digits**2), 2 * digits)
    expected = [math.floor((i * phi % 1) * count) for i in range(1, min(64, count) + 1)]
    found = positions(count, 64)
    assert len(found) == len(expected)
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert found[:20] == tuple(expected[:20])
    assert all(0 <= i < count for i in found)


def test_positions_are_spread_over_all_of_a_weight() -> None:
    """No tenth of it is without a sample, so that a weight cut off or spoilt in part is seen."""
    for count in (640, 10_007, 2**24):
        assert {10 * i // count for i in positions(count, 64)} == set(range(10))


def test_samples_are_what_is_there() -> None:
    model = base()
    found = taken(model)
    assert found.layers.keys() == layers_of(model).keys()
    for name, layer in layers_of(model).items():
        codes, state, sampled = codes_of(layer), layer.state, found.layers[name]
        assert sampled.codes == "".join(f"{codes[i]:x}" for i in positions(len(codes), 64))
        # bitsandbytes dequantizes scales by itself; 6 digits are kept
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        expected = [scales[i].item() for i in positions(len(scales), 4)]
        assert sampled.scales == pytest.approx(expected, rel=1e-5)
    embedding = model.model.embed_tokens.weight.reshape(-1)
    assert found.dense["model.embed_tokens.weight"].shape == (500, 64)
    expected = [embedding[i].item() for i in positions(len(embedding), 32)]
    assert found.dense["model.embed_tokens.weight"].values == pytest.approx(expected, rel=1e-5)


def test_a_hash_is_sha256_over_all_of_a_layer() -> None:
    model = base()
    for name, layer in layers_of(model).items():
        state, codes = layer.state, np.array(codes_of(layer), dtype=np.uint8)
        content = f"{tuple(state.shape)} nf4 64 True".encode() + (codes[::2] * 16 + codes[1::2]).tobytes()
        content += state.absmax.numpy().tobytes() + state.state2.absmax.numpy().tobytes()
        content += np.float32(state.offset.item()).tobytes()
        assert taken(model).layers[name].hash == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("part", ["codes", "absmax", "offset", "absmax of absmax"])
@pytest.mark.parametrize("place", [0, -1])
def test_every_part_of_a_layer_is_hashed(part: str, place: int) -> None:
    model = base()
    before, (name, layer) = taken(model), list(layers_of(model).items())[5]
    state = layer.state
    tensor = {
        "codes": layer.weight.data,
        "absmax": state.absmax,
        "offset": state.offset,
        "absmax of absmax": state.state2.absmax,
    }[part].view(-1)
    if tensor.dtype == torch.uint8:
        tensor[place] ^= 1
    else:
        tensor[place] = torch.nextafter(tensor[place], torch.tensor(math.inf))
    after = taken(model)
    assert after.root != before.root
    assert [n for n in before.layers if before.layers[n].hash != after.layers[n].hash] == [name]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_architecture_has_one(architecture: Any) -> None:
    torch.manual_seed(0)
    model = quantize_model(architecture.make())
    found = taken(model)
    assert set(found.layers) == {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    embeddings = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert {f"{name}.weight" for name in embeddings} & found.dense.keys() or not embeddings
    assert not any(name.endswith("bias") for name in found.dense)
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_dense_base_has_one_of_samples() -> None:
    model = dense_model()
    found = taken(model)
    assert (found.layers, found.format) == ({}, "")
    assert len(found.root) == 64
    assert found.dense.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("without", ["codes", "scales", "an embedding"])
def test_weights_that_are_elsewhere_have_none(without: str) -> None:
    model = base()
    layer = next(iter(layers_of(model).values()))
    if without == "codes":
        layer.weight = nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
    elif without == "scales":
        layer.state.absmax = layer.state.absmax.to("meta")
    else:
        model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.to("meta"))
    assert take_fingerprint(model) is None


def test_a_part_of_a_sharded_weight_is_not_taken_for_all_of_it() -> None:
    model = base()
    layer = next(iter(layers_of(model).values()))
    layer.weight = nn.Parameter(layer.weight.data[: layer.weight.numel() // 2].clone(), requires_grad=False)
    assert take_fingerprint(model) is None


# ── What does not move it ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_base_has_the_same_one() -> None:
    assert taken(base()) == taken(base())
    assert compare(taken(base()), taken(base())).verdict == "same"


def test_taking_it_changes_nothing() -> None:
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


ADAPTED: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "an adapted embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["nf4", "dense"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", ADAPTED)
def test_an_adapter_and_what_it_trains_are_not_part_of_it(
    options: str, tied: bool, quantization: NF4Config | None
) -> None:
    made = {"tie_word_embeddings": tied, "attention_bias": True}
    expected = taken(base(**made) if quantization else dense_model(**made))
    model = get_peft_model(dense_model(**made), QLoRAConfig(r=2, quantization=quantization, **ADAPTED[options]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert taken(model.get_base_model()) == expected


def test_merging_is_not_part_of_it() -> None:
    """The packed layers stand aside meanwhile; a dense layer that holds a sum is left out."""
    model = get_peft_model(
        dense_model(), QLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    before = taken(model.get_base_model())
    model.merge_adapter()
    assert taken(model.get_base_model()) == before
    plain = get_peft_model(dense_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = taken(plain.get_base_model())
    plain.merge_adapter()
    merged = taken(plain.get_base_model())
    left_out = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert before.dense.keys() - merged.dense.keys() == left_out
    assert compare(before, merged).verdict == "same"


def stock_4bit(storage: torch.dtype = torch.uint8, **changes: Any) -> Any:
    """The base as `from_pretrained` makes it: bitsandbytes' layers, quantized by bitsandbytes."""
    model = dense_model(**changes)
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "lm_head" not in name:
            N, K = linear.weight.shape
            layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", quant_storage=storage)
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", quant_storage=storage, module=layer
            )
            model.set_submodule(name, layer.to("cpu"))
    return model


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_bitsandbytes_layers_have_the_same_one_whatever_stores_their_bytes(storage: torch.dtype) -> None:
    model = stock_4bit(storage)
    assert next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)).weight.dtype == storage
    assert taken(model) == taken(base())
    take_over(model, NF4Config())
    assert taken(model) == taken(base())


@pytest.mark.parametrize("taken_over", [True, False])
@pytest.mark.parametrize("which", ["here", "there"])
def test_a_base_that_bitsandbytes_repacked_is_the_same_but_for_its_scales(which: str, taken_over: bool) -> None:
    """Codes come back to the bit. Scales do not, by 2⁻⁹ relative and a step of the nested code."""
    size = {"intermediate_size": 128}
    clean, model = taken(base(**size)), stock_4bit(**size)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
    if taken_over:
        take_over(model, NF4Config())
    repacked = taken(model)
    assert repacked.repacked
    assert {n: layer.codes for n, layer in repacked.layers.items()} == {
        n: layer.codes for n, layer in clean.layers.items()
    }
    pair = (clean, repacked) if which == "here" else (repacked, clean)
    assert compare(*pair).verdict == "rounding"


def test_the_unused_half_of_a_last_byte_is_not_part_of_it() -> None:
    config = NF4Config()
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(63, 5), nn.Linear(5, 63)), config)
    before = taken(model)
    model[0].weight.data.view(-1)[-1] ^= 15
    assert taken(model) == before
    model[0].weight.data.view(-1)[-1] ^= 16
    assert taken(model).root != before.root


# ── Side by side ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_threads_and_devices_are_told_from_another_base() -> None:
    """A mean in its last bit, and scale codes that it moved by a step: 3 of 131,072 were seen, here 1 of a layer."""
    model = base()
    before = taken(model)
    for layer in layers_of(model).values():
        layer.state.offset = torch.nextafter(layer.state.offset, torch.tensor(math.inf))
    result = compare(before, taken(model))
    assert result.verdict == "rounding"
    assert set(result.names) == set(layers_of(model))
    layer = list(layers_of(model).values())[3]
    layer.state.absmax[positions(len(layer.state.absmax), 4)[1]] += 1
    assert compare(before, taken(model)).verdict == "rounding"


def test_the_number_of_threads_makes_no_other_base() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(taken(base(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)))
    assert compare(*found).verdict in ("same", "rounding")


def test_one_flipped_code_names_its_layer() -> None:
    """Sampled or not, it is one of very many: rounding can do that."""
    for sampled in (True, False):
        model = base()
        before, (name, layer) = taken(model), list(layers_of(model).items())[4]
        chosen = positions(layer.state.shape.numel(), 64)
        flip(layer, chosen[7] if sampled else next(i for i in range(1000) if i not in chosen))
        result = compare(before, taken(model))
        assert (result.verdict, result.names) == ("rounding", (name,))


def test_a_few_flipped_codes_of_a_layer_are_another_base_and_name_it() -> None:
    model = base()
    before, (name, layer) = taken(model), list(layers_of(model).items())[4]
    flip(layer, *positions(layer.state.shape.numel(), 64)[:3])
    result = compare(before, taken(model))
    assert (result.verdict, result.names) == ("differs", (name,))
    assert f"{name} (61 of 64 sampled codes and 4 of 4 scales agree)" in result.found


def test_other_scales_alone_are_another_base() -> None:
    model = base()
    before, (name, layer) = taken(model), list(layers_of(model).items())[2]
    layer.state.state2.absmax *= 1.1
    layer.state.offset *= 1.1
    result = compare(before, taken(model))
    assert (result.verdict, result.names) == ("differs", (name,))


@pytest.mark.parametrize("share", [1e-4, 3e-3])
def test_a_share_of_changed_codes_is_told_by_all_layers_together(share: float) -> None:
    """210 layers of 64 samples. 0.1 % are 13: Poisson with mean 1.3 never reaches them, with mean 40 always does."""
    rng = random.Random(0)
    for _ in range(50):
        layers = [
            LayerPrint("a" * 16, "".join(rng.choice("0123456789abcdef") for _ in range(64)), (1.0,) * 4)
            for _ in range(210)
        ]
        changed = [
            replace(layer, hash="b" * 16, codes="".join("x" if rng.random() < share else c for c in layer.codes))
            for layer in layers
        ]
        pair = [
            Fingerprint("", "nf4", False, {f"layers.{i}": p for i, p in enumerate(ps)}) for ps in (layers, changed)
        ]
        assert compare(*pair).verdict == ("rounding" if share < 1e-3 else "differs")


def test_another_model_of_the_same_shape_is_named_as_such() -> None:
    result = compare(taken(base(seed=0)), taken(base(seed=1)))
    assert result.verdict == "differs"
    assert set(layers_of(base())) < set(result.names)
    assert result.cause == "another model of the same architecture"
    assert "14 of 14 quantized layers and 2 of 7 other tensors differ: model.layers.0.self_attn.q_proj" in result.found


def trained_further(model: Any, names: tuple[str, ...], change: float = 0.02) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(change * torch.randn_like(parameter) * parameter.std().nan_to_num(1))
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(512)
    return model


CAUSES: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: quantize_model(dense_model(num_hidden_layers=12).bfloat16()), "weights cast to another dtype"),
    "merged": (
        lambda: quantize_model(trained_further(dense_model(num_hidden_layers=12), ("q_proj",), 0.2)),
        "an adapter merged into the base",
    ),
    "revision": (
        lambda: quantize_model(trained_further(dense_model(num_hidden_layers=12), ("weight",), 0.1)),
        "another revision of the model, or one trained further",
    ),
    "head": (
        lambda: quantize_model(trained_further(dense_model(num_hidden_layers=12), ("lm_head",), 1.0)),
        "a trained or replaced head or embedding",
    ),
    "vocabulary": (lambda: resized(base(num_hidden_layers=12)), "another vocabulary"),
    "block size": (lambda: base(num_hidden_layers=12, config=NF4Config(block_size=32)), "other settings"),
    "nesting": (lambda: base(num_hidden_layers=12, config=NF4Config(double_quant=False)), "other settings"),
    "skipped": (
        lambda: base(num_hidden_layers=12, config=NF4Config(skip_modules=("lm_head", "down_proj"))),
        "other skip_modules",
    ),
    "dense": (lambda: dense_model(num_hidden_layers=12), "a base loaded in another way"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_was_done_to_the_base_is_the_likely_cause(cause: str) -> None:
    make, expected = CAUSES[cause]
    result = compare(taken(base(num_hidden_layers=12)), taken(make()))
    assert result.verdict == "differs"
    assert expected in result.cause
    assert result.names


def test_a_dense_base_in_another_dtype_is_the_same() -> None:
    model = taken(dense_model())
    for dtype in (torch.bfloat16, torch.float16):
        other = taken(dense_model().to(dtype))
        assert other != model
        assert compare(model, other).verdict == "same"
    assert compare(model, taken(dense_model(seed=1))).verdict == "differs"


def damaged(model: Any, how: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(how(parameter))
    return model


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled by 0.35 %": lambda w: w * 1.0035,
    "scaled by 1e-5": lambda w: w * 1.00001,
    "a tenth pruned": lambda w: w * (torch.rand_like(w) > 0.1),
    "a fifth of the signs flipped": lambda w: w * torch.where(torch.rand_like(w) < 0.2, -1.0, 1.0),
    "shifted by 1e-4": lambda w: w + 1e-4,
    "infinite": lambda w: torch.full_like(w, math.inf),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("make", [base, dense_model], ids=["nf4", "dense"])
def test_damaged_dense_weights_are_another_base(how: str, make: Callable[[], Any]) -> None:
    """Of a quantized base only the head, embeddings and norms are changed here."""
    result = compare(taken(make()), taken(damaged(make(), DAMAGE[how])))
    assert result.verdict == "differs"
    assert "lm_head.weight" in result.names


def test_one_dense_value_that_differs_is_another_base() -> None:
    model = dense_model()
    before, weight = taken(model), model.model.layers[1].mlp.up_proj.weight.data.view(-1)
    weight[positions(len(weight), 32)[20]] *= 1.0001
    result = compare(before, taken(model))
    assert (result.verdict, result.names) == ("differs", ("model.layers.1.mlp.up_proj.weight",))


def test_models_of_many_tensors_have_fewer_values_of_each() -> None:
    model = nn.ModuleList(nn.LayerNorm(64) for _ in range(512))
    assert {len(tensor.values) for tensor in taken(model).dense.values()} == {16}


def test_an_attribute_of_anothers_module_is_no_layer_of_ours() -> None:
    model = dense_model()
    model.model.norm._packed = 7
    assert taken(model) == taken(dense_model())


def test_what_only_one_side_has_of_dense_tensors_is_no_difference() -> None:
    """A base that is dense by choice has more of them."""
    quantized = taken(base())
    assert compare(quantized, taken(dense_model()), only_dense=True).verdict == "same"
    assert compare(quantized, taken(dense_model(seed=1)), only_dense=True).verdict == "differs"


# ── As JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def golden_base() -> nn.Module:
    """Of integers, so that it is the same on every machine."""
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    nn.init.constant_(model[1].weight, 0.75)
    numbers = torch.arange(32 * 64 // 2)
    state = QuantState(
        absmax=((numbers[:32] * 37) % 251).to(torch.uint8),
        shape=torch.Size((32, 64)),
        dtype=torch.float32,
        blocksize=64,
        code=torch.zeros(16),
        quant_type="nf4",
        offset=torch.tensor(2.0),
        state2=QuantState(absmax=torch.tensor([0.5]), blocksize=256, code=torch.arange(256) / 128 - 1),
    )
    become_linear4bit(model[0], ((numbers * 73) % 256).to(torch.uint8)[:, None], state, None)
    return model


def test_the_json_is_the_golden_one() -> None:
    """Adapters saved today are compared by every later version."""
    assert taken(golden_base()).to_dict() == json.loads(GOLDEN.read_text())
    assert Fingerprint.from_dict(json.loads(GOLDEN.read_text())) == taken(golden_base())


def test_dense_values_without_a_dtype_are_compared_as_far_as_they_go() -> None:
    """As fingerprints had them first: eight, and no word of what they are."""
    values = json.loads(GOLDEN.read_text())
    shape, _, numbers = values["dense"]["1.weight"].split()
    values["dense"]["1.weight"] = f"{shape} {','.join(numbers.split(',')[:8])}"
    old = Fingerprint.from_dict(values)
    assert old.to_dict() == values
    assert compare(replace(old, root=""), taken(golden_base())).verdict == "same"


def test_a_scalar_comes_back() -> None:
    """As CLIP's `logit_scale`, a parameter without dimensions."""
    model = base()
    model.logit_scale = nn.Parameter(torch.tensor(2.6592))
    fingerprint = taken(model)
    back = Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict())))
    assert back.dense["logit_scale"] == DensePrint((), (2.6592,), "float32")
    assert back == fingerprint
    assert compare(back, fingerprint).verdict == "same"
    model.logit_scale.data.fill_(4.6052)
    assert compare(back, taken(model)).names == ("logit_scale",)


def test_numbers_that_are_not_finite_come_back() -> None:
    prints = {"a": DensePrint((3,), (math.inf, -math.inf, 1e-40))}
    given = Fingerprint("", "", False, {}, prints)
    assert Fingerprint.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    broken = Fingerprint("", "", False, {}, {"a": DensePrint((3,), (math.nan,) * 3)})
    assert compare(broken, Fingerprint.from_dict(broken.to_dict())).verdict == "same"
    whole = Fingerprint("", "", False, {}, {"a": DensePrint((3,), (1.0, -1.0, 1e-40))})
    assert compare(given, whole).verdict == compare(whole, given).verdict == "differs"


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda good: None,
    "a list": lambda good: [good],
    "a text": lambda good: "eval(1)",
    "empty": lambda good: {},
    "a key too few": lambda good: {key: value for key, value in good.items() if key != "dense"},
    "root": lambda good: good | {"root": "0" * 63},
    "root of no text": lambda good: good | {"root": 7},
    "format": lambda good: good | {"format": "x" * 101},
    "format of no text": lambda good: good | {"format": ["nf4"]},
    "repacked": lambda good: good | {"repacked": "no"},
    "layers of no names": lambda good: good | {"layers": [1]},
    "dense null": lambda good: good | {"dense": None},
    "a layer of no text": lambda good: good | {"layers": {"a": {"codes": "0"}}},
    "a layer without scales": lambda good: good | {"layers": {"a": "0123456789abcdef 00"}},
    "a layer with a word": lambda good: good | {"layers": {"a": "0123456789abcdef 00 one"}},
    "a layer of many numbers": lambda good: good | {"layers": {"a": "0123456789abcdef 00 " + "1," * 2000 + "1"}},
    "a long number": lambda good: good | {"dense": {"a": "9 " + "9" * 3000}},
    "a long shape": lambda good: good | {"dense": {"a": "1" * 13 + " 1.0"}},
    "a long name": lambda good: good | {"dense": {"a" * 3000: "1 1.0"}},
    "very many layers": lambda good: good | {"layers": dict.fromkeys(map(str, range(100_001)), "- 0 1.0")},
}


@pytest.mark.parametrize("how", MALFORMED)
def test_what_is_malformed_is_refused_with_its_place_and_the_way_out(how: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json: hf_qlora\.fingerprint.*remove the key") as error:
        Fingerprint.from_dict(MALFORMED[how](taken(base()).to_dict()))
    assert len(str(error.value)) < 500


def test_a_key_of_a_newer_version_is_ignored() -> None:
    found = taken(base())
    assert Fingerprint.from_dict(found.to_dict() | {"of_tomorrow": [1]}) == found


@pytest.mark.parametrize("given", [None, [], "x", {"id": 7}, {"id": "x" * 501}, dict.fromkeys(map(str, range(21)))])
def test_a_malformed_description_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"hf_qlora\.base"):
        check_base(given)


def test_a_model_of_very_many_layers_has_a_record_of_bounded_size() -> None:
    """As mixtures of experts have: fewer samples of each. 16 codes of 4,096 layers are 65,536 in all."""
    model = nn.ModuleList()
    one = quantize_model(nn.Sequential(nn.Linear(64, 64)))[0]
    for _ in range(4096):
        model.append(copy.copy(one))
    found = taken(model)
    assert {len(layer.codes) for layer in found.layers.values()} == {16}
    assert fingerprints.CODES_IN_ALL == 16 * 4096
