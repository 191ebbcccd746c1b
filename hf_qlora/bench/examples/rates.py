"""Learning rates of an example's methods: each is tried on the validation split, with one seed, and the best is taken.

All methods have at least three rates; extended where the best lay at an edge, so that it lies between two that are
worse, and none is tuned better than another. All that were tried are shown, and the best is of all of them, also of
those that a study no longer asks for. The seed is none of the table's.
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
        rates: of each method, rising, which have to be tried; text, as it is given to the example.
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
            yield from (self._run(method, rate) for rate in rates)

    def _run(self, method: str, rate: str) -> Run:
        return Run(method, self.seed, (*self.arguments, *self.arm(method, rate), *self.only), SWEEP)

    def rows(self, results: Path, origin: Origin) -> dict[str, dict[str, dict[str, Any]]]:
        """The lines by method and rate, rising: all that were tried."""
        tried: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in self.rates}
        for run, row in read(results, origin):
            rate = dict(zip(run.arguments, run.arguments[1:], strict=False)).get(OPTION, "")
            if run.arm in tried and run == self._run(run.arm, rate):
                tried[run.arm][rate] = row
        return {method: {rate: of[rate] for rate in sorted(of, key=float)} for method, of in tried.items() if of}

    def found(self, results: Path, origin: Origin) -> dict[str, dict[str, float]]:
        """The scores by method and rate, as far as they are known."""
        return {
            method: {rate: self.score(row["found"]) for rate, row in rows.items()}
            for method, rows in self.rows(results, origin).items()
        }

    def chosen(self, results: Path, origin: Origin) -> dict[str, str]:
        """The best rate of each method that has been tried at all rates it has to be; of equal ones the lowest."""
        found = self.found(results, origin)
        return {
            method: min(found[method], key=found[method].__getitem__)
            for method, rates in self.rates.items()
            if found.get(method, {}).keys() >= set(rates)
        }

    def markdown(self, results: Path, origin: Origin, names: Mapping[str, str]) -> str:
        """What was tried, the chosen rate in bold, and where nothing was tried beyond it; empty if nothing was."""
        chosen, lines = self.chosen(results, origin), []
        for method, scores in self.found(results, origin).items():
            tried = [
                f"**{rate}: {self.shown(score)}**" if rate == chosen.get(method) else f"{rate}: {self.shown(score)}"
                for rate, score in scores.items()
            ]
            ends = (next(iter(scores)), next(reversed(scores)))
            is_end = len(scores) > 1 and chosen.get(method) in ends
            lines.append(f"* {names[method]}: {', '.join(tried)}{'; none was tried beyond' if is_end else ''}")
        head = f"Learning rates, by the {self.of} on the validation split with seed {self.seed}:"
        return f"{head}\n\n" + "\n".join(lines) if lines else ""
