"""An adapter knows its base: noted, written, and compared in every way of loading."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import SIZES, llama, tokens
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig, quantize_model
from hf_qlora.config.fingerprint import Fingerprint
from hf_qlora.identity import is_local
from hf_qlora.quant import fingerprint as fingerprints
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.fingerprint import take_fingerprint
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.validation import ConfigError


CONFIG = "adapter_config.json"
Model = Any


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors here are far too small to share


def config(**changes: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def base(seed: int = 0, **changes: Any) -> Model:
    torch.manual_seed(seed)
    return llama(**{"hidden_size": 64, "intermediate_size": 64, **changes})


def saved(folder: Path, given: QLoRAConfig | None = None, model: nn.Module | None = None) -> Path:
    """An adapter that does something, trained on `base()`."""
    torch.manual_seed(1)
    adapted = get_peft_model(base() if model is None else model, given or config())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / CONFIG).read_text())["hf_qlora"]
    return record


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values["hf_qlora"])
    (folder / CONFIG).write_text(json.dumps(values))


def logits(model: Model) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=tokens()).logits
    return result


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What was said of the base, at a level or above."""
    return [r.getMessage() for r in caplog.records if r.levelno >= level and r.name == "hf_qlora.identity"]


def swap(folder: Path, model: Model, **options: Any) -> Model:
    """Into an adapter of the same kind that was trained on the model's own base."""
    adapted = get_peft_model(model, config())
    hotswap_adapter(adapted, str(folder), "default", torch_device="cpu", **options)
    return adapted


def resume(folder: Path, model: Model, **options: Any) -> Model:
    adapted = get_peft_model(model, config(**options))
    adapted.load_adapter(folder, "default")
    return adapted


def second(folder: Path, model: Model, **options: Any) -> Model:
    adapted = get_peft_model(model, config())
    PeftModel.load_adapter(adapted, folder, "second", **options)
    adapted.set_adapter("second")
    return adapted


def into_transformers(folder: Path, model: Model, **options: Any) -> Model:
    given = QLoRAConfig.from_pretrained(folder, **options) if options else None
    model.load_adapter(str(folder), peft_config=given)
    return model


def swap_in_transformers(folder: Path, model: Model, **options: Any) -> Model:
    model.add_adapter(config(**options))
    model.load_adapter(str(folder), adapter_name="default", hotswap=True)
    return model


def auto_peft(folder: Path, model: Model, **options: Any) -> Model:
    named_base(folder, model)
    return AutoPeftModelForCausalLM.from_pretrained(folder, **options)


def auto_model(folder: Path, model: Model, **options: Any) -> Model:
    named_base(folder, model)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def named_base(folder: Path, model: Model) -> None:
    """Save the base and let the adapter name it, as it would the one that it was trained on."""
    place = folder.with_name("base")
    model.save_pretrained(place)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(place)}))


WAYS: dict[str, Callable[..., Model]] = {
    "from_pretrained": lambda folder, model, **options: PeftModel.from_pretrained(model, folder, **options),
    "low memory": lambda folder, model, **options: PeftModel.from_pretrained(
        model, folder, low_cpu_mem_usage=True, **options
    ),
    "a config of the caller's": lambda folder, model, **options: PeftModel.from_pretrained(
        model, folder, config=config(**options)
    ),
    "load_adapter": second,
    "resuming": resume,
    "hot-swap": swap,
    "transformers": into_transformers,
    "hot-swap in transformers": swap_in_transformers,
    "AutoPeftModel": auto_peft,
    "AutoModel": auto_model,
}


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_the_base_trained_on_is_silent(way: str, adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_qlora.identity"):
        WAYS[way](adapter, base())
    assert said(caplog, logging.INFO) == []


@pytest.mark.parametrize("way", WAYS)
def test_another_base_is_a_warning_that_names_its_first_layers(
    way: str, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = WAYS[way](adapter, base(seed=1))
    (message,) = said(caplog)
    assert "trained on another base than this one: 14 of 14 quantized layers" in message
    assert "model.layers.0.self_attn.q_proj (" in message
    assert "another model of the same architecture" in message
    assert "on_base_mismatch='ignore'" in message
    assert torch.isfinite(logits(model)).all()


NO_SETTINGS = ("AutoModel",)  # transformers takes none of a config's there


def asked(way: str, folder: Path, setting: str) -> dict[str, str]:
    """Options that ask for a setting, or the setting in the file where there are none."""
    if way in NO_SETTINGS:
        change_record(folder, lambda record: record.update(on_base_mismatch=setting))
    return {} if way in NO_SETTINGS else {"on_base_mismatch": setting}


@pytest.mark.parametrize("way", [way for way in WAYS if way not in NO_SETTINGS])
def test_ignoring_is_silent(way: str, adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    WAYS[way](adapter, base(seed=1), on_base_mismatch="ignore")
    assert said(caplog) == []


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "AutoPeftModel", "AutoModel"])
def test_a_file_does_not_silence_its_reader(way: str, adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_record(adapter, lambda record: record.update(on_base_mismatch="ignore"))
    WAYS[way](adapter, base(seed=1))
    assert len(said(caplog)) == 1


def test_an_error_that_was_asked_for_and_cannot_be_given_is_a_warning(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantize_model(base(seed=1))
    model.model.unused = nn.Parameter(torch.empty(0))  # as a shard of a weight that is elsewhere
    PeftModel.from_pretrained(model, adapter, on_base_mismatch="error")
    assert {"is not compared with the one trained on" in message for message in said(caplog)} == {True}


def test_a_config_that_was_read_and_is_saved_says_what_its_file_said_of_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", use_rslora=True)
    folder = saved(tmp_path / "adapter", given, labelled())
    before, expected = record_of(folder), logits(PeftModel.from_pretrained(labelled(), folder))
    read = QLoRAConfig.from_pretrained(folder)
    read.base_model_name_or_path = "org/base"
    read.save_pretrained(folder)
    after = record_of(folder)
    assert before.keys() - after.keys() == {"weights_sha256"}
    assert all(after[key] == before[key] for key in ("base", "fingerprint", "labels", "depth", "fold", "versions"))
    assert torch.equal(logits(PeftModel.from_pretrained(labelled(), folder)), expected)
    assert said(caplog) == []


def labelled() -> Model:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "vocab_size": 500}
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "pad_token_id": 0}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, **names))


def test_what_a_read_config_says_of_old_weights_is_not_said_of_new_ones(adapter: Path, tmp_path: Path) -> None:
    read = QLoRAConfig.from_pretrained(adapter, inference_mode=False)
    read.record["depth"] = {"stale": {}}  # as of an adapter that had scales
    PeftModel.from_pretrained(base(seed=1), adapter, config=read, is_trainable=True).save_pretrained(tmp_path / "new")
    record, other = record_of(tmp_path / "new"), take_fingerprint(quantize_model(base(seed=1)))
    assert other is not None
    assert record["fingerprint"] == other.to_dict()
    assert "depth" not in record


@pytest.mark.parametrize("way", WAYS)
def test_an_error_leaves_a_base_that_can_be_used(way: str, adapter: Path) -> None:
    """And an adapter that was there before as it was."""
    model = base(seed=1)
    expected = logits(quantize_model(base(seed=1)))
    with pytest.raises(BaseModelError, match=r"another base than this one.*model\.layers\.0\.self_attn\.q_proj"):
        WAYS[way](adapter, model, **asked(way, adapter, "error"))
    if way in ("AutoPeftModel", "AutoModel"):  # who loaded the model, too
        return
    has_own = way in ("load_adapter", "resuming", "hot-swap", "hot-swap in transformers")
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if ".lora_A." in name} == (
        {"default"} if has_own else set()
    )
    assert torch.equal(logits(model), expected)  # an adapter of its own is as it was: new, and so 0
    if not has_own:
        own = saved(adapter.with_name("own"), model=base(seed=1))
        assert logits(PeftModel.from_pretrained(model, own)).isfinite().all()


def test_the_adapters_own_setting_is_what_the_file_says(adapter: Path) -> None:
    strict = saved(adapter.with_name("strict"), config(on_base_mismatch="error"))
    PeftModel.from_pretrained(base(), strict)
    with pytest.raises(BaseModelError, match="another base"):
        PeftModel.from_pretrained(base(seed=1), strict)
    PeftModel.from_pretrained(base(seed=1), strict, on_base_mismatch="warn")


@pytest.mark.parametrize("value", ["Warn", "", None, True, ["warn"]])
def test_an_unknown_setting_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"on_base_mismatch=.*|wrong type"):
        config(on_base_mismatch=value)


@pytest.mark.parametrize("way", ["load_adapter", "AutoPeftModel"])
def test_an_unknown_setting_is_refused_where_it_is_loaded_with(way: str, adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"on_base_mismatch='perhaps' is not known; choose one of"):
        WAYS[way](adapter, base(), on_base_mismatch="perhaps")


def test_rounding_is_an_information(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantize_model(base())
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.state.offset = torch.nextafter(layer.state.offset, torch.tensor(9.0))
    with caplog.at_level(logging.INFO, "hf_qlora.identity"):
        PeftModel.from_pretrained(model, adapter)
    (message,) = said(caplog, logging.INFO)
    assert "rounded otherwise in 14 layers (model.layers.0.self_attn.q_proj, …)" in message
    assert said(caplog) == []


def test_another_dtype_is_named(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    PeftModel.from_pretrained(base().bfloat16(), adapter)
    (message,) = said(caplog)
    assert "weights cast to another dtype" in message
    assert "dtype 'float32', now 'bfloat16'" in message


def test_another_revision_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def downloaded(commit: str, seed: int = 0) -> Model:
        model = base(seed)
        model.config.name_or_path, model.name_or_path = "org/model", "org/model"
        model.config._commit_hash = commit
        return model

    folder = saved(tmp_path, model=downloaded("a" * 40))
    assert record_of(folder)["base"] == {
        "id": "org/model",
        "commit": "a" * 40,
        "class": "LlamaForCausalLM",
        "dtype": "float32",
    }
    PeftModel.from_pretrained(downloaded("b" * 40), folder)
    assert said(caplog) == []  # another commit with the same weights
    PeftModel.from_pretrained(downloaded("b" * 40, seed=1), folder)
    assert "The likely cause is another revision of the model. Trained on commit 'aaaa" in said(caplog)[0]


def test_a_file_from_before_is_loaded_silently(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("fingerprint", "base", "on_base_mismatch"):
        change_record(adapter, lambda record, key=key: record.pop(key))
        PeftModel.from_pretrained(base(seed=1), adapter)
        base(seed=1).load_adapter(str(adapter))
    assert said(caplog) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_malformed_fingerprint_is_refused_and_the_file_named(way: str, adapter: Path) -> None:
    change_record(adapter, lambda record: record["fingerprint"].update(layers=["x"]))
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*hf_qlora\.fingerprint\.layers"):
        WAYS[way](adapter, base())


def test_a_fingerprint_of_another_model_names_what_is_not_here(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names from a file reach messages quoted."""
    layers = {"\x1b[31mred": "- 0123 1.0"}
    change_record(adapter, lambda record: record["fingerprint"].update(root="", layers=layers))
    PeftModel.from_pretrained(base(), adapter)
    (message,) = said(caplog)
    assert "14 layers are 4-bit here and not there" in message
    assert "\x1b" not in message


def test_weights_that_are_not_here_are_not_compared(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where they are offloaded or sharded."""
    model = quantize_model(base(seed=1))
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.to("meta"), requires_grad=False)
    with caplog.at_level(logging.DEBUG, "hf_qlora.identity"):
        PeftModel.from_pretrained(model, adapter)
    assert said(caplog) == []
    assert "its weights are not all here" in said(caplog, logging.DEBUG)[-1]


# ── Dense bases ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_of_a_dense_base_knows_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, config(quantization=None))
    assert record_of(folder)["fingerprint"]["layers"] == {}
    PeftModel.from_pretrained(base(), folder)
    PeftModel.from_pretrained(base().bfloat16(), folder)
    assert said(caplog) == []
    PeftModel.from_pretrained(base(seed=1), folder)
    assert "16 of 21 other tensors differ: model.embed_tokens.weight, model.layers.0" in said(caplog)[0]


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_an_initialisation_that_changes_the_base_is_compared_before_it(
    init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, config(quantization=None, init_lora_weights=init))
    expected = take_fingerprint(base())
    assert expected is not None
    assert Fingerprint.from_dict(record_of(folder)["fingerprint"]).dense == expected.dense
    PeftModel.from_pretrained(base(), folder)
    assert said(caplog) == []
    PeftModel.from_pretrained(base(seed=1), folder)
    assert len(said(caplog)) == 1


def test_a_dense_base_by_choice_is_compared_as_far_as_it_goes(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    PeftModel.from_pretrained(base(), adapter, quantization=None)
    assert said(caplog) == []
    PeftModel.from_pretrained(base(seed=1), adapter, quantization=None)
    assert "2 of 7 other tensors differ: model.embed_tokens.weight, lm_head.weight" in said(caplog)[0]


def test_a_quantized_base_for_an_adapter_of_a_dense_one_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, config(quantization=None))
    PeftModel.from_pretrained(quantize_model(base()), folder)
    assert "it is 4-bit, and was dense" in said(caplog)[0]


# ── Saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_the_base_trained_on(adapter: Path) -> None:
    expected = take_fingerprint(quantize_model(base()))
    assert expected is not None
    assert record_of(adapter)["fingerprint"] == expected.to_dict()


OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "a head": {"modules_to_save": ["lm_head"]},
    "a tied head": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "biases": {"bias": "all"},
    "loftq": {"init_lora_weights": "loftq"},
    "replicated": {"layer_replication": [[1, 2], [0, 2]]},
    "no double quantization": {"quantization": NF4Config(double_quant=False)},
    "blocks of 32": {"quantization": NF4Config(block_size=32)},
}


FIRST_ONLY = ("replicated", "biases", "no double quantization", "blocks of 32")  # beside another on one base


@pytest.mark.parametrize(
    ("options", "way"),
    [
        *((name, way) for name in OPTIONS for way in ("from_pretrained", "transformers")),
        *((name, "load_adapter") for name in OPTIONS if name not in FIRST_ONLY),
    ],
)
def test_what_is_trained_beside_lora_is_no_other_base(
    options: str, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"tie_word_embeddings": "tied" in options, "attention_bias": True}
    folder = saved(tmp_path / "adapter", config(**OPTIONS[options]), base(**sizes))
    with caplog.at_level(logging.INFO, "hf_qlora.identity"):
        WAYS[way](folder, base(**sizes))
    assert said(caplog, logging.INFO) == []


def test_depth_scales_are_no_other_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = AdaptiveDepthLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    PeftModel.from_pretrained(base(), saved(tmp_path, given))
    assert said(caplog) == []


def test_bytes_are_hashed_once_for_all_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = fingerprints._hash
    monkeypatch.setattr(fingerprints, "_hash", lambda layer: hashed.append(layer.name) or original(layer))
    model = get_peft_model(base(), config())
    assert hashed == []  # putting an adapter on samples alone
    for step in range(3):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    assert len(hashed) == 14
    record = record_of(tmp_path / "checkpoint-0")
    assert record["fingerprint"] == record_of(tmp_path / "checkpoint-2")["fingerprint"]


def test_a_base_that_moved_is_hashed_again(tmp_path: Path) -> None:
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path / "a")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.weight.data.view(-1)[0] ^= 1  # no sample: in place, where only the version tells
            layer.weight.add_(0)
    model.save_pretrained(tmp_path / "b")
    roots = [record_of(tmp_path / name)["fingerprint"]["root"] for name in "ab"]
    assert roots[0] != roots[1]


@pytest.mark.parametrize("part", ["codes", "embedding"])
def test_a_base_that_changed_while_training_is_a_warning(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path)
    assert said(caplog) == []
    with torch.no_grad():
        if part == "codes":
            model.model.model.layers[1].mlp.up_proj.weight.data.fill_(0x77)
        else:
            model.model.model.embed_tokens.weight.add_(0.1)
    model.save_pretrained(tmp_path)
    (message,) = said(caplog)
    counts = "1 of 14 quantized layers and 0 of 7" if part == "codes" else "0 of 14 quantized layers and 1 of 7"
    assert f"The base has changed since adapter 'default' was put on it: {counts}" in message
    assert ("model.layers.1.mlp.up_proj" if part == "codes" else "model.embed_tokens.weight") in message


def classifier(kind: str, seed: int, body: int = 0) -> Model:
    """A base whose body is always the same and whose head is new, as `from_pretrained` makes it."""
    sizes = {**SIZES, "vocab_size": 500, "num_labels": 3}
    torch.manual_seed(body)
    backbone = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=kind.startswith("Seq"))
    torch.manual_seed(seed)
    model = getattr(transformers, f"BertFor{kind}")(backbone.config)
    model.bert.load_state_dict(backbone.state_dict())
    return model


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("SequenceClassification", "SEQ_CLS"),
        ("TokenClassification", "TOKEN_CLS"),
        ("QuestionAnswering", "QUESTION_ANS"),
    ],
)
@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["nf4", "dense"])
def test_a_new_head_under_a_trained_one_is_no_other_base(
    kind: str, task: str, quantization: NF4Config | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The head that the base was made with is never used: the adapter's file has its own."""
    given = config(
        target_modules=["query", "value"], task_type=task, quantization=quantization, on_base_mismatch="error"
    )
    folder = saved(tmp_path, given, classifier(kind, seed=1))
    PeftModel.from_pretrained(classifier(kind, seed=2), folder)
    model = classifier(kind, seed=3)
    model.load_adapter(str(folder))
    assert said(caplog) == []
    with pytest.raises(BaseModelError, match="another base"):
        PeftModel.from_pretrained(classifier(kind, seed=1, body=1), folder)


@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["nf4", "dense"])
def test_embeddings_in_the_adapters_file_are_not_lost_and_no_other_base(
    quantization: NF4Config | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(base(), config(quantization=quantization))
    model.get_base_model().resize_token_embeddings(512)
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    assert said(caplog) == []
    for name in ("without", "again"):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    (message,) = said(caplog)  # once, and not at each checkpoint
    assert "2 of 7" in message or quantization is None
    assert "model.embed_tokens.weight (its shape is (512, 64), and was (500, 64))" in message
    caplog.clear()
    PeftModel.from_pretrained(resized(base()), tmp_path / "with")
    assert said(caplog) == []
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):  # of the file, which has them
        PeftModel.from_pretrained(base(), tmp_path / "with")
    assert said(caplog) == []


def resized(model: Model) -> Model:
    model.resize_token_embeddings(512)
    return model


def test_an_adapter_that_was_only_loaded_stays_with_its_base(adapter: Path, tmp_path: Path) -> None:
    """Saved again where it does not belong, it is still the adapter of the base that it was trained on."""
    PeftModel.from_pretrained(base(seed=1), adapter).save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(base(seed=1), adapter, is_trainable=True).save_pretrained(tmp_path / "trained")
    kept, renewed = (record_of(tmp_path / name)["fingerprint"] for name in ("again", "trained"))
    assert kept == record_of(adapter)["fingerprint"]
    other = take_fingerprint(quantize_model(base(seed=1)))
    assert other is not None
    assert renewed == other.to_dict()


def test_a_deleted_adapter_leaves_nothing(adapter: Path) -> None:
    """Of memory: servers load and delete adapters by the thousand."""
    model = get_peft_model(base(), config())
    model.save_pretrained(adapter.parent / "own")

    def kept() -> dict[str, Any]:
        return {name: copy.copy(value) for name, value in vars(model.get_base_model()).items() if "hf_qlora" in name}

    before = kept()
    for name in ("first", "second"):
        model.load_adapter(adapter, name)
        model.delete_adapter(name)
    assert kept() == before


def test_a_path_on_this_machine_is_not_written_into_the_record(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "secret")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "secret")
    record = record_of(saved(tmp_path / "adapter", model=model))
    assert "secret" not in json.dumps(record)
    assert record["base"]["id"] is None


def test_a_folder_of_the_hubs_cache_says_which_model_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--my-model" / "snapshots" / ("c" * 40)
    base().save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    described = record_of(saved(tmp_path / "adapter", model=model))["base"]
    assert (described["id"], described["commit"]) == ("org/my-model", "c" * 40)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", False),
        ("org/model", False),
        ("/home/me/model", True),
        ("./model", True),
        ("~/model", True),
        ("runs/1/base", True),
        (r"C:\models\base", True),
        (str(Path(__file__).parent), True),
    ],
)
def test_paths_are_told_from_ids(name: str, expected: bool) -> None:
    assert is_local(name) is expected


# ── Real weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

FRESH = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
import hf_qlora
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[3])
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", ""), ("float32", "weights cast to another dtype")])
def test_a_fresh_process_knows_smollm2(dtype: str, expected: str, smollm2: Path, tmp_path: Path) -> None:
    """Saved from one thread, loaded by two; the checkpoint is in float32, so that bfloat16 is another base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    get_peft_model(model, config()).save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).stat().st_size < 100_000
    command = [sys.executable, "-c", FRESH, str(smollm2), str(tmp_path), dtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=600)
    lines = [line for line in run.stderr.splitlines() if line.startswith("WARNING hf_qlora.identity")]
    assert len(lines) == bool(expected)
    assert expected in "".join(lines)
