"""The table: what each arm reached, and how sure it is that it differs from LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_qlora.bench.depth.arms import ARMS, REFERENCE
from hf_qlora.bench.depth.run import SWEEP_SEEDS, Run, best_rate, read
from hf_qlora.bench.depth.tasks import TASKS, Task
from hf_qlora.bench.results import read_lines
from hf_qlora.bench.train_step.report import described


RESAMPLES = 10_000
SEEDS_NEEDED = 5  # for an interval or a test: with three, 95 % intervals cover 83 %


@dataclass(frozen=True)
class Row:
    """One arm's test scores, and their paired differences from the reference's, over the seeds that both have.

    Attributes:
        edge: whether no rate was tried beyond the chosen one, so that a better one may be there.
        worst: the worst score; a run that collapsed shows.
        interval: 95 % bootstrap-t interval of the mean difference; NaN with fewer than five seeds.
        p: two-sided, of a paired t-test, NaN likewise; `p_corrected` after Holm, over the arms of the task.
    """

    arm: str
    lr: float
    seeds: int
    mean: float
    deviation: float = math.nan
    worst: float = math.nan
    edge: bool = False
    difference: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    p: float = math.nan
    p_corrected: float = math.nan


def table(results: Path, task: type[Task]) -> list[Row]:
    """The rows of a task, the reference first, over the seeds that all arms have; no arm, no seed: no rows."""
    scores = {arm: found for arm, found in _test_scores(read(results), task).items() if arm in ARMS}
    common = sorted(set.intersection(*(set(found) for found in scores.values()))) if scores else []
    if REFERENCE not in scores or not common:
        return []
    reference = scores[REFERENCE]
    rows = []
    for arm in (name for name in ARMS if name in scores):
        found = [scores[arm][seed][0] for seed in common]
        differences = [scores[arm][seed][0] - reference[seed][0] for seed in common]
        rows.append(_row(task, arm, scores[arm][common[0]][1], found, differences))
    return _corrected(rows)


def _row(task: type[Task], arm: str, lr: float, found: Sequence[float], differences: Sequence[float]) -> Row:
    deviation = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
    worst = min(found) if task.better > 0 else max(found)
    edge = lr in (min(task.rates), max(task.rates))
    own = Row(arm, lr, len(found), float(np.mean(found)), deviation, worst, edge)
    if arm == REFERENCE:
        return own
    return replace(
        own,
        difference=float(np.mean(differences)),
        interval=bootstrap_interval(differences),
        p=paired_p(differences),
    )


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by the studentized bootstrap, which a handful of seeds does not make too narrow."""
    d = np.asarray(differences)
    n = len(d)
    if n < SEEDS_NEEDED or not np.isfinite(d).all() or not np.ptp(d):
        return math.nan, math.nan
    samples = np.random.default_rng(0).choice(d, (RESAMPLES, n))
    errors = samples.std(axis=1, ddof=1) / math.sqrt(n)
    usable = np.ptp(samples, axis=1) > 0  # rounding gives one value repeated an error, too
    t = (samples.mean(axis=1)[usable] - d.mean()) / errors[usable]
    low, high = np.quantile(t, [0.025, 0.975])
    error = d.std(ddof=1) / math.sqrt(n)
    return float(d.mean() - high * error), float(d.mean() - low * error)


def paired_p(differences: Sequence[float]) -> float:
    """Of a two-sided t-test that the mean difference is 0; NaN where there is too little to test."""
    d = np.asarray(differences)
    if len(d) < SEEDS_NEEDED or not np.isfinite(d).all() or not np.ptp(d):
        return math.nan
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def _corrected(rows: list[Row]) -> list[Row]:
    """Holm: the smallest p times the number of tests, the next times one less, never falling."""
    tested = sorted((row for row in rows if not math.isnan(row.p)), key=lambda row: row.p)
    corrected, highest = {}, 0.0
    for i, row in enumerate(tested):
        highest = max(highest, min(1.0, row.p * (len(tested) - i)))
        corrected[row.arm] = highest
    return [replace(row, p_corrected=corrected.get(row.arm, math.nan)) for row in rows]


def _test_scores(
    done: list[tuple[Run, dict[str, Any]]], task: type[Task]
) -> dict[str, dict[int, tuple[float, float]]]:
    """(score, learning rate) by arm and seed; of the longest runs, each arm at its best rate."""
    own = [(run, found) for run, found in done if run.task == task.name]
    steps = max((run.steps for run, _ in own), default=0)
    scores: dict[str, dict[int, tuple[float, float]]] = {}
    for run, found in own:
        if run.seed not in SWEEP_SEEDS and run.steps == steps and run.lr == best_rate(done, task, run.arm, steps):
            scores.setdefault(run.arm, {})[run.seed] = (found["score"], run.lr)
    return scores


def markdown(results: Path) -> str:
    """The tables of all tasks that have test runs, and what they do not say."""
    parts = []
    for task in TASKS.values():
        rows = table(results, task)
        if rows:
            parts.append(
                f"**{task.name}**: {task.metric}, {'higher' if task.better > 0 else 'lower'} is better.\n\n"
                "| arm | rate | seeds | mean | sd | worst | difference from LoRA | 95 % interval | p, Holm |\n"
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(map(_line, rows))
            )
    if not parts:
        return ""
    done = read_lines(results)
    codes = {row["with"].get("code", "unknown") for row in done}
    notes = [
        f"Run on {'; '.join(sorted({described(row['with']) for row in done}))}.",
        "Intervals and p are over seeds, with one test set; \\* marks a rate at the end of those tried. "
        '"layer rates, linear" and "fixed linear" are the same to rounding: their difference is noise.',
    ]
    if len(codes) > 1:
        notes.append(f"The runs are of {len(codes)} versions of the code.")
    return "\n\n".join([*parts, *notes])


def _line(row: Row) -> str:
    mark = "\\*" if row.edge else ""
    own = f"| {row.arm} | {row.lr:g}{mark} | {row.seeds} | {row.mean:.4f} | {row.deviation:.4f} | {row.worst:.4f} |"
    if row.arm == REFERENCE:
        return f"{own} | | |"
    low, high = row.interval
    between = "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
    p = "" if math.isnan(row.p_corrected) else f"{row.p_corrected:.3f}"
    return f"{own} {row.difference:+.4f} | {between} | {p} |"
