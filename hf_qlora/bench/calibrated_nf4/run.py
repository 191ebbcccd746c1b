"""The runs: which are to be done, doing one, and keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_qlora.bench.calibrated_nf4 import models, parts
from hf_qlora.bench.calibrated_nf4.commands import commands
from hf_qlora.bench.measure import environment
from hf_qlora.bench.processes import apart, side_by_side
from hf_qlora.bench.results import append_line, check_once, check_same_device, read_lines


@dataclass(frozen=True)
class Run:
    """What identifies a run.

    Attributes:
        part: of `PARTS`.
        settings: of its function, sorted.
    """

    part: str
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = models.STEPS
    rows: int = parts.ROWS
    amounts: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    methods: tuple[str, ...] = tuple(parts.METHODS)
    questions: int = parts.QUESTIONS
    sizes: tuple[int, ...] = (0, 1, 2)
    layers: int | None = None  # the first of the model's


QUICK = Plan(seeds=(0,), steps=2, rows=2, amounts=(2,), methods=("the default",), questions=2, sizes=(0,), layers=1)

PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "merge": parts.merging,
    "base": parts.base,
    "loftq": parts.loftq,
    "trained": parts.trained,
    "rows": parts.amount,
    "caps": parts.capped,
    "methods": parts.method,
    "cost": parts.cost,
    "commands": commands,
}
ALONE = ("cost", "commands")


def planned(plan: Plan, names: tuple[str, ...]) -> Iterator[Run]:
    """The runs of the parts of these names; the rows and the methods are compared with the first seed's adapter."""
    seed = plan.seeds[0]
    model = {"layers": plan.layers}
    adapter = {"steps": plan.steps, **model}
    settings: Mapping[str, list[dict[str, Any]]] = {
        "merge": [{"seed": s, "rows": plan.rows, "questions": plan.questions, **adapter} for s in plan.seeds],
        "base": [{"seed": s, "rows": plan.rows, **model} for s in plan.seeds],
        "loftq": [{"seed": s, **adapter} for s in plan.seeds],
        "trained": [
            {"seed": s, "rows": plan.rows, "base": base, **adapter} for s in plan.seeds for base in parts.BASES
        ],
        "rows": [{"seed": seed, "rows": n, **adapter} for n in plan.amounts],
        "caps": [
            {"seed": s, "rows": min(parts.FEW_ROWS, plan.rows), "cap": cap, **adapter}
            for s in plan.seeds
            for cap in parts.CAPS
        ],
        "methods": [{"seed": seed, "rows": plan.rows, "name": name, **adapter} for name in plan.methods],
        "cost": [{"size": size, "rows": plan.rows} for size in plan.sizes],
        "commands": [{"seed": seed, "rows": plan.rows, **model}],
    }
    for name in names:
        yield from (Run(name, tuple(sorted(one.items()))) for one in settings[name])


def perform(
    plan: Plan, results: Path, names: tuple[str, ...] = tuple(PARTS), device: str = "cpu", workers: int = 1
) -> None:
    """Do the runs that are not in the file `results`, and append each there; `ALONE` last, one at a time.

    Args:
        workers: processes side by side.

    Raises:
        ValueError: the file has rows of another kind of device, or a run twice.
    """
    check_same_device(results, made_with(device)["device"])
    done = {run for run, _ in read(results)}
    todo = [run for run in planned(plan, names) if run not in done]
    with tqdm(total=len(todo), desc="runs", unit="run") as bar:
        shared = [(run, (run, device)) for run in todo if run.part not in ALONE]
        for run, found in side_by_side(do, shared, workers):
            _keep(results, run, found, device, bar)
        for run in (run for run in todo if run.part in ALONE):
            # Commands are processes of their own, and this one clears up behind them.
            _keep(results, run, do(run, device) if run.part == "commands" else apart(do, run, device), device, bar)


def made_with(device: str) -> dict[str, Any]:
    """The `environment`; a device that has no products in bfloat16 is another one than those that have."""
    found = environment(device)
    if models.dtype_of(device) is not torch.bfloat16:
        found["device"] += f", {str(models.dtype_of(device)).removeprefix('torch.')}"
    return found


def do(run: Run, device: str) -> dict[str, Any]:
    return PARTS[run.part](device, **dict(run.settings))


def read(results: Path) -> list[tuple[Run, dict[str, Any]]]:
    """The runs in a file, with what they found.

    Raises:
        ValueError: a line was changed, or a run is there twice.
    """
    found = [
        (Run(row["part"], tuple(sorted(row["settings"].items()))), row["found"] | {"with": row["with"]})
        for row in read_lines(results)
    ]
    check_once(results, (run for run, _ in found))
    return found


def _keep(results: Path, run: Run, found: dict[str, Any], device: str, bar: Any) -> None:
    row = {"part": run.part, "settings": dict(run.settings), "found": found, "with": made_with(device)}
    append_line(results, row)
    bar.set_postfix_str(run.part)
    bar.update()
