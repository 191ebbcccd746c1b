"""What our callbacks cost a training step.

    step      arms with and without, in one process, in turn, round after round; the ratio of each round to its step
              without, and of these the median: what disturbs the machine disturbs both
    share     the callbacks' own events, called and timed by themselves, over the step without them; a log every
              `LOG_EVERY` steps in it

Steps are as Trainer makes them: it looks at the loss, clips, and calls the events in this order. The model has gains,
so that there are scales to look at.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_qlora.bench.measure import clock, environment
from hf_qlora.bench.train_step.arms import ARMS, Case
from hf_qlora.bench.train_step.report import described
from hf_qlora.train.health import AdapterHealthCallback
from hf_qlora.train.memory import MemoryCallback


LOG_EVERY = 10
WARMUP = 2
NONE = "none"
MODEL = "ours, gain"  # of the arms of `bench train-step`


def _memory(model: nn.Module) -> TrainerCallback:
    trainer: Any = SimpleNamespace(model=model, callback_handler=SimpleNamespace(callbacks=[]))
    return MemoryCallback(trainer)


CALLBACKS: dict[str, Callable[[nn.Module], list[TrainerCallback]]] = {
    NONE: lambda model: [],
    "AdapterHealthCallback": lambda model: [AdapterHealthCallback("error")],
    "MemoryCallback": lambda model: [_memory(model)],
    "both": lambda model: [AdapterHealthCallback("error"), _memory(model)],
}


class WatchedStep:
    """A model with its optimizer and callbacks; called with a batch, it is trained on it as Trainer would."""

    def __init__(self, case: Case, arm: str, folder: str) -> None:
        self.case, self.step = case, ARMS[MODEL].start(case)
        self.args = TrainingArguments(folder, use_cpu=torch.device(case.device).type == "cpu", report_to="none")
        self.state, self.control = TrainerState(), TrainerControl()
        model = self.step.model
        callbacks = [DefaultFlowCallback(), *CALLBACKS[arm](model)]
        self.handler = CallbackHandler(callbacks, model, None, self.step.optimizer, None)
        self.handler.on_train_begin(self.args, self.state, self.control)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        optimizer = self.step.optimizer
        assert optimizer is not None
        self.handler.on_step_begin(self.args, self.state, self.control)
        loss = self.step.model(**batch).loss
        loss.backward()
        if not bool(loss.isfinite()):  # Trainer waits here, too
            raise RuntimeError(f"The loss is {loss.item()}.")
        nn.utils.clip_grad_norm_(self.step.trained, 1.0)
        self.handler.on_pre_optimizer_step(self.args, self.state, self.control)
        optimizer.step()
        self.state.global_step += 1
        self.handler.on_step_end(self.args, self.state, self.control)
        if self.state.global_step % LOG_EVERY == 0:
            self.handler.on_log(self.args, self.state, self.control, {"loss": loss.item()})
        self.step.model.zero_grad()

    def own_seconds(self, batch: dict[str, Tensor]) -> float:
        """Of the events of a step, on the gradients of a batch, with their part of a log."""
        self.step.model(**batch).loss.backward()
        started = clock(self.case.device)
        for event in (self.handler.on_step_begin, self.handler.on_pre_optimizer_step, self.handler.on_step_end):
            event(self.args, self.state, self.control)
        logging = clock(self.case.device)
        self.handler.on_log(self.args, self.state, self.control, {"loss": 1.0})
        ended = clock(self.case.device)
        self.step.model.zero_grad()
        return logging - started + (ended - logging) / LOG_EVERY


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The seconds of each arm's steps in turn, and of its events by themselves."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {arm: WatchedStep(case, arm, folder) for arm in CALLBACKS}
        found: dict[str, dict[str, list[float]]] = {arm: {"step_s": [], "own_s": []} for arm in steps}
        for number in tqdm(range(-WARMUP, rounds), desc="callbacks", unit="round"):
            batch = case.batch(number + WARMUP)
            turn = number % len(steps)  # nobody always comes first
            for arm in [*list(steps)[turn:], *list(steps)[:turn]]:
                started = clock(case.device)
                steps[arm](batch)
                if number >= 0:
                    found[arm]["step_s"].append(clock(case.device) - started)
        for arm, step in steps.items():
            found[arm]["own_s"] = [step.own_seconds(case.batch(0)) for _ in range(WARMUP + 5)][WARMUP:]
    return {"case": asdict(case), "with": environment(case.device), "arms": found}


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each arm."""
    case, arms = result["case"], result["arms"]
    plain = arms[NONE]["step_s"]
    lines = [
        f"{case['shape']}, {case['batch_size']} × {case['sequence_length']} tokens, rank {case['rank']}, "
        f"{len(plain)} rounds; a log every {LOG_EVERY} steps; {described(result['with'])}.",
        "",
        "| callbacks | step, s | ratio by rounds | of minima | own time, ms | own share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in arms.items():
        ratios = [mine / other for mine, other in zip(arm["step_s"], plain, strict=True)]
        own = statistics.median(arm["own_s"])
        lines.append(
            f"| {name} | {statistics.median(arm['step_s']):.3f} | {statistics.median(ratios):.4f} "
            f"| {min(arm['step_s']) / min(plain):.4f} | {1e3 * own:.2f} | {own / statistics.median(plain):.2%} |"
        )
    return "\n".join(lines)
