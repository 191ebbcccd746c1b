"""examples/text_generation.py: full fine-tuning, LoRA and QLoRA side by side, over seeds.

    sweep   each method at each of its rates, perplexity on the validation split → its rate. At least three; extended
            where the best lay at an edge, so that it lies between two that are worse
    base    what the model can do before it is trained, dense and in NF4; once, since nothing in it is random
    runs    each method at its rate, for each seed → perplexity, BLEU and exact match on the test split
    cost    see generation_cost.py: memory, time of a step, speed of generating

Runs of one seed see the same examples in the same order, and all are measured on the same answers, so that differences
are paired by seed and answer. All that is printed comes from the lines of the results: see generation_report.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qlora.bench.examples import generation_cost
from hf_qlora.bench.examples.rates import Sweep
from hf_qlora.bench.examples.runs import Origin, Run, Study, example, origin, perform


SCRIPT = "text_generation.py"
TRAINED = ("--measure", "trained", "--no-checkpoints")
BASE = "base"  # the arm of the model that is not trained, and its part


@dataclass(frozen=True)
class Plan:
    """How much to do.

    Attributes:
        rates: that have to be tried for each method; text, as it is given to the example.
        arguments: of all runs.
        rounds: of the times.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rates: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "full": ("5e-5", "1e-4", "2e-4"),
            "lora": ("1e-3", "2e-3", "4e-3"),
            "qlora": ("1e-3", "2e-3", "4e-3"),
        }
    )
    arguments: tuple[str, ...] = ()
    rounds: int = 8

    @property
    def sweep(self) -> Sweep:
        return Sweep(
            self.rates,
            score=_perplexity,
            shown="{:.3f}".format,
            of="perplexity",
            arguments=self.arguments,
            only=("--split", "validation", "--measure", "perplexity", "--no-checkpoints"),
        )

    @property
    def base(self) -> Run:
        return Run(BASE, 0, (*self.arguments, "--method", BASE, *TRAINED), BASE)

    def study(self, results: Path, ours: Origin) -> Study:
        """The methods that the sweep is done for, at their rates."""
        sweep = self.sweep
        arms = {method: sweep.arm(method, rate) for method, rate in sweep.chosen(results, ours).items()}
        return Study(arms, self.seeds, (*self.arguments, *TRAINED))


def _perplexity(found: dict[str, Any]) -> float:
    """Of a run that diverged, NaN or null, infinity: no other is worse."""
    value = found["trained"]["perplexity"]
    return math.inf if value is None or math.isnan(value) else float(value)


QUICK = Plan(
    seeds=(1, 2),
    rates=dict.fromkeys(("full", "lora", "qlora"), ("1e-3",)),
    arguments=("--steps", "2", "--held-out", "8", "--answer-tokens", "8"),
    rounds=1,
)


def measure(
    plan: Plan, results: Path, device: str = "cpu", workers: int = 1, script: Path | None = None, cost: bool = True
) -> None:
    """Do what is not in the file `results`, and append it there: the sweep, the seeds, and what a step costs.

    Raises:
        ExampleError: no example, or a run of it that failed. What ended before is kept.
    """
    script = script or example(SCRIPT)
    ours = origin(script, device)
    perform(script, [*plan.sweep.runs(), plan.base], results, device, workers)
    perform(script, plan.study(results, ours).runs(), results, device, workers)
    if cost:
        rates = plan.sweep.chosen(results, ours)
        generation_cost.perform(script, plan.arguments, results, plan.rounds, rates, device)
