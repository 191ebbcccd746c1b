"""Of a training step: time and memory, and what its parts cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.bench.commands.files import check_addable, file_of_runs, measured, read_results, reported
from hf_qlora.bench.commands.options import (
    BatchSize,
    Device,
    DrawnResults,
    Rank,
    ReportOnly,
    Results,
    Rounds,
    Runs,
    SequenceLength,
    Shape,
    Workers,
    check_choice,
    check_device,
)


def train_step(
    shape: Shape = "smollm2",
    batch_size: BatchSize = 4,
    sequence_length: SequenceLength = 256,
    rank: Rank = 16,
    rounds: Rounds = 15,
    arm: Annotated[list[str] | None, typer.Option(help="All by default.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing, in all arms.")
    ] = False,
    device: Device = "cpu",
    results: DrawnResults = Path("results/train_step.json"),
    report_only: ReportOnly = False,
) -> None:
    """Time and memory of a training step: ours, stock PEFT with bitsandbytes, and the frozen base alone.

    The arms take turns in one process, so that ratios hold on a noisy machine; absolute seconds do not. Memory is
    measured in a process for each arm. Minutes on two cores.
    """
    from hf_qlora.bench.train_step import arms, report, run

    check_choice("--shape", [shape], arms.SHAPES)
    check_choice("--arm", arm or [], arms.ARMS)
    if reported("train-step", results, report, report_only):
        return
    check_device(device)
    case = arms.Case(shape, batch_size, sequence_length, rank, checkpointing=checkpointing, device=device)
    measured(run.measure(case, rounds, arm or arms.arms_for(device)), results, report)


def callbacks(
    shape: Shape = "smollm2",
    batch_size: BatchSize = 4,
    sequence_length: SequenceLength = 256,
    rank: Rank = 16,
    rounds: Rounds = 20,
    device: Device = "cpu",
    results: Results = Path("results/callbacks.json"),
    report_only: ReportOnly = False,
) -> None:
    """What AdapterHealthCallback and MemoryCallback cost a training step.

    The arms take turns in one process, so that ratios hold on a noisy machine. Minutes on two cores.
    """
    from hf_qlora.bench import callbacks
    from hf_qlora.bench.train_step.arms import SHAPES, Case

    check_choice("--shape", [shape], SHAPES)
    if reported("callbacks", results, callbacks, report_only):
        return
    check_device(device)
    case = Case(shape, batch_size, sequence_length, rank, device=device)
    measured(callbacks.measure(case, rounds), results, callbacks)


def growth(
    shape: Shape = "smollm2",
    batch_size: BatchSize = 2,
    sequence_length: SequenceLength = 256,
    rank: Rank = 16,
    rounds: Rounds = 5,
    axis: Annotated[list[str] | None, typer.Option(help="tokens, rank, layers or adapters; all by default.")] = None,
    dtype: Annotated[
        str, typer.Option(help="The base's: bfloat16, or float32, as for CPUs without products in bfloat16.")
    ] = "bfloat16",
    device: Device = "cpu",
    results: DrawnResults = Path("results/growth.json"),
    report_only: ReportOnly = False,
) -> None:
    """What one more token, rank, layer or adapter costs a training step, beside the frozen base alone.

    Interrupted, the same command goes on where it stopped. Half an hour to an hour on two cores.
    """
    from functools import partial

    from hf_qlora.bench.results import write_whole
    from hf_qlora.bench.train_step import arms, growth
    from hf_qlora.config.nf4 import COMPUTE_DTYPES

    check_choice("--shape", [shape], arms.SHAPES)
    check_choice("--axis", axis or [], growth.AXES)
    check_choice("--dtype", [dtype], COMPUTE_DTYPES)
    if reported("growth", results, growth, report_only):
        return
    check_device(device)
    case = arms.Case(shape, batch_size, sequence_length, rank, device=device, dtype=dtype)
    before = read_results("growth", results) if results.is_file() else None
    keep = partial(write_whole, results)
    measured(growth.measure(case, rounds, axis or tuple(growth.AXES), before, keep), results, growth)


def checkpointing(
    device: Annotated[str, typer.Option(help="cpu (SmolLM2's shape) or cuda (Llama-3-8B's).")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="How often each mode's turn comes.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model once, to see that it works.")] = False,
    results: DrawnResults = Path("results/checkpointing.json"),
    report_only: ReportOnly = False,
) -> None:
    """Time and memory of a training step in each mode of checkpointing, with the same loss and gradients.

    Minutes on two cores, or on a GPU with 80 GB.
    """
    from dataclasses import replace

    from hf_qlora.bench.train_step import checkpointing

    if reported("checkpointing", results, checkpointing, report_only):
        return
    check_device(device)
    case, turns = checkpointing.CASES[device], rounds
    if quick:
        case, turns = replace(case, shape="tiny", batch_size=2, sequence_length=16), 1
    measured(checkpointing.measure(case, turns), results, checkpointing)


def memory_plan(
    device: Device = "cpu",
    results: DrawnResults = Path("results/memory_plan.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Two tiny settings, to see that it works.")] = False,
    report_only: ReportOnly = False,
) -> None:
    """Peaks of memory as `hf-qlora plan` has them, beside measured ones: families, batches and ways to train.

    Each setting is measured in a process of its own. Minutes on two cores.
    """
    from dataclasses import replace

    from hf_qlora.bench.memory_plan import report, run, settings

    if reported("memory-plan", results, report, report_only):
        return
    check_device(device)
    chosen: tuple[settings.Setting, ...] = settings.CUDA if device == "cuda" else settings.CPU
    if quick:
        chosen = tuple(replace(setting, device=device) for setting in settings.QUICK)
    measured(run.measure(chosen), results, report)


def learning_curve(
    results: Runs = Path("results/learning_curve.jsonl"),
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 200,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: ReportOnly = False,
) -> None:
    """Loss curves of our step and of stock PEFT's, on real weights and data, over three seeds.

    Half an hour on two cores.
    """
    from hf_qlora.bench.measure import environment
    from hf_qlora.bench.train_step import curves

    results = file_of_runs("learning-curve", results, report_only)
    if not report_only:
        check_device(device)
        check_addable(results, environment(device)["device"])
        curves.perform(results, steps, device=device, workers=workers)
    typer.echo(curves.markdown(results) or f"No runs to compare in {results} yet.")
