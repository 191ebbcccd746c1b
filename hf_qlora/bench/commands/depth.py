"""Of scales by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.bench.commands.files import check_addable, file_of_runs
from hf_qlora.bench.commands.options import Device, ReportOnly, Runs, Workers, check_choice, check_device
from hf_qlora.console import misused


def adaptive_depth(
    task: Annotated[list[str] | None, typer.Option(help="headlines or answers; both by default.")] = None,
    results: Runs = Path("results/adaptive_depth.jsonl"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: ReportOnly = False,
) -> None:
    """Compare LoRA, DoRA and scales by depth on real models, at the best learning rate of each.

    Takes hours on two cores, and goes on where it stopped.
    """
    from dataclasses import replace

    from hf_qlora.bench.measure import environment

    try:
        from hf_qlora.bench.depth import report, run, tasks
    except ImportError as error:
        raise misused(f"{error}. Install what the experiment needs: pip install 'hf-qlora[bench]'") from None
    names = tuple(task or tasks.TASKS)
    check_choice("--task", names, tasks.TASKS)
    file = file_of_runs("adaptive-depth", results, report_only, quick, run.read)
    if not report_only:
        check_device(device)
        check_addable(file, environment(device)["device"])
        run.perform(replace(run.QUICK if quick else run.Plan(), tasks=names), file, device, workers)
    typer.echo(report.markdown(file) or f"No test runs in {file} yet.")
