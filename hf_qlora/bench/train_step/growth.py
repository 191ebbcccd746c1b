"""How the cost of a step grows: with tokens, rank, layers, and adapters that are active at once.

    for each axis and each of its values: the arms' steps in turn, and their peaks in processes of their own
    → a line by least squares, cost = fixed + slope · value, for each axis and arm

All but the axis's own value is the case's. A slope is what one more token, rank, layer or adapter costs; how well a
line describes the points is said beside it (R²).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_qlora.bench.measure import environment
from hf_qlora.bench.train_step.arms import CHUNKED, FLOOR, Case
from hf_qlora.bench.train_step.report import described, mib
from hf_qlora.bench.train_step.run import interleaved, peak_alone
from hf_qlora.plots import pyplot, save


ARMS = (CHUNKED, FLOOR)


@dataclass(frozen=True)
class Axis:
    """What is varied.

    Attributes:
        field: of `Case`.
        per: how many of the unit a slope is for.
        values: by shape.
    """

    field: str
    unit: str
    per: int
    values: Mapping[str, tuple[int, ...]]


AXES = {
    "tokens": Axis(
        "sequence_length",
        "tokens",
        1000,
        {"smollm2": (128, 256, 512, 1024), "llama3-8b": (512, 1024, 2048, 4096, 8192, 16384), "tiny": (8, 16)},
    ),
    "rank": Axis(
        "rank", "of rank", 16, {"smollm2": (8, 32, 128, 256), "llama3-8b": (8, 32, 128, 256), "tiny": (2, 4)}
    ),
    "layers": Axis("layers", "layers", 1, {"smollm2": (5, 10, 20, 30), "llama3-8b": (4, 8, 16, 32), "tiny": (1, 2)}),
    "adapters": Axis("adapters", "adapters", 1, {"smollm2": (1, 2, 4, 8), "llama3-8b": (1, 2, 4, 8), "tiny": (1, 2)}),
}


def measure(
    case: Case,
    rounds: int,
    axes: Sequence[str] = tuple(AXES),
    before: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All of it, as JSON types: for each axis its points, each with the arms' step times and peaks.

    Args:
        before: an earlier result; its points are taken over where it is of the same case, rounds, code and device.
        keep: is given the result so far after each point.
    """
    points = [(name, value) for name in axes for value in AXES[name].values[case.shape]]
    result: dict[str, Any] = {
        "case": asdict(case),
        "rounds": rounds,
        "with": environment(case.device),
        "axes": {n: [] for n in axes},
    }
    known = _known(before, result)
    with tqdm(total=len(points) * len(ARMS) * (1 + rounds), desc="growth", unit="step") as bar:
        for name, value in points:
            bar.set_postfix_str(f"{value} {AXES[name].unit}")
            if (name, value) in known:
                result["axes"][name].append(known[name, value])
                bar.update(len(ARMS) * (1 + rounds))
                continue
            result["axes"][name].append({"value": value, "arms": _point(_at(case, name, value), rounds, bar)})
            keep(result)
    return result


def _known(before: dict[str, Any] | None, result: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The points of an earlier result that need not be measured again."""
    if before is None or any(before.get(key) != result[key] for key in ("case", "rounds")):
        return {}
    if any(before["with"][key] != result["with"][key] for key in ("code", "device", "threads")):
        return {}
    return {(name, point["value"]): point for name, points in before["axes"].items() for point in points}


def _at(case: Case, name: str, value: int) -> Case:
    """The case with one value of an axis; tokens are those of one step, of one sequence."""
    changed: dict[str, Any] = {AXES[name].field: value}
    if name == "tokens":
        changed["batch_size"] = 1
    return replace(case, **changed)


def _point(case: Case, rounds: int, bar: Any) -> dict[str, dict[str, Any]]:
    peaks = {}
    for arm in ARMS:
        peaks[arm] = peak_alone(arm, case)["peak"]
        bar.update()
    times, _, ends = interleaved(case, rounds, ARMS, lambda arm: bar.update())
    return {
        arm: {
            **times[arm],
            "peak": peaks[arm],
            **{name: ends[arm][name] for name in ("loss", "gradient_norm")},
        }
        for arm in ARMS
    }


@dataclass(frozen=True)
class Line:
    """cost = fixed + slope · value, fitted by least squares; R² is 1 where all points are on it."""

    fixed: float
    slope: float
    r_squared: float


def line(values: Sequence[float], costs: Sequence[float]) -> Line:
    """Through the points; NaN where there are fewer than two."""
    if len(values) < 2:
        return Line(float("nan"), float("nan"), float("nan"))
    slope, fixed = np.polyfit(values, costs, 1)
    left = float(np.sum((np.asarray(costs) - fixed - slope * np.asarray(values)) ** 2))
    spread = float(np.sum((np.asarray(costs) - np.mean(costs)) ** 2))
    return Line(float(fixed), float(slope), 1.0 - left / spread if spread else 1.0)


def markdown(result: dict[str, Any]) -> str:
    """The slopes, and below them the points."""
    case = result["case"]
    lines = [
        f"{case['shape']} in {case['dtype']}, {case['batch_size']} × {case['sequence_length']} tokens, rank "
        f"{case['rank']} where not varied, {result['rounds']} rounds; {described(result['with'])}.",
        "",
        "| one step more costs | ours, s | R² | floor, s | R² | ours, MiB | R² |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, points in result["axes"].items():
        axis = AXES[name]
        cells = []
        for arm, cost in ((CHUNKED, _seconds), (FLOOR, _seconds), (CHUNKED, _peak_mib)):
            fitted = line([point["value"] for point in points], [cost(point["arms"][arm]) for point in points])
            cells += [f"{fitted.slope * axis.per:.3g}", f"{fitted.r_squared:.3f}"]
        lines.append(f"| for {axis.per:,} {axis.unit} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| varied | value | ours, s | floor, s | ours ÷ floor | ours, MiB | floor, MiB | loss | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, points in result["axes"].items():
        lines += [_row(name, point["value"], point["arms"][CHUNKED], point["arms"][FLOOR]) for point in points]
    return "\n".join(lines)


def _row(name: str, value: int, ours: dict[str, Any], floor: dict[str, Any]) -> str:
    mine, least = _seconds(ours), _seconds(floor)
    return (
        f"| {name} | {value:,} | {mine:.3f} | {least:.3f} | {mine / least:.2f} "
        f"| {mib(ours['peak'])} | {mib(floor['peak'])} | {ours['loss']:.4f} | {ours['gradient_norm']:.4f} |"
    )


def _seconds(arm: dict[str, Any]) -> float:
    return float(statistics.median(arm["step_s"]))


def _peak_mib(arm: dict[str, Any]) -> float:
    return float(arm["peak"]) / 2**20


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against each axis, every round a mark, the fitted line through the medians."""
    plt = pyplot()
    axes = result["axes"]
    figure, places = plt.subplots(1, len(axes), figsize=(3.2 * len(axes), 3), squeeze=False)
    for place, (name, points) in zip(places[0], axes.items(), strict=True):
        values = [point["value"] for point in points]
        for arm, colour in ((CHUNKED, "#4c72b0"), (FLOOR, "#8c8c8c")):
            for point in points:
                seconds = point["arms"][arm]["step_s"]
                place.plot([point["value"]] * len(seconds), seconds, "_", color=colour, alpha=0.5)
            fitted = line(values, [_seconds(point["arms"][arm]) for point in points])
            place.plot(values, [fitted.fixed + fitted.slope * value for value in values], color=colour, label=arm)
        place.set_xlabel(name)
        place.set_ylim(bottom=0)
    places[0][0].set_ylabel("step, s")
    places[0][0].legend(fontsize=8)
    save(figure, path)
