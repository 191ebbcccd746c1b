"""Registration: in any order and any number of times, silent, and to stock configs as if it had not happened.

What another process would see is tried in other processes: two run the same stock script, one of them with this
package imported half way, and everything they compute, save and say is compared; three more import in other orders.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.peft_model
import peft.utils.hotswap
import pytest
import torch
from architectures import VOCAB, llama
from peft import (
    IA3Config,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_config,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import hf_qlora
from hf_qlora import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig, QLoRAModel, registration
from hf_qlora.quant.base import is_quantized
from hf_qlora.validation import ConfigError


HERE = Path(__file__).parent

STOCK_SCRIPT = """
import sys
mode, folder, tests = sys.argv[1:]
sys.path.insert(0, tests)

import contextlib, dataclasses, hashlib, json, os, pickle, warnings
from pathlib import Path
import bitsandbytes, peft, torch, transformers
import peft.peft_model, peft.utils.hotswap
from peft import (
    IA3Config, LoraConfig, LoraModel, PeftConfig, PeftMixedModel, PeftModel, get_peft_config, get_peft_model,
    get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.hotswap import hotswap_adapter
from architectures import bert, gpt2, llama

torch.manual_seed(0)
early = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "default")
if mode == "with":
    import hf_qlora

out = Path(folder, mode)
out.mkdir()
os.chdir(out)
results = {}


def digest(tensors):
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def files(where):
    return {p.relative_to(where).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(where).rglob("*")) if p.is_file()}


@contextlib.contextmanager
def scenario(name):
    torch.manual_seed(1)
    found = results[name] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        except Exception as error:
            found["raised"] = f"{type(error).__name__}: {error}"
    found["warnings"] = [f"{w.category.__name__}: {w.message}" for w in caught]


def dense():
    torch.manual_seed(0)
    return llama()


def nf4():
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "base", quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def randomize(model):
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05


dense().save_pretrained("base")
tokens = torch.arange(1, 25).view(2, 12)
CONFIGS = {
    "plain": {"target_modules": "all-linear"},
    "scaled": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "alpha_pattern": {"q_proj": 3},
               "rank_pattern": {"down_proj": 2}},
    "dora": {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"},
    "saved-head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": "gaussian"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}
for base in (dense, nf4):
    for label, options in CONFIGS.items():
        if base is nf4 and label == "pissa":
            continue
        name = f"{base.__name__}-{label}"
        with scenario(name) as found:
            config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
            model = get_peft_model(base(), config)
            found["config"] = [type(config).__name__, repr(config), str(config.to_dict())]
            kinds = {n: f"{type(m).__module__}.{type(m).__qualname__}" for n, m in model.named_modules()}
            del kinds["base_model"]  # the tuner, whose class is another one and does the same
            found["layers"] = kinds
            found["trainable"] = [n for n, p in model.named_parameters() if p.requires_grad]
            found["state"] = digest(model.state_dict())
            randomize(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            loss = model.train()(input_ids=tokens, labels=tokens).loss
            loss.backward()
            found["loss"] = loss.item()
            found["gradients"] = digest({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            found["stepped"] = digest(model.state_dict())
            model.eval()
            model.save_pretrained(name)
            found["files"] = files(name)
            found["logits"] = digest({"": model(tokens).logits})
            model.merge_adapter()
            found["merged"] = digest(model.state_dict())
            model.unmerge_adapter()
            found["unmerged"] = digest(model.state_dict())
            merged = model.merge_and_unload()
            found["unloaded"] = [type(merged).__name__, digest(merged.state_dict()), repr(merged)]
        with scenario(f"{name}-load") as found:
            config = PeftConfig.from_pretrained(name)
            found["config"] = [type(config).__name__, type(config).__module__, repr(config)]
            model = PeftModel.from_pretrained(base(), name)
            found["state"] = digest(model.state_dict())
            if label in ("plain", "scaled", "embeddings"):  # PEFT weighs no other kinds
                found["second"] = str(model.load_adapter(name, "second", is_trainable=True))
                model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "both", combination_type="linear")
                model.set_adapter("both")
            found["both"] = digest({"": model(tokens).logits, **model.state_dict()})
            found["tensors"] = digest(get_peft_model_state_dict(model, adapter_name="default"))
            model.save_pretrained(f"{name}-again", selected_adapters=[list(model.peft_config)[-1]])
            found["files"] = files(f"{name}-again")

with scenario("hot-swap") as found:
    model = PeftModel.from_pretrained(dense(), "dense-plain")
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    other = get_peft_model(dense(), config)
    randomize(other)
    other.save_pretrained("other")
    hotswap_adapter(model, "other", "default")
    found["state"] = digest(model.state_dict())
    found["scaling"] = model.base_model.model.model.layers[0].mlp.up_proj.scaling
    for wrong in ("dense-scaled", "nowhere"):
        try:
            hotswap_adapter(model, wrong, "default")
        except Exception as error:
            found[wrong] = [type(error).__name__, str(error)]
    try:
        peft.utils.hotswap.hotswap_adapter_from_state_dict(model, {}, "no-such-adapter", model.peft_config["default"])
    except Exception as error:
        found["no-such-adapter"] = [type(error).__name__, str(error)]

with scenario("by-keyword") as found:
    model = PeftModel.from_pretrained(model=dense(), model_id="dense-plain", adapter_name="a")
    tensors = peft.peft_model.load_peft_weights(model_id="dense-plain", device="cpu")
    options = {"ignore_mismatched_sizes": False, "low_cpu_mem_usage": False}
    found["result"] = str(peft.peft_model.set_peft_model_state_dict(
        model=model, peft_model_state_dict=tensors, adapter_name="a", **options))
    config = PeftConfig.from_pretrained(pretrained_model_name_or_path="dense-plain")
    found["json"] = str(PeftConfig.from_json_file(path_json_file="dense-plain/adapter_config.json"))
    peft.utils.hotswap.check_hotswap_configs_compatible(config0=config, config1=config)
    named = {k.replace(".weight", ".a.weight"): v for k, v in tensors.items()}
    peft.utils.hotswap.hotswap_adapter_from_state_dict(
        model=model, state_dict=named, adapter_name="a", config=config, parameter_prefix="lora_")
    model.save_pretrained(save_directory="keyword", safe_serialization=True, selected_adapters=["a"])
    model.base_model.inject_adapter(model=model.base_model.model, adapter_name="a")
    found["state"] = digest(model.state_dict())

with scenario("options-of-a-file-without-them") as found:
    values = json.loads(Path("dense-plain/adapter_config.json").read_text())
    for gone in ("lora_dropout", "use_rslora"):
        del values[gone]
    os.makedirs("older", exist_ok=True)
    Path("older/adapter_config.json").write_text(json.dumps(values))
    Path("older/adapter_model.safetensors").write_bytes(Path("dense-plain/adapter_model.safetensors").read_bytes())
    model = PeftModel.from_pretrained(dense(), "older", lora_dropout=0.25, use_rslora=True)
    found["config"] = repr(model.peft_config["default"])
    found["state"] = digest(model.state_dict())

with scenario("a-newer-file") as found:
    os.makedirs("newer", exist_ok=True)
    values = json.loads(Path("dense-plain/adapter_config.json").read_text())
    Path("newer/adapter_config.json").write_text(json.dumps(values | {"unheard_of": 1, "peft_version": "9.9.9"}))
    found["config"] = repr(PeftConfig.from_pretrained("newer"))

with scenario("config") as found:
    config = LoraConfig(r=3, target_modules=["q_proj"])
    found["pickle"] = hashlib.sha256(pickle.dumps(config)).hexdigest()
    known = PEFT_TYPE_TO_CONFIG_MAPPING["LORA"]
    found["class"] = [known.__name__, [f.name for f in dataclasses.fields(known)]]
    found["isinstance"] = [isinstance(config, known), isinstance(IA3Config(), known)]
    found["subclass"] = [issubclass(c, known) for c in (LoraConfig, IA3Config, peft.AdaLoraConfig)]
    found["dict"] = repr(get_peft_config({"peft_type": "LORA", "r": 5}))
    found["types"] = [str(type(c.from_peft_type(peft_type="LORA", r=2))) for c in (PeftConfig, LoraConfig)]

with scenario("ways-round") as found:
    early.model.lm_head.weight.data.zero_()
    early.peft_config["second"] = LoraConfig(r=2, target_modules=["v_proj"])
    early.inject_adapter(early.model, "second")
    found["early"] = digest(early.state_dict())
    torch.manual_seed(3)
    found["direct"] = digest(LoraModel(dense(), LoraConfig(r=2, target_modules=["q_proj"]), "default").state_dict())
    torch.manual_seed(3)
    mixed = get_peft_model(dense(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    mixed.add_adapter("ia3", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    found["mixed"] = digest(mixed.state_dict())
    torch.manual_seed(3)
    injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), dense())
    found["injected"] = digest(injected.state_dict())
    torch.manual_seed(3)
    ia3 = get_peft_model(dense(), IA3Config(task_type="CAUSAL_LM"))
    ia3.save_pretrained("ia3")
    found["ia3"] = [files("ia3"), repr(PeftConfig.from_pretrained("ia3"))]
    found["ia3-state"] = digest(PeftModel.from_pretrained(dense(), "ia3").state_dict())
    model = dense()
    model.load_adapter("dense-plain")
    found["transformers"] = digest(model.state_dict())
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "new")
    found["added"] = sorted(model.state_dict())

with scenario("errors") as found:
    for label, attempt in {
        "no-module": lambda: get_peft_model(dense(), LoraConfig(target_modules=["nothing"])),
        "zero-rank": lambda: get_peft_model(dense(), LoraConfig(r=0, target_modules=["q_proj"])),
        "nowhere": lambda: PeftModel.from_pretrained(dense(), "nowhere"),
        "file": lambda: get_peft_model(dense(), LoraConfig(target_modules=["q_proj"])).save_pretrained("base.py"),
        "other-shape": lambda: PeftModel.from_pretrained(llama(hidden_size=64), "dense-plain"),
        "bad-json": lambda: PeftConfig.from_pretrained("bad"),
    }.items():
        Path("base.py").touch()
        os.makedirs("bad", exist_ok=True)
        Path("bad/adapter_config.json").write_text("{")
        try:
            attempt()
        except Exception as error:
            found[label] = [type(error).__name__, "" if label == "bad-json" else str(error)]

Path("../" + mode + ".json").write_text(json.dumps(results))
"""
LABELS = ("plain", "scaled", "dora", "saved-head", "embeddings")
SCENARIOS = [
    *(f"dense-{label}{load}" for label in (*LABELS, "pissa") for load in ("", "-load")),
    *(f"nf4-{label}{load}" for label in LABELS for load in ("", "-load")),
    "hot-swap",
    "by-keyword",
    "options-of-a-file-without-them",
    "a-newer-file",
    "config",
    "ways-round",
    "errors",
]

# Imports, then says what came of it. The blocks are put together by `ORDERS`.
START = """
import os, sys, tempfile
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
import logging, traceback
"""
SILENTLY = """
import torch
calls = []
def record():
    calls.append([frame.filename for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename][-1])
torch.cuda._lazy_init = record
said = tempfile.TemporaryFile()
kept = os.dup(1), os.dup(2)
os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
try:
    import hf_qlora
finally:
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(kept[0], 1), os.dup2(kept[1], 2)
said.seek(0)
result = {
    "said": said.read().decode(),
    "cuda": [name for name in calls if "hf_qlora" in name],
    "handlers": [repr(h) for name in (None, "hf_qlora") for h in logging.getLogger(name).handlers],
}
"""
AGAIN = """
import importlib
import hf_qlora
importlib.reload(hf_qlora)
importlib.reload(hf_qlora.registration)
hf_qlora.registration.register()
hf_qlora.registration.register()
importlib.reload(hf_qlora)
"""
ANEW = """
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_qlora"]:
    del sys.modules[name]
import hf_qlora
"""
REPORT = """
import hashlib, json
from pathlib import Path
import bitsandbytes, torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from architectures import llama
from hf_qlora import QLoRAConfig, QLoRAModel

def depth(function):
    function = getattr(function, "__func__", function)
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count

def layers(model):
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]

def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

result = globals().get("result", {})
torch.manual_seed(0)
model = get_peft_model(llama(), QLoRAConfig(r=2, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"))
for p in model.parameters():
    if p.requires_grad:
        p.data += 0.01
target = Path(folder, str(os.getpid()))
model.save_pretrained(target)
given = adapter(model)
loaded = PeftModel.from_pretrained(model.unload(), target)
same = all(torch.allclose(t, given[n], rtol=1e-6, atol=0) for n, t in adapter(loaded).items())
stock = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
result |= {
    "tuner": type(model.base_model) is QLoRAModel,
    "config": type(PeftConfig.from_pretrained(target)) is QLoRAConfig,
    "quantized": len(layers(loaded)),
    "tensors": hashlib.sha256((target / "adapter_model.safetensors").read_bytes()).hexdigest(),
    "fold": json.loads((target / "adapter_config.json").read_text())["hf_qlora"]["fold"],
    "loaded": same,
    "stock": [type(stock.peft_config["default"]) is LoraConfig, len(layers(stock))],
    "wrapped": depth(PeftModel.save_pretrained),
}
target.with_suffix(".json").write_text(json.dumps(result))
"""
ORDERS = {
    "ours first": START + SILENTLY + REPORT,
    "transformers, ours, peft, again": START + "import transformers\n" + AGAIN + "import peft\n" + REPORT,
    "peft, ours, anew": START + "import peft\nfrom peft import get_peft_model\nimport hf_qlora\n" + ANEW + REPORT,
}


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONHASHSEED": "0",  # the order of a set of target modules in a JSON
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def stock_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the stock script found without this package and with it."""
    folder = tmp_path_factory.mktemp("stock")
    for process in [start(STOCK_SCRIPT, mode, str(folder), str(HERE)) for mode in ("without", "with")]:
        finish(process)
    return {mode: json.loads((folder / f"{mode}.json").read_text()) for mode in ("without", "with")}


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of importing in each order."""
    folder = tmp_path_factory.mktemp("orders")
    processes = {name: start(script, str(folder), str(HERE)) for name, script in ORDERS.items()}
    for process in processes.values():
        finish(process)
    return {name: json.loads((folder / f"{process.pid}.json").read_text()) for name, process in processes.items()}


# Stock configs


@pytest.mark.parametrize("name", SCENARIOS)
def test_stock_is_bit_for_bit_as_without_us(name: str, stock_runs: dict[str, dict[str, Any]]) -> None:
    """State, gradients, a step, files, merged weights, configs, warnings and errors: all of it."""
    without, with_us = stock_runs["without"][name], stock_runs["with"][name]
    assert "raised" not in without, without["raised"]
    assert with_us.get("raised") is None
    assert with_us.keys() == without.keys()
    for what in without:
        assert with_us[what] == without[what], what


def test_the_scenarios_are_all_compared(stock_runs: dict[str, dict[str, Any]]) -> None:
    assert sorted(stock_runs["without"]) == sorted(stock_runs["with"]) == sorted(SCENARIOS)


def test_the_stock_runs_did_what_they_say(stock_runs: dict[str, dict[str, Any]]) -> None:
    """Each digest is of something: the adapters moved, merging changed the weights, the 4-bit base was 4-bit."""
    for name, found in stock_runs["without"].items():
        if "stepped" in found:
            assert len({found["state"], found["stepped"], found["merged"]}) == 3, name
    assert any("lora.bnb.Linear4bit" in layer for layer in stock_runs["without"]["nf4-plain"]["layers"].values())


def test_loading_a_stock_adapter_gives_a_stock_config(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    for config in (
        PeftConfig.from_pretrained(tmp_path),
        LoraConfig.from_pretrained(tmp_path),
        PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"],
        get_peft_config(json.loads((tmp_path / "adapter_config.json").read_text())),
    ):
        assert type(config) is LoraConfig


# Our configs


def config(**options: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(llama(), config(use_rslora=True, quantization=NF4Config(block_size=128)))
    model.save_pretrained(folder)
    return folder


def test_loading_an_adapter_of_ours_gives_our_config(adapter: Path) -> None:
    for loaded in (
        PeftConfig.from_pretrained(adapter),
        LoraConfig.from_pretrained(adapter),
        QLoRAConfig.from_pretrained(adapter),
        PeftModel.from_pretrained(llama(), adapter).peft_config["default"],
        get_peft_config(json.loads((adapter / "adapter_config.json").read_text())),
    ):
        assert type(loaded) is QLoRAConfig
        assert loaded.quantization == NF4Config(block_size=128)
        assert loaded.use_rslora


@pytest.mark.parametrize("made", [QLoRAConfig(r=4, use_rslora=True), AdaptiveDepthLoRAConfig(depth_profile="linear")])
def test_the_dict_of_a_config_of_ours_gives_it_back(made: QLoRAConfig) -> None:
    for values in (made.to_dict(), json.loads(json.dumps(made.to_dict()))):
        for back in (get_peft_config(dict(values)), PeftConfig.from_peft_type(**values)):
            assert type(back) is type(made)
            assert back == made


def test_the_registry_knows_both_kinds() -> None:
    lora = PEFT_TYPE_TO_CONFIG_MAPPING["LORA"]
    assert isinstance(config(), lora)
    assert isinstance(LoraConfig(), lora)
    assert not isinstance(IA3Config(), lora)
    assert issubclass(QLoRAConfig, lora)
    assert issubclass(LoraConfig, lora)
    assert not issubclass(IA3Config, lora)
    assert lora.__name__ == "LoraConfig"
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is QLoRAModel


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_configs_are_pickled(protocol: int, adapter: Path) -> None:
    loaded = PeftConfig.from_pretrained(adapter)
    given = config(use_rslora=True, alpha_pattern={"q_proj": 3}, quantization=NF4Config(compute_dtype="bfloat16"))
    for original in (given, loaded, config(quantization=None, portable=False)):
        again = pickle.loads(pickle.dumps(original, protocol))
        assert type(again) is QLoRAConfig
        assert again == original
        assert again.to_portable_dict() == original.to_portable_dict()
        assert again.record == original.record


def test_configs_are_copied_and_the_copies_are_their_own() -> None:
    original = config(alpha_pattern={"q_proj": 3})
    for make in (copy.copy, copy.deepcopy):
        again = make(original)
        assert type(again) is QLoRAConfig
        assert again == original
    deep = copy.deepcopy(original)
    deep.alpha_pattern["q_proj"] = 4
    deep.target_modules.add("v_proj")
    assert original.alpha_pattern == {"q_proj": 3}
    assert original.target_modules == {"q_proj"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_models_are_copied_and_pickled_as_stock_ones_are(copied: Callable[[nn.Module], nn.Module]) -> None:
    tokens = torch.randint(1, VOCAB, (2, 8))
    model = get_peft_model(llama(), config(init_lora_weights=False)).eval()
    again = copied(model)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    again.merge_adapter()
    again.unmerge_adapter()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_spawned_process_gets_the_config_and_is_registered(adapter: Path) -> None:
    """Unpickling is all that it does; that alone imports and registers."""
    sent = PeftConfig.from_pretrained(adapter)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        received = pool.apply(copy.copy, (sent,))
        values = pool.apply(operator.methodcaller("to_portable_dict"), (sent,))
        tuners = pool.apply(registration.resolve, ("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING",))
    assert received == sent
    assert received.record == sent.record
    assert values == sent.to_portable_dict()
    assert tuners[peft.PeftType.LORA] is QLoRAModel


# Orders


@pytest.mark.parametrize("order", list(ORDERS))
def test_every_order_of_imports_gives_the_same(order: str, orders: dict[str, dict[str, Any]]) -> None:
    found = orders[order]
    assert found["tuner"]
    assert found["config"]
    assert found["quantized"] == 14
    assert found["loaded"]
    assert found["stock"] == [True, 0]
    assert found["fold"]  # once: √2, rsLoRA's α/√r against α/r at r = 2
    assert list(found["fold"].values()) == pytest.approx([2**0.5] * 14)
    assert found["tensors"] == orders["ours first"]["tensors"]


def test_importing_again_wraps_nothing_twice(orders: dict[str, dict[str, Any]]) -> None:
    assert orders["ours first"]["wrapped"] == orders["transformers, ours, peft, again"]["wrapped"] == 1


def test_importing_is_silent(orders: dict[str, dict[str, Any]]) -> None:
    """Nothing is printed but bitsandbytes' own words, no CUDA context is made, no logging is set up."""
    found = orders["ours first"]
    assert [line for line in found["said"].splitlines() if "kernels" not in line] == []
    assert found["cuda"] == []
    assert found["handlers"] == []


def test_registering_again_changes_nothing() -> None:
    def state() -> list[Any]:
        return [
            PEFT_TYPE_TO_TUNER_MAPPING.copy(),
            PEFT_TYPE_TO_CONFIG_MAPPING.copy(),
            BaseTuner.inject_adapter,
            PeftModel.save_pretrained,
            vars(peft.config.PeftConfigMixin)["from_json_file"],
            peft.peft_model.load_peft_weights,
            peft.peft_model.set_peft_model_state_dict,
            peft.utils.hotswap.load_peft_weights,
            peft.utils.hotswap.check_hotswap_configs_compatible,
            peft.utils.hotswap.hotswap_adapter_from_state_dict,
        ]

    before = state()
    registration.register()
    importlib.reload(hf_qlora)
    assert state() == before


WRAPPED = {
    "inject_adapter": BaseTuner.inject_adapter,
    "from_json_file": peft.config.PeftConfigMixin.from_json_file.__func__,
    "load_peft_weights": peft.peft_model.load_peft_weights,
    "set_peft_model_state_dict": peft.peft_model.set_peft_model_state_dict,
    "save_pretrained": PeftModel.save_pretrained,
    "hotswap.load_peft_weights": peft.utils.hotswap.load_peft_weights,
    "check_hotswap_configs_compatible": peft.utils.hotswap.check_hotswap_configs_compatible,
    "hotswap_adapter_from_state_dict": peft.utils.hotswap.hotswap_adapter_from_state_dict,
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_a_wrapped_function_looks_as_it_did(name: str) -> None:
    function = WRAPPED[name]
    original = inspect.unwrap(function)
    assert original is not function
    assert original.__module__ == function.__module__
    assert original.__module__.startswith("peft.")
    assert (original.__name__, original.__doc__) == (function.__name__, function.__doc__)
    assert inspect.signature(original) == inspect.signature(function)


# What is refused


@pytest.mark.parametrize("found", ["0.20.0", "0.20.9", "0.21.0.dev0", "0.22.0", "0.22.0.dev0", "0.22.0rc1", "1.0.0"])
def test_another_peft_is_refused_by_name(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-releases of the next version too, as pip's `<0.22` leaves them out: they are that version's code."""
    monkeypatch.setattr(registration, "version", lambda package: found)
    with pytest.raises(ImportError, match=rf"peft >= 0\.21\.0, < 0\.22, but peft {found} is installed: pip install"):
        registration.register()


@pytest.mark.parametrize("found", ["0.21.0", "0.21.2", "0.21.10", "0.21.3.dev0"])
def test_a_peft_of_the_known_range_is_accepted(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "version", lambda package: found)
    registration.register()


def test_a_missing_private_name_is_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft.peft_model, "load_peft_weights")
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, LoraModel)
    with pytest.raises(
        ImportError, match=rf"peft\.peft_model:load_peft_weights, which peft {peft.__version__} does not"
    ):
        registration.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is LoraModel


def test_a_missing_private_module_is_refused() -> None:
    with pytest.raises(ImportError, match=r"peft\.no_such_module:thing, which peft"):
        registration.resolve("peft.no_such_module:thing")


REFUSED = r"QLoRAConfig cannot be used with {}, which would leave the base unquantized"


def assert_untouched(model: nn.Module) -> None:
    assert not is_quantized(model)
    torch.manual_seed(0)
    pristine = llama()
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in pristine.named_parameters())


def test_a_direct_lora_model_is_refused() -> None:
    torch.manual_seed(0)
    base = llama()
    with pytest.raises(ConfigError, match=REFUSED.format("LoraModel")):
        LoraModel(base, config(), "default")
    assert_untouched(base)


def test_a_mixed_model_is_refused(adapter: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    with pytest.raises(ConfigError, match=REFUSED.format("MixedModel")):
        get_peft_model(base, config(), mixed=True)
    assert_untouched(base)
    with pytest.raises(ConfigError, match=REFUSED.format("MixedModel")):
        PeftMixedModel.from_pretrained(base, adapter)
    assert_untouched(base)


@pytest.mark.parametrize("kind", ["mixed", "direct"])
def test_adding_an_adapter_to_a_stock_model_of_another_tuner_is_refused_and_the_model_works_on(kind: str) -> None:
    tokens = torch.randint(1, VOCAB, (2, 8))
    if kind == "mixed":
        model: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
        add = lambda: model.add_adapter("ours", config())  # noqa: E731
        tuner = "MixedModel"
    else:
        model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "default")
        add = lambda: (model.peft_config.update(ours=config()), model.inject_adapter(model.model, "ours"))  # noqa: E731
        tuner = "LoraModel"
    before = model(tokens).logits
    with pytest.raises(ConfigError, match=REFUSED.format(tuner)):
        add()
    assert torch.equal(model(tokens).logits, before)
    assert not is_quantized(model)
    if kind == "mixed":
        assert set(model.peft_config) == {"default"}
        model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))


def test_ours_can_be_added_to_a_stock_peft_model_and_injected() -> None:
    """Not refused: `get_peft_model` and `inject_adapter_in_model` go through the registry."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("ours", config(target_modules=["v_proj"], quantization=None))
    assert not is_quantized(model)
    injected = inject_adapter_in_model(config(), llama())
    assert is_quantized(injected)


def test_the_message_names_the_config_class_and_the_way_out() -> None:
    with pytest.raises(
        ConfigError,
        match=r"get_peft_model\(model, config\), without mixed=True or an XLoraConfig, after importing hf_qlora",
    ):
        LoraModel(llama(), config(), "default")


# --- what is passed on -----------------------------------------------------------------------------------------------


def test_an_adapter_of_a_dense_base_works_where_peft_mixes_adapters(tmp_path: Path) -> None:
    """There the tuner is PEFT's own, which computes what the file says."""
    torch.manual_seed(0)
    base = llama()
    tokens = torch.randint(1, VOCAB, (2, 8))
    ours = get_peft_model(copy.deepcopy(base), config(quantization=None, use_rslora=True, init_lora_weights=False))
    ours.save_pretrained(tmp_path)
    mixed = PeftMixedModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(mixed.eval()(tokens).logits, ours.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_whose_config_was_read_from_a_file_scales_as_it_says(tmp_path: Path) -> None:
    """No tensors follow, so that nothing is folded."""
    get_peft_model(llama(), config(use_rslora=True)).save_pretrained(tmp_path)
    given = QLoRAConfig.from_pretrained(tmp_path)
    through_peft = get_peft_model(llama(), copy.deepcopy(given))
    through_transformers = llama()
    through_transformers.add_adapter(copy.deepcopy(given))
    scalings = [
        {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
        for model in (through_peft, through_transformers)
    ]
    assert scalings[0] == scalings[1] == {given.lora_alpha / math.sqrt(given.r)}


def test_keywords_for_the_config_are_honoured(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    assert QLoRAConfig.from_pretrained(tmp_path, quantization=None).quantization is None
    model = PeftModel.from_pretrained(llama(), tmp_path, quantization=None)
    assert not is_quantized(model.get_base_model())


def test_an_adapter_may_have_the_name_of_a_module(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    for name in ("mlp", "model", "up_proj"):
        model.load_adapter(tmp_path, name)
    assert set(model.peft_config) == {"default", "mlp", "model", "up_proj"}


@pytest.mark.parametrize("way", ["load_adapter", "hotswap"])
def test_an_adapter_of_another_base_is_not_put_in_the_place_of_one(way: str, tmp_path: Path) -> None:
    other = config(quantization=NF4Config(block_size=256, double_quant=False), init_lora_weights=False)
    get_peft_model(llama(), other).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config(init_lora_weights=False))
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    ways: dict[str, Callable[[], Any]] = {
        "hotswap": lambda: hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu"),
        "load_adapter": lambda: model.load_adapter(tmp_path, "default"),
    }
    with pytest.raises(ValueError, match=r"block_size.*block_size"):
        ways[way]()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_dense_base_does_not_get_an_nf4_adapter_by_hot_swap(tmp_path: Path) -> None:
    get_peft_model(llama(), config(init_lora_weights=False)).save_pretrained(tmp_path)
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with pytest.raises(ValueError, match="not to 4 bits"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


@pytest.mark.parametrize("cls", [QLoRAConfig, LoraConfig])
def test_a_half_quantized_base_gets_no_adapter(cls: type[LoraConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = llama(), []
    original = hf_qlora.quant.base.become_linear4bit

    def interrupted(*args: Any) -> Any:
        made.append(original(*args))
        if len(made) == 3:
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(hf_qlora.quant.base, "become_linear4bit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, config())
    with pytest.raises(ValueError, match="interrupted"):
        get_peft_model(model, cls(r=2, target_modules=["q_proj"]))


# --- training --------------------------------------------------------------------------------------------------------


def test_a_trained_model_compiles_in_one_graph() -> None:
    model = get_peft_model(llama(), config())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(1, VOCAB, (2, 8))
    assert torch.equal(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_may_be_changed_in_place(checkpointing: bool) -> None:
    """Some models add to what their embedding returned."""
    model = get_peft_model(llama(), config(init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.add_(0.1))
    tokens = torch.randint(1, VOCAB, (2, 8))
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
