"""One card, whoever writes to it and in whichever order; what a user wrote stays, and no name is markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
import yaml
from architectures import llama
from hub.conftest import BASE, Model, adapted, tokenizer
from hub.server import Fault, Hub
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.modelcard import TrainingSummary

from hf_qlora import AdaptiveDepthLoRAConfig, ModelCardCallback, QLoRAConfig, quantize_model, saving
from hf_qlora.hub import card, facts, licenses
from hf_qlora.merge.stream import merge_files
from hf_qlora.validation import ConfigError


REPO = "alice/adapter"
GOLDEN = Path(__file__).parents[1] / "golden" / "model_card.md"
# What a stranger may call a thing; none of it may become Markdown, HTML, YAML or Python.
HOSTILE = [
    "<script>alert(1)</script>",
    "a: b\n- c",
    "---\nlicense: mit\n---",
    "`` ` ```\n# heading",
    "x | y \\| z",
    "<!-- /hf_qlora adapter -->",
    '"); import os; ("',
    "{{ 7 * 7 }}{% raw %}",
    "\u202e\x00\x1b[31m",
    "[a](javascript:alert(1))",
]


@pytest.fixture(autouse=True)
def _nothing_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licenses, "_asked", {})


def trained(model: Model, folder: Path, data: dict[str, Any] | None = None, **settings: Any) -> tuple[Trainer, Any]:
    ids = torch.randint(2, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    given = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "seed": 7, **settings}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer())
    callback = ModelCardCallback(trainer, **(data or {}))
    trainer.add_callback(callback)
    return trainer, callback


def offline_model(cls: type[QLoRAConfig] = QLoRAConfig, **settings: Any) -> Model:
    torch.manual_seed(0)
    base = llama(hidden_size=64, intermediate_size=64, vocab_size=64)
    base.config._name_or_path = base.name_or_path = "alice/base"
    return get_peft_model(base, cls(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings))


def test_that_the_base_was_calibrated_is_said(tmp_path: Path) -> None:
    """Quantized in memory: nobody gets it again by the base's name."""
    base = llama(hidden_size=64, intermediate_size=64, vocab_size=64)
    quantize_model(base, calibration=calibrating.rows_of(calibrating.text(words=64)))
    model = get_peft_model(base, QLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    facts.write_card(model, tmp_path, REPO)
    said = "The base that this adapter was trained on was rounded calibrated, on `a test`."
    assert said in text_of(tmp_path)
    check_well_formed(text_of(tmp_path))
    facts.write_card(offline_model(), tmp_path, REPO)
    assert "calibrated" not in text_of(tmp_path)


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def check_well_formed(text: str) -> ModelCardData:
    """What the Hub and a reader of Markdown ask of a card."""
    loaded = ModelCard(text)
    data = loaded.data
    assert yaml.safe_load(data.to_yaml()) == yaml.safe_load(ModelCard(str(loaded)).data.to_yaml())
    for ours in ("adapter", "training"):
        assert text.count(f"<!-- hf_qlora {ours}") == text.count(f"<!-- /hf_qlora {ours} -->") <= 1
    outside_code = re.sub(r"(?ms)^```.*?^```", "", text)
    headings = re.findall(r"(?m)^#+ .*$", outside_code)
    assert len(headings) == len(set(headings)), headings
    assert "needed" not in text.lower(), text
    for field in ("tags", "datasets", "metrics", "language"):
        assert data.get(field) is None or all(isinstance(item, str) for item in data.get(field))
    for result in data.eval_results or []:
        assert result.task_type
        assert result.dataset_type
        assert result.metric_type
        assert isinstance(result.metric_value, float)
    for rows in re.findall(r"(?m)(?:^\|.*\n)+", text):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
        assert len(columns) == 1, rows
    return data


def test_the_whole_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "versions", lambda: {"hf-qlora": "1", "peft": "2"})
    model = offline_model(AdaptiveDepthLoRAConfig, lora_dropout=0.1, use_rslora=True)
    licenses._asked["alice/base"] = {"license": "apache-2.0"}
    named = {"dataset": "alice/numbers", "dataset_name": "Numbers", "dataset_split": "test", "language": "en"}
    trainer, callback = trained(model, tmp_path / "run", named)
    trainer.train()
    model.zero_grad()
    with torch.no_grad():  # what training gives differs in the last digits from processor to processor
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.numel() == 1:
                parameter.fill_(0.25)
    callback.costs = {"train_runtime": 12.5, "train_samples_per_second": 1.28}
    callback.on_evaluate(None, trainer.state, None, {"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 3.0})
    callback.write()
    assert text_of(tmp_path / "run") == GOLDEN.read_text()
    check_well_formed(GOLDEN.read_text())
    assert (tmp_path / "run" / "depth.png").stat().st_size > 1000


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    trainer, callback = trained(offline_model(), tmp_path, {"dataset": "alice/numbers"})
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    first = text_of(tmp_path)
    callback.write()
    trainer.create_model_card()
    trainer.model.save_pretrained(tmp_path)
    callback.write()
    assert text_of(tmp_path) == first
    assert "loss" in first


OWN = """---
license: mit
base_model: alice/other
tags:
- mine
model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: numbers
      type: alice/numbers
    metrics:
    - type: loss
      value: 0.5
custom: [1, 2]
---
# My adapter

My text, with `code` and ---

## Uses

I use it.
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("how", ["save", "train", "push"])
def test_what_a_user_wrote_stays(how: str, line_break: str, hub: Hub, model: Model, tmp_path: Path) -> None:
    own = OWN.replace("\n", line_break)
    (tmp_path / "README.md").write_bytes(own.encode())
    if how == "save":
        model.save_pretrained(tmp_path)
        text = text_of(tmp_path)
    elif how == "push":
        hub.put(REPO, {"README.md": own.encode()})
        model.push_to_hub(REPO, tags=["new"])
        text = hub.tree(REPO)["README.md"].decode()
    else:
        settings = {"push_to_hub": True, "hub_model_id": REPO}
        trainer, _ = trained(model, tmp_path, {"dataset": "alice/numbers", "license": "apache-2.0"}, **settings)
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub()
        text = hub.tree(REPO)["README.md"].decode()
        assert text == text_of(tmp_path)
    body = own.split(f"---{line_break}", 2)[2]
    assert text.split(f"---{line_break}", 2)[2].startswith(body.rstrip())
    assert line_break == "\n" or "\n" not in text.replace("\r\n", "")
    data = check_well_formed(text)
    assert (data.license, data.base_model, data.get("custom")) == ("mit", "alice/other", [1, 2])
    assert data.tags is not None
    assert data.tags[0] == "mine"
    assert {"lora", "hf_qlora"} <= set(data.tags)
    assert [(one.metric_type, one.metric_value) for one in data.eval_results or []] == [("loss", 0.5)]


def test_a_users_edit_of_what_we_wrote_stays(tmp_path: Path) -> None:
    model = offline_model()
    model.save_pretrained(tmp_path)
    edited = ModelCard.load(tmp_path / "README.md")
    edited.data.pipeline_tag = "text-classification"
    edited.data.tags = ["lora", "mine"]
    edited.text += "\nAn afterthought.\n"
    edited.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    data = check_well_formed(text_of(tmp_path))
    assert data.pipeline_tag == "text-classification"
    assert "mine" in (data.tags or [])
    assert text_of(tmp_path).rstrip().endswith("An afterthought.")


@pytest.mark.parametrize(
    "own", ["", "No heading.\n", "---\nlicense: mit\n---\n", "---\n---\n", "\ufeff# Mine\n", "# Mine"]
)
def test_a_card_of_hardly_anything_is_extended(own: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(own)
    for _ in range(2):
        offline_model().save_pretrained(tmp_path)
        data = check_well_formed(text_of(tmp_path))
        assert own.split("---\n")[-1].strip("\ufeff\n") in text_of(tmp_path)
        assert data.license == ("mit" if "mit" in own else None)


def test_text_after_a_block_without_an_end_stays(tmp_path: Path) -> None:
    model = offline_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text_of(tmp_path).replace("<!-- /hf_qlora adapter -->", "All mine.\n"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert "All mine." in text_of(tmp_path)
    assert text_of(tmp_path).count("<!-- /hf_qlora adapter -->") == 1


def test_what_an_earlier_run_wrote_is_replaced(tmp_path: Path) -> None:
    trainer, callback = trained(offline_model(), tmp_path, {"dataset": "alice/numbers"})
    for loss in (2.0, 1.0):
        callback.on_evaluate(None, trainer.state, None, {"eval_loss": loss, "eval_f1": float("nan")})
        callback.write()
        data = check_well_formed(text_of(tmp_path))
        assert [one.metric_value for one in data.eval_results or []] == [loss]
        assert data.get("metrics") == ["loss"]


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = "---\n: [\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken)
    offline_model().save_pretrained(tmp_path)
    assert text_of(tmp_path) == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "metadata cannot be read" in caplog.text


# ── Other generators ─────────────────────────────────────────────────────────────────────────────────────────────────


def peft_card(folder: Path) -> None:
    """The one that stock PEFT writes."""
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


def transformers_card(folder: Path) -> None:
    """The one that transformers puts into a repository without one."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    ModelCard.from_template(ModelCardData(), model_description=description).save(folder / "README.md")


def trainer_card(folder: Path) -> None:
    trainer, _ = trained(offline_model(), folder)
    trainer.train()
    trainer.evaluate()
    (folder / "README.md").write_text(TrainingSummary.from_trainer(trainer).to_model_card())


@pytest.mark.parametrize("generate", [peft_card, transformers_card, trainer_card])
def test_a_generated_card_leaves_no_boilerplate(generate: Any, tmp_path: Path) -> None:
    generate(tmp_path)
    before = text_of(tmp_path)
    assert re.search("more information needed", before, re.IGNORECASE)
    trainer, _ = trained(offline_model(), tmp_path)
    trainer.train()
    text = text_of(tmp_path)
    check_well_formed(text)
    assert "from scratch" not in text
    assert "It achieves" not in text
    assert "Framework versions" not in text
    ours = ["## Adapter", "## How to use it", "## Licence", "## Training", "## Memory and speed"]
    assert re.findall(r"(?m)^## .*$", text) == ours


def test_a_filled_in_section_of_a_template_stays(tmp_path: Path) -> None:
    peft_card(tmp_path)
    filled = text_of(tmp_path).replace("### Direct Use\n", "### Direct Use\n\nFor numbers.\n")
    (tmp_path / "README.md").write_text(filled)
    offline_model().save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert "## Uses\n" in text
    assert "### Direct Use\n\nFor numbers.\n" in text
    assert "## Citation" not in text


def test_a_trainers_card_without_the_callback_is_extended_too(hub: Hub, model: Model, tmp_path: Path) -> None:
    trainer, callback = trained(model, tmp_path, push_to_hub=True, hub_model_id=REPO)
    trainer.remove_callback(callback)
    trainer.create_model_card = callback._original
    trainer.train()
    trainer.push_to_hub()
    text = hub.tree(REPO)["README.md"].decode()
    data = check_well_formed(text)
    assert data.library_name in ("peft", "transformers")
    assert "## Adapter" in text
    assert "### Training hyperparameters" in text


def test_trl_and_the_callback_make_one_card(hub: Hub, base: Model, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["1 2 3 4", "5 6 7 8"] * 4})
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_always_push=True,
    )
    config = QLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(base, arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    trainer.add_callback(ModelCardCallback(trainer, dataset="alice/numbers"))
    trainer.train()
    first = check_well_formed(hub.tree(REPO)["README.md"].decode())
    trainer.push_to_hub()
    text = hub.tree(REPO)["README.md"].decode()
    pushed = check_well_formed(text)
    assert pushed.tags is not None
    assert first.tags is not None
    assert {"lora", "trl", "sft"} <= set(pushed.tags) & set(first.tags)
    assert pushed.get("licence") is None
    assert pushed.library_name == "peft"
    assert "SFTTrainer of trl" in text
    assert text.count("## Citations") == 1


def failing(path: Path) -> None:
    path.write_text("Half a card")
    raise OSError("no space left")


@pytest.mark.parametrize("own", [None, "# Mine\n\nMy words.\n"])
def test_a_generator_that_fails_leaves_the_card_that_was_there(own: str | None, tmp_path: Path) -> None:
    trainer, callback = trained(offline_model(), tmp_path)
    path = tmp_path / "README.md"
    if own:
        path.write_text(own)
    callback._original = lambda: failing(path)
    with pytest.raises(OSError, match="no space left"):
        trainer.create_model_card()
    assert (path.read_text() if path.is_file() else None) == own


def test_a_generator_that_writes_nothing_leaves_ours(tmp_path: Path) -> None:
    trainer, callback = trained(offline_model(), tmp_path)
    callback._original = lambda: None
    trainer.create_model_card()
    assert "## Adapter" in text_of(tmp_path)


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_licence_is_the_bases_where_the_hub_knows_it(hub: Hub, base_files: dict[str, bytes], model: Model) -> None:
    model.push_to_hub(REPO)
    assert "Not stated" in hub.tree(REPO)["README.md"].decode()
    licenses._asked.clear()
    terms = b"---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://example.org/terms\n---\n"
    hub.put(BASE, {**base_files, "README.md": terms})
    model.push_to_hub(REPO)
    text = hub.tree(REPO)["README.md"].decode()
    data = check_well_formed(text)
    assert (data.license, data.license_name, data.license_link) == ("other", "my-terms", "https://example.org/terms")
    assert "[`other: my-terms`](https://example.org/terms), as the base." in text


def test_a_merged_model_has_the_licence_of_a_base_on_the_hub(
    hub: Hub, base_files: dict[str, bytes], model: Model, tmp_path: Path
) -> None:
    model.push_to_hub(REPO)
    card = hub.tree(REPO)["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    hub.put(REPO, {**hub.tree(REPO), "README.md": card})
    hub.put(BASE, {**base_files, "README.md": b"---\nlicense: mit\n---\n"})
    merge_files(REPO, tmp_path / "merged")
    text = text_of(tmp_path / "merged")
    data = check_well_formed(text)
    assert (data.license, data.base_model, data.base_model_relation) == ("mit", BASE, "finetune")
    assert f"[`{REPO}`](https://huggingface.co/{REPO}) merged into it." in text
    assert "The base's: `mit`. The adapter's: `mit`." in text


def test_a_hub_that_does_not_know_the_base_is_no_error(hub: Hub, model: Model) -> None:
    hub.faults.append(Fault(f"GET /api/models/{BASE}$", 404))
    model.push_to_hub(REPO)
    assert "Not stated" in hub.tree(REPO)["README.md"].decode()


def test_metrics_are_those_of_the_adapter_that_is_saved(tmp_path: Path) -> None:
    model = offline_model()
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer, _ = trained(model, tmp_path, {"dataset": "alice/numbers"}, **every, **best)
    losses = iter([1.0, 3.0, 2.0])
    evaluate = trainer.evaluation_loop

    def with_known_loss(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        found.metrics["eval_loss"] = next(losses)
        return found

    trainer.evaluation_loop = with_known_loss
    trainer.train()
    assert trainer.state.best_global_step == 1
    data = check_well_formed(text_of(tmp_path))
    assert [one.metric_value for one in data.eval_results or []] == [1.0]
    assert "training ended at step 3, and the adapter is that of step 1" in text_of(tmp_path)


def test_metrics_of_another_step_are_no_metadata(tmp_path: Path) -> None:
    trainer, callback = trained(offline_model(), tmp_path, {"dataset": "alice/numbers"})
    callback.on_evaluate(None, TrainerState(global_step=1), None, {"eval_loss": 1.5})
    trainer.train()
    assert check_well_formed(text_of(tmp_path)).eval_results is None
    assert "| `loss` | 1.5 | 1 |" in text_of(tmp_path)


def test_the_learning_rate_is_the_optimizers(tmp_path: Path) -> None:
    model = offline_model()
    trainer, _ = trained(model, tmp_path)
    groups = [
        {"params": [p], "lr": rate}
        for p, rate in zip(filter(_trainable, model.parameters()), (0.25, 0.5), strict=False)
    ]
    trainer.optimizer = torch.optim.SGD(groups)
    trainer.train()
    assert "| learning_rate | `0.25, 0.5` |" in text_of(tmp_path)
    assert "| optimizer | `SGD` |" in text_of(tmp_path)


def _trainable(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


def test_nothing_is_said_that_was_not_measured(tmp_path: Path) -> None:
    _, callback = trained(offline_model(), tmp_path)
    callback.write()
    for absent in ("## Memory and speed", "## Results", "Tokens", "GPU"):
        assert absent not in text_of(tmp_path)


def test_no_picture_where_matplotlib_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    facts.write_card(offline_model(AdaptiveDepthLoRAConfig), tmp_path, REPO, picture=True)
    assert "depth.png" not in text_of(tmp_path)
    assert "### Scale of each layer" in text_of(tmp_path)


@pytest.mark.parametrize("block_size", [64, 128])
def test_the_snippets_load_what_was_pushed(block_size: int, hub: Hub, base: Model) -> None:
    model = adapted(base, quantization={"block_size": block_size})
    model.push_to_hub(REPO)
    text = hub.tree(REPO)["README.md"].decode()
    snippets = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert len(snippets) == (2 if block_size == 64 else 1)  # BitsAndBytesConfig has no block size
    ids = torch.arange(2, 34).view(2, 16)
    for snippet in snippets:
        scope: dict[str, Any] = {}
        exec(snippet, scope)
        with torch.no_grad():
            assert torch.equal(scope["model"].eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", [BertConfig, LlamaConfig])
def test_the_snippets_of_a_classifier_quantize_no_head(family: Any, hub: Hub, tmp_path: Path) -> None:
    """The head is new, and in the adapter: bitsandbytes would quantize it, empty as it is."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    AutoModel.from_config(family(hidden_size=64, intermediate_size=64, **sizes)).save_pretrained(tmp_path)
    hub.put("alice/encoder", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    base = AutoModelForSequenceClassification.from_pretrained("alice/encoder", num_labels=3)
    model = get_peft_model(base, QLoRAConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    model.push_to_hub(REPO)
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    snippets = re.findall(r"(?ms)^```python\n(.*?)^```", hub.tree(REPO)["README.md"].decode())
    assert len(snippets) == 2
    for snippet in snippets:
        scope: dict[str, Any] = {}
        exec(snippet, scope)
        with torch.no_grad():
            found = scope["model"].eval()(input_ids=ids).logits
        assert torch.allclose(found, expected, atol=1e-4)  # float32, products of the same NF4 weights


# ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_markup(name: str, tmp_path: Path) -> None:
    model = offline_model()
    clean = tmp_path / "clean"
    trainer, callback = trained(offline_model(), clean, {"dataset_name": "fine"})
    callback.on_evaluate(None, trainer.state, None, {"eval_fine": 0.5})
    callback.write()
    model.peft_config["default"].base_model_name_or_path = name
    model.peft_config["default"].revision = name
    model.get_base_model().model_tags = [name]
    model.peft_config["default"].rank_pattern = {name: 4}
    trainer, callback = trained(model, tmp_path / "run", {"dataset_name": name, "dataset_split": name})
    callback.on_evaluate(None, trainer.state, None, {f"eval_{name}": 0.5})
    callback.write()
    text = text_of(tmp_path / "run")
    data = check_well_formed(text)
    assert data.base_model is None
    assert data.license is None
    body, expected = (ModelCard(one).text for one in (text, text_of(clean)))
    outside = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`", "", body)
    assert not re.search(r"javascript|alert|import os|7 \* 7|heading|\x1b|\u202e", outside)
    assert re.findall(r"<[^>]*>", body) == [
        re.sub("adapter [0-9a-f ]+", found.group() if (found := re.search("adapter [0-9a-f ]+", body)) else "", tag)
        for tag in re.findall(r"<[^>]*>", expected)
    ]
    for snippet in re.findall(r"(?ms)^```python\n(.*?)^```", body):
        compile(snippet, "card", "exec")
        assert json.dumps(name)[1:4] in snippet or "id/of" in snippet


@pytest.mark.parametrize("name", [*HOSTILE, "/home/me/base", "a" * 500])
def test_a_name_is_one_short_line_of_code(name: str) -> None:
    shown = card.code(name)
    assert re.fullmatch(r"`[^`\n<>]{1,220}`", shown)
    assert not re.search(r"(?<!\\)\|", shown)
    assert eval(card.literal(name)) == name
    assert not re.search("[<>`\n]", card.literal(name))


def test_a_folder_on_this_machine_is_not_told(hub: Hub, base_files: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "of-alice" / "my-base"
    folder.mkdir(parents=True)
    for name, data in base_files.items():
        (folder / name).write_bytes(data)
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    model.push_to_hub(REPO)
    _, callback = trained(model, tmp_path / "run")
    callback.write()
    for text in (hub.tree(REPO)["README.md"].decode(), text_of(tmp_path / "run")):
        assert "of-alice" not in text
        assert "adapter for `my-base`." in text
        assert f'from_pretrained("{facts.BASE_PLACEHOLDER}"' in text
        assert check_well_formed(text).base_model is None


@pytest.mark.parametrize("name", ["../bases/my-base", "~/bases/my-base/", r"C:\bases\my-base", "/gone/bases/my-base"])
def test_a_path_to_another_machine_is_not_told_either(name: str, tmp_path: Path) -> None:
    model = offline_model()
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(tmp_path)
    assert "adapter for `my-base`." in text_of(tmp_path)
    assert not re.search(r"bases|gone", text_of(tmp_path))


def test_a_base_in_the_hubs_cache_has_its_id(hub: Hub, base: Model) -> None:
    terms = b"---\nlicense: mit\n---\n"
    hub.put(BASE, {**hub.tree(BASE), "README.md": terms})
    model = adapted(AutoModelForCausalLM.from_pretrained(snapshot_download(BASE, ignore_patterns="README.md")))
    model.push_to_hub(REPO)
    text = hub.tree(REPO)["README.md"].decode()
    assert "snapshots" not in text
    assert f'from_pretrained("{BASE}"' in text
    data = check_well_formed(text)
    assert (data.base_model, data.license) == (BASE, "mit")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "no id"}, "no id on the Hub"),
        ({"dataset": "a: b\n- c"}, "no id on the Hub"),
        ({"license": "My Licence"}, "as the Hub spells"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_training(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(offline_model(), tmp_path, given)


def test_another_model_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(llama(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        ModelCardCallback(trainer)


def test_a_local_base_is_no_metadata(tmp_path: Path) -> None:
    model = offline_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    data = check_well_formed(text_of(tmp_path / "saved"))
    assert data.base_model is None
    assert not any("base_model" in tag for tag in data.tags or [])
