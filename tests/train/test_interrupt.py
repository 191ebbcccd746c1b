"""Ctrl-C leaves a checkpoint; a run goes on under its own settings only, with its early stopping."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runs
from transformers import TrainerCallback

from hf_qlora.train.interrupt import (
    NOTE,
    EarlyStopping,
    RunError,
    StopOnCtrlC,
    begin_run,
    check_run,
    train,
    way_on,
)


SETTINGS = {"method": "qlora", "model": None, "steps": 4}


EACH_STEP: dict[str, Any] = {  # evaluated and saved, and the best loaded at the end
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


class Interrupt(TrainerCallback):
    """Presses Ctrl-C in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


class NoGain(TrainerCallback):
    """Every evaluation is as good as the first."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_loss"] = 1.0


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    before, stopper = signal.getsignal(signal.SIGINT), StopOnCtrlC()
    trainer = runs.trainer(runs.qlora(), tmp_path, stopper, Interrupt(2), max_steps=4)
    trainer.train()
    assert stopper.asked
    assert trainer.state.global_step == 2
    assert "checkpoint-2" in way_on(tmp_path)
    assert "--resume" in way_on(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("same", [True, False], ids=["same trainer", "new trainer"])
def test_training_that_begins_twice_gives_the_handler_back(same: bool) -> None:
    """As after running out of memory, with a smaller batch."""
    before, first = signal.getsignal(signal.SIGINT), StopOnCtrlC()
    second = first if same else StopOnCtrlC()
    first.asked = True
    try:
        for stopper in (first, second):
            stopper.on_train_begin(None, None, None)
        assert not second.asked
        second.on_train_end(None, None, None)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_ctrl_c_ends_at_once(before: Any, tmp_path: Path) -> None:
    """Where Ctrl-C was ignored, too, as shells have it for what runs in the background."""
    found = signal.signal(signal.SIGINT, before)
    try:
        trainer = runs.trainer(runs.qlora(), tmp_path, StopOnCtrlC(), Interrupt(1), Interrupt(1), max_steps=4)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, found)
    assert "no checkpoint" in way_on(tmp_path)
    assert "--resume" not in way_on(tmp_path)


def test_outside_the_main_thread_training_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = runs.trainer(runs.qlora(), tmp_path, StopOnCtrlC(), max_steps=2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trainer.train).result()
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_was_not_set_from_python_becomes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` returns None for it, and takes none."""
    before, real, stopper = signal.getsignal(signal.SIGINT), signal.signal, StopOnCtrlC()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(signal, "signal", lambda *given: real(*given) and None)
            stopper.on_train_begin(None, None, None)
        stopper.on_train_end(None, None, None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    options = {"max_steps": 12, **EACH_STEP}

    def made(folder: Path, *callbacks: TrainerCallback) -> Any:
        trainer = runs.trainer(runs.qlora(), folder, NoGain(), EarlyStopping(3), *callbacks, **options)
        trainer.eval_dataset = runs.rows()
        return trainer

    whole = made(tmp_path / "whole")
    whole.train()
    first = made(tmp_path / "parts", StopOnCtrlC(), Interrupt(3))
    first.train()
    assert first.state.global_step == 3  # two evaluations without a gain behind it
    second = made(tmp_path / "parts")
    second.train(resume_from_checkpoint=check_run(tmp_path / "parts", {}, resume=True))
    assert second.state.global_step == whole.state.global_step == 4


class Losses(TrainerCallback):
    """The first evaluation is the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("early", [False, True], ids=["last step", "early stopping"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "qlora"])
def test_a_run_that_had_ended_is_not_trained_on(
    adapted: bool, early: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that is stopped while it is tested: what is loaded is the best, not the last."""
    options = {"max_steps": 8 if early else 3, **EACH_STEP}

    def made() -> Any:
        stopping = EarlyStopping(2 if early else 9)
        return runs.trainer(runs.qlora() if adapted else runs.base(), tmp_path, Losses(), stopping, **options)

    whole, again = made(), made()
    train(whole, None)
    last = check_run(tmp_path, {}, resume=True)
    assert last is not None
    assert last.endswith("checkpoint-3")
    train(again, last)
    assert "had ended at step 3\n" in capsys.readouterr().out
    assert again.state.global_step == whole.state.global_step == 3
    assert again.state.best_global_step == 1
    runs.assert_identical(runs.adapters(again.model), runs.adapters(whole.model))


def test_a_run_goes_on_under_its_own_settings_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert check_run(folder, SETTINGS, resume=False) is None
    assert not folder.parent.exists()
    begin_run(folder, SETTINGS)
    with pytest.raises(RunError, match="no whole checkpoint"):
        check_run(folder, SETTINGS, resume=True)
    runs.trainer(runs.qlora(), folder, StopOnCtrlC(), Interrupt(1), max_steps=2).train()
    assert check_run(folder, SETTINGS, resume=True) == str(folder / "checkpoint-1")
    with pytest.raises(RunError, match="add --resume"):
        check_run(folder, SETTINGS, resume=False)
    with pytest.raises(RunError, match="another steps=4"):
        check_run(folder, {**SETTINGS, "steps": 5}, resume=True)
    with pytest.raises(RunError, match="another seed=None"):
        check_run(folder, {**SETTINGS, "seed": 1}, resume=True)
    (folder / NOTE).unlink()
    with pytest.raises(RunError, match=r"has no settings\.json any more"):
        check_run(folder, SETTINGS, resume=True)


def test_a_run_goes_on_with_the_same_data_and_weights_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = {"data_sha256": "1", "model_sha256": "2"}
    begin_run(tmp_path, SETTINGS | hashes)
    runs.trainer(runs.qlora(), tmp_path, StopOnCtrlC(), Interrupt(1), max_steps=2).train()
    last = check_run(tmp_path, SETTINGS, resume=True)  # the data are not read yet
    assert check_run(tmp_path, SETTINGS | hashes, resume=True) == last
    for name, said in (("data_sha256", "the data of the run"), ("model_sha256", "the model of the run")):
        with pytest.raises(RunError, match=f"{said} in .* changed since it began"):
            check_run(tmp_path, SETTINGS | hashes | {name: "3"}, resume=True)
    with pytest.raises(RunError, match=r"made with another steps=4; repeat"):
        check_run(tmp_path, SETTINGS | {"steps": 5, "data_sha256": "3"}, resume=True)
    train(runs.trainer(runs.qlora(), tmp_path, max_steps=2), last)
    assert "going on from step 1\n" in capsys.readouterr().out


def test_a_finished_run_is_not_said_to_be_missing(tmp_path: Path) -> None:
    begin_run(tmp_path, SETTINGS)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match="is finished; without --resume it is made again, and written over"):
        check_run(tmp_path, SETTINGS, resume=True)


@pytest.mark.parametrize("noted", [SETTINGS, None])
def test_another_result_is_not_written_over(noted: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    if noted is not None:
        begin_run(tmp_path, noted)
        assert check_run(tmp_path, {**SETTINGS, "steps": 5}, resume=False) is None
    with pytest.raises(RunError, match="holds another result"):
        check_run(tmp_path, {**SETTINGS, "method": "full"}, resume=False)


def test_the_result_of_other_data_is_not_written_over(tmp_path: Path) -> None:
    begin_run(tmp_path, {**SETTINGS, "dataset": "a.jsonl"})
    assert check_run(tmp_path, {**SETTINGS, "dataset": "b.jsonl"}, resume=False) is None  # nothing is there yet
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match=r"another result \(dataset='a\.jsonl'\)"):
        check_run(tmp_path, {**SETTINGS, "dataset": "b.jsonl"}, resume=False)


def test_a_run_that_saves_nothing_leaves_a_result_its_settings(tmp_path: Path) -> None:
    begin_run(tmp_path, SETTINGS)
    assert check_run(tmp_path, SETTINGS, resume=False, saves=False) is None
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match="would save none in its place"):
        check_run(tmp_path, SETTINGS, resume=False, saves=False)


@pytest.mark.parametrize(
    ("file", "content", "ours"),
    [
        ("README.md", "# Mine", False),
        ("README.md", "<!-- hf_qlora adapter 1f2e3d4c -->", True),
        ("README.md", "<!-- This model card has been generated automatically according to the information", True),
        ("settings.json", '{"editor.fontSize": 12}', False),
        ("settings.json", "// none", False),
        ("settings.json", json.dumps(SETTINGS), True),
        ("pyproject.toml", "", False),
        ("README.md", b"\xff\xfe", False),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_is_refused(
    resume: bool, file: str, content: str | bytes, ours: bool, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if ours and not resume:
        assert check_run(tmp_path, SETTINGS, resume=False) is None
        return
    said = "no whole checkpoint" if ours else f"has a {file} of another origin"
    with pytest.raises(RunError, match=said):
        check_run(tmp_path, SETTINGS, resume=resume)


@pytest.mark.parametrize("name", [".", ".."])
def test_the_folder_that_one_is_in_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="that you are in, or above it"):
        check_run(Path(name), SETTINGS, resume=False)


def test_what_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(RunError, match="not a folder"):
            check_run(folder, SETTINGS, resume=False)
    with pytest.raises(RunError, match="cannot be written"):
        begin_run(tmp_path / "run", SETTINGS, tmp_path)
    with pytest.raises(RunError, match=r"found\.json cannot be written: it lies in a file"):
        begin_run(tmp_path / "run", SETTINGS, file / "found.json")
    begin_run(tmp_path / "run", SETTINGS, tmp_path / "new" / "found.json")
    assert not (tmp_path / "new" / "found.json").exists()
    assert json.loads((tmp_path / "run" / NOTE).read_text()) == SETTINGS
