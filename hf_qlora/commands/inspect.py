"""`hf-qlora inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.commands.outcome import make_place
from hf_qlora.console import misused


def inspect_adapter(
    adapter: Annotated[str, typer.Argument(help="A folder, or a Hub id.")],
    plot: Annotated[Path | None, typer.Option(help="Draw ‖ΔW‖ by layer and module into this .png file.")] = None,
) -> None:
    """Show a saved adapter layer by layer: ranks, the size of ΔW, and what depth scales were folded in."""
    from hf_qlora import inspect_adapter

    try:
        if plot is not None:
            make_place(plot)
        inspect_adapter.show(adapter, plot)
    except (ImportError, OSError, ValueError) as error:
        raise misused(str(error)) from None
