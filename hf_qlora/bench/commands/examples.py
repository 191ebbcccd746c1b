"""Of the examples: a table for each, over seeds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qlora.bench.commands.files import file_of_runs
from hf_qlora.bench.commands.options import Device, ReportOnly, Runs, Workers, check_choice, check_device
from hf_qlora.console import misused


Seeds = Annotated[int, typer.Option(min=1, help="How many; more of them go on from fewer.")]
Write = Annotated[bool, typer.Option("--write", help="Write the model card and the page of the docs, in a checkout.")]
Quick = Annotated[bool, typer.Option("--quick", help="Two steps of everything, to see that it works.")]


def results_classification(
    results: Runs = Path("results/text_classification.jsonl"),
    seeds: Seeds = 5,
    quick: Quick = False,
    device: Device = "cpu",
    workers: Workers = 1,
    write: Write = False,
    report_only: ReportOnly = False,
) -> None:
    """Full fine-tuning, LoRA, QLoRA and scales by depth on headlines: examples/text_classification.py over seeds.

    Learning rates first, at least three for each method (extended where the best lay at an edge, so that it lies
    between two that are worse), then the seeds, then cost. Hours; goes on where it stopped.
    """
    _results("classification", results, seeds, quick, device, workers, write, report_only)


def results_generation(
    results: Runs = Path("results/text_generation.jsonl"),
    seeds: Seeds = 5,
    cost: Annotated[bool, typer.Option(help="Measure memory and times too.")] = True,
    quick: Quick = False,
    device: Device = "cpu",
    workers: Workers = 1,
    write: Write = False,
    report_only: ReportOnly = False,
) -> None:
    """Full fine-tuning, LoRA and QLoRA on SmolLM2, by examples/text_generation.py over seeds, and what each costs.

    Learning rates first, at least three for each method (extended where the best lay at an edge, so that it lies
    between two that are worse), then the seeds, then cost. Hours; goes on where it stopped.
    """
    _results("generation", results, seeds, quick, device, workers, write, report_only, cost=cost)


def _results(
    name: str,
    results: Path,
    seeds: int,
    quick: bool,
    device: str,
    workers: int,
    write: bool,
    report_only: bool,
    **measured: Any,
) -> None:
    """Do an example's study, unless it is only to be reported, and print its tables; write them if asked."""
    check_choice("--device", [device], ("cpu", "cuda"))
    if write and quick:
        raise misused("--write is of the whole measurement: leave out --quick.")
    try:
        study: Any = import_module(f"hf_qlora.bench.examples.{name}")
        report: Any = import_module(f"hf_qlora.bench.examples.{name}_report")
        from hf_qlora.bench.examples import pages, runs
    except ImportError as error:
        raise misused(f"{error}. Install what the table needs: pip install 'hf-qlora[bench]'") from None
    file = file_of_runs(f"results-{name}", results, report_only, quick, runs.read_all)
    plan = study.QUICK if quick else replace(study.Plan(), seeds=tuple(range(1, seeds + 1)))
    measure = partial(study.measure, plan, file, device, workers, **measured)
    try:
        ours = runs.last_origin(file, device) if report_only else _measure(measure, runs.example(study.SCRIPT), device)
        text = report.markdown(file, plan, ours)
        if write and (card := report.card(file, plan, ours)):
            for written in pages.write(Path(study.SCRIPT).stem, card, text, runs.checkout()):
                typer.echo(f"Written: {written}")
    except (runs.ExampleError, OSError) as error:
        raise misused(str(error)) from None
    typer.echo(text or f"No runs on {device} in {file} yet.")


def _measure(measure: Any, script: Path, device: str) -> Any:
    from hf_qlora.bench.examples import runs

    check_device(device)
    measure(script=script)
    return runs.origin(script, device)
