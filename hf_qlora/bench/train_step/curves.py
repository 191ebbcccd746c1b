"""Does the fast step learn what stock's learns? The loss curves of real steps, side by side.

    for each seed and arm: SmolLM2 on NF4, real examples, the same batches from the same `lora_A` → losses of all steps

Arms differ in rounding alone, which training amplifies: no two curves are the same. What that amounts to is seen
between the two stock arms, which round differently too: the difference to ours has to be of that size. Every run is
one line of a JSON-lines file; what is there is not done again.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_qlora import assets
from hf_qlora.bench.depth.tasks import Answers
from hf_qlora.bench.measure import environment
from hf_qlora.bench.processes import side_by_side
from hf_qlora.bench.results import append_line, check_once, check_same_device, read_lines
from hf_qlora.bench.train_step.arms import ARMS, CHUNKED, DOCUMENTED, TUNED, Case


COMPARED = (DOCUMENTED, TUNED, CHUNKED)
SEEDS = (1, 2, 3)
STEPS, LAST = 200, 50


class FourAnswers(Answers):
    batch_size = 4


@dataclass(frozen=True)
class SmolLM2(Case):
    """The real weights."""

    learning_rate: float = 5e-4

    def dense(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(assets.smollm2_135m_instruct(), dtype=torch.bfloat16)
        model.config.use_cache = False
        return model.to(self.device).requires_grad_(False)


def perform(
    results: Path, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS, device: str = "cpu", workers: int = 1
) -> None:
    """Do the runs that are not in the file `results`, and append each there.

    Args:
        workers: processes side by side.

    Raises:
        ValueError: the file has rows of another kind of device, or a run twice.
    """
    check_same_device(results, environment(device)["device"])
    done = {(row["arm"], row["seed"], row["steps"]) for row in _read(results)}
    todo = [(arm, seed) for seed in seeds for arm in COMPARED if (arm, seed, steps) not in done]
    jobs = [(job, (*job, steps, device, workers == 1)) for job in todo]
    for (arm, seed), found in tqdm(side_by_side(_run, jobs, workers), total=len(jobs), desc="curves", unit="run"):
        append_line(results, {"arm": arm, "seed": seed, "steps": steps, **found, "with": environment(device)})


def _run(arm: str, seed: int, steps: int, device: str, shown: bool) -> dict[str, list[float]]:
    batches = FourAnswers(device).batches(seed, steps)
    torch.manual_seed(seed)
    step = ARMS[arm].start(SmolLM2(seed=seed, device=device))
    losses, norms = [], []
    for batch in tqdm(batches, desc=f"{arm}, seed {seed}", unit="step", leave=False, disable=not shown):
        step(batch)
        losses.append(round(step.loss, 5))
        norms.append(round(step.gradient_norm, 5))
    return {"losses": losses, "gradient_norms": norms}


def markdown(results: Path, last: int = LAST) -> str:
    """For each pair of arms: the difference of the mean losses, and how far curves are apart step by step."""
    rows = _read(results)
    steps = max((row["steps"] for row in rows), default=0)
    curves = {(row["arm"], row["seed"]): row["losses"] for row in rows if row["steps"] == steps}
    lines = [
        f"| difference | seeds | mean loss, all {steps} steps | mean loss, last {last} | p, paired | step by step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, other in ((TUNED, DOCUMENTED), (CHUNKED, DOCUMENTED), (CHUNKED, TUNED)):
        seeds = sorted(seed for name, seed in curves if name == arm and (other, seed) in curves)
        if seeds:
            lines.append(_line(f"{arm} − {other}", [(curves[arm, s], curves[other, s]) for s in seeds], last))
    return "\n".join(lines) if len(lines) > 2 else ""


def _read(results: Path) -> list[dict[str, Any]]:
    rows = read_lines(results)
    check_once(results, ((row["arm"], row["seed"], row["steps"]) for row in rows))
    return rows


def _line(title: str, pairs: list[tuple[list[float], list[float]]], last: int) -> str:
    whole = [statistics.fmean(one) - statistics.fmean(other) for one, other in pairs]
    ends = [statistics.fmean(one[-last:]) - statistics.fmean(other[-last:]) for one, other in pairs]
    p = float(stats.ttest_1samp(ends, 0.0).pvalue) if len(ends) > 2 else math.nan
    apart = statistics.fmean(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return (
        f"| {title} | {len(pairs)} | {statistics.fmean(whole):+.4f} | {statistics.fmean(ends):+.4f} "
        f"| {'' if math.isnan(p) else f'{p:.2f}'} | {apart:.4f} |"
    )
