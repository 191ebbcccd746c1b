"""Learning rates of an example's methods: each is tried on the validation split, with one seed, and the best is taken.

All methods have as many rates, so that none is tuned better than another. The seed is none of the table's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qlora.bench.examples.runs import Origin, Run, read


SWEEP = "sweep"  # the part of its rows
OPTION = "--learning-rate"


@dataclass(frozen=True)
class Sweep:
    """What is tried, and how the best is found.

    Attributes:
        rates: of each method, rising; text, as it is given to the example.
        arguments: of all runs.
        score: of what a run found, on the validation split; less is better.
        shown: that score as it is printed.
        of: what it is called.
        only: further arguments of the sweep's runs, behind the others.
    """

    rates: Mapping[str, tuple[str, ...]]
    score: Callable[[dict[str, Any]], float]
    shown: Callable[[float], str]
    of: str
    arguments: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seed: int = 100

    def arm(self, method: str, rate: str) -> tuple[str, ...]:
        """The arguments of a method at a rate."""
        return ("--method", method, OPTION, rate)

    def runs(self) -> Iterator[Run]:
        for method, rates in self.rates.items():
            for rate in rates:
                yield Run(method, self.seed, (*self.arguments, *self.arm(method, rate), *self.only), SWEEP)

    def found(self, results: Path, origin: Origin) -> dict[str, dict[str, float]]:
        """The scores by method and rate, as far as they are known."""
        done = dict(read(results, origin))
        scores: dict[str, dict[str, float]] = {}
        for run in self.runs():
            if run in done:
                rate = run.arguments[run.arguments.index(OPTION) + 1]
                scores.setdefault(run.arm, {})[rate] = self.score(done[run]["found"])
        return scores

    def chosen(self, results: Path, origin: Origin) -> dict[str, str]:
        """The best rate of each method that has been tried at all of its rates; of equal ones the lowest."""
        found = self.found(results, origin)
        return {
            method: min(found[method], key=found[method].__getitem__)
            for method, rates in self.rates.items()
            if len(found.get(method, ())) == len(rates)
        }

    def markdown(self, results: Path, origin: Origin, names: Mapping[str, str]) -> str:
        """What was tried, the chosen rate in bold, and where nothing was tried beyond it; empty if nothing was."""
        chosen, lines = self.chosen(results, origin), []
        for method, scores in self.found(results, origin).items():
            tried = [
                f"**{rate}: {self.shown(score)}**" if rate == chosen.get(method) else f"{rate}: {self.shown(score)}"
                for rate, score in scores.items()
            ]
            ends = (self.rates[method][0], self.rates[method][-1])
            is_end = len(scores) > 1 and chosen.get(method) in ends
            lines.append(f"* {names[method]}: {', '.join(tried)}{'; none was tried beyond' if is_end else ''}")
        head = f"Learning rates, by the {self.of} on the validation split with seed {self.seed}:"
        return f"{head}\n\n" + "\n".join(lines) if lines else ""
