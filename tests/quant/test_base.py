"""The quantized base is bitsandbytes' to the bit, only what should be quantized is, and an error changes nothing.

Oracles: `bitsandbytes.functional.quantize_4bit` on the whole weight, a base that transformers loaded with a
`BitsAndBytesConfig`, and byte counts made here from shapes. Comparisons are exact unless a tolerance is explained.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, Architecture, bert, gpt2, llama, tokens
from bitsandbytes.functional import QuantState, dequantize_4bit, has_avx512bf16, quantize_4bit
from peft import IA3Config, LoraConfig, MissConfig, PeftConfig, RoadConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationMethod

from hf_qlora import NF4Config, QLoRAConfig, quantize_model
from hf_qlora.config.nf4 import BLOCK_SIZES
from hf_qlora.quant import base, linear4bit, packing
from hf_qlora.quant.base import footprint
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.codebook import nf4_levels
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.quant.quantizer import dequantize_layers
from hf_qlora.validation import ConfigError


@pytest.fixture(autouse=True)
def _bitsandbytes_eager() -> Iterator[None]:
    """bitsandbytes compiles its dequantization anew for odd shapes and long blocks: 17 s each, the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on two threads; the module's fixture with the real model comes before."""
    torch.set_num_threads(1)


def by_architecture(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)(test)


def quantized_layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def dense_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """By bitsandbytes' own function, so that stock layers and ours are read alike."""
    layers = quantized_layers(model).items()
    return {name: dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in layers}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def state_bytes(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    state = model.state_dict().items()
    return {name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in state}


def assert_same_state(found: QuantState, expected: QuantState) -> None:
    """Every field that dequantization reads, exactly."""
    for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(found, name) == getattr(expected, name), name
    tensors = ["absmax", "code"]
    if expected.nested:
        tensors += ["offset", "state2.absmax", "state2.code"]
        assert found.state2.blocksize == expected.state2.blocksize
        assert found.state2.dtype == expected.state2.dtype
    for path in tensors:
        ours, theirs = found, expected
        for part in path.split("."):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def stock_4bit(folder: Path, **settings: Any) -> nn.Module:
    """The model as transformers alone loads it in 4 bits."""
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **config)
    )


# --- codes and scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (64, 65), (31, 750), (96, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_chunks_quantize_as_the_whole_weight(
    shape: tuple[int, int],
    dtype: torch.dtype,
    double_quant: bool,
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shapes below, one row over, and well over a chunk; with short last blocks and an odd number of weights."""
    monkeypatch.setitem(packing.CHUNK, "cpu", 4096)
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    expected, state = quantize_4bit(
        layer.weight.data, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    quantize_model(nn.Sequential(layer), NF4Config(block_size=block_size, double_quant=double_quant))
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer.weight.data, expected)
    assert_same_state(layer.weight.quant_state, state)


def test_weights_larger_than_a_chunk_quantize_as_a_whole() -> None:
    layer = nn.Linear(1000, 2 * packing.CHUNK["cpu"] // 1000 + 1)  # two chunks and a part
    expected, state = quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
    quantize_model(nn.Sequential(layer))
    assert torch.equal(layer.weight.data, expected)
    assert_same_state(layer.weight.quant_state, state)


def test_non_contiguous_weights_quantize_as_their_values() -> None:
    layer = nn.Linear(128, 64)
    layer.weight = nn.Parameter(torch.randn(128, 64).t())
    expected, state = quantize_4bit(layer.weight.data.contiguous(), compress_statistics=True, quant_type="nf4")
    quantize_model(nn.Sequential(layer))
    assert torch.equal(layer.weight.data, expected)
    assert_same_state(layer.weight.quant_state, state)


def test_in_place_equals_streamed(tmp_path: Path) -> None:
    """What transformers' streaming from_pretrained makes of the same checkpoint, weight by weight."""
    folder = saved(llama(), tmp_path)
    streamed = stock_4bit(folder)
    converted = quantize_model(tf.AutoModelForCausalLM.from_pretrained(folder))
    assert quantized_layers(converted).keys() == quantized_layers(streamed).keys()
    for name, layer in quantized_layers(converted).items():
        other = quantized_layers(streamed)[name]
        assert torch.equal(layer.weight.data, other.weight.data), name
        assert_same_state(layer.weight.quant_state, other.weight.quant_state)


def test_conv1d_is_quantized_transposed() -> None:
    model = gpt2()
    originals = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, Conv1D)}
    biases = {name: m.bias for name, m in model.named_modules() if isinstance(m, Conv1D)}
    quantize_model(model)
    assert set(quantized_layers(model)) == set(originals)
    for name, layer in quantized_layers(model).items():
        expected, state = quantize_4bit(originals[name].t().contiguous(), compress_statistics=True, quant_type="nf4")
        assert torch.equal(layer.weight.data, expected), name
        assert_same_state(layer.weight.quant_state, state)
        assert layer.bias is biases[name]
        assert (layer.out_features, layer.in_features) == tuple(reversed(originals[name].shape))


def test_biases_are_kept() -> None:
    layer = nn.Linear(64, 32)
    bias, values = layer.bias, layer.bias.detach().clone()
    quantize_model(nn.Sequential(layer))
    assert layer.bias is bias
    assert torch.equal(layer.bias, values)
    assert not layer.bias.requires_grad


# --- what stays dense ------------------------------------------------------------------------------------------------


@by_architecture
def test_heads_and_routers_stay_dense(family: Architecture) -> None:
    model = family.make()
    linear = dense_layers(model)
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    quantize_model(model)
    expected = {name for name in linear if name.rpartition(".")[2] in family.dense}
    assert expected, "the family names no dense layer"
    assert dense_layers(model) == expected
    assert set(quantized_layers(model)) == linear - expected
    for parameter in model.parameters():
        is_codes = getattr(parameter, "quant_state", None) is not None
        assert is_codes or id(parameter) in weights  # the very parameters that were there


def test_tied_heads_stay_dense_and_tied() -> None:
    model = llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    quantize_model(model)
    assert model.lm_head.weight is embedding
    assert model.model.embed_tokens.weight is embedding
    assert embedding.dtype == torch.float32


def test_a_linear_layer_tied_to_a_dense_one_stays_dense_and_tied() -> None:
    """Were one of two layers that share a parameter quantized and the other not, they would compute differently."""
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("encoder", "head", "free")})
    model["head"].weight = model["encoder"].weight
    quantize_model(model, NF4Config(skip_modules=("head",)))
    assert model["head"].weight is model["encoder"].weight
    assert dense_layers(model) == {"encoder", "head"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("mlp.down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("model.layers.1.self_attn.o_proj", {"model.layers.1.self_attn.o_proj"}),
        ("proj", set()),  # whole components only: not q_proj
        ("layers.1.mlp", {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}),
    ],
)
def test_skip_modules_are_names_suffixes_or_containers(name: str, expected: set[str], tmp_path: Path) -> None:
    """And a saved base reloads with the same layers dense, in transformers alone."""
    model = quantize_model(llama(), NF4Config(skip_modules=("lm_head", name)))
    assert dense_layers(model) == expected | {"lm_head"}
    ids = tokens()
    reloaded = tf.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert dense_layers(reloaded) == dense_layers(model)
    # Up to the rounding of another kernel's bias and addition order; the weights are equal.
    torch.testing.assert_close(logits(quantize_model(reloaded), ids), logits(model, ids), rtol=0, atol=1e-6)


def test_modules_to_save_stay_dense() -> None:
    model = quantize_model(bert(), skip=["classifier", "pooler"])
    assert dense_layers(model) == {"classifier", "bert.pooler.dense"}


def test_subclasses_of_linear_are_left_alone() -> None:
    """nn.MultiheadAttention reads `out_proj.weight` past the layer's forward: codes there are garbage or a crash."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "after": nn.Linear(64, 64)}).eval()
    x = torch.randn(2, 5, 64)
    expected = attention(x, x, x)[0]
    quantize_model(model)
    assert set(quantized_layers(model)) == {"after"}
    assert torch.equal(attention(x, x, x)[0], expected)


def test_reparametrized_layers_are_left_alone() -> None:
    """Their weight is a function of other parameters, computed before each forward: there is nothing to pack."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(64, 64))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    model = nn.ModuleDict({"old": old, "new": new, "plain": nn.Linear(64, 64)})
    x = torch.randn(3, 64)
    expected = old(x), new(x)
    quantize_model(model)
    assert set(quantized_layers(model)) == {"plain"}
    assert torch.equal(old(x), expected[0])
    assert torch.equal(new(x), expected[1])


@pytest.mark.parametrize(
    "family", [a for a in ARCHITECTURES if "mixtral" in a.name or "moe" in a.name], ids=lambda a: a.name
)
def test_3d_experts_are_named_with_their_share(family: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    model = family.make()
    experts = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3}
    share = 100 * sum(experts.values()) / sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        quantize_model(model)
    (record,) = caplog.records
    message = record.getMessage()
    assert next(iter(experts)) in message
    assert f"{len(experts)} weights" in message
    assert f"{share:.0f} %" in message


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_without_experts_warn_of_none(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A vision transformer's class token and patch convolution have three axes and more, and are no linear layers."""
    (family,) = [family for family in ARCHITECTURES if family.name == name]
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        quantize_model(family.make())
    assert not caplog.records


T5_LIKE = {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32, "vocab_size": 500}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tf.LongT5ForConditionalGeneration, tf.LongT5Config),
        (tf.SwitchTransformersForConditionalGeneration, tf.SwitchTransformersConfig),
    ],
)
def test_a_layer_whose_inputs_the_model_casts_to_its_weights_dtype_is_an_error(
    make: Any, config: Any, adapted: bool
) -> None:
    """That of codes is uint8: activations would be whole numbers, and gradients would end, without a word."""
    dense = make(config(**T5_LIKE, decoder_start_token_id=0)).eval()
    inputs = {"input_ids": tokens(), "labels": tokens()}

    def made(nf4: NF4Config) -> nn.Module:
        if not adapted:
            return quantize_model(copy.deepcopy(dense), nf4)
        # an adapter of zeros, which changes nothing
        return get_peft_model(copy.deepcopy(dense), QLoRAConfig(r=4, target_modules="all-linear", quantization=nf4))

    for mode in (True, False):
        with pytest.raises(TypeError, match=r"\(256 → 128\) got inputs of torch.uint8: .*skip_modules"):
            made(NF4Config()).train(mode)(**inputs)
    model = made(NF4Config(skip_modules=("lm_head", "wo"))).eval()
    expected = dequantize_layers(quantize_model(copy.deepcopy(dense), NF4Config(skip_modules=("lm_head", "wo"))))
    # the same products in float32, which the node and torch may sum in another order
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-5)


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_a_layer_object_used_many_times_is_quantized_once() -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == "albert"]
    model, called = family.make(), []

    def on_layer(name: str, weight: Tensor, layer: Linear4bit) -> None:
        called.append(name)

    quantize_model(model, on_layer=on_layer)
    assert called == list(quantized_layers(model))
    with torch.no_grad():
        assert model(**family.inputs()).logits.isfinite().all()


def test_modules_that_share_a_parameter_share_its_codes() -> None:
    first, second = nn.Linear(64, 32), nn.Linear(64, 32)
    second.weight = first.weight
    single = copy.deepcopy(first)
    model = quantize_model(nn.Sequential(first, second))
    quantize_model(nn.Sequential(single))
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert first.weight.quant_state.absmax.data_ptr() == second.weight.quant_state.absmax.data_ptr()
    assert torch.equal(first.weight.data, single.weight.data)
    assert torch.equal(second.dequantize(), single.dequantize())
    once = footprint(nn.Sequential(single))
    assert (footprint(model).code_bytes, footprint(model).scale_bytes) == (once.code_bytes, once.scale_bytes)


def test_replicated_layers_share_their_codes() -> None:
    """PEFT's layer_replication builds new layers around the same parameters."""
    from hf_qlora import QLoRAConfig

    plain = quantize_model(llama())
    model = get_peft_model(
        llama(), QLoRAConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
    )
    layers = model.base_model.model.model.layers
    assert len(layers) == 3
    assert layers[1].mlp.up_proj.weight.data_ptr() == layers[2].mlp.up_proj.weight.data_ptr()
    assert footprint(layers[1]).code_bytes == footprint(layers[1:]).code_bytes
    assert footprint(model).code_bytes == footprint(plain).code_bytes


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from torch import nn
from transformers.pytorch_utils import Conv1D
import hf_qlora

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

size, layers = 4096, 4
with torch.device("meta"):
    model = {
        "linear": lambda: nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))),
        "conv1d": lambda: nn.Sequential(*(Conv1D(size, size) for _ in range(layers))),
    }[sys.argv[1]]()
model.to_empty(device="cpu")
for layer in model:
    layer.weight.data.fill_(0.5)
hf_qlora.quantize_model(nn.Sequential(nn.Linear(64, 64)))  # the libraries' own memory
dense = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
hf_qlora.quantize_model(model)
print(dense, status("VmHWM:"), status("VmRSS:"))
"""
LAYER_MIB = 64


@pytest.mark.slow  # resident memory: other work on the machine must not disturb it
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_peak_memory_is_the_dense_model_and_one_layer(kind: str) -> None:
    """Four layers of 64 MiB in float32.

    A layer needs its packed form, 8 MiB, and the workspace of a chunk, 8 MiB; the allocator keeps some more.
    bitsandbytes on the whole weight needs seven layers; a transposed copy, or a dense weight that lives on into the
    next turn, one layer more.
    """
    run = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
    dense, peak, after = map(float, run.stdout.split())
    assert dense > 4 * LAYER_MIB, "the model was not in memory"
    assert peak - dense <= LAYER_MIB
    # Of 256 MiB, 33 remain in codes; the allocator may keep freed pieces of the workspace, but no weight.
    assert dense - after >= 2 * LAYER_MIB


# --- counting --------------------------------------------------------------------------------------------------------


def test_footprint_counts_every_byte_once() -> None:
    """Two layers of 64 × 64 weights and one tied pair: counted by hand."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Embedding(10, 8))
    model.append(nn.Linear(8, 10, bias=False))
    model[3].weight = model[2].weight
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    counted = footprint(quantize_model(model))
    assert counted.code_bytes == 2 * 64 * 64 // 2
    assert counted.scale_bytes == 2 * (64 + 4 + 4)  # 64 one-byte scales, the scale of their group, their mean
    assert counted.table_bytes == 4 * (16 + 256)
    assert counted.dense_bytes == 4 * 64 + 4 * 80 + 3 * 8
    assert counted.quantized_params == 2 * 64 * 64
    assert counted.dense_params == 64 + 80 + 3
    assert counted.total_bytes == sum(
        (counted.code_bytes, counted.scale_bytes, counted.table_bytes, counted.dense_bytes)
    )


@pytest.fixture(scope="module")
def smollm2_nf4(smollm2: Path) -> nn.Module:
    return quantize_model(tf.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16))


def test_smollm2_takes_4127_thousandths_of_a_bit(smollm2_nf4: nn.Module) -> None:
    """4 + 8 / 64 + 32 / (64 · 256) bits, and less than 0.001 for the layers' own offsets."""
    assert footprint(smollm2_nf4).bits_per_quantized_param == pytest.approx(4.127, abs=0.01)


def test_smollm2_footprint_is_what_its_config_says(smollm2_nf4: nn.Module) -> None:
    """Reported bytes against sizes computed from the config alone: within 1 %, which leaves room for the buffers."""
    c = smollm2_nf4.config
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * (c.hidden_size // heads) * kv
    linear = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    dense = c.vocab_size * c.hidden_size + (2 * c.num_hidden_layers + 1) * c.hidden_size
    counted = footprint(smollm2_nf4)
    assert counted.quantized_params == linear
    assert counted.total_bytes == pytest.approx(linear * (4 + 8 / 64 + 32 / 16384) / 8 + dense * 2, rel=0.01)


def test_smollm2_shares_its_tables(smollm2_nf4: nn.Module) -> None:
    states = [layer.weight.quant_state for layer in quantized_layers(smollm2_nf4).values()]
    assert len(states) == 210
    assert len({state.code.data_ptr() for state in states}) == 1
    assert len({state.state2.code.data_ptr() for state in states}) == 1
    assert footprint(smollm2_nf4).table_bytes == 4 * (16 + 256)


# --- a base that is 4-bit already ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(llama(), tmp_path_factory.mktemp("llama"))


def test_a_stock_4bit_base_is_taken_over_as_it_is(checkpoint: Path) -> None:
    model = stock_4bit(checkpoint)
    before, modules = dequantized(model), {name: id(m) for name, m in model.named_modules()}
    assert quantize_model(model, NF4Config()) is model
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert all(isinstance(layer, Linear4bit) for layer in quantized_layers(model).values())
    after = dequantized(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert footprint(model).table_bytes == 4 * (16 + 256)


@pytest.mark.parametrize(
    ("settings", "config", "words"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, NF4Config(), ("fp4", "nf4")),
        ({"bnb_4bit_use_double_quant": False}, NF4Config(), ("'double_quant': False", "'double_quant': True")),
        ({}, NF4Config(double_quant=False), ("'double_quant': True", "'double_quant': False")),
        ({}, NF4Config(block_size=128), ("64", "128")),
    ],
    ids=["quant_type", "nested", "not nested", "block_size"],
)
def test_another_quantization_is_refused_and_both_are_named(
    settings: dict[str, Any], config: NF4Config, words: tuple[str, str], checkpoint: Path
) -> None:
    model = stock_4bit(checkpoint, **settings)
    before = state_bytes(model)
    with pytest.raises(BaseModelError, match="already quantized") as error:
        quantize_model(model, config)
    assert all(word in str(error.value) for word in words)
    assert state_bytes(model) == before
    assert not any(isinstance(layer, Linear4bit) for layer in quantized_layers(model).values())


def test_an_int8_base_is_refused_and_named() -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64), nn.Linear(64, 4))
    with pytest.raises(BaseModelError, match=r"(?i)8.?bit") as error:
        quantize_model(model)
    assert "nf4" in str(error.value).lower()
    assert type(model[1]) is nn.Linear


def test_a_base_of_another_method_is_refused_and_named() -> None:
    model = llama()
    model.quantization_method = QuantizationMethod.GPTQ
    before = state_bytes(model)
    with pytest.raises(BaseModelError, match="gptq"):
        quantize_model(model)
    assert state_bytes(model) == before


def test_a_base_quantized_twice_is_the_base_quantized_once() -> None:
    model = quantize_model(llama())
    before = state_bytes(model)
    quantize_model(model)
    assert state_bytes(model) == before
    with pytest.raises(BaseModelError, match="128"):
        quantize_model(model, NF4Config(block_size=128))


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks weights only on AVX512-BF16 processors")
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_repacked_base_is_unpacked_with_a_warning(
    double_quant: bool, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An eval forward of the stock base packs it; 0.4 % is half a unit in the last of bfloat16's eight digits."""
    model = stock_4bit(checkpoint, bnb_4bit_use_double_quant=double_quant)
    before = dequantized(model)
    logits(model, tokens())
    layers = quantized_layers(model)
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in layers.values())
    with caplog.at_level(logging.WARNING, logger="hf_qlora"):
        quantize_model(model, NF4Config(double_quant=double_quant))
    assert "repacked" in caplog.text
    for name, weight in dequantized(model).items():
        # Nested scales are then rounded a second time, to 8 bits: up to a unit of the dynamic map, about 1 % of the
        # largest. A wrong order of codes or scales is off by 20 % and more.
        assert (weight - before[name]).norm() <= (0.01 if double_quant else 0.004) * before[name].norm(), name


# --- refused, with nothing changed -----------------------------------------------------------------------------------


def two_layers(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, **options))


def _with_value(value: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = two_layers()
        with torch.no_grad():
            model[1].weight[3, 5] = value
        return model

    return make


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nan": (_with_value(float("nan")), r"1\.weight has NaN"),
    "inf": (_with_value(float("inf")), r"1\.weight has NaN or infinite"),
    "-inf": (_with_value(float("-inf")), r"1\.weight has NaN or infinite"),
    "float64": (lambda: two_layers(dtype=torch.float64), r"1\.weight has dtype torch\.float64"),
    "float8": (lambda: two_layers().append(nn.Linear(64, 64).to(torch.float8_e4m3fn)), r"2\.weight.*float8"),
    "no values": (lambda: two_layers().append(nn.Linear(64, 0)), r"2\.weight"),
    "no linear layer": (lambda: nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "No linear layer.*LayerNorm"),
    "all skipped": (lambda: nn.ModuleDict({"lm_head": nn.Linear(64, 64)}), "No linear layer"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_before_anything_changes(name: str) -> None:
    make, words = REFUSED[name]
    model = make()
    before, classes = state_bytes(model), [type(module) for module in model.modules()]
    parameters = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(BaseModelError, match=words):
        quantize_model(model)
    assert state_bytes(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_weights_on_meta_are_refused_before_anything_changes() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is on the meta device"):
        quantize_model(model)
    assert not quantized_layers(model)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")


def test_weights_that_zero_3_has_partitioned_are_refused() -> None:
    """DeepSpeed leaves an empty tensor with its number in each process."""
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data, weight.ds_id = torch.empty(0), 7
    with pytest.raises(BaseModelError, match=r"q_proj\.weight is sharded over processes by DeepSpeed ZeRO-3"):
        quantize_model(model)
    assert not quantized_layers(model)


@pytest.mark.parametrize("loaded", ["dense", "4-bit"])
def test_a_compute_dtype_the_device_lacks_is_refused(
    loaded: str, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    model = two_layers() if loaded == "dense" else stock_4bit(checkpoint)
    matmul = Tensor.__matmul__

    def without_half(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return matmul(a, b)

    before = state_bytes(model)
    monkeypatch.setattr(Tensor, "__matmul__", without_half)
    with pytest.raises(BaseModelError, match=r"torch\.float16 is not supported on cpu.*not implemented.*float32"):
        quantize_model(model, NF4Config(compute_dtype="float16"))
    assert state_bytes(model) == before
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


# --- what transformers, Trainer and PEFT look for --------------------------------------------------------------------


def test_a_quantized_model_bears_the_marks_of_a_loaded_one(checkpoint: Path) -> None:
    converted = quantize_model(tf.AutoModelForCausalLM.from_pretrained(checkpoint))
    streamed = stock_4bit(checkpoint)
    for name in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(converted, name) == getattr(streamed, name), name
    assert converted.hf_quantizer.is_trainable
    assert converted.hf_quantizer.is_serializable()
    ours, theirs = (m.config.quantization_config for m in (converted, streamed))
    same = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    for name, layer in quantized_layers(converted).items():
        stock = quantized_layers(streamed)[name]
        assert vars(layer).keys() - {"training"} >= vars(stock).keys() - {"training", "_is_hf_initialized"}, name
        assert layer.source_cls is stock.source_cls
        assert layer.weight.bnb_quantized
        assert layer.quant_state is layer.weight.quant_state
        assert layer.weight.module is layer
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_peft_alone_puts_its_4bit_layer_on_the_base() -> None:
    model = get_peft_model(quantize_model(llama()), LoraConfig(r=4, target_modules=["q_proj"]))
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, PeftLinear4bit)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(r=8, target_modules=["q_proj"]),
        MissConfig(r=4, target_modules=["q_proj", "v_proj"]),
        RoadConfig(target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_pefts_other_methods_train_on_the_base_as_on_a_stock_one(config: PeftConfig, checkpoint: Path) -> None:
    ids, gradients = tokens(), []
    for base_model in (stock_4bit(checkpoint), quantize_model(tf.AutoModelForCausalLM.from_pretrained(checkpoint))):
        torch.manual_seed(0)
        model = get_peft_model(base_model, copy.deepcopy(config)).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    found, expected = gradients[1], gradients[0]
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        # Both dequantize the same codes and multiply in float32; the order of sums may differ.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_base_reloads_bit_for_bit(make: Callable[..., nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    """In transformers alone. GPT-2's `c_proj` is square: a wrong orientation would not show in its shape."""
    model = quantize_model(make().to(dtype))
    reloaded = tf.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert {type(layer) for layer in quantized_layers(reloaded).values()} == {bnb.nn.Linear4bit}
    found, expected = dequantized(reloaded), dequantized(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype == dtype
        assert torch.equal(found[name], weight), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def distilbert() -> nn.Module:
    """Its dense `classifier` is the end of the name of its quantized `pre_classifier`."""
    config = tf.DistilBertConfig(dim=128, hidden_dim=256, n_layers=1, n_heads=4, vocab_size=500)
    return tf.DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    "make", [*(family.make for family in ARCHITECTURES), distilbert], ids=lambda make: make.__name__.strip("_")
)
def test_a_saved_base_reloads_with_the_same_layers_dense(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """transformers decides anew, from the names in the saved config, what is 4-bit."""
    model = quantize_model(make())
    reloaded = type(model).from_pretrained(saved(model, tmp_path))
    assert dense_layers(reloaded) == dense_layers(model)
    found, expected = dequantized(reloaded), dequantized(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = quantize_model(llama())
    first = (saved(model, tmp_path / "1") / "model.safetensors").read_bytes()
    logits(model, tokens())
    assert (saved(model, tmp_path / "2") / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("reloaded", [False, True], ids=["converted", "reloaded"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_dequantize_gives_the_original_classes_back(
    make: Callable[..., nn.Module], reloaded: bool, tmp_path: Path
) -> None:
    model = make()
    classes = {name: type(module) for name, module in model.named_modules()}
    quantize_model(model)
    if reloaded:
        model = quantize_model(tf.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "4bit")))
    ids = tokens()
    expected, weights = logits(model, ids), dequantized(model)
    dense = model.dequantize()
    assert {name: type(module) for name, module in dense.named_modules()} == classes
    for name, weight in weights.items():
        layer = dense.get_submodule(name)
        assert torch.equal(layer.weight.t() if isinstance(layer, Conv1D) else layer.weight, weight), name
    # Conv1D multiplies by the transposed weight, in another order: a few roundings of values near 1.
    torch.testing.assert_close(logits(dense, ids), expected, rtol=0, atol=1e-5)
    again = tf.AutoModelForCausalLM.from_pretrained(saved(dense, tmp_path / "dense"))
    assert not quantized_layers(again)
    assert torch.equal(logits(again, ids), logits(dense, ids))


def test_a_dequantized_model_is_free_again() -> None:
    model = quantize_model(llama())
    dense = model.dequantize()
    assert not getattr(dense, "is_loaded_in_4bit", False)
    assert dense.half().lm_head.weight.dtype == torch.float16


def test_a_layer_shared_by_two_parents_is_still_shared_when_dequantized() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    dequantize_layers(quantize_model(model))
    assert type(model["first"][0]) is nn.Linear
    assert model["first"][0] is model["second"][0]


# --- the object stays ------------------------------------------------------------------------------------------------


def test_modules_and_hooks_are_the_same_objects() -> None:
    model = llama()
    modules = {name: id(module) for name, module in model.named_modules()}
    calls: list[str] = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    quantize_model(model)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    logits(model, tokens())
    assert calls == ["before", "forward"]


class _Doubles(ModelHook):
    """Doubles the input, counts, and needs the forward of the class the module has now."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls += 1
        return tuple(2 * x for x in args), kwargs


@pytest.mark.parametrize("loaded", ["dense", "4-bit"])
def test_accelerate_hooks_stay_attached(loaded: str, checkpoint: Path) -> None:
    model = llama() if loaded == "dense" else stock_4bit(checkpoint)
    hook, layer = _Doubles(), model.model.layers[0].mlp.down_proj
    add_hook_to_module(layer, hook)
    quantize_model(model)
    assert layer._hf_hook is hook
    x = torch.randn(3, layer.in_features)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # fp32 sums of 256 products of size 0.02, in whatever order: 1e-6 is ten roundings.
    torch.testing.assert_close(layer(x), 2 * x @ weight.T, rtol=0, atol=1e-6)
    assert hook.calls == 1


def test_deepcopy_is_independent_and_equal() -> None:
    model, ids = quantize_model(llama()), tokens()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    before = state_bytes(model)
    for layer in quantized_layers(twin).values():
        layer.weight.data.zero_()
        layer.weight.quant_state.absmax.zero_()
    assert state_bytes(model) == before
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))


def test_state_dict_survives_torch_save() -> None:
    model, buffer = quantize_model(llama()), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=True)
    assert restored.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [NF4Config(), NF4Config(double_quant=False), NF4Config(block_size=128)])
def test_a_loaded_state_dict_is_that_model(config: NF4Config) -> None:
    """Codes come with their scales; bitsandbytes' own layers keep theirs, and compute something else."""
    (one, other), ids = [quantize_model(seeded(seed), config) for seed in (1, 2)], tokens()
    before = [layer.weight for layer in quantized_layers(other).values()]
    assert not torch.equal(logits(other, ids), logits(one, ids))
    assert str(other.load_state_dict(one.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(logits(other, ids), logits(one, ids))
    assert state_bytes(other) == state_bytes(one)
    assert [layer.weight for layer in quantized_layers(other).values()] == before  # in place
    for layer in quantized_layers(one).values():
        layer.weight.quant_state.absmax.zero_()
        layer.weight.data.zero_()
    assert state_bytes(other) != state_bytes(one)  # and a copy
    other.model.to(torch.float32)
    assert len({layer.state.code.data_ptr() for layer in quantized_layers(other).values()}) == 1


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return llama()


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (NF4Config(block_size=128), {}, r"blocksize is 128, and this layer's is 64"),
        (NF4Config(double_quant=False), {}, r"nested is False, and this layer's is True"),
        (NF4Config(), {"assign": True}, r"assign=True is not supported"),
    ],
)
def test_a_state_dict_of_another_format_is_refused(config: NF4Config, options: dict[str, Any], said: str) -> None:
    model, other = quantize_model(seeded(1)), quantize_model(seeded(2), config)
    packed = {name: layer.weight.data.clone() for name, layer in quantized_layers(model).items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=said):
            model.load_state_dict(other.state_dict(), strict=strict, **options)
    assert all(torch.equal(layer.weight.data, packed[name]) for name, layer in quantized_layers(model).items())


def test_codes_without_their_scales_are_missing_keys() -> None:
    """With the layer's own scales they would be other weights."""
    model, other = quantize_model(seeded(1)), quantize_model(seeded(2)).state_dict()
    before = state_bytes(model)
    name = "model.layers.0.mlp.up_proj.weight"
    scales = [key for key in other if key.startswith(f"{name}.")]
    assert len(scales) == 5
    rest = {key: value for key, value in other.items() if key not in scales}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(rest)
    assert sorted(model.load_state_dict(rest, strict=False).missing_keys) == sorted(scales)
    assert all(bytes_ == before[key] for key, bytes_ in state_bytes(model).items() if key.startswith(name))
    for key in scales:
        incomplete = {k: value for k, value in other.items() if k != key}
        with pytest.raises(RuntimeError, match=f"{name} is not loaded"):
            model.load_state_dict(incomplete)


@pytest.mark.parametrize("what", ["weight", "weight.absmax", "weight.nested_absmax", "weight.quant_map"])
def test_a_refused_layer_is_as_it_was(what: str) -> None:
    """Codes and scales: all of them or none."""
    model, other = quantize_model(seeded(1)), quantize_model(seeded(2)).state_dict()
    name = "model.layers.0.mlp.up_proj"
    before = {key: value for key, value in state_bytes(model).items() if key.startswith(name)}
    assert len(before) == 6
    other[f"{name}.{what}"] = other[f"{name}.{what}"][:-1]
    with pytest.raises(RuntimeError, match=f"{name}.weight is not loaded: its .*shape is"):
        model.load_state_dict(other)
    assert {key: value for key, value in state_bytes(model).items() if key.startswith(name)} == before


def test_float64_is_refused_before_a_layer_is_cast() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_model(model)
    x = torch.randn(3, 64)
    expected = model(x)
    with pytest.raises(TypeError, match=r"not in torch\.float64"):
        model.double()
    assert torch.equal(model(x), expected)


def test_a_pickled_model_computes_the_same() -> None:
    model, ids, buffer = quantize_model(llama()), tokens(), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(restored, ids), logits(model, ids))


def test_moving_to_where_it_is_changes_nothing() -> None:
    model, ids = quantize_model(llama()), tokens()
    expected, before = logits(model, ids), state_bytes(model)
    assert torch.equal(logits(model.to("cpu"), ids), expected)
    assert torch.equal(logits(model.cpu(), ids), expected)
    assert state_bytes(model) == before


def test_casting_is_refused_by_transformers() -> None:
    model = quantize_model(llama())
    before = state_bytes(model)
    for cast in (model.half, model.float, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"not supported|cannot cast"):
            cast()
    assert state_bytes(model) == before


def test_the_progress_bar_waits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_model(llama())
    assert "Quantizing" not in capsys.readouterr().err
    assert 1 <= base.PROGRESS_DELAY_S <= 10  # "a few seconds"
    monkeypatch.setattr(base, "PROGRESS_DELAY_S", 0.0)
    quantize_model(llama())
    assert "Quantizing to NF4" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [None, "float16"])
def test_layers_follow_the_model_to_another_dtype(dtype: torch.dtype, compute_dtype: str | None) -> None:
    """Through a wrapper, PEFT's for one, which transformers does not guard. The codes stay; products follow."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(torch.bfloat16)
    quantize_model(model, NF4Config(compute_dtype=compute_dtype))
    codes = {name: layer.weight.data.clone() for name, layer in quantized_layers(model).items()}
    x = torch.randn(3, 64, dtype=dtype)
    model.to(dtype)
    assert model(x).dtype == dtype
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight.data, codes[name])
        assert layer.dequantize().dtype == layer.weight.quant_state.dtype == dtype
        assert layer.compute_dtype == (torch.float16 if compute_dtype else dtype)
    assert all(p.dtype == dtype for p in dequantize_layers(model).parameters())
    assert model(x).dtype == dtype


@pytest.mark.parametrize("compute_dtype", [None, "float16"])
def test_what_layers_compute_in_is_saved(compute_dtype: str | None, tmp_path: Path) -> None:
    """bitsandbytes computes in float32 where a checkpoint names nothing; here it is the model's dtype."""
    model = quantize_model(llama().to(torch.bfloat16), NF4Config(compute_dtype=compute_dtype))
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = torch.float16 if compute_dtype else torch.bfloat16
    assert {m.compute_dtype for m in again.modules() if isinstance(m, bnb.nn.Linear4bit)} == {expected}
    nn.Sequential(model).float()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_compute_dtype"] == ("float16" if compute_dtype else "float32")


def test_the_widest_of_several_compute_dtypes_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint names one; and the config is the user's, who may load another model by it."""
    llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    quantize_model(model, NF4Config(double_quant=False))
    model.model.layers[1].mlp.up_proj.compute_dtype = torch.float16
    model.save_pretrained(tmp_path / "nf4")
    stored = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_compute_dtype"] == "float32"
    assert "The layers compute in ['torch.bfloat16', 'torch.float16']" in caplog.text
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_levels_do_not_depend_on_the_default_dtype(bfloat16_by_default: None) -> None:
    """bitsandbytes makes their table in that dtype, which rounds it."""
    model = quantize_model(nn.Sequential(nn.Linear(64, 64)), NF4Config())
    assert torch.get_default_dtype() == torch.bfloat16
    table = model[0].weight.quant_state.code
    assert table.dtype == torch.float32
    assert torch.equal(table, nf4_levels().to(table.dtype))


def test_a_layer_whose_levels_were_rounded_is_taken_over(bfloat16_by_default: None) -> None:
    packed = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    packed.to("cpu")  # quantizes
    assert packed.weight.quant_state.code.dtype == torch.bfloat16
    expected = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    linear4bit.adopt_linear(packed, "it", None)
    assert torch.equal(packed.dequantize(), expected)


def test_tables_are_shared_again_after_a_move() -> None:
    model = copy.deepcopy(quantize_model(llama()))  # which copies them
    model.model.to("cpu")
    layers = quantized_layers(model).values()
    assert len({layer.weight.quant_state.code.data_ptr() for layer in layers}) == 1
    assert len({layer.weight.quant_state.state2.code.data_ptr() for layer in layers}) == 1


@pytest.mark.parametrize("make", [llama, gpt2])
def test_layers_become_dense_in_place_with_their_hooks(make: Callable[..., nn.Module]) -> None:
    model, ids = make(), tokens()
    modules = dict(model.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    keys = {name: set(vars(modules[name])) for name in dense_layers(model)}
    seen: list[str] = []
    quantize_model(model)
    for name, layer in quantized_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    expected, packed = logits(model, ids), set(quantized_layers(model))
    seen.clear()
    dequantize_layers(model)
    assert dict(model.named_modules()) == modules
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(modules[name])) for name in keys} == keys
    assert torch.equal(logits(model, ids), expected)
    assert set(seen) == packed


def test_packed_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector, so that the peak is the model and one layer."""
    model = quantize_model(llama())
    alive = [weakref.ref(layer.weight) for layer in quantized_layers(model).values()]
    found: list[int] = []
    original = Linear4bit.become_dense

    def watched(layer: Linear4bit, weight: Tensor) -> nn.Module:
        found.append(sum(ref() is not None for ref in alive))
        return original(layer, weight)

    monkeypatch.setattr(Linear4bit, "become_dense", watched)
    gc.disable()
    try:
        dequantize_layers(model)
    finally:
        gc.enable()
    assert found == list(range(len(alive), 0, -1))


# --- a 4-bit base that differs from the config -----------------------------------------------------------------------


def test_a_base_loaded_for_the_config_differs_in_nothing(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = stock_4bit(checkpoint)
    caplog.clear()
    get_peft_model(model, QLoRAConfig(r=2, target_modules=["q_proj"]))
    assert "in this base" not in caplog.text


@pytest.mark.parametrize(
    ("skipped", "config", "words"),
    [
        (["down_proj", "lm_head"], NF4Config(), r"2 layers are dense .* 4-bit .*down_proj"),
        (None, NF4Config(skip_modules=("up_proj",)), r"2 layers are 4-bit .* dense .*up_proj"),
    ],
)
def test_other_layers_in_4_bits_than_the_config_says_are_named(
    skipped: list[str] | None, config: NF4Config, words: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stock_4bit(checkpoint, llm_int8_skip_modules=skipped)
    adapted = get_peft_model(model, QLoRAConfig(r=2, target_modules=["q_proj"], quantization=config))
    assert re.search(words, caplog.text)
    caplog.clear()
    adapted.add_adapter("second", QLoRAConfig(r=2, target_modules=["q_proj"], quantization=config))
    assert "in this base" not in caplog.text


def test_modules_to_save_in_4_bits_are_refused(checkpoint: Path) -> None:
    config = QLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(BaseModelError, match=r"modules_to_save=\['down_proj'\].*llm_int8_skip_modules"):
        get_peft_model(stock_4bit(checkpoint), config)


def test_a_plain_module_with_4bit_layers_bears_the_mark() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    model[0].weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    quantize_model(model)
    assert model.is_loaded_in_4bit


def test_a_misspelt_skip_module_is_named(caplog: pytest.LogCaptureFixture) -> None:
    quantize_model(llama(), NF4Config(skip_modules=("lm_haed", "o_proj")))
    assert "'lm_haed'" in caplog.text
    assert "o_proj" not in caplog.text


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LoraConfig, QLoRAConfig])
def test_a_base_with_adapters_is_refused(config: type[LoraConfig]) -> None:
    settings: dict[str, Any] = {} if config is LoraConfig else {"quantization": None}
    model = get_peft_model(llama(), config(r=4, target_modules="all-linear", **settings))
    before = state_bytes(model)
    with pytest.raises(BaseModelError, match="have adapters already"):
        quantize_model(model)
    assert state_bytes(model) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"skip": "q_proj"}, r"skip='q_proj'.*\['q_proj'\]"),
        ({"config": QLoRAConfig()}, "NF4Config"),
        ({"config": "nf4"}, "NF4Config"),
        ({"config": {"block": 64}}, "block"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], words: str) -> None:
    model = llama()
    with pytest.raises(ConfigError, match=words):
        quantize_model(model, **arguments)
    assert not quantized_layers(model)


def test_a_dict_is_a_config() -> None:
    model = quantize_model(llama(), {"block_size": 128})
    assert {layer.weight.quant_state.blocksize for layer in quantized_layers(model).values()} == {128}


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(64, 64)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_a_wrapped_model_keeps_dense_what_it_keeps_alone(name: str, tmp_path: Path) -> None:
    (family,) = [family for family in ARCHITECTURES if family.name == name]
    alone, wrapped = quantize_model(family.make()), quantize_model(Wrapper(family.make()))
    expected = {f"inner.{layer}" for layer in quantized_layers(alone)} | {"extra"}
    assert set(quantized_layers(wrapped)) == expected
    wrapped.inner.save_pretrained(tmp_path)
    assert type(wrapped.inner).from_pretrained(tmp_path).is_quantized
    dequantize_layers(wrapped)
    base.forget_quantization(wrapped)
    assert not wrapped.inner.is_loaded_in_4bit


def test_shared_layers_follow_a_cast_alike() -> None:
    model = quantize_model(llama().to(torch.bfloat16))
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight  # as layer replication does
    nn.ModuleList([first, second]).float()
    assert first.compute_dtype == second.compute_dtype == torch.float32


def test_a_parameter_without_state_is_read_by_its_layers() -> None:
    """FSDP puts a plain parameter in the place of the packed one."""
    model = quantize_model(llama())
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    layer._parameters["weight"] = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer.state_dict()
    layer.to(torch.float32)
