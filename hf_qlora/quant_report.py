"""`hf-qlora quant-report`: load a model as its files say, measure what quantizing it loses, and show it."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from hf_qlora import plots
from hf_qlora.config import NF4Config
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.config.record import write_json
from hf_qlora.merge.load import load_model
from hf_qlora.quant import report_text, skip_list
from hf_qlora.quant.scheme import QUANT_TYPES, grid
from hf_qlora.quant.survey import quantization_report
from hf_qlora.validation import ConfigError


def show(
    model: str,
    block_sizes: list[int],
    budget: str | None = None,
    *,
    dtype: str | None = None,
    every_layer: bool = False,
    json: Path | None = None,
    plot: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the report on a model at a local path or Hub id, and write it into the files that are named.

    Args:
        block_sizes: to compare; outliers and the skip list go by the first.
        dtype: to load the weights in; by default what the model's config says.

    Raises:
        ConfigError: an argument that cannot be honoured; found before the model is loaded.
        LoadError, MergeError: no such model, or not to be loaded.
        BaseModelError: see `quantization_report`.
        ImportError, OSError: no matplotlib for the picture; a file cannot be written.
    """
    config = NF4Config(block_size=block_sizes[0])
    _check(config, block_sizes, budget, dtype, json, plot)
    loaded = load_model(model, dtype)
    found = quantization_report(loaded, config, block_sizes=block_sizes, budget=budget)
    to = console or Console(width=None if sys.stdout.isatty() else report_text.UNCUT)
    report_text.show(found, to, every_layer)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, found.to_dict())
        to.print(f"Written to {json}", highlight=False, markup=False)
    if plot is not None:
        found.plot(plot)
        to.print(f"Drawn in {plot}", highlight=False, markup=False)


def _check(
    config: NF4Config,
    block_sizes: list[int],
    budget: str | None,
    dtype: str | None,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Refuse what can be refused before anything is loaded."""
    grid(config, QUANT_TYPES, block_sizes)
    if budget is not None:
        skip_list.bytes_of(budget, 0)
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; choose one of {tuple(COMPUTE_DTYPES)}.")
    if json is not None and (json.suffix != ".json" or json.is_dir()):
        raise ConfigError(f"{json} cannot be the report: name a file that ends in .json.")
    if plot is not None:
        plots.pyplot()
        plots.check_path(plot)
