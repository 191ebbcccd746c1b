"""Whatever goes wrong with a push: the Hub has the old adapter or the new one, and it can be repeated."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.conftest import BASE, Model, logits
from hub.server import Fault, File, Hub
from hub.test_push_and_pull import FILES, REPO, pull, trainer, with_adapter
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import close_session
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_qlora.hub.errors import explanation


ALWAYS = 1000
SECRETS = ("hf_alice_write", "hf_alice_read", "hf_bob_write")
CREATE, CARD, ASK = "POST /api/repos/create", "HEAD .*/README.md", "POST .*/preupload/"
BATCH, PUT, COMMIT = "POST .*/objects/batch", "PUT /_lfs/", "POST .*/commit/main"


def change(model: Model) -> None:
    """Train a little, as it were."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)


def tensors(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}


def adapter_of(hub: Hub) -> dict[str, bytes]:
    """The files on the Hub that make the adapter."""
    tree = hub.tree(REPO)
    return {name: tree[name] for name in FILES - {"README.md"} if name in tree}


def saved(model: Model, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in FILES - {"README.md"}}


FAULTS = [
    pytest.param(Fault(CREATE, 401, times=ALWAYS), "no token, or it is not valid", id="401-create"),
    pytest.param(Fault(ASK, 401, times=ALWAYS), "no token, or it is not valid", id="401-preupload"),
    pytest.param(Fault(CREATE, 403, times=ALWAYS), "may not write", id="403-create"),
    pytest.param(Fault(COMMIT, 403, times=ALWAYS), "may not write", id="403-commit"),
    pytest.param(Fault(ASK, 404, times=ALWAYS), "no such repository", id="404-preupload"),
    pytest.param(Fault(BATCH, 404, times=ALWAYS), "no such repository", id="404-lfs"),
    pytest.param(Fault(COMMIT, 409, times=ALWAYS), "Somebody else", id="409-commit"),
    pytest.param(Fault(COMMIT, 412, times=ALWAYS), "Somebody else", id="412-commit"),
    pytest.param(Fault(COMMIT, 429, times=ALWAYS), "too many requests", id="429-commit"),
    pytest.param(Fault(COMMIT, 400, times=ALWAYS), "refused it", id="400-commit"),
    pytest.param(Fault(CREATE, 500, times=ALWAYS), r"failed \(HTTP 500\)", id="500-create"),
    pytest.param(Fault(CARD, 500, times=ALWAYS), "cannot be reached or broke", id="500-card"),
    pytest.param(Fault(ASK, 502, times=ALWAYS), r"failed \(HTTP 502\)", id="502-preupload"),
    pytest.param(Fault(PUT, 503, times=ALWAYS), r"failed \(HTTP 503\)", id="503-upload"),
    pytest.param(Fault(COMMIT, 503, times=ALWAYS), r"failed \(HTTP 503\)", id="503-commit"),
    pytest.param(Fault(CREATE, drop=True, times=ALWAYS), "cannot be reached or broke", id="dropped-create"),
    pytest.param(
        Fault(CARD, drop=True, times=ALWAYS), None, id="dropped-card"
    ),  # an answer to HEAD has no body to break
    pytest.param(Fault(ASK, drop=True, times=ALWAYS), "cannot be reached or broke", id="dropped-preupload"),
    pytest.param(Fault(COMMIT, status=500, drop=True, times=ALWAYS), "reached or broke|failed", id="dropped-commit"),
]


@pytest.mark.parametrize(("fault", "cause"), FAULTS)
def test_a_failed_push_changes_nothing_and_can_be_repeated(
    fault: Fault, cause: str | None, hub: Hub, model: Model, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    if fault.request != CREATE:
        model.push_to_hub(REPO)
        change(model)
    old, before, files = adapter_of(hub), tensors(model), saved(model, tmp_path / "saved")
    hub.faults.append(Fault(**{**vars(fault), "times": ALWAYS}))
    if cause is not None:
        with pytest.raises(OSError, match=cause) as raised:
            model.push_to_hub(REPO)
        assert adapter_of(hub) == old
        message = str(raised.value)
        for said in (f"Pushing to {REPO} failed", "and push again", "Nothing on this machine was changed"):
            assert message.count(said) == 1, message
        if fault.status and "reached" not in cause and fault.request != PUT:
            assert isinstance(raised.value, HfHubHTTPError)
            assert raised.value.response.status_code == fault.status
        said = "".join(traceback.format_exception(raised.value))
        for secret in SECRETS:
            assert secret not in said + caplog.text + "".join(capfd.readouterr())
    hub.faults.clear()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert saved(model, tmp_path / "saved") == files
    model.push_to_hub(REPO)
    assert adapter_of(hub) == files
    assert torch.equal(logits(pull()), logits(model))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(PUT, 503, times=2),
        Fault(PUT, drop=True, status=500),
        Fault(CARD, 500, times=2),
        Fault("", delay_s=0.1, times=3),
        Fault(COMMIT, delay_s=1.0),
    ],
    ids=["upload", "dropped upload", "card", "slow", "slow commit"],
)
def test_what_passes_is_borne(fault: Fault, hub: Hub, model: Model, tmp_path: Path) -> None:
    hub.faults.append(Fault(**vars(fault)))
    model.push_to_hub(REPO)
    assert hub.faults[0].times == 0
    assert adapter_of(hub) == saved(model, tmp_path)
    assert len(hub.titles(REPO)) == 1


@pytest.mark.parametrize("fault", [Fault(COMMIT, 504, applied=True), Fault(COMMIT, applied=True, drop=True)])
def test_a_commit_whose_answer_is_lost_is_made_once(fault: Fault, hub: Hub, model: Model, tmp_path: Path) -> None:
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises(OSError, match=f"Pushing to {REPO} failed"):
        model.push_to_hub(REPO)
    assert adapter_of(hub) == saved(model, tmp_path)
    model.push_to_hub(REPO)
    assert len(hub.titles(REPO)) == 1  # there was nothing left to commit


@pytest.mark.parametrize("there", [True, False], ids=["edited", "new"])
@pytest.mark.parametrize("revision", [None, "exp/two"])
def test_a_card_that_somebody_changes_meanwhile_is_not_lost(
    revision: str | None, there: bool, hub: Hub, model: Model
) -> None:
    branch = revision or "main"
    if there:
        model.push_to_hub(REPO, revision=revision)
    old, card = adapter_of(hub), b"# Mine\n\nMy words.\n"

    def edit() -> None:
        tree = {**hub.repos[REPO].at(branch).tree, "README.md": File(card, False)}
        hub.repos[REPO].commit(branch, "edit", tree)

    change(model)
    hub.faults.append(Fault("POST .*/preupload/", call=edit))
    with pytest.raises(HfHubHTTPError, match="Somebody else has changed it at the same time"):
        model.push_to_hub(REPO, revision=revision)
    assert adapter_of(hub) == old
    assert hub.tree(REPO, branch)["README.md"] == card
    model.push_to_hub(REPO, revision=revision)
    text = hub.tree(REPO, branch)["README.md"].decode()
    assert "My words." in text
    assert "## Adapter" in text
    assert torch.equal(logits(pull(revision=branch)), logits(model))


@pytest.mark.parametrize(
    ("token", "status", "cause"),
    [
        ("hf_alice_read", 403, "may not write"),
        ("hf_bob_write", 403, "may not write"),
        ("hf_nobody", 401, "not valid"),
        (None, 401, "no token"),
    ],
)
def test_the_wrong_token_is_said_to_be_one(
    token: str | None, status: int, cause: str, hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match=cause) as raised:
        model.push_to_hub(REPO, token=token)
    assert raised.value.response.status_code == status
    assert str(token) not in "".join(traceback.format_exception(raised.value))
    assert REPO not in hub.repos


def test_a_push_while_offline_says_so(hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=f"Pushing to {REPO} failed. HF_HUB_OFFLINE is set. Unset it"):
        model.push_to_hub(REPO)


def test_a_failed_push_of_a_config_is_explained_too(hub: Hub, model: Model) -> None:
    hub.faults.append(Fault(COMMIT, 503))
    with pytest.raises(HfHubHTTPError, match=f"Pushing to {REPO} failed"):
        model.peft_config["default"].push_to_hub(REPO)
    model.peft_config["default"].push_to_hub(REPO)
    assert hub.tree(REPO).keys() == {"adapter_config.json"}


def test_a_stock_adapters_errors_are_huggingface_hubs(hub: Hub, base: Model) -> None:
    hub.faults.append(Fault(COMMIT, 503))
    with pytest.raises(HfHubHTTPError) as raised:
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub(REPO)
    assert "Pushing to" not in str(raised.value)


# ── Trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_push_in_the_background_is_said(
    hub: Hub, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault(COMMIT, 503, times=ALWAYS))
    watched = trainer(model, tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    watched.train()
    said = [record.getMessage() for record in caplog.records if record.name == "hf_qlora.hub.trainer"]
    assert said
    assert all(f"Pushing to {REPO} failed. The Hub failed (HTTP 503)" in message for message in said)
    caplog.clear()
    with pytest.raises(HfHubHTTPError, match=f"Pushing to {REPO} failed") as raised:
        watched.push_to_hub()
    assert str(raised.value).count("Pushing to") == 1
    hub.faults.clear()
    watched.push_to_hub()
    assert "Pushing to" not in caplog.text
    assert torch.equal(logits(pull()), logits(model.eval()))


@pytest.mark.parametrize("how", ["PEFT", "transformers"])
def test_a_push_that_fails_before_others_succeed_is_said_once(
    how: str, hub: Hub, base: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault(COMMIT, 503))
    watched = trainer(with_adapter(base, how), tmp_path / "run", hub_strategy="every_save", max_steps=6)

    class Wait(TrainerCallback):  # so that Trainer puts each push in the place of the one before
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if watched.push_in_progress is not None:
                watched.push_in_progress.wait_until_done()

    watched.add_callback(Wait())
    watched.train()
    said = [record.getMessage() for record in caplog.records if record.name == "hf_qlora.hub.trainer"]
    assert len(said) == 1
    assert f"Pushing to {REPO} failed. The Hub failed (HTTP 503)" in said[0]
    assert [title.rpartition(" ")[2] for title in hub.titles(REPO)] == ["4", "6"]


def test_a_trainer_without_a_token_says_so_before_training(
    hub: Hub, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match=f"Pushing to {REPO} failed. There is no token"):
        trainer(model, tmp_path / "run")


def test_an_error_is_explained_once(hub: Hub, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    watched = trainer(model, tmp_path / "run", push_to_hub=False)
    with pytest.raises(HfHubHTTPError) as raised:  # from the repository's creation, within the push
        watched.push_to_hub()
    assert str(raised.value).count("Pushing to") == 1


# ── Pulling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET /_cdn/", drop=True, keep=1000, times=2),
        Fault("HEAD .*/alice/adapter/resolve/", 500, times=2),
        Fault("HEAD .*/alice/adapter/resolve/", 429),
        Fault("", delay_s=0.1, times=4),
    ],
    ids=["dropped", "HEAD 500", "HEAD 429", "slow"],
)
def test_a_pull_bears_what_passes(fault: Fault, hub: Hub, model: Model, tmp_path: Path) -> None:
    model.push_to_hub(REPO)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    hub.faults.append(Fault(**vars(fault)))
    pulled = PeftModel.from_pretrained(base, REPO, cache_dir=tmp_path / "fresh").eval()
    assert hub.faults[0].times == 0
    assert torch.equal(logits(pulled), logits(model))


# ── Killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def requests_of(hub: Hub, push: Any) -> list[str]:
    """Patterns for each request that a push makes, in order."""
    hub.log.clear()
    push()
    return [line.rsplit(" ", 1)[0] for line in hub.log]


def killed_at(hub: Hub, number: int, applied: bool, push: Any) -> None:
    """Push in a process that is killed at a request, before the Hub has seen it or before its answer arrives."""
    close_session()  # no connection is shared with the other process
    process: list[int] = []
    seen = Fault("", times=number)  # lets those before it pass
    hub.faults[:] = [seen, Fault("", applied=applied, call=lambda: os.kill(process[0], signal.SIGKILL))]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(read, 1)
            push()
        finally:
            os._exit(1)
    process.append(child)
    os.write(write, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    hub.faults.clear()
    os.close(read)
    os.close(write)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["model", "trainer"])
def test_a_killed_push_leaves_the_old_adapter_or_the_new_one(
    how: str, hub: Hub, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = tmp_path / "run"
    push = trainer(model, run).push_to_hub if how == "trainer" else lambda: model.push_to_hub(REPO)
    push()
    push()  # now its card is in the cache, and a push makes the requests that it will make below
    old = adapter_of(hub)
    first = {branch: list(commits) for branch, commits in hub.repos[REPO].branches.items()}
    change(model)
    count = len(requests_of(hub, push))
    new, blobs = adapter_of(hub), dict(hub.blobs)
    assert new != old
    assert count >= 6
    found = []
    for number in range(count):
        for applied in (False, True):
            hub.repos[REPO].branches = {branch: list(commits) for branch, commits in first.items()}
            hub.blobs = {sha: data for sha, data in blobs.items() if data != new["adapter_model.safetensors"]}
            killed_at(hub, number, applied, push)
            found.append(adapter_of(hub))
            assert found[-1] in (old, new), (number, applied)
            if how == "trainer":  # what is in its folder loads
                local = pull(str(run))
                assert torch.equal(logits(local), logits(model))
    assert found[0] == old
    assert found[-1] == new
    hub.repos[REPO].branches = {branch: list(commits) for branch, commits in first.items()}
    push()
    assert adapter_of(hub) == new
    assert torch.equal(logits(pull(cache_dir=tmp_path / "fresh")), logits(model))


def test_a_file_that_was_removed_while_it_was_pushed_is_named() -> None:
    gone = FileNotFoundError(2, "No such file or directory", "run/checkpoint-2/adapter_config.json")
    said = explanation(gone, "me/adapter")
    assert "run/checkpoint-2/adapter_config.json was removed" in said
    assert "cannot be reached" not in said


def test_what_the_client_could_not_look_up_is_no_removed_file() -> None:
    """Its error is a `FileNotFoundError`, too."""
    said = explanation(LocalEntryNotFoundError("The Hub was asked for it in vain."), "me/adapter")
    assert "cannot be reached" in said
    assert "removed" not in said
