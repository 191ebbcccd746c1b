"""What will be refused is refused before the base is touched; what is fine is not refused for want of weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, gpt2, llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn

import hf_qlora.registration
import hf_qlora.tuner
from hf_qlora import NF4Config, QLoRAConfig
from hf_qlora.files import AdapterFileError
from hf_qlora.quant.base import is_quantized
from hf_qlora.rehearsal import rehearse
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
    tried = hf_qlora.tuner.QLoRAModel._rehearse(None, given, model, "default")  # type: ignore[arg-type]
    assert tried
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
    shadow = rehearse(model, lambda copied: None)
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
    assert rehearse(model, lambda copied: pytest.fail("tried")) is None
    assert is_quantized(get_peft_model(model, config()).get_base_model())


def test_a_step_that_needs_weights_does_not_count() -> None:
    assert rehearse(llama(), lambda copied: copied.lm_head.weight.sum().item()) is None


def test_other_errors_reach_the_caller() -> None:
    def fail(copied: nn.Module) -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        rehearse(llama(), fail)


def test_loftq_decomposes_only_what_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = hf_qlora.tuner.loftq_factors

    def watched(weight: Any, quantized: Any, given: Any, name: str) -> Any:
        seen.append(name)
        return original(weight, quantized, given, name)

    monkeypatch.setattr(hf_qlora.tuner, "loftq_factors", watched)
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
