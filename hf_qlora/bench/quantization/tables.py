"""Rows as tables: one for each case, and one of layers where there are some; for the terminal and for the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hf_qlora.bench.quantization.result import QuantizationResult
from hf_qlora.bench.quantization.rows import METRICS, Row, ratios, summary
from hf_qlora.bench.quantization.run import CASES


UNCUT = 160  # columns where no terminal says how many
LEAST_FOR_P95 = 10  # rounds
WORST = 5  # layers in the terminal
TIMING = ("median, ms", "÷ {}", "mean", "std", "p95", "least", "tokens/s")


@dataclass(frozen=True)
class Table:
    """Text in columns; the first `names` of them are names, the others numbers."""

    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    names: int


def of_case(result: QuantizationResult, case: str) -> list[Table]:
    """Its timings in one table, everything else in another, without layers."""
    rows = [row for row in result.cases[case].rows if not row.layer]
    timed = [row for row in rows if METRICS[row.metric].kind == "timing"]
    other = [row for row in rows if METRICS[row.metric].kind != "timing"]
    reference = CASES[case].reference
    return [table for table in (_timings(timed, reference), _numbers(other, reference)) if table.body]


def of_layers(result: QuantizationResult, case: str, most: int | None = None) -> Table | None:
    """The layers of its first arm that has some, the largest relative error first."""
    rows = [row for row in result.cases[case].rows if row.layer]
    if not rows:
        return None
    found = _numbers([row for row in rows if row.arm == rows[0].arm], "")
    place = found.head.index(METRICS["relative_error"].title)
    body = sorted(found.body, key=lambda line: -float(line[place]))
    return Table(("layer", *found.head[1:]), tuple(body[:most]), found.names)


def _timings(rows: Sequence[Row], reference: str) -> Table:
    """A line for each; over the reference is the median of the ratios within a round."""
    with_settings = any(row.setting for row in rows)
    with_tokens = any(row.tokens for row in rows)
    # A percentile of few rounds is their largest, or made up between two.
    upper = "p95" if all(len(row.values) >= LEAST_FOR_P95 for row in rows) else "most"
    head = [*(["setting"] if with_settings else []), "arm", *(upper if name == "p95" else name for name in TIMING)]
    if not with_tokens:
        head.remove("tokens/s")
    base = {row.setting: row.values for row in rows if row.arm == reference}
    body = []
    for row in rows:
        found = summary(row.values)
        ratio = f"{np.median(ratios(row.values, base[row.setting])):.2f}" if row.setting in base else ""
        names = [row.setting] if with_settings else []
        cells = [*names, row.arm, _ms(found["median"]), ratio]
        upmost = found["p95"] if upper == "p95" else max(row.values)
        cells += [_ms(value) for value in (found["mean"], found["std"], upmost, found["min"])]
        body.append([*cells, *([f"{row.tokens / found['median']:,.1f}"] if with_tokens else [])])
    place = head.index("÷ {}")
    head[place] = f"÷ {reference}"
    if not base:
        head.pop(place)
        body = [[*line[:place], *line[place + 1 :]] for line in body]
    return Table(tuple(head), tuple(map(tuple, body)), 1 + with_settings)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _numbers(rows: Sequence[Row], reference: str) -> Table:
    """A line for each arm and setting, a column for each metric; weights also over those of the reference."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    with_settings = any(row.setting for row in rows)
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.setting, row.arm), {})[row.metric] = row.values[0]
    layers = bool(rows) and rows[0].layer
    names = (["setting"] if with_settings else []) + ([] if layers else ["arm"])
    head = [*names, *(METRICS[metric].title for metric in metrics)]
    body = []
    for (setting, arm), found in lines.items():
        cells = ([setting] if with_settings else []) + ([] if layers else [arm])
        body.append([*cells, *(_cell(metric, found) for metric in metrics)])
    whole = {setting: found.get("weight_bytes") for (setting, arm), found in lines.items() if arm == reference}
    if any(whole.values()):
        head.append("× smaller")
        for line, ((setting, _), found) in zip(body, lines.items(), strict=True):
            line.append(f"{(whole[setting] or 0) / found['weight_bytes']:.2f}")
    return Table(tuple(head), tuple(map(tuple, body)), len(names))


def _cell(metric: str, found: dict[str, float]) -> str:
    return METRICS[metric].shown(found[metric]) if metric in found else ""


def heading(result: QuantizationResult) -> str:
    """What was measured, on one line."""
    model, settings = result.model, result.settings
    rounds = f"{settings['rounds']} round{'s' * (settings['rounds'] != 1)}"
    smoke = "; a smoke run, whose numbers mean nothing" if settings["smoke"] else ""
    return (
        f"{model['name']} ({model['class']}, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['quantizable'] / max(model['parameters'], 1):.0%} of them quantized), {settings['dtype']} on "
        f"{settings['device']}, {rounds}, seed {settings['seed']}{smoke}"
    )


def environments(result: QuantizationResult) -> list[tuple[str, str]]:
    """On what the cases were measured, and which ones; one line for all, if that is so."""
    lines: dict[str, list[str]] = {}
    for name, found in result.cases.items():
        with_ = found.environment
        packages = ", ".join(f"{key} {value}" for key, value in with_.items() if key not in _NO_PACKAGES)
        line = f"{with_['device']} {with_['capability']}".rstrip()
        line += f", {with_['threads']} threads, {packages}, code {with_['code']}, {with_['date']}"
        lines.setdefault(line, []).append(name)
    return [(", ".join(names), line) for line, names in lines.items()]


_NO_PACKAGES = ("device", "capability", "threads", "date", "code")


def show(result: QuantizationResult, console: Console | None = None) -> None:
    """Print all tables."""
    to = console or Console(width=None if sys.stdout.isatty() else UNCUT)

    def say(text: str) -> None:
        to.print(text, highlight=False, markup=False)

    say(heading(result))
    for name, found in result.cases.items():
        case = CASES[name]
        say(f"\n{case.title}")
        for table in of_case(result, name):
            to.print(_rich(table))
        layers = of_layers(result, name, WORST)
        if layers is not None:
            say(f"the {len(layers.body)} layers of the largest relative error")
            to.print(_rich(layers))
        for note in found.notes:
            say(f"Note: {note}")
        say(f"{case.reading} ({found.seconds:.0f} s)")
    for cases, line in environments(result):
        say(f"\n{cases}: {line}")


def text(result: QuantizationResult) -> str:
    console = Console(width=UNCUT, no_color=True)
    with console.capture() as captured:
        show(result, console)
    return captured.get().rstrip("\n")


def _rich(table: Table) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for place, title in enumerate(table.head):
        shown.add_column(Text(title), justify="left" if place < table.names else "right", no_wrap=place >= table.names)
    for line in table.body:
        shown.add_row(*map(Text, line))  # names of arms and layers are no markup
    return shown
