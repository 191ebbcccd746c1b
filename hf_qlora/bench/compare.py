"""`hf-qlora bench compare`: two runs of one measurement, and what of their difference is more than noise.

    timings     ratio of medians with a 95 % bootstrap interval. "slower" or "faster" where a two-sided Mann–Whitney
                test on the raw rounds rejects that the runs are alike, and the medians are 2 % apart or more; else
                "no difference seen". All timings of a comparison together have a false alarm in 1 % of the
                comparisons at most (Holm, 1979), if rounds are independent. Where so few rounds cannot reach that,
                "too few rounds", which is no success where failing on "slower" was asked for.
    counts      bytes of weights: "equal", or by how much they are "larger" or "smaller"
    the rest    peaks of memory, errors, KL, losses: "equal" up to the tolerance of the metric (`METRICS`); "not a
                number" where one of the two is none, which is no success whatever failing was asked for

Rounds of a run are not independent of the hour in which it was made: a machine that was busy then is slower in all of
them. With `relative` each arm's rounds are divided by the reference arm's of the same round (dense, or the floor),
which takes that out, and compares what the arm itself does.

What can be compared: results of `bench quantization`, of `bench train-step` and of `bench generation`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_qlora.bench.quantization.rows import METRICS, Metric, Row
from hf_qlora.bench.quantization.tables import UNCUT
from hf_qlora.bench.runs import Key, Run
from hf_qlora.validation import ConfigError


ALPHA = 0.01  # of a false alarm in any timing of a comparison
LEAST = 0.02  # relative difference of medians: a smaller one may be real, and is no reason to act
RESAMPLES = 2000
SAME, FEW, EQUAL, BROKEN = "no difference seen", "too few rounds", "equal", "not a number"
WORSE = ("slower", "larger")
HEAD = ("case", "setting", "arm", "number", "first", "second", "ratio", "95 %", "p", "")


@dataclass(frozen=True)
class Verdict:
    """One quantity in both runs.

    Attributes:
        before, after: medians.
        interval: of the ratio after / before, 95 %; None but for timings.
        p: of the Mann–Whitney test, as it is; None but for timings.
        word: "slower", "faster", "no difference seen", "too few rounds"; "equal", "larger", "smaller",
            "not a number".
    """

    key: Key
    before: float
    after: float
    word: str
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0 if not self.after else math.inf

    @property
    def metric(self) -> Metric:
        return METRICS[self.key[3]]


@dataclass(frozen=True)
class Comparison:
    """Both runs side by side: what was found, and what makes it doubtful."""

    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    missing: int = 0  # numbers of the first that the second has not

    def counts(self) -> dict[str, int]:
        return dict(Counter(verdict.word for verdict in self.verdicts))

    def failures(self, on: Collection[str]) -> str:
        """Why the comparison fails, where it is to fail on these of `WORSE`, in a sentence; or ""."""
        counts = self.counts()
        found = [f"{counts[word]} {word}" for word in (*on, BROKEN) if word in counts]
        if self.missing:
            found.append(f"{self.missing} in the first alone")
        parts = [f"of the numbers {', '.join(found)}." if found else "", self.untold() if "slower" in on else ""]
        return " ".join(part for part in parts if part) if on else ""

    def untold(self) -> str:
        """A sentence on the timings that have too few rounds for a verdict, and how many they need; or ""."""
        few = [verdict.key for verdict in self.verdicts if verdict.word == FEW]
        if not few:
            return ""
        tests = sum(verdict.p is not None for verdict in self.verdicts)
        return (
            f"{len(few)} of {tests} timings have too few rounds to tell whether they are slower, of "
            f"{sorted({key[0] for key in few})}; both runs need {rounds_for(tests)} rounds of each, or leave them out."
        )


def compare(before: Run, after: Run, relative: bool = False) -> Comparison:
    """Hold two runs of one kind against each other.

    Args:
        relative: divide each timing's rounds by those of its reference arm; timings without one are left out.

    Raises:
        ConfigError: runs of two kinds, or with nothing in common.
        ImportError: scipy is not installed.
    """
    if before.kind != after.kind:
        raise ConfigError(f"One is of bench {before.kind} and one of bench {after.kind}; compare two of one kind.")
    warnings = list(_warnings(before, after))
    ours, theirs = (run.relative() if relative else run.rows for run in (before, after))
    if alone := [key for key in before.rows if key not in ours and key not in before.references]:
        cases = sorted({key[0] for key in alone})
        warnings.append(f"{len(alone)} timings have no arm to be divided by and are left out, of {cases}.")
    common = [key for key in ours if key in theirs]
    if not common:
        raise ConfigError("The two results have nothing in common; compare runs of the same cases.")
    timed = [key for key in common if METRICS[key[3]].kind == "timing"]
    tests = {key: _p_value(ours[key].values, theirs[key].values) for key in timed}
    adjusted = dict(zip(timed, holm([tests[key] for key in timed]), strict=True))
    verdicts = []
    for key in common:
        if key in tests:
            verdicts.append(_timing(key, ours[key], theirs[key], tests[key], adjusted[key], len(timed)))
        else:
            verdicts.append(_number(key, ours[key].values[0], theirs[key].values[0]))
    return Comparison(tuple(verdicts), tuple(warnings), len(ours) - len(common))


def _timing(key: Key, before: Row, after: Row, p: float, adjusted: float, tests: int) -> Verdict:
    word, metric = SAME, METRICS[key[3]]
    ratio = after.median / before.median
    if least_p(len(before.values), len(after.values)) * tests > ALPHA:
        word = FEW
    elif adjusted <= ALPHA and max(ratio, 1 / ratio) >= 1 + LEAST:
        word = metric.worse if ratio > 1 else metric.better
    interval = ratio_interval(before.values, after.values)
    return Verdict(key, before.median, after.median, word, interval, p)


def _number(key: Key, before: float, after: float) -> Verdict:
    metric = METRICS[key[3]]
    if math.isnan(before) or math.isnan(after):
        return Verdict(key, before, after, BROKEN)
    if before == after or abs(after - before) <= metric.tolerance * max(abs(before), abs(after)):
        return Verdict(key, before, after, EQUAL)
    return Verdict(key, before, after, metric.worse if after > before else metric.better)


def _p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided, exact where no two rounds are equal."""
    try:
        from scipy.stats import mannwhitneyu
    except ImportError as error:
        raise ImportError("Comparing timings needs scipy: pip install 'hf-qlora[bench]'") from error
    if len({*a, *b}) == 1:
        return 1.0
    method = "exact" if len({*a, *b}) == len(a) + len(b) else "asymptotic"
    return float(mannwhitneyu(a, b, alternative="two-sided", method=method).pvalue)


def least_p(a: int, b: int) -> float:
    """The smallest p that so many rounds can give: all of one run below all of the other."""
    return min(1.0, 2 / math.comb(a + b, a))


def rounds_for(tests: int) -> int:
    """How many rounds of both runs can fail one of so many tests."""
    return next(rounds for rounds in itertools.count(1) if least_p(rounds, rounds) * tests <= ALPHA)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that all tests together are wrong no more often than one alone would be."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, reached = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        reached = max(reached, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = reached
    return adjusted


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % of the ratios of medians of rounds that are drawn anew, with replacement."""
    generator = np.random.default_rng(0)
    a, b = (
        np.median(generator.choice(np.asarray(values), (RESAMPLES, len(values))), axis=1) for values in (before, after)
    )
    low, high = np.percentile(b / a, (2.5, 97.5))
    return float(low), float(high)


def _warnings(before: Run, after: Run) -> Iterator[str]:
    """What differs beside the numbers; the code may, which is what runs are compared for."""
    for key in before.settings.keys() | after.settings.keys():
        ours, theirs = before.settings.get(key), after.settings.get(key)
        if ours != theirs:
            yield f"{key} is {ours!r} in the first and {theirs!r} in the second."
    seen = set()
    for case in before.environments.keys() & after.environments.keys():
        ours, theirs = before.environments[case], after.environments[case]
        for key in sorted((ours.keys() | theirs.keys()) - {"date", "code"}):
            if ours.get(key) != theirs.get(key):
                seen.add(f"{key} is {ours.get(key)!r} in the first and {theirs.get(key)!r} in the second.")
    yield from sorted(seen)
    for one, other, which in ((before, after, "first"), (after, before, "second")):
        alone = [key for key in one.rows if key not in other.rows]
        if alone:
            yield f"{len(alone)} numbers are in the {which} alone, of {sorted({key[0] for key in alone})}."


def show(found: Comparison, everything: bool = False, console: Console | None = None) -> None:
    """Print what differs, or everything; then how much of what there is, and what makes it doubtful."""
    to = console or Console(width=None if sys.stdout.isatty() else UNCUT)
    shown = [verdict for verdict in found.verdicts if everything or verdict.word not in (SAME, FEW, EQUAL)]
    if shown:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, title in enumerate(HEAD):
            table.add_column(title, justify="left" if place < 4 or not title else "right", no_wrap=place > 3)
        for verdict in shown:
            table.add_row(*map(Text, _cells(verdict)))  # names of arms and layers are no markup
        to.print(table)
    counts = ", ".join(f"{count} {word}" for word, count in sorted(found.counts().items()))
    to.print(f"{len(found.verdicts)} numbers compared: {counts}.", highlight=False, markup=False)
    for warning in found.warnings:
        to.print(f"Warning: {warning}", highlight=False, markup=False)


def _cells(verdict: Verdict) -> list[str]:
    case, setting, arm, _ = verdict.key
    metric, timed = verdict.metric, verdict.interval is not None
    form = (lambda value: f"{value:.4g}") if timed else metric.shown
    interval = "{:.3f} to {:.3f}".format(*verdict.interval) if verdict.interval else ""
    p = "" if verdict.p is None else f"{verdict.p:.2g}"
    numbers = (form(verdict.before), form(verdict.after), f"{verdict.ratio:.3f}", interval, p)
    return [case, setting, arm, metric.title, *numbers, verdict.word]
