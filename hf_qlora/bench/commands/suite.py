"""The suite for quantized models, and two runs of a measurement held against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.bench.commands.options import Device, check_choice
from hf_qlora.console import INTERRUPTED, misused


def quantization(
    case: Annotated[
        list[str] | None,
        typer.Argument(help="memory, latency, precision, double-quant, train-step, load or merge; all by default."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, or a Hub id, of a dense model; SmolLM2-135M-Instruct by default.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the dense weights: bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[
        Path,
        typer.Option(help="Folder for the results; cases that are there with the same settings are not done again."),
    ] = Path("results/quantization"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Of each timing; 10 by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, batches and adapters.")] = 0,
    texts: Annotated[
        str | None,
        typer.Option(
            help="For precision: a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub id."
        ),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A little of everything on a tiny model, to see that it works.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Do nothing; print the tables of --output.")] = False,
) -> None:
    """What quantizing a model saves, costs and loses: tables here, and a page and plots in --output.

    The arms of each case take turns. Ten minutes on two cores, by default; goes on where it stopped.
    """
    from hf_qlora.bench.quantization.result import QuantizationResult
    from hf_qlora.bench.quantization.run import CaseMemoryError, QuantizationBenchmark
    from hf_qlora.plots import pyplot

    try:
        if report_only:
            QuantizationResult.load(output).show()
            return
        pyplot()
        benchmark = QuantizationBenchmark(
            model,
            case or None,
            device=device,
            dtype=dtype,
            rounds=rounds,
            seed=seed,
            texts=texts,
            smoke=smoke,
            output=output,
        )
        found = benchmark.run()
    except (CaseMemoryError, ImportError, OSError, ValueError) as error:  # what goes wrong in a case is a CaseError
        raise misused(str(error)) from None
    except KeyboardInterrupt:
        typer.echo(f"Stopped; the cases that were done are in {output}, and the same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    found.show()
    try:
        page = found.save(output)
    except OSError as error:
        raise misused(str(error)) from None
    typer.echo(f"Written to {page}, with plots and every round beside it.")


def compare(
    first: Annotated[Path, typer.Argument(help="A result of bench quantization, train-step or generation.")],
    second: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    relative: Annotated[
        bool, typer.Option("--relative", help="Divide timings by the reference arm's, which takes the machine out.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what does not differ.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="slower or larger: exit with 1 where a number is, is missing, or cannot be told; twice for both."
        ),
    ] = None,
) -> None:
    """Hold two runs against each other: which timings are slower or faster beyond noise, and what else differs."""
    from hf_qlora.bench import compare, runs

    check_choice("--fail-on", fail_on or [], compare.WORSE)
    try:
        found = compare.compare(runs.read(first), runs.read(second), relative)
    except (ImportError, OSError, ValueError) as error:
        raise misused(str(error)) from None
    compare.show(found, everything)
    if failures := found.failures(fail_on or ()):
        typer.echo(f"Failed: {failures}", err=True)
        raise typer.Exit(1)
