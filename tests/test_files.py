"""An adapter's files: whole or not at all, read only if they belong together, the same function for every reader."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from architectures import LLAMA_LIKE, gpt2, llama, tokens
from huggingface_hub import constants
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import config as lora_config
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig, quantize_model, saving
from hf_qlora.files import STATE_NAME, AdapterFileError
from hf_qlora.layers import fold
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.tuner import AdapterError
from hf_qlora.validation import ConfigError


WEIGHTS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"
FACTOR = 2.0  # rsLoRA's scaling over LoRA's, at rank 4: √4
Model = Any


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors here are far too small to share


def config(**changes: Any) -> QLoRAConfig:
    """One whose scaling a stock reader does not know, so that something is folded."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return QLoRAConfig(**{**given, "use_rslora": True, **changes})


def base(**changes: Any) -> nn.Module:
    """A model that is the same in every test."""
    torch.manual_seed(0)
    return llama(**{"hidden_size": 64, "intermediate_size": 64, "attention_bias": True, **changes})


def train(model: Model, seed: int = 1) -> Model:
    """Give every trainable tensor another value, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(given: LoraConfig | None = None, seed: int = 1, model: nn.Module | None = None) -> Model:
    torch.manual_seed(seed)
    return train(get_peft_model(base() if model is None else model, given or config()), seed)


def load(folder: Path, model: nn.Module | None = None, **options: Any) -> Model:
    return PeftModel.from_pretrained(base() if model is None else model, folder, **options).eval()


def logits(model: Model) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def adapter_tensors(model: Model, adapter: str = "default") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return values


def write_config(folder: Path, values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(values))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save other tensors into an adapter as if it had been saved with them: the hash is right."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    values = read_config(folder)
    values["hf_qlora"]["weights_sha256"] = digest(folder / WEIGHTS)
    write_config(folder, values)


def without_hash(folder: Path) -> None:
    """As where the config was saved by itself, over an adapter."""
    values = read_config(folder)
    del values["hf_qlora"]["weights_sha256"]
    write_config(folder, values)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one kind, `one` and `two`, saved."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(("one", "two"), start=1):
        adapted(seed=seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def adapter(originals: Path, tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(originals / "one", tmp_path / "adapter"))


# ── What is written ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_is_three_files(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "deep" / "adapter")
    assert snapshot(tmp_path / "deep" / "adapter").keys() == {WEIGHTS, CONFIG, README}


def test_the_config_names_the_weights_and_how_they_were_folded(adapter: Path) -> None:
    record = read_config(adapter)["hf_qlora"]
    assert record["weights_sha256"] == digest(adapter / WEIGHTS)
    modules = [f"layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    assert record["fold"] == {f"base_model.model.model.{name}": FACTOR for name in modules}
    assert record["versions"].keys() == {"hf-qlora", "peft", "transformers", "torch", "bitsandbytes"}


def test_what_is_written_is_lora_b_times_the_factor(tmp_path: Path) -> None:
    model = adapted(config(rank_pattern={"v_proj": 9}, alpha_pattern={"layers.1.self_attn.q_proj": 24}))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / WEIGHTS)
    own = {name.replace(".default", ""): tensor for name, tensor in adapter_tensors(model).items()}
    assert written.keys() == own.keys()
    for name, tensor in own.items():
        factor = 1.0
        if "lora_B" in name:  # (α of the module / √r) / (α of the config / r)
            factor = 3.0 if "v_proj" in name else 6.0 if "layers.1" in name else 2.0
        assert torch.equal(written[name], tensor * factor)


def test_lora_b_is_folded_in_float32_whatever_its_dtype(tmp_path: Path) -> None:
    model = adapted(config(r=3))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    own = adapter_tensors(model)
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        native = own[name.replace(".weight", ".default.weight")]
        assert torch.equal(tensor, native.float() * math.sqrt(3) if "lora_B" in name else native)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"use_rslora": False},
    "rslora": {},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 24}},
    "not portable": {"portable": False, "alpha_pattern": {"q_proj": 24}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "adapted biases": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 3]}},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "loftq": {"init_lora_weights": "loftq"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "kasa": {"kasa_config": lora_config.KasaConfig()},
    "velora": {"velora_config": lora_config.VeloraConfig()},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
ONLY_DENSE = ("pissa", "pissa_niter", "olora", "mica", "orthogonal", "kasa", "velora", "parameters")
ON_NF4 = [name for name in OPTIONS if name not in ONLY_DENSE]
DENSE = [name for name in OPTIONS if name != "loftq"]


@pytest.mark.parametrize(
    ("options", "quantization"),
    [*((name, NF4Config()) for name in ON_NF4), *((name, None) for name in DENSE)],
)
def test_a_loaded_adapter_computes_what_was_saved(
    options: str, quantization: NF4Config | None, tmp_path: Path
) -> None:
    """fp32; folding and unfolding round lora_B once each, 2⁻²⁴ relative, and the logits are of order 1."""
    model = adapted(config(**OPTIONS[options], quantization=quantization))
    model.save_pretrained(tmp_path)
    assert (logits(load(tmp_path)) - logits(model)).abs().max() <= 1e-5
    assert (logits(model) - logits(base())).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [1, 3]},
        {"trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_on_tied_embeddings_computes_what_was_saved(options: dict[str, Any], tmp_path: Path) -> None:
    """Most small models tie them. PEFT's layers on the head then share the tensors of those on the embedding."""
    model = adapted(config(**options), model=base(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert (logits(load(tmp_path, base(tie_word_embeddings=True))) - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_the_file_says_its_form_whatever_the_config_given_will_save(saved: bool, given: bool, tmp_path: Path) -> None:
    model = adapted(config(portable=saved, alpha_pattern={"v_proj": 24}))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, config=config(portable=given, alpha_pattern={"v_proj": 24}))
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [name for name in DENSE if name not in ("not portable",)])
def test_a_stock_reader_computes_what_was_saved(options: str, tmp_path: Path) -> None:
    """Without the key `hf_qlora` PEFT reads the file as it would without this package."""
    model = adapted(config(**OPTIONS[options], quantization=None))
    model.save_pretrained(tmp_path)
    values = read_config(tmp_path)
    del values["hf_qlora"]
    write_config(tmp_path, values)
    stock = load(tmp_path)
    assert type(stock.peft_config["default"]) is LoraConfig
    assert (logits(stock) - logits(model)).abs().max() <= 1e-5


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    model.save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_loaded_adapter_saved_again_is_the_same_adapter(adapter: Path, tmp_path: Path) -> None:
    load(adapter).save_pretrained(tmp_path / "again")
    again, once = read_config(tmp_path / "again"), read_config(adapter)
    for values in (again, once):
        values["hf_qlora"].pop("weights_sha256")
    assert again == once
    for name, tensor in load_file(adapter / WEIGHTS).items():  # ×2 and ÷2 are exact
        assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[name], tensor)


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = logits(train(model, seed=2))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    assert snapshot(tmp_path).keys() == {WEIGHTS, CONFIG, README}


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = adapted()
    before, config_before = adapter_tensors(model), model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path)
    assert same(adapter_tensors(model), before)
    assert model.peft_config["default"].to_dict() == config_before
    assert model.peft_config["default"].use_rslora is True


def test_a_state_dict_of_the_callers_is_what_is_saved(tmp_path: Path) -> None:
    """Trainer, FSDP and DeepSpeed gather the tensors and pass them."""
    model = adapted()
    gathered = {name: tensor * 3 if "lora_B" in name else tensor for name, tensor in model.state_dict().items()}
    for folder in ("checkpoint-1", "plain"):
        model.save_pretrained(tmp_path / folder, state_dict=gathered)
        for name, tensor in adapter_tensors(load(tmp_path / folder)).items():
            assert torch.equal(tensor, gathered[name])


def test_files_are_as_readable_as_stock_peft_makes_them(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        adapted().save_pretrained(tmp_path / "ours")
        adapted(LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "stock")
    finally:
        os.umask(before)
    for name in (WEIGHTS, CONFIG, README):
        ours, stock = (stat.S_IMODE((tmp_path / kind / name).stat().st_mode) for kind in ("ours", "stock"))
        assert (name, oct(ours)) == (name, oct(stock))


def test_the_model_card_is_extended_not_overwritten(tmp_path: Path) -> None:
    mine = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nTrained with care.\n"
    (tmp_path / README).write_text(mine)
    adapted(config(quantization=None)).save_pretrained(tmp_path)
    text = (tmp_path / README).read_text()
    for line in ("Trained with care.", "license: mit", "library_name: peft", "- mine", "- lora"):
        assert line in text.splitlines()


# ── Several adapters ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three() -> Model:
    """Ours as `default`, ours as `other` with another scaling, and PEFT's own as `stock`."""
    model = adapted()
    model.add_adapter("other", config(r=9, lora_alpha=9, target_modules=["o_proj"]))
    model.add_adapter("stock", LoraConfig(r=4, target_modules=["k_proj"], use_rslora=True, task_type="CAUSAL_LM"))
    for name in ("other", "stock"):
        model.set_adapter(name)
        train(model, seed=7)
    return model


def test_several_adapters_are_saved_in_folders_of_their_own(three: Model, tmp_path: Path) -> None:
    three.save_pretrained(tmp_path)
    inner = {f"{name}/{file}" for name in ("other", "stock") for file in (WEIGHTS, CONFIG)}
    assert snapshot(tmp_path).keys() == {WEIGHTS, CONFIG, README} | inner
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other"), ("stock", tmp_path / "stock")):
        three.set_adapter(name)
        assert (logits(load(folder, quantize_model(base()))) - logits(three)).abs().max() <= 1e-5


def test_a_subfolder_is_named_on_loading(three: Model, tmp_path: Path) -> None:
    three.save_pretrained(tmp_path)
    three.set_adapter("other")
    three.peft_config["other"].inference_mode = True  # as PEFT says of every saved adapter
    assert (logits(load(tmp_path, subfolder="other")) - logits(three)).abs().max() <= 1e-5
    assert PeftConfig.from_pretrained(tmp_path, subfolder="other") == three.peft_config["other"]
    (tmp_path / "other" / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes())
    with pytest.raises(AdapterFileError, match=r"other.*sha256 differs"):
        load(tmp_path, subfolder="other")


def test_a_stock_adapter_beside_ours_is_saved_as_without_us(three: Model, tmp_path: Path) -> None:
    """The config that PEFT writes, and the tensors as they are in the model: nothing folded."""
    three.save_pretrained(tmp_path)
    three.peft_config["stock"].inference_mode = True
    three.peft_config["stock"].save_pretrained(tmp_path / "expected")
    assert read_config(tmp_path / "stock") == read_config(tmp_path / "expected")
    own = adapter_tensors(three, "stock")
    for name, tensor in load_file(tmp_path / "stock" / WEIGHTS).items():
        assert torch.equal(tensor, own[name.replace(".weight", ".stock.weight")])
    assert "fold" in read_config(tmp_path / "other")["hf_qlora"]


@pytest.mark.parametrize("selected", [["default"], ["other"], ["stock"], ["other", "stock"], []])
def test_only_selected_adapters_are_saved(three: Model, selected: list[str], tmp_path: Path) -> None:
    three.save_pretrained(tmp_path, selected_adapters=selected)
    folders = {"default": ""} | {name: f"{name}/" for name in ("other", "stock")}
    expected = {f"{folders[name]}{file}" for name in selected for file in (WEIGHTS, CONFIG)}
    assert snapshot(tmp_path).keys() == expected | {README}


def test_an_unknown_adapter_is_refused_as_by_peft(three: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        three.save_pretrained(tmp_path / "new", selected_adapters=["nobody"])
    assert snapshot(tmp_path) == {}


def test_an_adapter_may_be_named_like_a_path(tmp_path: Path) -> None:
    model = get_peft_model(base(), config(), adapter_name="team/one")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "team" / "one" / WEIGHTS).is_file()
    load(tmp_path / "team" / "one")


def test_two_threads_save_two_adapters_of_one_model(
    three: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread stops while it takes native tensors for a checkpoint; another saves meanwhile, folded."""
    for name, folder in (("default", "checkpoint-1"), ("other", "plain")):
        three.save_pretrained(tmp_path / "alone" / folder, selected_adapters=[name])
    taking, saved = threading.Event(), threading.Event()
    original = saving.get_peft_model_state_dict

    def slow(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        taking.set()
        assert saved.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(saving, "get_peft_model_state_dict", slow)
    options = {"selected_adapters": ["default"]}
    thread = threading.Thread(target=three.save_pretrained, args=(tmp_path / "both" / "checkpoint-1",), kwargs=options)
    thread.start()
    assert taking.wait(60)
    three.save_pretrained(tmp_path / "both" / "plain", selected_adapters=["other"])
    saved.set()
    thread.join()
    both, alone = snapshot(tmp_path / "both"), snapshot(tmp_path / "alone")
    state = f"checkpoint-1/{STATE_NAME}"
    assert same(safetensors.torch.load(both.pop(state)), safetensors.torch.load(alone.pop(state)))
    assert both == alone


def test_threads_that_save_into_one_folder_leave_one_whole_adapter(tmp_path: Path) -> None:
    models = [adapted(seed=seed) for seed in (1, 2)]
    results = [logits(model) for model in models]
    for _ in range(5):
        threads = [threading.Thread(target=model.save_pretrained, args=(tmp_path,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert snapshot(tmp_path).keys() == {WEIGHTS, CONFIG, README}
        with contextlib.suppress(AdapterFileError):  # a mixture, which must be named
            found = logits(load(tmp_path))
            assert any(torch.equal(found, result) for result in results)


# ── Options of save_pretrained ───────────────────────────────────────────────────────────────────────────────────────


def test_pickling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safe_serialization=False would pickle.*safetensors only"):
        adapted().save_pretrained(tmp_path / "new", safe_serialization=False)
    assert snapshot(tmp_path) == {}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "new", is_main_process=False)
    assert snapshot(tmp_path) == {}


def test_a_conversion_that_folding_does_not_allow_is_refused(tmp_path: Path) -> None:
    """PEFT subtracts the tensors of the beginning from those of the end, which must be in one form."""
    with pytest.raises(ValueError, match=r"path_initial_model_for_weight_conversion.*portable=False"):
        adapted().save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("options", [{"use_rslora": False}, {"portable": False}], ids=["nothing folded", "native"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_conversion_gives_an_adapter_for_the_original_base(
    init: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """As PEFT converts it: the rank doubled, the base as it was before the initialisation.

    fp32: the base is the difference of two matrices here and was written back in there; the logits are of order 1.
    """
    model = get_peft_model(base(), config(quantization=None, init_lora_weights=init, **options))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, for the folder of the beginning
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert read_config(tmp_path / "converted")["r"] == 8
    assert (logits(load(tmp_path / "converted")) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-20000"])
@pytest.mark.parametrize("trailing", ["", "/"])
def test_a_checkpoint_has_the_native_tensors_beside_to_the_bit(name: str, trailing: str, tmp_path: Path) -> None:
    """At rank 3, (x · √3) / √3 is another float for one x in ten."""
    model = adapted(config(r=3))
    model.save_pretrained(f"{tmp_path / name}{trailing}")
    assert snapshot(tmp_path / name).keys() == {WEIGHTS, CONFIG, README, STATE_NAME}
    own = {name.replace(".default", ""): t for name, t in adapter_tensors(model).items() if "lora_B" in name}
    assert same(load_file(tmp_path / name / STATE_NAME), own)
    assert same(adapter_tensors(load(tmp_path / name)), adapter_tensors(model))
    (tmp_path / name / STATE_NAME).unlink()
    assert not same(adapter_tensors(load(tmp_path / name)), adapter_tensors(model))  # so it is needed


@pytest.mark.parametrize(
    "options", [{"use_rslora": False}, {"portable": False}, {"r": 1, "use_rslora": True}], ids=str
)
def test_a_checkpoint_where_nothing_is_folded_has_no_state_file(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(config(**options))
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert snapshot(tmp_path / "checkpoint-3").keys() == {WEIGHTS, CONFIG, README}
    assert same(adapter_tensors(load(tmp_path / "checkpoint-3")), adapter_tensors(model))


@pytest.mark.parametrize(
    "name", ["adapter", "checkpoint", "checkpoint-", "checkpoint-1-merged", "my-checkpoint-1", "checkpoint-best"]
)
def test_no_other_folder_has_a_state_file(name: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / name)
    assert snapshot(tmp_path / name).keys() == {WEIGHTS, CONFIG, README}


def test_a_checkpoint_of_several_adapters_has_a_state_file_for_each_folded_one(three: Model, tmp_path: Path) -> None:
    three.save_pretrained(tmp_path / "checkpoint-7")
    written = snapshot(tmp_path / "checkpoint-7").keys()
    assert {name for name in written if name.endswith(STATE_NAME)} == {STATE_NAME, f"other/{STATE_NAME}"}
    model = load(tmp_path / "checkpoint-7")
    model.load_adapter(tmp_path / "checkpoint-7" / "other", "other")
    for name in ("default", "other"):
        assert same(adapter_tensors(model, name), adapter_tensors(three, name))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint whose native tensors differ from the unfolded ones."""
    adapted(config(r=3)).save_pretrained(tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    "options", [{"adapter_name": "again"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str
)
def test_a_checkpoint_is_exact_however_it_is_loaded(options: dict[str, Any], checkpoint: Path) -> None:
    own = adapter_tensors(load(checkpoint))
    name = options.get("adapter_name", "default")
    model = load(checkpoint, **options)
    assert same({n.replace(f".{name}", ".default"): t for n, t in adapter_tensors(model, name).items()}, own)
    assert not same(own, unfolded(checkpoint))


def unfolded(folder: Path) -> dict[str, Tensor]:
    """What an adapter holds where it is read from the portable file alone."""
    tensors = load_file(folder / WEIGHTS)
    return {
        name.replace(".weight", ".default.weight"): t / math.sqrt(3) if "lora_B" in name else t
        for name, t in tensors.items()
    }


def test_a_state_file_of_another_save_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    adapted(config(r=3), seed=2).save_pretrained(tmp_path / "checkpoint-2")
    shutil.copy(tmp_path / "checkpoint-2" / STATE_NAME, checkpoint)
    assert same(adapter_tensors(load(checkpoint)), unfolded(checkpoint))


def test_a_state_file_left_by_an_earlier_save_is_ignored(checkpoint: Path) -> None:
    model = adapted(config(use_rslora=False), seed=2)
    model.save_pretrained(checkpoint)
    assert same(adapter_tensors(load(checkpoint)), adapter_tensors(model))


def test_a_state_file_is_not_for_a_model_with_another_scaling(checkpoint: Path) -> None:
    """A config given on loading decides; the portable file fits every one."""
    other = config(r=3, use_rslora=False)
    assert same(
        adapter_tensors(load(checkpoint, config=other)),
        {name.replace(".weight", ".default.weight"): t for name, t in load_file(checkpoint / WEIGHTS).items()},
    )


STATE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-100],
    "header": lambda content: b"\xff" * 8 + content[8:],
    "text": lambda content: b"not a tensor in sight",
    "bit": lambda content: content[:-5] + bytes([content[-5] ^ 64]) + content[-4:],
}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_a_damaged_state_file_is_named_or_ignored_never_used(damage: str, checkpoint: Path) -> None:
    """The adapter beside it is whole: refusing with the file's name is right, reading past it (with a word) too."""
    state = checkpoint / STATE_NAME
    state.write_bytes(STATE_DAMAGE[damage](state.read_bytes()))
    try:
        model = load(checkpoint)
    except ValueError as error:
        model, message = None, str(error)
    assert same(adapter_tensors(model), unfolded(checkpoint)) if model is not None else STATE_NAME in message


def test_an_incomplete_state_file_is_named_or_ignored_never_used(checkpoint: Path) -> None:
    """Half native and half folded would be another function."""
    tensors = load_file(checkpoint / STATE_NAME)
    tensors.pop(min(tensors))
    metadata = {"format": "pt", "weights_sha256": digest(checkpoint / WEIGHTS)}
    save_file(tensors, checkpoint / STATE_NAME, metadata=metadata)
    try:
        model = load(checkpoint)
    except ValueError as error:
        model, message = None, str(error)
    assert same(adapter_tensors(model), unfolded(checkpoint)) if model is not None else STATE_NAME in message


def test_a_state_file_of_spoilt_values_is_refused(checkpoint: Path) -> None:
    """It stands in for the `lora_B` that were checked; its hash is right."""
    tensors = load_file(checkpoint / STATE_NAME)
    tensors[min(tensors)].view(-1)[0] = math.nan
    save_file(tensors, checkpoint / STATE_NAME, metadata={"format": "pt"})
    values = read_config(checkpoint)
    values["hf_qlora"]["state_sha256"] = digest(checkpoint / STATE_NAME)
    write_config(checkpoint, values)
    with pytest.raises(AdapterFileError, match=rf"{STATE_NAME}: .*NaN"):
        load(checkpoint)


# ── Spoilt weights ───────────────────────────────────────────────────────────────────────────────────────────────────


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "run"))


def lying(content: bytes, length: int) -> bytes:
    return struct.pack("<Q", length) + content[8:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "eight bytes": lambda content: content[:8],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "bit in the header": lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:],
    "bit in the data": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "header longer than the file": lambda content: lying(content, 2**40),
    "header of all memory": lambda content: lying(content, 2**64 - 1),
    "header shorter than it is": lambda content: lying(content, 10),
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15368\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_spoilt_weights_are_refused_by_their_hash(damage: str, adapter: Path) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(AdapterFileError, match=r"sha256 differs.*Save or download the adapter again") as error:
        load(adapter)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "bit in the data"])
def test_spoilt_weights_are_refused_without_a_hash_too(damage: str, adapter: Path) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    without_hash(adapter)
    with pytest.raises((AdapterFileError, AdapterError)) as error:
        load(adapter)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_pickle_under_the_name_of_the_weights_is_not_run(hashed: bool, adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    if not hashed:
        without_hash(adapter)
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        load(adapter)
    assert not (tmp_path / "bomb").exists()


def test_a_pickled_adapter_is_refused_and_not_run(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin beside it is pickled and is not loaded"):
        load(adapter)
    assert not (tmp_path / "bomb").exists()


def test_a_pickle_beside_the_weights_is_not_read(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    load(adapter)
    assert not (tmp_path / "bomb").exists()


def test_missing_weights_are_named(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=rf"{WEIGHTS} does not exist.*Save the adapter again") as error:
        load(adapter)
    assert "pickled" not in str(error.value)


def test_weights_spoilt_after_they_were_loaded_are_refused(adapter: Path) -> None:
    """Also with the time stamp of the whole file, as rsync and tar leave it."""
    load(adapter)
    path, times = adapter / WEIGHTS, (adapter / WEIGHTS).stat()
    path.write_bytes(DAMAGE["bit in the data"](path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(AdapterFileError, match="sha256 differs"):
        load(adapter)


def test_a_folder_in_the_place_of_the_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).mkdir()
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        load(adapter)


def test_foreign_tensors_are_refused(adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {"model.embed.weight": torch.ones(3, 3)})
    with pytest.raises(AdapterError, match=r"does not fit the model: 8 of 8 tensors are missing"):
        load(adapter)


def test_a_file_without_tensors_is_refused(adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {})
    with pytest.raises(AdapterError, match="8 of 8 tensors are missing"):
        load(adapter)


@pytest.mark.parametrize(("weights", "settings"), [("one", "two"), ("two", "one")])
def test_a_mixture_of_two_saves_is_refused(weights: str, settings: str, originals: Path, tmp_path: Path) -> None:
    shutil.copy(originals / weights / WEIGHTS, tmp_path)
    shutil.copy(originals / settings / CONFIG, tmp_path)
    with pytest.raises(AdapterFileError, match="a save was interrupted between the two files"):
        load(tmp_path)


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "hotswap", "with a config", "transformers"])
def test_every_way_of_loading_checks_the_files(how: str, adapter: Path, originals: Path) -> None:
    shutil.copy(originals / "two" / WEIGHTS, adapter)
    calls: dict[str, Callable[[], Any]] = {
        "from_pretrained": lambda: load(adapter),
        "load_adapter": lambda: adapted().load_adapter(adapter, "second"),
        "hotswap": lambda: hotswap_adapter(load(originals / "one"), str(adapter), "default"),
        "transformers": lambda: base().load_adapter(str(adapter)),
        "with a config": lambda: load(adapter, config=QLoRAConfig.from_pretrained(originals / "two")),
    }
    with pytest.raises(AdapterFileError, match="sha256 differs"):
        calls[how]()


# ── Tensors that do not fit ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_of_another_architecture_is_refused(adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj.*GPT2LMHeadModel.*c_attn"):
        load(adapter, gpt2(n_embd=64))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 128}, "8 have another shape"),
        ({"num_hidden_layers": 3}, "4 of 12 tensors are missing"),
        ({"num_hidden_layers": 1}, "4 belong to no adapted layer"),
        ({"num_key_value_heads": 4}, "2 have another shape"),
        ({"hidden_size": 128, "num_hidden_layers": 3}, r"4 of 12 tensors are missing .*; 8 have another shape"),
    ],
)
def test_an_adapter_of_another_size_is_refused(changes: dict[str, int], found: str, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=found) as error:
        load(adapter, base(**changes))
    assert str(adapter) in str(error.value)
    assert "layers." in str(error.value)  # one of them is named


def drop(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    "options", ["rslora", "dora", "lora_bias", "all biases", "adapted biases", "modules_to_save", "tokens"]
)
def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(options: str, tmp_path: Path) -> None:
    adapted(config(**OPTIONS[options])).save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    for name in saved:
        if "layers" in name and "layers.0.self_attn.q_proj" not in name:
            continue  # one of each kind
        cases: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
            "1 of .* tensors are missing|lacks": drop(name),
            "1 have another shape|size mismatch": lambda t, n=name: {**t, n: torch.cat([t[n], t[n]])},
        }
        if "layers.0" in name:
            other = name.replace("layers.0", "layers.9")
            cases["1 belong to no adapted layer"] = lambda t, n=name, other=other: {**t, other: t[n].clone()}
        for found, change in cases.items():
            rewrite(tmp_path, change)
            with pytest.raises(AdapterError, match=found) as error:
                load(tmp_path)
            assert name.split(".")[-2] in str(error.value)
            save_file(saved, tmp_path / WEIGHTS)


def test_a_misfit_leaves_the_adapter_as_it_was(adapter: Path, originals: Path) -> None:
    """Checked before the first tensor is set: an adapter that is in the model is not half overwritten."""
    model = load(originals / "two")
    before = adapter_tensors(model)
    rewrite(adapter, drop("layers.1.self_attn.v_proj.lora_B"))
    with pytest.raises(AdapterError, match="1 of 8"):
        model.load_adapter(adapter, "default")
    assert same(adapter_tensors(model), before)


def test_ignore_mismatched_sizes_is_honoured_as_by_peft(adapter: Path) -> None:
    rewrite(
        adapter, lambda tensors: {n: t[:2] if "lora_A" in n and "layers.0" in n else t for n, t in tensors.items()}
    )
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        model = load(adapter, ignore_mismatched_sizes=True)
    loaded, saved = adapter_tensors(model), load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"
    assert torch.equal(loaded[f"{name}.default.weight"], saved[f"{name}.weight"])


@pytest.fixture
def with_head(tmp_path: Path) -> Path:
    adapted(config(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_missing_module_to_save_is_named(with_head: Path) -> None:
    rewrite(with_head, drop("lm_head"))
    with pytest.raises(AdapterError, match=r"lacks .*lm_head.*modules_to_save"):
        load(with_head)


def test_a_module_to_save_of_another_shape_is_refused(with_head: Path) -> None:
    """A resized vocabulary: the most common misfit of all."""
    with pytest.raises(AdapterError, match=r"lm_head.*\(500, 64\).*\(600, 64\)"):
        load(with_head, base(vocab_size=600))


def test_a_trained_head_that_the_model_has_no_place_for_is_not_dropped_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A classifier's adapter on a language model: every LoRA tensor fits, and the head is nobody's."""
    sizes = {**LLAMA_LIKE, "hidden_size": 64, "intermediate_size": 64}
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    get_peft_model(classifier, config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path / WEIGHTS)
    try:
        load(tmp_path)
        message = caplog.text
    except AdapterError as error:
        message = str(error)
    assert "score" in message


# ── Spoilt configs ───────────────────────────────────────────────────────────────────────────────────────────────────

BROKEN = {
    "empty": b"",
    "not JSON": b"{'peft_type': 'LORA'}",
    "binary": bytes(range(256)),
    "utf-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "a list": b"[]",
    "a string": b'"hf_qlora"',
    "a number": b"7",
    "null": b"null",
    "record is a list": b'{"peft_type": "LORA", "hf_qlora": []}',
    "record is null": b'{"peft_type": "LORA", "hf_qlora": null}',
    "record is empty": b'{"peft_type": "LORA", "hf_qlora": {}}',
    "no peft_type": b'{"hf_qlora": {"format_version": 1}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_spoilt_config_is_refused_and_named(content: bytes, adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(adapter)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_spoilt_config_is_refused_where_another_is_given_too(content: bytes, adapter: Path) -> None:
    """The config given decides what is computed; the record in the file says in which form the tensors are."""
    given = QLoRAConfig.from_pretrained(adapter)
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(adapter, config=given)


def test_weights_without_a_config_are_read_as_the_given_config_says(adapter: Path) -> None:
    """Or refused: what must not happen is that folded tensors are taken for native ones."""
    given, expected = QLoRAConfig.from_pretrained(adapter), logits(load(adapter))
    (adapter / CONFIG).unlink()
    with contextlib.suppress(ValueError):
        assert torch.equal(logits(load(adapter, config=given)), expected)


def test_a_newer_format_is_refused_where_another_config_is_given_too(adapter: Path) -> None:
    given = QLoRAConfig.from_pretrained(adapter)
    values = read_config(adapter)
    values["hf_qlora"]["format_version"] = 99
    write_config(adapter, values)
    with pytest.raises(ConfigError, match="format_version 99"):
        load(adapter, config=given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("weights_sha256", value) for value in (7, "abc")),
        *((name, value) for name in ("portable", "folded") for value in ("no", 0, None)),
    ],
)
def test_a_wrong_value_in_the_record_is_refused(name: str, value: Any, adapter: Path) -> None:
    values = read_config(adapter)
    values["hf_qlora"][name] = value
    write_config(adapter, values)
    with pytest.raises((ConfigError, AdapterFileError), match=rf"{name.removeprefix('weights_')}"):
        load(adapter)


@pytest.mark.parametrize("value", [None, [], "x", {"base": "x"}, {"a": 1}])
def test_a_wrong_fold_in_a_checkpoint_costs_only_exactness(value: Any, checkpoint: Path) -> None:
    values = read_config(checkpoint)
    values["hf_qlora"]["fold"] = value
    write_config(checkpoint, values)
    assert same(adapter_tensors(load(checkpoint)), unfolded(checkpoint))


# ── Nothing named in a file is run ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported here and must not be."""
    (tmp_path / "hf_qlora_trap.py").write_text(
        "import pathlib\npathlib.Path(__file__ + '.run').touch()\nclass Model: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "hf_qlora_trap"
    assert "hf_qlora_trap" not in sys.modules
    assert not (tmp_path / "hf_qlora_trap.py.run").exists()


def test_a_library_named_in_the_auto_mapping_is_not_imported(trap: str, adapter: Path) -> None:
    values = read_config(adapter) | {"task_type": None, "base_model_name_or_path": "x"}
    values["auto_mapping"] = {"base_model_class": "Model", "parent_library": trap}
    write_config(adapter, values)
    with pytest.raises(ValueError, match=rf"wants to import '{trap}' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(adapter)


def test_a_library_named_as_megatrons_core_is_not_imported(trap: str, adapter: Path) -> None:
    values = read_config(adapter) | {"megatron_config": {"a": 1}, "megatron_core": trap}
    for quantization in (values["hf_qlora"]["quantization"], None):
        values["hf_qlora"]["quantization"] = quantization
        write_config(adapter, values)
        with pytest.raises(ValueError, match="megatron"):
            load(adapter)


@pytest.mark.parametrize("attribute", ["type", "class", "config_class"])
def test_a_class_named_in_the_record_is_not_imported(trap: str, attribute: str, adapter: Path) -> None:
    values = read_config(adapter)
    values["hf_qlora"][attribute] = f"{trap}.Model"
    write_config(adapter, values)
    with contextlib.suppress(ConfigError):
        load(adapter)


# ── Files that would do harm ─────────────────────────────────────────────────────────────────────────────────────────

LOADERS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": lambda folder: load(folder),
    "load_adapter": lambda folder: adapted().load_adapter(folder, "second"),
    "hotswap": lambda folder: hotswap_adapter(adapted(), str(folder), "default"),
    "transformers": lambda folder: base().load_adapter(str(folder)),
    "hotswap in transformers": lambda folder: in_transformers().load_adapter(
        str(folder), adapter_name="default", hotswap=True
    ),
}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def in_transformers() -> Any:
    model: Any = base()
    model.add_adapter(config())
    return model


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(number: float, how: str, adapter: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[A][1, 2] = number
        return tensors

    rewrite(adapter, spoil)
    with pytest.raises(AdapterFileError, match=r"q_proj\.lora_A\.weight has 1 values of 256 that are NaN or infinite"):
        LOADERS[how](adapter)


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_of_no_floating_point_are_refused(dtype: torch.dtype, how: str, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {**tensors, A: tensors[A].to(dtype)})
    with pytest.raises(AdapterFileError, match=rf"q_proj\.lora_A\.weight has dtype {dtype}") as error:
        LOADERS[how](adapter)
    assert str(adapter / WEIGHTS) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_weights_of_any_floating_point_are_read(dtype: torch.dtype, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    loaded = adapter_tensors(load(adapter))[A.replace(".weight", ".default.weight")]
    assert torch.equal(loaded, load_file(adapter / WEIGHTS)[A].float())


def test_a_refusal_comes_before_the_base_is_quantized(adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {**tensors, A: tensors[A] * math.nan})
    model = base()
    with pytest.raises(AdapterFileError):
        load(adapter, model)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


PATTERNS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "target_modules": lambda values, pattern: values.update(target_modules=pattern),
    "exclude_modules": lambda values, pattern: values.update(exclude_modules=pattern),
    "rank_pattern": lambda values, pattern: values.update(rank_pattern={pattern: 4}),
    "alpha_pattern": lambda values, pattern: values["hf_qlora"]["originals"].update(alpha_pattern={pattern: 4}),
    "modules_to_save": lambda values, pattern: values.update(modules_to_save=[pattern]),
    "layers_pattern": lambda values, pattern: values.update(layers_pattern=[pattern], layers_to_transform=[0]),
}


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("place", PATTERNS)
def test_a_pattern_that_explodes_is_refused(place: str, how: str, adapter: Path) -> None:
    values = read_config(adapter)
    PATTERNS[place](values, r"(\w+|\.)*(\w+|\.)*!")
    write_config(adapter, values)
    with pytest.raises(ConfigError, match=rf"{CONFIG}: {place}: the regular expression .* is refused: .*very long"):
        LOADERS[how](adapter)


def test_a_pattern_that_is_none_is_refused_wherever_it_stands(adapter: Path) -> None:
    for change in PATTERNS.values():
        values = read_config(adapter)
        change(values, "q_proj(")
        write_config(adapter, values)
        with pytest.raises(ConfigError, match=rf"{CONFIG}: .*'q_proj\(' is not a regular expression"):
            load(adapter)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    adapted(AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    return tmp_path


def change_scales(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = read_config(folder)
    change(values["hf_qlora"]["depth"])
    write_config(folder, values)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"theta": value} for value in (math.nan, math.inf, 1e300, 10**400, "1", None, True)),
        *({"attention": value} for value in (math.nan, 0.4, 2.1)),
        *({"concentration": value} for value in (math.nan, 1e300, "x")),
        *({"observations": value} for value in (-1, 10**400, 1.5)),
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_a_depth_scale_out_of_range_is_refused(wrong: dict[str, Any], deep: Path) -> None:
    change_scales(deep, lambda scales: next(iter(scales.values())).update(wrong))
    for read in (load, lambda folder: base().load_adapter(str(folder))):
        with pytest.raises(ConfigError, match=rf"{CONFIG}: .*hf_qlora\.depth"):
            read(deep)


def test_depth_scales_of_other_modules_are_named_and_change_nothing(
    deep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fp32: a gain that starts from 1 leaves its factor in lora_B, which rounds once more."""
    expected = logits(load(deep))
    assert "depth scales" not in caplog.text
    change_scales(deep, lambda scales: scales.update(nobody=scales.pop(next(iter(scales)))))
    assert (logits(load(deep)) - expected).abs().max() <= 1e-5
    assert "for modules that are not adapted; they are ignored: ['nobody']" in caplog.text
    assert "for all but some adapted modules, which start from 1" in caplog.text


@pytest.mark.parametrize("how", LOADERS)
def test_a_config_of_all_memory_is_not_read(how: str, adapter: Path) -> None:
    with (adapter / CONFIG).open("r+b") as file:
        file.truncate(2**40)  # on the disk it takes nothing
    with pytest.raises(AdapterFileError, match=rf"{CONFIG} has 1,099,511,627,776 bytes"):
        LOADERS[how](adapter)


def test_an_adapter_is_not_saved_outside_of_its_folder(tmp_path: Path) -> None:
    """Names with dots are refused by torch when the adapter is made."""
    model = get_peft_model(base(), config(), adapter_name=str(tmp_path / "outside"))
    with pytest.raises(ValueError, match="lead out of"):
        model.save_pretrained(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["me/../../secret", "..", "../secret", "me/a/b", "me/..%2f"])
def test_an_id_that_leads_out_of_the_cache_is_refused(name: str, cached: Path) -> None:
    """By the Hub's client."""
    with pytest.raises((ValueError, OSError)):
        load(name, cache_dir=str(cached.parents[2]))  # type: ignore[arg-type]


# ── Saves that fail ──────────────────────────────────────────────────────────────────────────────────────────────────


def whole(folder: Path) -> bool:
    """Whether an adapter can be loaded; False where loading refuses it as a mixture, any other error is raised."""
    try:
        load(folder)
    except AdapterFileError as error:
        if "a save was interrupted" in str(error):
            return False
        raise
    return True


def test_saving_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file; pass a folder"):
        adapted().save_pretrained(tmp_path / "file")
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_saving_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"Cannot save the adapter in .*file/adapter"):
        adapted().save_pretrained(tmp_path / "file" / "adapter")
    assert snapshot(tmp_path) == {"file": b"mine"}


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def read_only(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("tempfile.mkdtemp", read_only),
        ("tempfile.mkdtemp", full),
        ("shutil.copy", full),
        ("os.replace", read_only),
        ("pathlib.Path.write_text", full),
        ("peft.peft_model.safe_save_file", full),
        ("peft.peft_model.PeftModel.create_or_update_model_card", full),
        ("hf_qlora.saving.save_file", full),
    ],
)
def test_a_failed_save_leaves_the_old_adapter_and_nothing_else(
    place: str, error: Callable[..., None], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, before, model = checkpoint, snapshot(checkpoint), adapted(seed=2)
    settings, tensors = model.peft_config["default"].to_dict(), adapter_tensors(model)
    with monkeypatch.context() as patch:
        patch.setattr(place, error)
        with pytest.raises(OSError, match=r"No space left|Permission denied") as raised:
            model.save_pretrained(adapter)
    assert str(adapter) in str(raised.value)
    assert snapshot(adapter) == before
    assert list(adapter.glob(".*")) == []
    assert model.peft_config["default"].to_dict() == settings
    assert same(adapter_tensors(model), tensors)


def test_an_interrupted_save_leaves_the_old_adapter_and_nothing_else(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and errors that are not of the file system."""
    before, model = snapshot(adapter), adapted(seed=2)
    for error in (KeyboardInterrupt, RuntimeError):

        def interrupted(*_: Any, error: type[BaseException] = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("peft.peft_model.safe_save_file", interrupted)
            with pytest.raises(error):
                model.save_pretrained(adapter)
        assert snapshot(adapter) == before


def counted(limit: int, then: Callable[[], None]) -> Callable[..., None]:
    """`os.replace`, with something else in the place of its call number `limit`."""
    original, calls = os.replace, 0

    def replace(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            then()
        original(*args, **kwargs)

    return replace


def renames_of_a_save(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that files get in a save into `folder`, in order."""
    found: list[str] = []
    original = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda source, final: (found.append(Path(final).name), original(source, final)))
        model.save_pretrained(folder)
    return found


FOLDERS = {"adapter": {WEIGHTS, CONFIG, README}, "checkpoint-1": {WEIGHTS, CONFIG, README, STATE_NAME}}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_config_is_moved_in_last(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names is there then; a reader that comes in between finds another hash."""
    renames = renames_of_a_save(adapted(), tmp_path / folder, monkeypatch)
    assert set(renames) == FOLDERS[folder]
    assert renames[-1] == CONFIG


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_rename_that_fails_leaves_the_old_adapter_or_says_that_it_is_lost(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, old, model = tmp_path / folder, adapted(seed=1), adapted(seed=2)
    count = len(renames_of_a_save(model, tmp_path / "dry" / folder, monkeypatch))
    for number in range(1, count + 1):
        old.save_pretrained(target)
        before = snapshot(target)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", counted(number, full))
            with pytest.raises(OSError, match="No space left") as raised:
                model.save_pretrained(target)
        assert snapshot(target).keys() == before.keys()
        if whole(target):
            assert torch.equal(logits(load(target)), logits(old))
        else:
            assert "What was there before is unchanged" not in str(raised.value)
    model.save_pretrained(target)  # saving again, once there is room, is all it takes
    assert torch.equal(logits(load(target)), logits(model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_crash_leaves_the_old_adapter_the_new_one_or_a_mixture_that_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, old, model = tmp_path / folder, adapted(seed=1), adapted(seed=2)
    count = len(renames_of_a_save(model, tmp_path / "dry" / folder, monkeypatch))
    results = [logits(old), logits(model)]
    found = []
    for number in range(1, count + 1):
        old.save_pretrained(target)
        process = os.fork()
        if process == 0:  # the child dies before rename `number`, without cleaning up
            os.replace = counted(number, lambda: os._exit(9))  # type: ignore[assignment]
            try:
                model.save_pretrained(target)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        found.append(whole(target))
        if found[-1]:
            assert any(torch.equal(logits(load(target)), result) for result in results)
    assert found[0] is True
    assert found[-1] is False  # without the hash, this one would be loaded
    model.save_pretrained(target)  # what the crashes left behind is in nobody's way
    assert torch.equal(logits(load(target)), results[1])


@pytest.mark.parametrize("largest", [README, WEIGHTS, CONFIG])
def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(largest: str, tmp_path: Path) -> None:
    """A real one, as the kernel reports it: no file may grow beyond a limit, and the largest file hits it."""
    resource = pytest.importorskip("resource")
    options: dict[str, Any] = {README: {"r": 1}, WEIGHTS: {"r": 16}, CONFIG: {}}[largest]
    if largest == README:  # which PEFT extends
        (tmp_path / README).write_text("Long.\n" * 5000)
    if largest == CONFIG:
        options = {"rank_pattern": {f"a_module_that_is_not_there_{i}": 4 for i in range(400)}}
    model = adapted(config(**options))
    if largest == README:
        (tmp_path / README).write_text("---\n{}\n---\n" + "All of this is mine.\n" * 1000)
    model.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    sizes = sorted((len(content), name) for name, content in before.items())
    assert sizes[-1][1] == largest
    train(model, seed=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((sizes[-2][0] + sizes[-1][0]) // 2, hard))
    try:
        with pytest.raises(OSError, match=str(tmp_path)):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before
    assert list(tmp_path.glob(".*")) == []
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_folder_in_the_place_of_a_file_leaves_the_old_adapter(adapter: Path) -> None:
    """Found before anything is moved, or taken back."""
    (adapter / README).unlink()
    (adapter / README).mkdir()
    before = snapshot(adapter)
    with pytest.raises(OSError, match=README):
        adapted(seed=2).save_pretrained(adapter)
    assert snapshot(adapter) == before


# ── Adapters of the Hub ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cached(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter in the Hub's cache as `me/adapter`; the Hub cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    snapshot_folder = tmp_path / "cache" / "models--me--adapter" / "snapshots" / commit
    shutil.copytree(adapter, snapshot_folder)
    (snapshot_folder.parents[1] / "refs").mkdir()
    (snapshot_folder.parents[1] / "refs" / "main").write_text(commit)
    return snapshot_folder


def from_hub(cached: Path) -> Model:
    return load("me/adapter", cache_dir=str(cached.parents[2]))  # type: ignore[arg-type]


def test_an_adapter_from_the_hub_is_loaded(cached: Path, adapter: Path) -> None:
    model = from_hub(cached)
    assert type(model.peft_config["default"]) is QLoRAConfig
    assert torch.equal(logits(model), logits(load(adapter)))


def test_an_adapter_from_the_hub_is_checked(cached: Path, originals: Path) -> None:
    shutil.copy(originals / "two" / WEIGHTS, cached)
    with pytest.raises(AdapterFileError, match="sha256 differs"):
        from_hub(cached)


def test_a_pickled_adapter_from_the_hub_is_refused_and_not_run(cached: Path, tmp_path: Path) -> None:
    (cached / WEIGHTS).unlink()
    (cached / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(AdapterFileError, match=r"me/adapter has no adapter_model\.safetensors.*pickled"):
        from_hub(cached)
    assert not (tmp_path / "bomb").exists()


def test_an_adapter_that_is_nowhere_is_not_found(cached: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'me/other'"):
        load("me/other", cache_dir=str(cached.parents[2]))  # type: ignore[arg-type]


# ── Configs that were copied ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantization", ["as saved", None])
def test_a_replaced_config_does_not_scale_a_folded_adapter_twice(
    quantization: NF4Config | str | None, adapter: Path
) -> None:
    """transformers' load_adapter sets the file's tensors past PEFT, so the adapter must take their form."""
    given = QLoRAConfig.from_pretrained(adapter)
    if quantization is None:
        given = dataclasses.replace(given, quantization=None)
    else:
        given = dataclasses.replace(given, inference_mode=True)
    model: Any = base()
    model.load_adapter(str(adapter), peft_config=given)
    expected = load(adapter, config=given)
    assert (logits(model) - logits(expected)).abs().max() <= 1e-5


# ── What a killed process leaves ─────────────────────────────────────────────────────────────────────────────────────


def test_a_later_save_removes_what_a_killed_one_left(adapter: Path) -> None:
    old, young = adapter / ".saving-old", adapter / ".saving-young"
    for left in (old, young):
        left.mkdir()
        (left / WEIGHTS).write_bytes(b"half")
    hours_ago = old.stat().st_mtime - 2 * saving.LEFT_OVER_AFTER_S
    os.utime(old, (hours_ago, hours_ago))
    adapted().save_pretrained(adapter)
    assert not old.exists()
    assert young.exists()  # another process may be at it


def test_a_left_over_that_vanishes_meanwhile_is_no_error(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / ".saving-gone"]))
    saving._remove_left_overs(adapter)


def test_every_process_takes_part_in_what_may_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded model's tensors are gathered by all processes, or by none of them to the end."""
    model, calls = adapted(), []
    original = saving.get_peft_model_state_dict
    monkeypatch.setattr(
        saving, "get_peft_model_state_dict", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    model.save_pretrained(tmp_path / "checkpoint-1", is_main_process=True)
    on_main = len(calls)
    calls.clear()
    model.save_pretrained(tmp_path / "checkpoint-1", is_main_process=False)
    assert on_main == len(calls) == 1


def test_a_callers_config_is_not_changed_by_a_loader_that_knows_no_forms(adapter: Path) -> None:
    """The layers scale as the file's tensors, which are folded, ask for; the config stays as it was read."""
    given = QLoRAConfig.from_pretrained(adapter)
    shown = given.to_dict()
    with fold.exchange("portable", past_peft=True):
        model = inject_adapter_in_model(given, base())
    assert model.model.layers[0].self_attn.q_proj.scaling["default"] == 8 / 4
    assert given.to_dict() == shown
