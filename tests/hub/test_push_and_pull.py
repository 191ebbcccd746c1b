"""What is pushed is what save_pretrained writes, and what is pulled computes the same, by the usual calls."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import bert
from hub.conftest import BASE, Model, adapted, logits, tokenizer
from hub.server import Hub
from huggingface_hub.errors import RepositoryNotFoundError
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_qlora import QLoRAConfig
from hf_qlora.validation import ConfigError


REPO = "alice/adapter"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def pull(repo: str = REPO, **options: Any) -> Model:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo, **options).eval()


def test_a_push_is_one_commit_of_what_save_pretrained_writes(hub: Hub, model: Model, tmp_path: Path) -> None:
    model.push_to_hub(REPO, commit_message="first")
    model.save_pretrained(tmp_path / "saved")
    pushed = hub.tree(REPO)
    assert hub.titles(REPO) == ["first"]
    assert pushed.keys() == FILES
    for name in FILES - {"README.md"}:
        assert pushed[name] == (tmp_path / "saved" / name).read_bytes()


def test_several_adapters_are_pushed_in_their_folders(hub: Hub, model: Model) -> None:
    model.add_adapter(
        "other", QLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.push_to_hub(REPO)
    assert set(hub.tree(REPO)) == FILES | {f"other/{name}" for name in FILES - {"README.md"}}
    model.set_adapter("other")
    assert torch.equal(logits(pull(subfolder="other")), logits(model))


@pytest.mark.parametrize("how", ["PeftModel", "AutoPeft", "AutoModel", "pipeline"])
def test_an_adapter_pulled_computes_what_was_pushed(how: str, hub: Hub, model: Model) -> None:
    expected = logits(model)
    model.push_to_hub(REPO)
    tokenizer().push_to_hub(REPO)
    if how == "PeftModel":
        pulled = pull()
    elif how == "AutoPeft":
        pulled = AutoPeftModelForCausalLM.from_pretrained(REPO).eval()
    elif how == "AutoModel":
        pulled = AutoModelForCausalLM.from_pretrained(REPO).eval()
    else:
        pipe = pipeline("text-generation", model=REPO, device="cpu")
        assert pipe("1 2 3", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("1 2 3")
        pulled = pipe.model
    assert torch.equal(logits(pulled), expected)


def test_a_branch_keeps_its_own_adapter(hub: Hub, model: Model) -> None:
    model.push_to_hub(REPO)
    first, before = logits(model), hub.tree(REPO)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    model.push_to_hub(REPO, revision="exp/two")
    assert hub.tree(REPO) == before
    assert torch.equal(logits(pull(revision="main")), first)
    assert torch.equal(logits(pull(revision="exp/two")), logits(model))
    commit = hub.repos[REPO].branches["main"][-1].id
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(REPO, revision=commit).eval()), first)


def test_a_private_repository_is_for_its_owner(hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    assert torch.equal(logits(pull(token="hf_alice_read")), logits(model))
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, "hf_bob_write"):
        with pytest.raises((ValueError, RepositoryNotFoundError), match=REPO):
            PeftModel.from_pretrained(model.get_base_model(), REPO, token=token, cache_dir="elsewhere")


def test_a_config_is_pushed_as_it_is_saved(hub: Hub, tmp_path: Path) -> None:
    config = QLoRAConfig(r=4, target_modules=["q_proj"], use_rslora=True, base_model_name_or_path=BASE)
    config.push_to_hub(REPO)
    config.save_pretrained(tmp_path)
    assert hub.tree(REPO) == {"adapter_config.json": (tmp_path / "adapter_config.json").read_bytes()}
    pulled = PeftConfig.from_pretrained(REPO)
    assert type(pulled) is QLoRAConfig
    assert pulled.use_rslora


def test_a_stock_adapter_is_pushed_by_transformers(hub: Hub, base: Model) -> None:
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub(REPO)
    assert hub.tree(REPO).keys() == FILES
    assert b"hf_qlora" not in hub.tree(REPO)["adapter_config.json"]


@pytest.mark.parametrize("kind", ["ours", "config", "stock"])
def test_a_misspelt_keyword_is_refused_before_there_is_a_repository(kind: str, hub: Hub, base: Model) -> None:
    pushed = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])) if kind == "stock" else adapted(base)
    pushed = pushed.peft_config["default"] if kind == "config" else pushed
    with pytest.raises(TypeError, match="privat"):
        pushed.push_to_hub(REPO, privat=True)
    assert REPO not in hub.repos
    pushed.push_to_hub(REPO, private=True, max_shard_size="1GB")
    assert hub.repos[REPO].private


def trainer(model: Model, folder: Path, **settings: Any) -> Trainer:
    ids = torch.randint(2, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    given = {
        "push_to_hub": True,
        "max_steps": 4,
        "logging_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        **settings,
    }
    arguments = TrainingArguments(
        str(folder), hub_model_id=REPO, use_cpu=True, report_to="none", disable_tqdm=True, **given
    )
    return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer())


def test_trainer_pushes_every_save_and_the_end(hub: Hub, model: Model, tmp_path: Path) -> None:
    watched = trainer(model, tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    watched.train()
    assert [title.rpartition(" ")[2] for title in hub.titles(REPO)] == ["2", "4"]
    assert torch.equal(logits(pull()), logits(model.eval()))
    watched.push_to_hub()
    assert hub.titles(REPO)[-1] == "End of training"
    pushed = set(hub.tree(REPO))
    assert pushed >= FILES | {"tokenizer.json", "tokenizer_config.json"}
    assert not {name for name in pushed if name.startswith((".", "checkpoint-")) or "/" in name}
    assert torch.equal(logits(pull(cache_dir=tmp_path / "fresh")), logits(model))
    assert len(AutoTokenizer.from_pretrained(REPO)) == len(tokenizer())


def test_a_checkpoint_on_the_hub_resumes_to_the_bit(hub: Hub, model: Model, tmp_path: Path) -> None:
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # Without save_total_limit: Trainer would remove the first checkpoint while it is pushed.
    watched = trainer(model, tmp_path / "run", hub_strategy="checkpoint", hub_always_push=True)
    watched.train()
    expected = logits(model.eval())
    last = {name.removeprefix("last-checkpoint/"): data for name, data in hub.tree(REPO).items() if "/" in name}
    assert json.loads(last["trainer_state.json"])["global_step"] == 4
    first = next(c for c in hub.repos[REPO].branches["main"] if c.title == "Training in progress, step 2, checkpoint")
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name, file in first.tree.items():
        if name.startswith("last-checkpoint/"):
            (folder / name.removeprefix("last-checkpoint/")).write_bytes(file.data)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
    trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    assert torch.equal(logits(model.eval()), expected)


class Wrapper(torch.nn.Module):
    """As parallelism, compilation and reward heads put around a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def with_adapter(base: Model, how: str) -> Model:
    if how == "PEFT":
        return adapted(base)
    base.add_adapter(QLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return base if how == "transformers" else Wrapper(base)


@pytest.mark.parametrize("how", ["PEFT", "transformers", "wrapped"])
def test_no_token_is_in_a_file_that_trainer_writes_or_pushes(how: str, hub: Hub, base: Model, tmp_path: Path) -> None:
    model = with_adapter(base, how)
    watched = trainer(model, tmp_path / "run", hub_token="hf_alice_write", hub_strategy="checkpoint")
    watched.train()
    watched.push_to_hub()
    local = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith("training_args.bin") for name in local)
    for name, data in {**local, **hub.tree(REPO), **hub.blobs}.items():
        assert b"hf_alice_write" not in data, name
    assert watched.args.hub_token == "hf_alice_write"
    assert pickle.loads(pickle.dumps(watched.args.hub_token)) is None


@pytest.mark.parametrize("how", ["PEFT", "transformers", "wrapped"])
def test_trainer_names_a_local_base(
    how: str, hub: Hub, base_files: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in base_files.items():
        (tmp_path / name).write_bytes(data)
    trainer(with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path), how), tmp_path / "run")
    assert f"base is the folder {tmp_path}" in caplog.text


def test_a_local_base_is_named_with_the_way_out(
    hub: Hub, base_files: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in base_files.items():
        (tmp_path / name).write_bytes(data)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path))
    model.push_to_hub(REPO)
    assert f"base is the folder {tmp_path}" in caplog.text
    caplog.clear()
    model.peft_config["default"].base_model_name_or_path = BASE
    model.push_to_hub(REPO)
    assert "folder" not in caplog.text
    hub.put(BASE, base_files)
    assert torch.equal(logits(pull()), logits(model))


CLASSES = {0: "bad", 1: "so-so", 2: "good"}


@pytest.fixture
def classifier(hub: Hub, tmp_path: Path) -> Model:
    """An adapter with a head of three classes, on a base that has two."""
    torch.manual_seed(0)
    bert().bert.save_pretrained(tmp_path / "bert")
    hub.put("alice/bert", {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()})
    base = AutoModelForSequenceClassification.from_pretrained(
        "alice/bert", id2label=CLASSES, label2id={name: i for i, name in CLASSES.items()}
    )
    config = QLoRAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.push_to_hub(REPO)
    return model


@pytest.mark.parametrize("how", ["AutoPeft", "AutoModel"])
def test_classes_travel_with_the_adapter(how: str, classifier: Model) -> None:
    if how == "AutoPeft":
        pulled = AutoPeftModelForSequenceClassification.from_pretrained(REPO).eval()
    else:
        pulled = AutoModelForSequenceClassification.from_pretrained(REPO, num_labels=3).eval()
    assert pulled.config.id2label == CLASSES
    assert pulled.config.label2id == {name: i for i, name in CLASSES.items()}
    assert torch.equal(logits(pulled), logits(classifier))


def test_a_caller_may_name_classes_otherwise(classifier: Model) -> None:
    names = {0: "a", 1: "b", 2: "c"}
    pulled = AutoPeftModelForSequenceClassification.from_pretrained(REPO, id2label=names)
    assert pulled.config.id2label == names


def test_another_number_of_classes_is_refused_with_the_number(classifier: Model) -> None:
    with pytest.raises(ConfigError, match="num_labels=3"):
        AutoModelForSequenceClassification.from_pretrained(REPO)


def test_only_classifiers_have_classes(hub: Hub, model: Model, classifier: Model) -> None:
    model.push_to_hub("alice/generator")
    records = [json.loads(hub.tree(repo)["adapter_config.json"])["hf_qlora"] for repo in (REPO, "alice/generator")]
    assert records[0]["labels"] == list(CLASSES.values())
    assert "labels" not in records[1]
