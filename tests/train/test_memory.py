"""Memory and speed are in the logs, in whatever reports them and in the bar, with the numbers that they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from architectures import VOCAB
from runs import assert_identical, outcome, qlora, trainer
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback

from hf_qlora import DepthScaleCallback, MemoryCallback, MemoryPlan, ModelCardCallback, plan_memory
from hf_qlora.train import memory
from hf_qlora.validation import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Reporter(TrainerCallback):
    """Stands for TensorBoard and the like."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


def planned(peak: int) -> MemoryPlan:
    return replace(plan_memory(qlora(), None, 2, 12, device="cpu"), step_peak_bytes=peak)


def watched(folder: Path, plan: Any = None, **options: Any) -> tuple[Trainer, Reporter]:
    run = trainer(qlora(), folder, **options)
    reporter = Reporter()
    run.add_callback(reporter)
    run.add_callback(MemoryCallback(run, plan))
    return run, reporter


def logged(reporter: Reporter, key: str = "memory/rss_mib") -> list[dict[str, float]]:
    return [logs for logs in reporter.seen if key in logs]


def test_every_loss_has_memory_and_speed_beside_it(tmp_path: Path) -> None:
    run, reporter = watched(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2)
    run.train()
    assert [logs["step"] for logs in logged(reporter)] == [2, 4, 6]
    assert [logs["step"] for logs in logged(reporter, "tokens_per_second")] == [2, 4, 6]
    rss = psutil.Process().memory_info().rss / 2**20
    assert all(rss / 2 < logs["memory/rss_mib"] <= 2 * rss for logs in logged(reporter))
    assert not any("memory/share_of_plan" in logs for logs in reporter.seen)
    kept = [entry for entry in run.state.log_history if "loss" in entry]
    assert kept == logged(reporter)
    assert len([entry for entry in run.state.log_history if "memory/rss_mib" in entry]) == 3
    assert not run.model._forward_pre_hooks


@pytest.mark.parametrize("reports_first", [True, False])
def test_a_loss_is_logged_once_with_memory_in_it(
    tmp_path: Path, reports_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainers add their metrics in `log`: called for memory alone, it would log them twice."""
    run, reporter = trainer(qlora(), tmp_path, logging_steps=2), Reporter()
    callbacks = [reporter, MemoryCallback(run)]
    for callback in callbacks if reports_first else reversed(callbacks):
        run.add_callback(callback)
    calls, log = [], run.log
    monkeypatch.setattr(run, "log", lambda logs, *args: (calls.append(logs), log(logs, *args)))
    for _ in range(2):  # a second training, too
        reporter.seen, calls[:] = [], []
        run.train()
        assert len(calls) == len(reporter.seen) == 4  # three losses and the summary
        assert [("loss" in logs, "memory/rss_mib" in logs) for logs in reporter.seen] == [(True, True)] * 3 + [
            (False, False)
        ]


def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([example["input_ids"] for example in examples])
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("counted", "masked", "tokens"),
    [("no", False, 12), ("no", True, 8), ("all", True, 12), ("non_padding", True, 8)],
)
def test_tokens_are_those_that_are_trained_on(
    tmp_path: Path, counted: str, masked: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps between logs, of two accumulated batches of two rows; a step takes 10 s of a clock of our own."""
    run, reporter = watched(
        tmp_path, logging_steps=2, gradient_accumulation_steps=2, include_num_input_tokens_seen=counted
    )
    if masked:
        run.data_collator = padded
    now = [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 10

    run.add_callback(Clock())
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run.train()
    speeds = [logs["tokens_per_second"] for logs in logged(reporter, "tokens_per_second")]
    assert speeds == pytest.approx([2 * 2 * 2 * tokens / 20] * 3)


@pytest.mark.parametrize(
    "pause", [{"eval_strategy": "steps", "eval_steps": 1}, {"save_strategy": "steps", "save_steps": 1}], ids=str
)
def test_evaluations_and_saves_take_no_time_from_the_speed(
    tmp_path: Path, pause: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 100 s of the clock, and a step 10 s."""
    now = [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 10

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 100

        on_save = on_evaluate

    run = trainer(
        qlora(),
        tmp_path,
        Clock(),
        **{**pause, "max_steps": 3},
    )
    reporter = Reporter()
    run.add_callback(reporter)
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run.add_callback(MemoryCallback(run))
    run.train()
    assert [logs["tokens_per_second"] for logs in logged(reporter, "tokens_per_second")] == [2.4] * 3


def test_the_share_of_a_plan_is_of_its_peak(tmp_path: Path) -> None:
    shares = []
    for peak in (2**34, 2**35):
        run, reporter = watched(tmp_path, planned(peak), logging_steps=6)
        run.train()
        (logs,) = logged(reporter, "memory/share_of_plan")
        shares.append(logs["memory/share_of_plan"])
        assert 0 < shares[-1] * peak <= logs["memory/rss_mib"] * 2**20 * 1.5
    assert shares[0] > shares[1]


@pytest.mark.parametrize("plan", [7, {"step_peak_bytes": 2**34}, SimpleNamespace(step_peak_bytes=2**34)])
def test_what_is_no_plan_is_refused(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(ConfigError, match="plan_memory"):
        MemoryCallback(trainer(qlora(), tmp_path), plan)


@pytest.mark.parametrize("given", [None, "trainer", torch.nn.Linear(2, 2)], ids=["none", "text", "model"])
@pytest.mark.parametrize("callback", [MemoryCallback, DepthScaleCallback, ModelCardCallback])
def test_what_is_no_trainer_is_refused(callback: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match="Trainer"):
        callback(given)


def test_the_progress_bar_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = watched(tmp_path, planned(2**34), disable_tqdm=False, max_steps=2)
    assert any(isinstance(callback, ProgressCallback) for callback in run.callback_handler.callbacks)
    run.train()
    shown = capsys.readouterr().err
    assert "memory=" in shown
    assert "of plan=" in shown
    assert "tokens/s=" in shown


def test_watching_memory_changes_nothing(tmp_path: Path) -> None:
    alone = trainer(qlora(), tmp_path)
    alone.train()
    run, _ = watched(tmp_path)
    run.train()
    assert_identical(outcome(run), outcome(alone))


def test_a_model_of_images_has_memory_and_no_tokens() -> None:
    model: Any = torch.nn.Linear(2, 2)
    callback = MemoryCallback(SimpleNamespace(model=model, callback_handler=SimpleNamespace(callbacks=[])))  # type: ignore[arg-type]
    args = SimpleNamespace(include_num_input_tokens_seen="no", torch_compile=False, world_size=1)
    callback.on_train_begin(args, SimpleNamespace(num_input_tokens_seen=0), None, model=model)
    callback._count(model, (), {"pixel_values": torch.zeros(2, 3, 4, 4)})
    callback._count(model, (torch.zeros(2, 3, 4, 4),), {})
    assert callback._speed(args, None) == {}
    callback._count(model, (torch.zeros(2, 5, dtype=torch.long),), {})
    callback._count(model, (), {"inputs_embeds": torch.zeros(2, 5, VOCAB), "attention_mask": torch.ones(2, 1, 5, 5)})
    callback._seconds = 1.0
    assert callback._speed(args, None) == {"tokens_per_second": 20.0}
