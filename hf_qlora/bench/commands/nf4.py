"""Of the rounding to NF4: calibrated, and with layers left dense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.bench.commands.files import check_addable, file_of_runs, measured, reported
from hf_qlora.bench.commands.options import Device, ReportOnly, Results, Runs, Workers, check_choice, check_device
from hf_qlora.console import misused


def calibrated_nf4(
    part: Annotated[
        list[str] | None,
        typer.Option(help="merge, base, loftq, trained, rows, caps, methods, cost or commands; all by default."),
    ] = None,
    results: Runs = Path("results/calibrated_nf4.jsonl"),
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: ReportOnly = False,
) -> None:
    """What calibrated rounding keeps of an adapter merged into NF4, and of a base, on SmolLM2 and real text.

    In bfloat16, or in float32 on a CPU that has no products in it. Hours on two cores; ten minutes on a GPU with
    --workers 14. The picture goes beside the results.
    """
    from hf_qlora.bench.calibrated_nf4 import report, run

    names = tuple(part or run.PARTS)
    check_choice("--part", names, run.PARTS)
    file = file_of_runs("calibrated-nf4", results, report_only, quick, run.read)
    if not report_only:
        check_device(device)
        check_addable(file, run.made_with(device)["device"])
        run.perform(run.QUICK if quick else run.Plan(), file, names, device, workers)
        report.plot(file, file.with_suffix(".png"))
    typer.echo(report.markdown(file) or f"No runs in {file} yet.")


def skip_list(
    budget: Annotated[str, typer.Option(help="For the layers that are left dense, as in quant-report.")] = "5%",
    draws: Annotated[int, typer.Option(min=1, help="Random lists to compare with.")] = 3,
    answers: Annotated[int, typer.Option(min=2, help="To take the perplexity of.")] = 160,
    results: Results = Path("results/skip_list.json"),
    report_only: ReportOnly = False,
) -> None:
    """Whether the layers that quant-report suggests to leave dense help SmolLM2 more than random ones.

    Minutes on two cores.
    """
    from hf_qlora.bench import skip_list

    if reported("skip-list", results, skip_list, report_only):
        return
    try:
        found = skip_list.measure(budget, draws, answers)
    except ValueError as error:
        raise misused(str(error)) from None
    measured(found, results, skip_list)
