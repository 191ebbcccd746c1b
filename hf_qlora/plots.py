"""Pictures, drawn with matplotlib where it is installed: `pip install 'hf-qlora[plot]'`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


Grid = Mapping[tuple[str, str], float]  # by (layer, module)


def pyplot() -> Any:
    """matplotlib's, set to draw into files.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'hf-qlora[plot]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_path(path: Path) -> None:
    """Raise ValueError unless a picture can have that name."""
    if path.suffix != ".png" or path.is_dir():
        raise ValueError(f"{path} cannot be the picture: name a file that ends in .png.")


def save(figure: Any, path: Path) -> None:
    """Write a figure to a temporary name, rename it, and let the figure go."""
    check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial.png")
    try:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        pyplot().close(figure)


def heat_maps(grids: Mapping[str, Grid], path: Path, label: str) -> None:
    """One map of layers × modules for each title, with one colour scale, 1 in its middle."""
    plt = pyplot()
    layers = _ordered(layer for grid in grids.values() for layer, _ in grid)
    modules = _ordered(module for grid in grids.values() for _, module in grid)
    values = [value for grid in grids.values() for value in grid.values()]
    reach = max((abs(math.log2(value)) for value in values if value > 0), default=0.0) or 1.0
    figure, axes = plt.subplots(
        1,
        len(grids),
        figsize=(1.5 + (0.6 + 0.35 * len(modules)) * len(grids), 1.8 + 0.18 * len(layers)),
        squeeze=False,
    )
    image = None
    for axis, (title, grid) in zip(axes[0], grids.items(), strict=True):
        shown = [[_log2(grid.get((layer, module))) for module in modules] for layer in layers]
        image = axis.imshow(shown, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(modules)), modules, rotation=90, fontsize=7)
        axis.set_yticks(range(len(layers)), layers if axis is axes[0][0] else [""] * len(layers), fontsize=6)
    figure.colorbar(image, ax=axes[0].tolist(), label=f"log₂ {label}")
    save(figure, path)


def _ordered(names: Any) -> Sequence[str]:
    return list(dict.fromkeys(names))


def _log2(value: float | None) -> float:
    return math.log2(value) if value else math.nan
