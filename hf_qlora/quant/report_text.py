"""The tables and the picture of a quantization report."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_qlora import plots


if TYPE_CHECKING:
    from hf_qlora.quant.report import LayerQuantization, QuantizationReport

WORST = 5
UNCUT = 200  # columns where no terminal says how many
_NUMBERED = re.compile(r"(.*?\.\d+)\.(.+)")


def text(report: QuantizationReport, every_layer: bool = False) -> str:
    console = Console(width=UNCUT, no_color=True)
    with console.capture() as captured:
        show(report, console, every_layer)
    return captured.get().rstrip("\n")


def show(report: QuantizationReport, console: Console, every_layer: bool = False) -> None:
    """Print what a report says; `every_layer`: not a row for each kind of layer, but for each."""
    for name, line in _lines(report):
        console.print(f"{name:<10} {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(_scheme_table(report))
    console.print(_layer_table(report) if every_layer else _kind_table(report))
    for name, line in (*_outlier_lines(report), *_skip_lines(report)):
        console.print(f"{name:<10} {line}", highlight=False, markup=False, soft_wrap=True)


def plot(report: QuantizationReport, path: Path) -> None:
    """See `QuantizationReport.plot`."""
    plots.pyplot()  # an ImportError before anything else
    plots.check_path(path)
    if not report.measured:
        raise ValueError("There are no errors to draw: the dense weights are not known. Pass original=.")
    yardstick = report.yardsticks[report.schemes[0]]
    grids = {
        scheme: {_place(layer.name): layer.errors[scheme] / yardstick for layer in report.layers}
        for scheme in _main_schemes(report)
    }
    plots.heat_maps(grids, path, f"error / that of Gaussian weights in {report.schemes[0]}")


def _lines(report: QuantizationReport) -> Iterator[tuple[str, str]]:
    numel = sum(layer.numel for layer in report.layers)
    kept = len(report.dense_layers)
    yield "model", f"{report.model}, {report.model_bytes / 2**20:.1f} MiB"
    yield (
        "layers",
        f"{len(report.layers)} linear with {numel / 1e6:.1f}M weights in {report.dtype}; "
        f"{kept or 'no'} other linear {'layer stays' if kept == 1 else 'layers stay'} dense",
    )
    if not report.measured:
        yield "errors", "not known without the dense weights: pass original="


def _scheme_table(report: QuantizationReport) -> Table:
    table = _table("scheme", ["bits", "error", "Gaussian"])
    for scheme in report.schemes:
        error = f"{report.error(scheme):.4f}" if report.measured else ""
        table.add_row(scheme, f"{report.bits(scheme):.3f}", error, f"{report.yardsticks[scheme]:.4f}")
    return table


def _kind_table(report: QuantizationReport) -> Table:
    """A row for each kind of module, with the layer that is worst, by error or else by peak."""
    kinds: dict[str, list[LayerQuantization]] = {}
    for layer in report.layers:
        kinds.setdefault(_place(layer.name)[1], []).append(layer)
    schemes = _main_schemes(report) if report.measured else []
    worst_of = f"worst, {schemes[0]}" if schemes else "largest peak"
    table = _table("module", ["layers", *schemes, worst_of, "in", "peak", "kurtosis"])
    for kind, layers in kinds.items():
        squares = sum(layer.norm**2 for layer in layers)
        of_kind = [
            math.sqrt(sum(layer.squared_error(scheme) for layer in layers) / squares) if squares else 0.0
            for scheme in schemes
        ]
        worst = max(layers, key=lambda layer: layer.errors[schemes[0]] if schemes else layer.peak)
        largest = worst.errors[schemes[0]] if schemes else worst.peak
        numbers = [f"{value:.4f}" for value in (*of_kind, largest)]
        known = [layer.kurtosis for layer in layers if layer.kurtosis is not None]
        kurtosis = f"{statistics.median(known):.1f}" if known else ""
        peak = statistics.median(layer.peak for layer in layers)
        place = escape(_place(worst.name)[0])
        table.add_row(escape(kind), str(len(layers)), *numbers, place, f"{peak:.1f}", kurtosis)
    return table


def _layer_table(report: QuantizationReport) -> Table:
    schemes = _main_schemes(report) if report.measured else []
    table = _table("layer", ["bits", *schemes, "peak", "kurtosis"])
    for layer in report.layers:
        bits = 8 * layer.nbytes[report.schemes[0]] / layer.numel
        errors = [f"{layer.errors[scheme]:.4f}" for scheme in schemes]
        kurtosis = "" if layer.kurtosis is None else f"{layer.kurtosis:.1f}"
        table.add_row(escape(layer.name), f"{bits:.3f}", *errors, f"{layer.peak:.1f}", kurtosis)
    return table


def _outlier_lines(report: QuantizationReport) -> Iterator[tuple[str, str]]:
    if report.measured:
        errors = {layer.name: layer.errors[report.schemes[0]] for layer in report.layers}
        names = report.outliers
        shown = ", ".join(f"{name} ({errors[name]:.4f})" for name in names[:WORST])
        more = f" and {len(names) - WORST} more" if len(names) > WORST else ""
        yield "outliers", f"{len(names)} by error: {shown}{more}" if names else "no layer's error stands out"


def _skip_lines(report: QuantizationReport) -> Iterator[tuple[str, str]]:
    if report.budget_bytes is None:
        return
    scheme, names = report.schemes[0], report.left_dense
    yield (
        "budget",
        f"{_size(report.budget_bytes)}: {len(names)} layers left dense for {_size(report.extra_bytes)} bring the "
        f"error from {report.error(scheme):.4f} to {report.error(scheme, names):.4f}",
    )
    yield "  NF4Config", f"(skip_modules={report.skip_modules!r})"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count} bytes"


def _main_schemes(report: QuantizationReport) -> list[str]:
    """Those that quantize scales as the first does: whether they do hardly shows in the error."""
    nested = report.schemes[0].endswith("-dq")
    return [scheme for scheme in report.schemes if scheme.endswith("-dq") == nested]


def _place(name: str) -> tuple[str, str]:
    """A layer's name as (layer, module): ("model.layers.3", "mlp.up_proj")."""
    found = _NUMBERED.match(name)
    return (found[1], found[2]) if found else ("", name)


def _table(first: str, columns: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "in" else "right", no_wrap=True)
    return table
