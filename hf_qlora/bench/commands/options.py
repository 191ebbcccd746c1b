"""Options of several commands, and what is refused in them before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.console import misused


Shape = Annotated[str, typer.Option(help="The model's: smollm2, llama3-8b or tiny. Weights are random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences in a batch.")]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
Rank = Annotated[int, typer.Option(min=1, help="Of the adapters.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each arm's turn comes.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes side by side.")]
Results = Annotated[Path, typer.Option(help="JSON.")]
DrawnResults = Annotated[Path, typer.Option(help="JSON; the picture goes beside it.")]
Runs = Annotated[Path, typer.Option(help="JSON lines, one for each run; runs that are there are not done again.")]
ReportOnly = Annotated[bool, typer.Option("--report", help="Do nothing; print the tables of what is there.")]


def check_choice(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises: typer.Exit: with 2, where an option was given what is none of its values."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise misused(f"{option} {unknown} is not known; choose from {sorted(known)}.")


def check_device(device: str) -> None:
    """Raises: typer.Exit: with 2, where it is no device, or there is none."""
    import torch

    check_choice("--device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise misused("--device cuda: torch sees no GPU; leave it out to measure on the CPU.")
