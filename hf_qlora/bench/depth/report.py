"""The table: what each arm reached, and how sure it is that it differs from LoRA."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qlora.bench.depth.arms import ARMS, REFERENCE
from hf_qlora.bench.depth.run import SWEEP_SEED, Run, read
from hf_qlora.bench.depth.tasks import TASKS, Task


RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One arm's test scores, and their paired differences from the reference's.

    Attributes:
        interval: 95 % bootstrap interval of the mean difference, over seeds.
        p: two-sided, of a paired t-test over seeds; `p_corrected` after Holm, over the arms of the task.
    """

    arm: str
    lr: float
    seeds: int
    mean: float
    deviation: float
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    p: float = 1.0
    p_corrected: float = 1.0


def table(results: Path, task: type[Task]) -> list[Row]:
    """The rows of a task, the reference first; arms without a seed in common with it are left out."""
    scores = _test_scores(read(results), task)
    reference = scores.get(REFERENCE)
    if not reference:
        return []
    rows = []
    for arm in ARMS:
        common = sorted(scores.get(arm, {}).keys() & reference.keys())
        if common:
            found = [scores[arm][seed][0] for seed in common]
            differences = [scores[arm][seed][0] - reference[seed][0] for seed in common]
            rows.append(_row(arm, scores[arm][common[0]][1], found, differences))
    return _corrected(rows)


def _row(arm: str, lr: float, found: Sequence[float], differences: Sequence[float]) -> Row:
    deviation = statistics.stdev(found) if len(found) > 1 else math.nan
    own = Row(arm, lr, len(found), statistics.mean(found), deviation)
    if arm == REFERENCE:
        return own
    return Row(
        *(own.arm, own.lr, own.seeds, own.mean, own.deviation),
        difference=statistics.mean(differences),
        interval=bootstrap_interval(differences),
        p=paired_p(differences),
    )


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    return means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]


def paired_p(differences: Sequence[float]) -> float:
    """Of a two-sided t-test that the mean difference is 0; 1 with fewer than two seeds or without any difference."""
    from scipy import stats

    if len(differences) < 2 or not any(differences):
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _corrected(rows: list[Row]) -> list[Row]:
    """Holm: the smallest p times the number of tests, the next times one less, never falling."""
    tested = sorted((row for row in rows if row.arm != REFERENCE), key=lambda row: row.p)
    corrected, highest = {}, 0.0
    for i, row in enumerate(tested):
        highest = max(highest, min(1.0, row.p * (len(tested) - i)))
        corrected[row.arm] = highest
    return [Row(**{**vars(row), "p_corrected": corrected.get(row.arm, 1.0)}) for row in rows]


def _test_scores(
    done: list[tuple[Run, dict[str, Any]]], task: type[Task]
) -> dict[str, dict[int, tuple[float, float]]]:
    """(score, learning rate) by arm and seed."""
    scores: dict[str, dict[int, tuple[float, float]]] = {}
    for run, found in done:
        if run.task == task.name and run.seed != SWEEP_SEED:
            scores.setdefault(run.arm, {})[run.seed] = (found["score"], run.lr)
    return scores


def markdown(results: Path) -> str:
    """The tables of all tasks that have test runs."""
    parts = []
    for task in TASKS.values():
        rows = table(results, task)
        if rows:
            parts.append(
                f"**{task.name}**: {task.metric}, {'higher' if task.better > 0 else 'lower'} is better; "
                f"{rows[0].seeds} seeds.\n\n"
                "| arm | rate | mean | sd | difference from LoRA | 95 % interval | p, Holm |\n"
                "| --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(map(_line, rows))
            )
    return "\n\n".join(parts)


def _line(row: Row) -> str:
    own = f"| {row.arm} | {row.lr:g} | {row.mean:.4f} | {row.deviation:.4f} |"
    if row.arm == REFERENCE:
        return f"{own} | | |"
    low, high = row.interval
    return f"{own} {row.difference:+.4f} | {low:+.4f} to {high:+.4f} | {row.p_corrected:.3f} |"
