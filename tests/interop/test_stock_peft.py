"""What is saved here is an ordinary adapter: PEFT without this package reads all of it and computes the same function.

Two consumers run in processes of their own and write their logits down. One cannot import `hf_qlora`; it quantizes the
base by `BitsAndBytesConfig`, or leaves it dense, and loads with stock PEFT. The other one imports this package.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, bert, gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig


# Of the largest logit: fp32 rounds at 6e-8, and the layers' sums lose one digit, not two.
TOLERANCE = 1e-5

CONSUMER = """
import json, sys, traceback, warnings
from importlib.abc import MetaPathFinder

mode, folder = sys.argv[1:]


class NotThisPackage(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_qlora":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if mode == "without":
    sys.meta_path.insert(0, NotThisPackage())
    try:
        import hf_qlora
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("hf_qlora can be imported")
else:
    import hf_qlora

import bitsandbytes, torch
from peft import AutoPeftModelForCausalLM, LoraModel, PeftModel
from safetensors.torch import load_file, save_file
import transformers

cases = json.load(open(f"{folder}/cases.json"))
inputs = load_file(f"{folder}/inputs.safetensors")
logits, heard, failures = {}, {}, {}


def base(case, kind):
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=case["skip"],
    )
    options = {"quantization_config": quantization} if kind == "nf4" else {}
    model = getattr(transformers, case["auto"]).from_pretrained(case["base"], dtype=torch.float32, **options)
    if mode == "without":
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
    return model


def note(name, load):
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model = load().eval()
            heard[name] = [str(warning.message) for warning in caught]
            logits[name] = model(input_ids=inputs["small" if model.config.vocab_size == 500 else "large"]).logits
    except Exception:
        failures[name] = traceback.format_exc()


def load(case, kind, again):
    model = PeftModel.from_pretrained(base(case, kind), case["adapter"])
    if mode == "without":
        assert type(model.base_model) is LoraModel
        if kind == "nf4":
            model.save_pretrained(again)
    return model


for name, case in cases.items():
    for kind in case["bases"]:
        note(f"{name}/{kind}", lambda: load(case, kind, f"{folder}/resaved/{name}"))
    if "auto" in case["ways"]:
        note(f"{name}/auto", lambda: AutoPeftModelForCausalLM.from_pretrained(case["adapter"], dtype=torch.float32))
    if "transformers" in case["ways"]:
        from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
        note(f"{name}/transformers", lambda: from_pretrained(case["adapter"], dtype=torch.float32))

if mode == "without":
    assert not [name for name in sys.modules if name.partition(".")[0] == "hf_qlora"]
save_file(logits, f"{folder}/{mode}.safetensors")
json.dump([heard, failures], open(f"{folder}/{mode}.json", "w"))
"""


@dataclass(frozen=True)
class Case:
    """A base and the fields of the config that is trained on it; `without`: what the stock consumer loads it onto."""

    base: str
    options: dict[str, Any]
    without: tuple[str, ...] = ("nf4", "dense")
    adapter: str = "default"
    ways: tuple[str, ...] = ()
    config: type[QLoRAConfig] = QLoRAConfig


ALL_LINEAR = {"target_modules": "all-linear"}
SCALED = {**ALL_LINEAR, "use_rslora": True, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 40}}
CASES = {
    "plain": Case("llama", ALL_LINEAR, ways=("auto", "transformers")),
    "rslora": Case("llama", {**ALL_LINEAR, "use_rslora": True}),
    "alpha-pattern": Case("llama", {**ALL_LINEAR, "alpha_pattern": SCALED["alpha_pattern"]}),
    "rank-pattern": Case("llama", {**ALL_LINEAR, "rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 16}}),
    "scaled-ranks": Case("llama", {**SCALED, "rank_pattern": {"q_proj": 2}}, ways=("auto", "transformers")),
    "depth": Case("llama", {**ALL_LINEAR, "depth_profile": "linear"}, config=AdaptiveDepthLoRAConfig),
    "scaled-ranks-and-depth": Case(
        "llama",
        {**SCALED, "rank_pattern": {"q_proj": 2}},
        ways=("auto", "transformers"),
        config=AdaptiveDepthLoRAConfig,
    ),
    "dora": Case("llama", {**SCALED, "use_dora": True}),
    "embeddings": Case(
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True, "alpha_pattern": {"embed_tokens": 3}},
    ),
    "head": Case("llama", {**SCALED, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "head-adapter": Case("llama", {"target_modules": ["lm_head", "o_proj"], "use_rslora": True}),
    "tokens": Case("llama", {**SCALED, "trainable_token_indices": [1, 2, 3]}),
    "some-layers": Case("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "use_rslora": True}),
    "loftq": Case("llama", {**SCALED, "init_lora_weights": "loftq"}),
    "native": Case("llama", {**SCALED, "portable": False}),
    "second": Case("llama", SCALED, adapter="second"),
    "gpt2": Case("gpt2", {**ALL_LINEAR, "use_rslora": True, "alpha_pattern": {"c_proj": 3}}),
    "gpt2-square": Case("gpt2", {"target_modules": ["attn.c_proj"], "alpha_pattern": {"c_proj": 30}}),
    "gpt2-dora": Case("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "use_rslora": True}),
    "gpt2-embeddings": Case("gpt2", {"target_modules": ["wte", "c_fc"], "use_rslora": True}),
    "gpt2-tied-tokens": Case(
        "gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2, 3], "use_rslora": True}
    ),
    "gpt2-lora-bias": Case("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True}),
    "bert": Case("bert", {"target_modules": ["query", "dense"], "use_rslora": True, "task_type": "SEQ_CLS"}),
    "bert-bias": Case(
        "bert", {"target_modules": ["query"], "bias": "all", "use_rslora": True, "task_type": "SEQ_CLS"}
    ),
    "bert-lora-only": Case("bert", {"target_modules": ["key"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "smollm2": Case("smollm2", {**ALL_LINEAR, "use_rslora": True, "alpha_pattern": {"v_proj": 30}}, without=("nf4",)),
}
TINY = [name for name in CASES if name != "smollm2"]
MAKERS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


@dataclass(frozen=True)
class World:
    """What was saved, and the logits that everyone computed from it, by case and base or way of loading."""

    folder: Path
    adapters: dict[str, Path]
    # "live": the model that was saved, the same with adapters disabled, and loaded here on the dense base;
    # "without" and "with" the package: the other processes
    results: dict[str, dict[str, Tensor]]
    failures: dict[str, dict[str, str]]
    heard: dict[str, list[str]]  # warnings in the process without the package

    def logits(self, who: str, key: str) -> Tensor:
        if key not in self.results[who]:
            pytest.fail(self.failures[who][key])
        return self.results[who][key]


def auto(name: str) -> type:
    return AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM


def randomize(model: PeftModel, std: float) -> None:
    """Give everything that is trained values that matter; lora_B starts at zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def consume(mode: str, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",  # the nested offset depends on it; as in `world`
    }
    return subprocess.Popen(
        [sys.executable, "-c", CONSUMER, mode, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, one_thread: None) -> World:
    folder = tmp_path_factory.mktemp("consumers")
    torch.manual_seed(0)
    inputs = {"small": torch.randint(1, VOCAB, (2, 16)), "large": torch.randint(1, 49_000, (1, 16))}
    save_file(inputs, folder / "inputs.safetensors")
    bases = {"smollm2": smollm2}
    for name, make in MAKERS.items():
        model = make()
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.08)  # logits of order 1
        bases[name] = folder / name
        model.save_pretrained(bases[name])

    adapters, live, failed, listed = {}, {}, {}, {}
    for name, case in CASES.items():
        tokens = inputs["large" if case.base == "smollm2" else "small"]
        config = case.config(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **case.options})
        dense = auto(case.base).from_pretrained(bases[case.base], dtype=torch.float32)
        model = get_peft_model(dense, config, adapter_name=case.adapter)
        randomize(model, 0.01 if case.base == "smollm2" else 0.05)  # 30 layers against 2
        live[f"{name}/nf4"] = logits(model, tokens)
        with model.disable_adapter():
            live[f"{name}/disabled"] = logits(model, tokens)
        model.save_pretrained(folder / "adapters" / name)
        adapters[name] = folder / "adapters" / name / ("" if case.adapter == "default" else case.adapter)
        if "dense" in case.without:
            opted_out = QLoRAConfig.from_pretrained(adapters[name])
            opted_out.quantization = None
            dense = auto(case.base).from_pretrained(bases[case.base], dtype=torch.float32)
            try:
                model = PeftModel.from_pretrained(dense, adapters[name], config=opted_out)
                live[f"{name}/dense"] = logits(model, tokens)
            except ValueError as error:
                failed[f"{name}/dense"] = str(error)
        listed[name] = {
            "auto": auto(case.base).__name__,
            "base": str(bases[case.base]),
            "adapter": str(adapters[name]),
            "ways": case.ways,
            "bases": case.without,
            # transformers' own choice, or what it misses: it quantizes a classifier, which PEFT cannot train then
            "skip": ["classifier"] if case.base == "bert" else None,
        }

    (folder / "cases.json").write_text(json.dumps(listed))
    results, failures, heard = {"live": live}, {"live": failed}, {}
    consumers = {mode: consume(mode, folder) for mode in ("without", "with")}
    for mode, consumer in consumers.items():
        output, _ = consumer.communicate(timeout=300)
        assert consumer.returncode == 0, output[-3000:]
        results[mode] = load_file(folder / f"{mode}.safetensors")
        heard[mode], failures[mode] = json.loads((folder / f"{mode}.json").read_text())
    return World(folder, adapters, results, failures, heard["without"])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max().item() <= TOLERANCE * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_computes_something_of_its_own(name: str, world: World) -> None:
    """Else the comparisons below would compare bases."""
    assert (world.logits("live", f"{name}/nf4") - world.logits("live", f"{name}/disabled")).abs().max() > 0.05


@pytest.mark.parametrize("name", list(CASES))
def test_stock_peft_on_a_stock_nf4_base_computes_the_same(name: str, world: World) -> None:
    assert_same(world.logits("without", f"{name}/nf4"), world.logits("live", f"{name}/nf4"))


@pytest.mark.parametrize("name", TINY)
def test_stock_peft_on_the_dense_base_computes_the_same(name: str, world: World) -> None:
    """As this package does on the dense base with `quantization=None`; the NF4 base's logits are others."""
    assert_same(world.logits("without", f"{name}/dense"), world.logits("live", f"{name}/dense"))
    assert (world.logits("live", f"{name}/dense") - world.logits("live", f"{name}/nf4")).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("name", TINY)
def test_a_new_process_with_the_package_computes_the_same(name: str, kind: str, world: World) -> None:
    """On a base that is 4-bit already, and on the dense base, which is then quantized the same way."""
    assert_same(world.logits("with", f"{name}/{kind}"), world.logits("live", f"{name}/nf4"))


def test_smollm2_in_a_new_process_with_the_package_computes_the_same(world: World) -> None:
    assert_same(world.logits("with", "smollm2/nf4"), world.logits("live", "smollm2/nf4"))


@pytest.mark.parametrize("way", ["auto", "transformers"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ways])
def test_the_folder_alone_is_enough(name: str, way: str, world: World) -> None:
    """`AutoPeftModel` and transformers' own loader find the base by its path: dense for stock, quantized with us."""
    assert_same(world.logits("without", f"{name}/{way}"), world.logits("live", f"{name}/dense"))
    assert_same(world.logits("with", f"{name}/{way}"), world.logits("live", f"{name}/nf4"))


@pytest.mark.parametrize("name", list(CASES))
def test_a_stock_reader_warns_of_one_key_and_misses_nothing(name: str, world: World) -> None:
    heard = [
        text for text in world.heard[f"{name}/nf4"] if "nexpected" in text or "issing" in text or "mismatch" in text
    ]
    assert heard
    assert {text.partition(" for class")[0] for text in heard} == {"Unexpected keyword arguments ['hf_qlora']"}


@pytest.mark.parametrize("name", list(CASES))
def test_the_json_has_the_keys_of_a_stock_config_and_one_more(name: str, world: World) -> None:
    values = json.loads((world.adapters[name] / "adapter_config.json").read_text())
    stock = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    assert values.keys() - stock == {"hf_qlora"}
    assert stock - values.keys() == set()
    assert values["peft_type"] == "LORA"
    if name != "native":
        neutral = {"use_rslora": False, "alpha_pattern": {}, "init_lora_weights": True, "loftq_config": {}}
        assert {key: values[key] for key in neutral} == neutral
    given = CASES[name].options
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (4, 8, given.get("rank_pattern", {}))


@pytest.mark.parametrize("name", list(CASES))
def test_stock_peft_saves_again_what_it_read(name: str, world: World) -> None:
    """So it read every value, and nothing is in the files that it would not have written itself."""
    ours, stock = world.adapters[name], world.folder / "resaved" / name
    tensors, again = load_file(ours / "adapter_model.safetensors"), load_file(stock / "adapter_model.safetensors")
    assert tensors.keys() == again.keys()
    assert {key for key in tensors if not torch.equal(tensors[key], again[key])} == set()
    values = json.loads((ours / "adapter_config.json").read_text())
    del values["hf_qlora"]
    values_again = json.loads((stock / "adapter_config.json").read_text())
    for found in (values, values_again):
        for key in ("target_modules", "modules_to_save"):  # PEFT adds a classifier's name anew at every load
            found[key] = sorted(set(found[key] or ()))
    assert values == values_again


@pytest.mark.parametrize("name", list(CASES))
def test_the_tensor_file_is_plain_safetensors(name: str, world: World) -> None:
    """As llama.cpp and vLLM read it: no metadata but the framework, lora keys under PEFT's prefix."""
    with safe_open(world.adapters[name] / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert all(key.startswith("base_model.model.") for key in keys)
    assert any(".lora_A.weight" in key or ".lora_embedding_A" in key for key in keys)
    assert not [path.name for path in world.adapters[name].iterdir() if path.name.startswith(".")]
