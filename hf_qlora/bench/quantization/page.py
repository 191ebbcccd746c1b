"""One HTML page of a result: nothing is fetched, plots are within it, and it follows the reader's light or dark."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_qlora.bench.quantization import pictures, tables
from hf_qlora.bench.quantization.result import FILE, QuantizationResult
from hf_qlora.bench.quantization.run import CASES


def write(result: QuantizationResult, path: Path) -> Path:
    """Write it to a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(html(result), encoding="utf-8")
    return aside.replace(path)


def html(result: QuantizationResult) -> str:
    """The page's text."""
    source = files("hf_qlora.bench.quantization").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    return environment.from_string(source).render(
        model=result.model["name"],
        heading=tables.heading(result),
        file=FILE,
        settings=result.settings,
        environments=tables.environments(result),
        sections=[_section(result, name) for name in result.cases],
    )


def _section(result: QuantizationResult, name: str) -> dict[str, Any]:
    case = CASES[name]
    return {
        "name": name,
        "title": case.title,
        "reading": case.reading,
        "notes": result.cases[name].notes,
        "seconds": result.cases[name].seconds,
        "picture": Markup(pictures.svg(result, name)),  # drawn here, its text escaped by matplotlib
        "tables": tables.of_case(result, name),
        "layers": tables.of_layers(result, name),
    }
