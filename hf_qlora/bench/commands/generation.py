"""Of generating."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.bench.commands.files import measured, reported
from hf_qlora.bench.commands.options import BatchSize, DrawnResults, Rank, ReportOnly, Rounds, Shape, check_choice
from hf_qlora.console import misused


def generation(
    shape: Shape = "smollm2",
    batch_size: BatchSize = 1,
    prompt_length: Annotated[int, typer.Option(min=1, help="In tokens.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated for each prompt.")] = 128,
    rank: Rank = 16,
    rounds: Rounds = 15,
    arm: Annotated[
        list[str] | None, typer.Option(help="By default all that this processor has the kernel for.")
    ] = None,
    results: DrawnResults = Path("results/generation.json"),
    report_only: ReportOnly = False,
) -> None:
    """What LoRA costs while generating on the CPU: unmerged and merged, with and without fast_generation, and stock.

    The arms take turns in one process, so that ratios hold on a noisy machine. Minutes on two cores.
    """
    from hf_qlora.bench.generation import arms, report, run
    from hf_qlora.bench.train_step.arms import SHAPES

    check_choice("--shape", [shape], SHAPES)
    check_choice("--arm", arm or [], arms.ARMS)
    if reported("generation", results, report, report_only):
        return
    case = arms.Generation(shape, batch_size, prompt_length, rank, new_tokens=new_tokens)
    try:
        found = run.measure(case, rounds, arm or arms.possible())
    except RuntimeError as error:
        raise misused(str(error)) from None
    measured(found, results, report)
