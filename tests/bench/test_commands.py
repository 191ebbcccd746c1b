"""What all commands of `hf-qlora bench` share."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench import skip_list
from hf_qlora.bench.commands import bench
from hf_qlora.bench.results import append_line, write_whole
from hf_qlora.cli import app
from hf_qlora.validation import ConfigError


ON_A_DEVICE = [
    command.callback.__name__.replace("_", "-")
    for command in bench.registered_commands
    if command.callback is not None and "device" in inspect.signature(command.callback).parameters
]
WITH_RESULTS = [
    command.callback.__name__.replace("_", "-")
    for command in bench.registered_commands
    if command.callback is not None and "results" in inspect.signature(command.callback).parameters
]
COMMITTED = Path(__file__).parents[2] / "results"
FILES = sorted(path for path in COMMITTED.rglob("[!.]*.json*"))
OF_A_STUDY = {"text_classification.jsonl": "results-classification", "text_generation.jsonl": "results-generation"}


def command_of(file: Path) -> str:
    """Which command a committed file is of, by its name or its folder's."""
    if file.parent != COMMITTED:
        return "quantization"
    named = file.stem.replace("_", "-")
    return OF_A_STUDY.get(file.name) or next(name for name in WITH_RESULTS if named.startswith(name))


def test_there_are_commands_for_gpus() -> None:
    assert {"train-step", "quantization", "results-classification"} <= set(ON_A_DEVICE)


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_no_gpu_is_one_sentence_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    result = CliRunner().invoke(bench, [name, "--device", "cuda"])

    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert "cuda" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_an_unknown_device_is_one_sentence_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(bench, [name, "--device", "abacus"])

    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "abacus" in result.output
    assert "cpu" in result.output


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_committed_results_are_known_for_their_own_commands(name: str) -> None:
    assert len(FILES) > 15
    for file in FILES:
        result = CliRunner().invoke(bench, [name, "--report", "--results", str(file)])
        if command_of(file) == name:
            assert result.exit_code == 0, result.output
        else:
            assert (result.exit_code, result.output.count("\n")) == (2, 1), (file, result.exception)
            assert f"{file} is no result of `hf-qlora bench {name}`" in result.output


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_sealed_results_of_another_form_are_refused(name: str, tmp_path: Path) -> None:
    for values in ({"arms": {}}, {"arms": [], "case": 1}, {"part": "cost", "with": {}}):
        file = tmp_path / "other.json"
        write_whole(file, values)
        result = CliRunner().invoke(bench, [name, "--report", "--results", str(file)])
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        lines = tmp_path / "other.jsonl"
        append_line(lines, values)
        result = CliRunner().invoke(bench, [name, "--report", "--results", str(lines)])
        assert (result.exit_code, result.output.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["growth", "learning-curve", "adaptive-depth", "results-generation"])
def test_what_goes_on_does_not_go_on_from_another_result(name: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    write_whole(file, {"mine": 1})
    before = file.read_bytes()

    result = CliRunner().invoke(bench, [name, "--results", str(file)])

    assert result.exit_code == 2
    assert "is no result of" in result.output
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_where_results_cannot_be_nothing_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for place, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "below.json", "cannot be written into")):
        result = CliRunner().invoke(bench, [name, "--results", str(place)])
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.exception
        assert said in result.output

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)  # root may write anywhere
    result = CliRunner().invoke(bench, [name, "--results", str(tmp_path / "new" / "x.json")])
    assert (result.exit_code, "Permission denied" in result.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [name for name in WITH_RESULTS if name.startswith(("adaptive", "results"))])
def test_a_folder_is_none_for_quick_runs_either(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [name, "--quick", "--results", str(tmp_path)])
    assert (result.exit_code, "is a folder" in result.output) == (2, True)


@pytest.mark.parametrize("budget", ["nope", "101%"])
def test_a_budget_is_read_before_a_model_is(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_list, "load_chat_model", None)
    with pytest.raises(ConfigError, match="is no number of bytes"):
        skip_list.measure(budget, 1, 2)


INTERRUPTED = """
import os, signal, sys, threading, time
from multiprocessing import active_children
from pathlib import Path
from hf_qlora.bench.processes import apart, side_by_side
from hf_qlora.bench.train_step import run
from hf_qlora.cli import app

WORK = "import time; from pathlib import Path; Path('begun').touch(); time.sleep(60)"
WAYS = {
    "apart": lambda *_: apart(exec, WORK),
    "side by side": lambda *_: list(side_by_side(exec, [(1, (WORK,)), (2, (WORK,))], 2)),
}

def interrupt():
    while not (Path("begun").exists() if when == "at work" else active_children()):
        time.sleep(0.02)
    time.sleep(0.7)  # if it starts, it imports by then
    os.killpg(0, signal.SIGINT)

way, when = sys.argv[1:]
run.measure = WAYS[way]
threading.Thread(target=interrupt, daemon=True).start()
app(["bench", "train-step", "--shape", "tiny", "--results", "found.json"])
"""


@pytest.mark.parametrize(("way", "when"), [("apart", "at work"), ("side by side", "starting")])
def test_ctrl_c_is_one_sentence_of_one_process(way: str, when: str, tmp_path: Path) -> None:
    root = str(COMMITTED.parent)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, way, when],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1].startswith("Stopped; ")  # bitsandbytes may have warned before
    assert "Traceback" not in done.stderr
    assert "KeyboardInterrupt" not in done.stderr
    assert not (tmp_path / "found.json").exists()


def test_ctrl_c_ends_every_measurement_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(skip_list, "measure", interrupted)
    result = CliRunner().invoke(app, ["bench", "skip-list", "--results", str(tmp_path / "x.json")])
    assert (result.exit_code, result.output.count("\n")) == (130, 1)
