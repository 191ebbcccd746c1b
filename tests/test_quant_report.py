"""`hf-qlora quant-report`: a folder in, a table, a JSON and a picture out; one sentence for what cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from architectures import bert, llama
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from hf_qlora import NF4Config, QuantizationReport, cli, quantization_report, quantize_model


def invoke(*arguments: str | Path) -> Result:
    settings = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(cli.app, ["quant-report", *map(str, arguments)], env=settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_command_writes_what_the_function_finds(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = ("--json", tmp_path / "out" / "report.json", "--plot", tmp_path / "out" / "report.png")
    result = invoke(folder, "--block-size", "128", "--block-size", "64", "--budget", "10%", *files)
    assert result.exit_code == 0, result.output
    written = QuantizationReport.from_dict(json.loads((tmp_path / "out" / "report.json").read_text()))
    model = type(llama()).from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert written == quantization_report(model, NF4Config(block_size=128), block_sizes=[64], budget="10%")
    assert str(written) in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.png"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_all_shows_each_layer_and_dtype_is_that_of_loading(folder: Path) -> None:
    result = invoke(folder, "--all", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^model\.layers\.\d\.\S+_proj ", result.output, re.MULTILINE)) == 14
    assert "weights in float32" in result.output


@pytest.mark.parametrize("kind", ["nf4", "classifier"])
def test_other_folders_that_transformers_saves_are_read(kind: str, tmp_path: Path) -> None:
    model: nn.Module = quantize_model(llama()) if kind == "nf4" else bert()
    model.save_pretrained(tmp_path / "base")
    result = invoke(tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert ("not known without the dense weights" in result.output) == (kind == "nf4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "100"], "block_size=100 is not supported"),
        (["--budget", "much"], "budget='much' is no number of bytes"),
        (["--budget", "-3"], "budget='-3' is no number of bytes"),
        (["--budget", "9 B"], "budget=9 bytes is too small to leave any layer dense; the smallest that works is"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--json", "report.txt"], "report.txt cannot be the report"),
        (["--plot", "map.pdf"], "map.pdf cannot be the picture"),
    ],
)
def test_a_bad_option_is_one_sentence(folder: Path, arguments: list[str], message: str) -> None:
    result = invoke(folder, *arguments)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith(f"Error: {message}")


def _edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("offline", "'nobody/nothing' is no folder and not in the Hub's cache"),
        ("absent", "is not there"),
        ("no config", "it has no config.json"),
        ("no class", "names no class of transformers"),
        ("no weights", "cannot be loaded"),
        ("truncated", "cannot be loaded"),
        ("lacking", "lacks 1 of its weights: model.layers.0.mlp.up_proj.weight"),
        ("nan", "model.layers.0.mlp.up_proj.weight has NaN or infinite values"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_sentence(
    folder: Path, problem: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    given: str | Path = folder
    if problem == "offline":
        given = "nobody/nothing"
    if problem == "absent":
        given = folder / "elsewhere"
    if problem == "no config":
        (folder / "config.json").unlink()
    if problem == "no class":
        _edit(folder, architectures=["os.system"])
    if problem == "no weights":
        weights.unlink()
    if problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if problem == "lacking":
        save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    if problem == "nan":
        tensors[name][0, 0] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    result = invoke(given)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in line
