"""The runs: which are to be done, doing one, and keeping it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from hf_qlora.bench.depth.arms import ARMS, Arm
from hf_qlora.bench.depth.tasks import TASKS, Task
from hf_qlora.bench.measure import environment
from hf_qlora.bench.processes import side_by_side
from hf_qlora.bench.results import append_line, check_once, check_same_device, read_lines


SWEEP_SEEDS = (0, 100)  # one alone may take a rate just below a cliff
TEST_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
WARMUP = 0.1  # of the steps; then the rate falls to 0


@dataclass(frozen=True)
class Run:
    """What identifies a run. The sweep is scored on the validation split, the others on the test split."""

    task: str
    arm: str
    lr: float
    seed: int
    steps: int

    @property
    def split(self) -> str:
        return "validation" if self.seed in SWEEP_SEEDS else "test"


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = TEST_SEEDS
    steps: int | None = None  # the task's own
    rates: int | None = None  # how many of the task's
    sweep_seeds: tuple[int, ...] = SWEEP_SEEDS
    rows: int | None = None  # of a split that are scored


QUICK = Plan(seeds=(1, 2), steps=2, rates=1, sweep_seeds=SWEEP_SEEDS[:1], rows=16)


def perform(plan: Plan, results: Path, device: str = "cpu", workers: int = 1) -> None:
    """Do the runs of a plan that are not in the file `results`, and append each there.

    Args:
        workers: processes side by side.

    Raises:
        ValueError: the file has rows of another kind of device, or a run twice.
    """
    check_same_device(results, environment(device)["device"])
    tasks = [TASKS[name] for name in plan.tasks]
    swept = len(plan.sweep_seeds)
    total = sum(len(ARMS) * (len(task.rates[: plan.rates]) * swept + len(plan.seeds)) for task in tasks)
    with tqdm(total=total, desc="runs", unit="run") as bar:
        for stage in (_sweeps, _tests):  # the tests' rates are what the sweeps found
            runs = list(stage(plan, results))
            done = {run for run, _ in read(results)}
            todo = [(run, (run, device, plan.rows)) for run in runs if run not in done]
            bar.update(len(runs) - len(todo))
            for run, found in side_by_side(_do_here, todo, workers):
                _append(results, run, found, device)
                bar.set_postfix_str(f"{run.task}: {run.arm}, rate {run.lr:g}, seed {run.seed}")
                bar.update()


def _sweeps(plan: Plan, results: Path) -> Iterator[Run]:
    for name in plan.tasks:
        for arm in ARMS:
            for lr in TASKS[name].rates[: plan.rates]:
                yield from (Run(name, arm, lr, seed, plan.steps or TASKS[name].steps) for seed in plan.sweep_seeds)


def _tests(plan: Plan, results: Path) -> Iterator[Run]:
    done = read(results)
    for name in plan.tasks:
        steps = plan.steps or TASKS[name].steps
        rates = {arm: best_rate(done, TASKS[name], arm, steps) for arm in ARMS}
        for seed in plan.seeds:
            yield from (Run(name, arm, rates[arm], seed, steps) for arm in ARMS)


def _do_here(run: Run, device: str, rows: int | None) -> dict[str, Any]:
    return do(run, _task(run.task, device), ARMS[run.arm], rows)


@functools.cache
def _task(name: str, device: str) -> Task:
    """A process's own, with its model and data read once."""
    return TASKS[name](device)


def best_rate(done: list[tuple[Run, dict[str, Any]]], task: type[Task] | Task, arm: str, steps: int) -> float:
    """Of the task's learning rates, that with the best mean score on the validation split; diverging is the worst."""
    swept: dict[float, list[float]] = {}
    for run, found in done:
        if (run.task, run.arm, run.steps) == (task.name, arm, steps) and run.seed in SWEEP_SEEDS:
            score = task.better * found["score"] if math.isfinite(found["score"]) else -math.inf
            swept.setdefault(run.lr, []).append(score)
    means = {lr: sum(scores) / len(scores) for lr, scores in swept.items() if lr in task.rates}
    return max(means, key=means.__getitem__, default=math.nan)


def do(run: Run, task: Task, arm: Arm, rows: int | None = None) -> dict[str, Any]:
    """Train and score; the losses and gradient norms of all steps are kept too.

    Gradients are not clipped: one norm over all of them would make the step of each weight depend on the scales of all
    others, and a profile would be no longer the same as learning rates.
    """
    started = time.monotonic()
    base = task.base()
    set_seed(run.seed)  # after the base is made: all arms of a seed start alike
    model = get_peft_model(base, arm.config(**task.shared))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = arm.optimizer(model, run.lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    model.train()
    for step, batch in enumerate(task.batches(run.seed, run.steps)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, run.steps)
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return {
        "score": task.evaluate(model, run.split, rows),
        "split": run.split,
        "metric": task.metric,
        "losses": [round(loss, 4) for loss in losses],
        "gradient_norms": [round(norm, 4) for norm in norms],
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "seconds": round(time.monotonic() - started, 1),
    }


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def read(results: Path) -> list[tuple[Run, dict[str, Any]]]:
    """The runs in a file, with what they found.

    Raises:
        ValueError: a line was changed, or a run is there twice.
    """
    found = [(Run(**row["run"]), row["found"]) for row in read_lines(results)]
    check_once(results, (run for run, _ in found))
    return found


def _append(results: Path, run: Run, found: dict[str, Any], device: str) -> None:
    append_line(results, {"run": asdict(run), "found": found, "with": environment(device)})
