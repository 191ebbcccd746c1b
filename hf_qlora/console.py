"""What commands say when they cannot go on, and the exit status that goes with it."""

from __future__ import annotations

import warnings

import typer


INTERRUPTED = 130  # 128 + SIGINT, as shells have it
MISUSED = 2


def misused(message: str) -> typer.Exit:
    """Say what is wrong; raise what this returns."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(MISUSED)


def ignore_renamed() -> None:
    """Keep a warning without consequences out of the output.

    PEFT 0.21 asks for an attribute that transformers 5.23 has renamed; both know.
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
