"""What will be refused is refused before the base is touched; what is fine is not refused for want of weights."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, gpt2, llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn

import hf_qlora.prepare
import hf_qlora.rehearsal
from hf_qlora import NF4Config, QLoRAConfig, quantize_model
from hf_qlora.files import AdapterFileError
from hf_qlora.quant.base import is_quantized
from hf_qlora.rehearsal import rehearse, try_config
from hf_qlora.tuner import AdapterError
from hf_qlora.validation import ConfigError


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def is_untouched(model: nn.Module, before: dict[str, bytes]) -> bool:
    return not is_quantized(model) and not hasattr(model, "peft_config") and state(model) == before


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_modules": ["q_proj", "input_layernorm"]}, ValueError, "LlamaRMSNorm"),
        ({"target_modules": ["q_proj", "mlp"]}, ValueError, "LlamaMLP"),
        ({"target_modules": ["nope"]}, NoMatchingPeftModuleError, "nope.*q_proj"),
        ({"trainable_token_indices": [3, -1]}, ConfigError, r"\[-1\].*embed_tokens.*0 to 499"),
        ({"trainable_token_indices": [500]}, ConfigError, r"\[500\].*resize_token_embeddings"),
        ({"trainable_token_indices": {"nope": [1]}}, ValueError, "nope"),
        ({"target_parameters": ["q_proj.weight"]}, ValueError, "target_modules"),
        ({"target_modules": [], "target_parameters": ["mlp.nope"]}, ValueError, "nope|target"),
    ],
    ids=["norm", "block", "nothing", "token -1", "token past the end", "embedding", "parameters", "parameter"],
)
def test_a_config_that_peft_refuses_half_way_leaves_the_base_dense(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = llama()
    before = state(model)
    with pytest.raises(error, match=words):
        get_peft_model(model, config(**settings))
    assert is_untouched(model, before)


@pytest.mark.parametrize(
    "settings", [{}, {"trainable_token_indices": [3, 499]}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]
)
def test_a_config_that_works_is_tried_and_then_used(settings: dict[str, Any]) -> None:
    given = config(**settings)
    shown = repr(given)
    model = get_peft_model(llama(), given)
    assert is_quantized(model.get_base_model())
    assert repr(given) == shown
    assert not any(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_every_family_can_be_tried_without_its_weights(family: Architecture) -> None:
    model = family.make()
    before = state(model)
    given = QLoRAConfig(r=2, target_modules="all-linear", task_type=family.task_type, **family.options)
    shadow = try_config(model, given, "default", PeftModel)
    assert shadow is not None
    assert any(isinstance(module, LoraLayer) for module in shadow.modules())
    assert is_untouched(model, before)
    assert all(p.device.type != "meta" for p in model.parameters())


# --- adapters from files ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(llama(), config(use_rslora=True, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_hash(folder: Path) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["hf_qlora"]["weights_sha256"]
    path.write_text(json.dumps(values))


def refuse(model: nn.Module, folder: Path, error: type[Exception], words: str) -> None:
    before = state(model)
    with pytest.raises(error, match=words):
        PeftModel.from_pretrained(model, folder)
    assert is_untouched(model, before)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refuse(llama(), folder, AdapterFileError, "does not exist")


def test_truncated_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    refuse(llama(), folder, AdapterFileError, "sha256 differs.*on purpose")


def test_another_rank(folder: Path) -> None:
    edit(folder, r=8)
    refuse(llama(), folder, AdapterError, "another shape")


def test_another_width(folder: Path) -> None:
    refuse(llama(hidden_size=64), folder, AdapterError, "another shape")


def test_another_architecture(folder: Path) -> None:
    refuse(gpt2(), folder, NoMatchingPeftModuleError, "c_attn")


def test_a_tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    remove_hash(folder)
    refuse(llama(), folder, AdapterError, "1 of 4 tensors are missing")


def test_weights_rewritten_on_purpose_load_without_the_hash(folder: Path) -> None:
    tensors = {name: t.half() for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    remove_hash(folder)
    PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}])
def test_loading_gives_the_saved_adapter(folder: Path, options: dict[str, Any]) -> None:
    """Trying it first changes nothing: not the config given, not what is loaded."""
    given = QLoRAConfig.from_pretrained(folder)
    given.inference_mode = False
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True, config=given, **options)
    name = options.get("adapter_name", "default")
    assert model.peft_config[name] is given
    saved = load_file(folder / WEIGHTS)
    found = {n.replace(f".{name}.", "."): p for n, p in model.named_parameters() if "lora_A" in n}
    assert found.keys() == {n for n in saved if "lora_A" in n}
    assert all(torch.equal(p, saved[n]) for n, p in found.items())


def test_automatic_classes_load_too(folder: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    edit(folder, base_model_name_or_path=str(tmp_path / "base"))
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert not any(p.device.type == "meta" for p in model.parameters())


def test_a_second_adapter_whose_file_is_refused_does_not_stay(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(init_lora_weights=False))
    expected = {name: p.clone() for name, p in model.named_parameters()}
    edit(folder, r=8)
    with pytest.raises(AdapterError, match="another shape"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "second").exists()
    PeftModel.from_pretrained(llama(), tmp_path / "again")


def test_an_addition_that_fails_half_way_leaves_no_trace_in_what_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(init_lora_weights=False))
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="LlamaRMSNorm"):
        model.add_adapter("second", config(target_modules=["q_proj", "k_proj", "norm"]))
    assert not any(".second" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert {name for name, _ in again.named_parameters()} == names


# --- the copy --------------------------------------------------------------------------------------------------------


def test_the_copy_has_no_data_and_keeps_ties() -> None:
    model = llama(tie_word_embeddings=True)
    shadow = rehearse(model, "default", lambda copied: None)
    assert shadow is not None
    assert {p.device.type for p in (*shadow.parameters(), *shadow.buffers())} == {"meta"}
    assert shadow.lm_head.weight is shadow.model.embed_tokens.weight
    assert [n for n, _ in shadow.named_modules()] == [n for n, _ in model.named_modules()]


def test_a_model_that_cannot_be_copied_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncopyable:
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise TypeError("cannot be copied")

    model = llama()
    model.handle = Uncopyable()
    assert rehearse(model, "default", lambda copied: pytest.fail("tried")) is None
    assert is_quantized(get_peft_model(model, config()).get_base_model())


def test_a_step_that_needs_weights_does_not_count() -> None:
    assert rehearse(llama(), "default", lambda copied: copied.lm_head.weight.sum().item()) is None


def test_other_errors_reach_the_caller() -> None:
    def fail(copied: nn.Module) -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        rehearse(llama(), "default", fail)


def test_loftq_decomposes_only_what_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = hf_qlora.prepare.loftq_factors

    def watched(weight: Any, quantized: Any, given: Any, name: str) -> Any:
        seen.append(name)
        return original(weight, quantized, given, name)

    monkeypatch.setattr(hf_qlora.prepare, "loftq_factors", watched)
    get_peft_model(llama(), config(init_lora_weights="loftq"))
    assert seen == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_hooks_and_quantization_settings_survive_the_try() -> None:
    model = llama()
    calls: list[str] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    adapted = get_peft_model(model, config(quantization=NF4Config(block_size=128)))
    adapted(torch.ones(1, 4, dtype=torch.long))
    assert calls == ["layer"]
    copy.deepcopy(adapted)


# --- a model that is 4-bit already -----------------------------------------------------------------------------------


@pytest.fixture
def nf4() -> nn.Module:
    return quantize_model(llama())


MISTAKES: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["nope"]},
    "norm": {"target_modules": ["q_proj", "norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1], "nope": [1]}},
    "token": {"trainable_token_indices": [9999]},
    "no token": {"trainable_token_indices": []},
    "packed": {"modules_to_save": ["down_proj"]},
}
WORDS = {
    "names": "nope.*down_proj",
    "norm": "LlamaRMSNorm",
    "tokens": "nope",
    "token": r"\[9999\].*rows 0 to 499",
    "no token": "names no token",
    "packed": r"modules_to_save=\['down_proj'\].*4-bit",
}


@pytest.mark.parametrize(
    ("mistake", "kind"),
    # On a dense base "packed" is no mistake: what is to be trained stays dense.
    [(mistake, kind) for mistake in MISTAKES for kind in ("dense", "nf4") if (mistake, kind) != ("packed", "dense")],
)
def test_a_mistake_and_then_the_right_config_on_the_same_model(
    mistake: str, kind: str, nf4: nn.Module, tmp_path: Path
) -> None:
    model = nf4 if kind == "nf4" else llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=WORDS[mistake]):
        get_peft_model(model, config(**MISTAKES[mistake]))
    assert [name for name, _ in model.named_modules()] == names
    adapted = get_peft_model(model, config(init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_second_adapter_costs_nothing(mistake: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(init_lora_weights=False))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=WORDS[mistake]):
        model.add_adapter("second", config(**MISTAKES[mistake]))
    assert [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path)


def test_a_bad_file_does_not_stand_in_the_way_of_a_good_one(nf4: nn.Module, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    edit(bad, modules_to_save=["lm_head"])
    names = [name for name, _ in nf4.named_modules()]
    with pytest.raises(AdapterError, match="modules_to_save"):
        PeftModel.from_pretrained(nf4, bad)
    assert [name for name, _ in nf4.named_modules()] == names
    PeftModel.from_pretrained(nf4, folder)


def test_transformers_refuses_a_bad_file_before_the_base_is_touched(folder: Path) -> None:
    model = llama()
    before = state(model)
    edit(folder, r=8)
    with pytest.raises(AdapterError, match="another shape"):
        model.load_adapter(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match="does not exist"):
        model.load_adapter(str(folder))
    assert is_untouched(model, before)


def test_the_task_s_own_class_is_tried() -> None:
    """It refuses after the tuner is done: PEFT adapts the head that the class wants to train."""
    (family,) = [family for family in ARCHITECTURES if family.name == "bert"]
    model = family.make()
    before = state(model)
    with pytest.raises(TypeError, match="modules_to_save"):
        get_peft_model(model, QLoRAConfig(r=2, target_modules=["query", "classifier"], task_type="TOKEN_CLS"))
    assert is_untouched(model, before)


def test_modules_that_other_threads_make_are_left_alone() -> None:
    stop, devices = threading.Event(), set()

    def make() -> None:
        while not stop.is_set():
            devices.add(nn.Linear(2, 2).weight.device.type)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(3):
            get_peft_model(llama(), config())
    finally:
        stop.set()
        thread.join()
    assert devices == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"target_modules": ["q_proj", "q_prj"]}, "q_prj"), ({"modules_to_save": ["lm_hed"]}, "lm_hed")],
)
def test_a_misspelt_name_among_good_ones_is_named(
    settings: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    get_peft_model(llama(), config(**settings))
    assert f"['{word}'] match nothing" in caplog.text


def test_good_names_are_not(caplog: pytest.LogCaptureFixture) -> None:
    (mixtral,) = [family for family in ARCHITECTURES if family.name == "mixtral"]
    get_peft_model(llama(), config(modules_to_save=["lm_head", "model.norm"]))
    get_peft_model(mixtral.make(), config(target_modules=["q_proj", "w1", "w2", "w3"]))
    assert "match nothing" not in caplog.text


def test_each_way_in_is_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[nn.Module] = []
    original = copy.deepcopy

    def counted(value: Any, memo: Any = None) -> Any:
        if isinstance(value, nn.Module) and memo:
            copies.append(value)
        return original(value, memo)

    monkeypatch.setattr(hf_qlora.rehearsal.copy, "deepcopy", counted)
    for step in (lambda: get_peft_model(llama(), config()), lambda: PeftModel.from_pretrained(llama(), folder)):
        copies.clear()
        step()
        assert len([model for model in copies if type(model).__name__ == "LlamaForCausalLM"]) == 1
