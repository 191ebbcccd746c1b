"""What all commands of `hf-qlora bench` share."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.commands import bench


ON_A_DEVICE = [
    command.callback.__name__.replace("_", "-")
    for command in bench.registered_commands
    if command.callback is not None and "device" in inspect.signature(command.callback).parameters
]


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
