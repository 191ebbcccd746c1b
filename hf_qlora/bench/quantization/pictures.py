"""Plots of a result: one for each case, as .png for cards and as .svg within the page.

Their text and lines are drawn in one colour that stands for the page's own (`INK`), so that they follow it into the
dark; the colours of arms are seen on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_qlora.bench.quantization.result import QuantizationResult
from hf_qlora.bench.quantization.rows import MIB, Row, summary
from hf_qlora.plots import pyplot, save


INK = "#3a3f4b"
COLORS = ("#4c78c8", "#e07b39", "#3fa66b", "#b663c4", "#c9a227", "#d1495b")
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}


def svg(result: QuantizationResult, case: str) -> str:
    """Markup for within a page, or "" for a case that has no picture."""
    figure = _figure(result, case)
    if figure is None:
        return ""
    plt, file = pyplot(), io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": case}):
        figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    # One page has several pictures, and what is named within one must be no other's.
    text = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{case}-", text)
    head, rest = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest  # as wide as the page lets it be


def save_all(result: QuantizationResult, folder: Path) -> list[Path]:
    """A .png file for each case that has a picture, named after it."""
    written = []
    for case in result.cases:
        figure = _figure(result, case)
        if figure is not None:
            save(figure, folder / f"{case}.png")
            written.append(folder / f"{case}.png")
    return written


def _figure(result: QuantizationResult, case: str) -> Any:
    draw = DRAWN.get(case)
    if draw is None:
        return None
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    more = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "font.family": "sans-serif"}
    with pyplot().rc_context({**style, **more}):
        return draw(list(result.cases[case].rows))


def _bars(axis: Any, names: list[str], values: list[float], form: str) -> None:
    """Horizontal, each with its number behind it."""
    places = range(len(names))
    colors = [COLORS[place % len(COLORS)] for place in places]
    drawn = axis.barh(places, values, height=0.6, color=colors)
    axis.bar_label(drawn, [format(value, form) for value in values], padding=3, fontsize=8)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.margins(x=0.15)


def _memory(rows: list[Row]) -> Any:
    arms = list(dict.fromkeys(row.arm for row in rows))
    found = {(row.arm, row.metric): row.values[0] / MIB for row in rows}
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(8.5, 0.9 + 0.42 * len(arms)), sharey=True)
    start = [0.0] * len(arms)
    for (metric, label), color in zip(
        (("dense_bytes", "dense"), ("quantized_bytes", "codes"), ("scale_bytes", "scales")), COLORS, strict=False
    ):
        values = [found[arm, metric] for arm in arms]
        left.barh(range(len(arms)), values, left=start, height=0.6, color=color, label=label)
        start = [a + b for a, b in zip(start, values, strict=True)]
    left.set_yticks(range(len(arms)), arms)
    left.set_xlabel("weights, MiB")
    left.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    for metric, label, color in (("peak_bytes", "peak", COLORS[5]), ("resident_bytes", "resident", COLORS[4])):
        right.barh(range(len(arms)), [found[arm, metric] for arm in arms], height=0.6, color=color, label=label)
    right.invert_yaxis()
    right.set_xlabel("of the process, MiB")
    right.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def _latency(rows: list[Row]) -> Any:
    """Tokens per second by arm, a panel for prefill and one for decode, bars by batch."""
    from matplotlib.ticker import LogLocator, NullLocator

    arms = list(dict.fromkeys(row.arm for row in rows))
    batches = list(dict.fromkeys(row.setting.partition(", ")[2] for row in rows))
    figure, axes = pyplot().subplots(1, 2, figsize=(8.5, 3.2))
    for axis, step in zip(axes, ("prefill", "decode"), strict=True):
        width = 0.8 / len(arms)
        for place, (arm, color) in enumerate(zip(arms, COLORS, strict=False)):
            chosen = {row.setting: row for row in rows if row.arm == arm}
            at = [number + (place - (len(arms) - 1) / 2) * width for number in range(len(batches))]
            own = [chosen[f"{step}, {batch}"] for batch in batches]
            axis.bar(at, [row.tokens / row.median for row in own], width * 0.92, color=color, label=arm)
            for x, row in zip(at, own, strict=True):
                axis.plot([x] * len(row.values), [row.tokens / value for value in row.values], "_", color=INK, ms=4)
        axis.set_xticks(range(len(batches)), batches)
        axis.set_title(step, fontsize=9)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_ylabel("tokens/s, each round a mark")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, **LEGEND, loc="lower center", ncols=len(arms), bbox_to_anchor=(0.5, -0.08))
    return figure


def _precision(rows: list[Row]) -> Any:
    """The relative error of each layer by its place, a line for each kind."""
    layers = [row for row in rows if row.layer and row.metric == "relative_error" and row.arm == "NF4"]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in layers:
        place = re.search(r"\.(\d+)\.", row.setting)
        lines.setdefault(row.setting.rpartition(".")[2], []).append((int(place[1]) if place else 0, row.values[0]))
    figure, axis = pyplot().subplots(figsize=(8.5, 3.2))
    for number, (kind, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        color, style = COLORS[number % len(COLORS)], "-" if number < len(COLORS) else ":"
        axis.plot(x, y, marker="o", ms=3, lw=1, color=color, ls=style, label=kind)
    axis.axhline(0.092, color=INK, lw=0.8, ls="--")
    axis.set_xlabel("layer (dashed: Gaussian weights)")
    axis.set_ylabel("‖W − Q(W)‖ / ‖W‖")
    axis.legend(**LEGEND, ncols=4, loc="upper right")
    axis.margins(y=0.25)
    return figure


def _double_quant(rows: list[Row]) -> Any:
    """Error over bits, a line for each type and kind of scales; each block size a point."""
    figure, axis = pyplot().subplots(figsize=(8.5, 3.4))
    found = {(row.arm, row.setting, row.metric): row.values[0] for row in rows}
    for arm, color in zip(dict.fromkeys(row.arm for row in rows), COLORS, strict=False):
        settings = list(dict.fromkeys(row.setting for row in rows if row.arm == arm))
        x = [found[arm, setting, "bits"] for setting in settings]
        y = [found[arm, setting, "relative_error"] for setting in settings]
        axis.plot(x, y, "o-", ms=5, color=color, label=arm)
        for setting, *at in zip(settings, x, y, strict=True):
            axis.annotate(setting.rpartition(" ")[2], at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("bits a weight (numbers: weights in a block)")
    axis.set_ylabel("‖W − Q(W)‖ / ‖W‖")
    axis.legend(**LEGEND)
    return figure


def _timed(rows: list[Row]) -> Any:
    """Seconds by arm, each round a mark."""
    timed = [row for row in rows if row.metric == "seconds"]
    figure, axis = pyplot().subplots(figsize=(8.5, 0.9 + 0.42 * len(timed)))
    _bars(axis, [row.arm for row in timed], [summary(row.values)["median"] for row in timed], ".3g")
    for place, row in enumerate(timed):
        axis.plot(row.values, [place] * len(row.values), "|", color=INK, ms=7)
    axis.set_xlabel("s (median; each round a mark)")
    return figure


DRAWN: dict[str, Callable[[list[Row]], Any]] = {
    "memory": _memory,
    "latency": _latency,
    "precision": _precision,
    "double-quant": _double_quant,
    "train-step": _timed,
    "load": _timed,
    "merge": _timed,
}
