"""The settings are what they are called, the command prints what it wrote, and peaks are seen where they are made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.memory_plan import report, run
from hf_qlora.bench.memory_plan.settings import CPU, CUDA, QUICK, Setting
from hf_qlora.cli import app


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("settings", [CPU, CUDA], ids=["cpu", "cuda"])
def test_settings_differ_and_are_on_one_device(settings: tuple[Setting, ...]) -> None:
    assert len(settings) >= 12
    assert len({setting.name for setting in settings}) == len(settings)
    assert len({replace(setting, name="") for setting in settings}) == len(settings)
    assert len({setting.device for setting in settings}) == 1
    assert {True, False} == {setting.checkpointing for setting in settings} == {setting.dora for setting in settings}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_each_family_trains_on_what_is_planned(family: str) -> None:
    setting = replace(QUICK[0], family=family)
    model = setting.dense().train()
    batch = setting.batch()
    assert batch["input_ids"].shape == (setting.batch_size, setting.seq_len)
    model(**batch).loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert run.planned(setting)["batch_size"] == setting.batch_size


def test_a_peak_is_measured_beyond_what_was_there() -> None:
    """Full logits in float32, 32 MiB, more than once; libraries and what a step leaves behind are not in it."""
    small = replace(QUICK[0], chunked=False, vocab=2048, batch_size=1, seq_len=16)
    large = replace(small, batch_size=32, seq_len=128)
    found = [run.apart(run.peaks, setting, True) for setting in (small, large)]
    logits = 32 * 128 * 2048 * 4
    assert found[1]["step"] - found[0]["step"] > 2 * logits
    assert found[1]["step"] == pytest.approx(run.planned(large)["step_peak_bytes"], rel=0.15)  # 10 % of larger ones


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "apart", lambda function, setting, mapped: {"conversion": 2**24, "step": 2**24})
    results = tmp_path / "new" / "plan.json"
    done = CliRunner().invoke(app, ["bench", "memory-plan", "--quick", "--results", str(results)])
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    assert [row["setting"]["name"] for row in found["settings"]] == ["plain", "checkpointing"]
    assert report.markdown(found) in done.output
    assert "of 2 within 10%" in done.output
    assert results.with_suffix(".png").stat().st_size > 1000
    again = CliRunner().invoke(app, ["bench", "memory-plan", "--report", "--results", str(results)])
    assert again.output.strip() == report.markdown(found)


@pytest.mark.parametrize(
    ("options", "said"), [(["--device", "tpu"], "choose from"), (["--report", "--results", "no.json"], "no.json")]
)
def test_misuse_is_explained(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "memory-plan", *options])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.gpu
def test_a_gpu_is_measured_too() -> None:
    found = run.measure([replace(setting, device="cuda", hidden=512) for setting in QUICK])
    assert all("heap" not in row for row in found["settings"])
    assert all(row["measured"]["step"] > 0 for row in found["settings"])
    assert isinstance(report.markdown(found), str)
