"""`hf-qlora bench`: one command for each measurement, which is made in the module that the command imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qlora.console import INTERRUPTED, misused


bench = typer.Typer(help="Measurements that can be run again.", no_args_is_help=True)

# Options of several commands.
Shape = Annotated[str, typer.Option(help="The model's: smollm2, llama3-8b or tiny. Weights are random.")]
Count = Annotated[int, typer.Option(min=1)]
SequenceLength = Annotated[int, typer.Option(min=2)]
Rounds = Annotated[int, typer.Option(min=1, help="How often each arm's turn comes.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes side by side.")]
Results = Annotated[Path, typer.Option(help="JSON.")]
DrawnResults = Annotated[Path, typer.Option(help="JSON; the picture goes beside it.")]
Runs = Annotated[Path, typer.Option(help="JSON lines, one for each run; runs that are there are not done again.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many; more of them go on from fewer.")]
Write = Annotated[bool, typer.Option("--write", help="Write the model card and the page of the docs, in a checkout.")]
ReportOnly = Annotated[bool, typer.Option("--report", help="Do nothing; print the table of --results.")]


@bench.command("adaptive-depth")
def bench_adaptive_depth(
    task: Annotated[list[str] | None, typer.Option(help="headlines or answers; both by default.")] = None,
    results: Runs = Path("results/adaptive_depth.jsonl"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: Annotated[bool, typer.Option("--report", help="Do nothing; print the tables.")] = False,
) -> None:
    """Compare LoRA, DoRA and scales by depth on real models, at the best learning rate of each.

    Takes hours on two cores, and goes on where it stopped.
    """
    from dataclasses import replace

    try:
        from hf_qlora.bench.depth import report, run, tasks
    except ImportError as error:
        raise misused(f"{error}. Install what the experiment needs: pip install 'hf-qlora[bench]'") from None
    names = tuple(task or tasks.TASKS)
    _check_choice("--task", names, tasks.TASKS)
    file = results.with_stem(f"{results.stem}_quick") if quick else results
    _check_lines(file)
    if not report_only:
        run.perform(replace(run.QUICK if quick else run.Plan(), tasks=names), file, device, workers)
    typer.echo(report.markdown(file) or f"No test runs in {file} yet.")


@bench.command("train-step")
def bench_train_step(
    shape: Shape = "smollm2",
    batch_size: Count = 4,
    sequence_length: SequenceLength = 256,
    rank: Count = 16,
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

    _check_choice("--shape", [shape], arms.SHAPES)
    _check_choice("--arm", arm or [], arms.ARMS)
    if report_only:
        typer.echo(report.markdown(_read_results(results)))
        return
    case = arms.Case(shape, batch_size, sequence_length, rank, checkpointing=checkpointing, device=device)
    _measured(run.measure(case, rounds, arm or arms.arms_for(device)), results, report)


@bench.command("callbacks")
def bench_callbacks(
    shape: Shape = "smollm2",
    batch_size: Count = 4,
    sequence_length: SequenceLength = 256,
    rank: Count = 16,
    rounds: Rounds = 20,
    device: Device = "cpu",
    results: Results = Path("results/callbacks.json"),
    report_only: ReportOnly = False,
) -> None:
    """What AdapterHealthCallback and MemoryCallback cost a training step.

    The arms take turns in one process, so that ratios hold on a noisy machine. Minutes on two cores.
    """
    from hf_qlora.bench import callbacks
    from hf_qlora.bench.results import write_whole
    from hf_qlora.bench.train_step.arms import SHAPES, Case

    _check_choice("--shape", [shape], SHAPES)
    if report_only:
        typer.echo(callbacks.markdown(_read_results(results)))
        return
    found = callbacks.measure(Case(shape, batch_size, sequence_length, rank, device=device), rounds)
    write_whole(results, found)
    typer.echo(callbacks.markdown(found))


@bench.command("growth")
def bench_growth(
    shape: Shape = "smollm2",
    batch_size: Count = 2,
    sequence_length: SequenceLength = 256,
    rank: Count = 16,
    rounds: Rounds = 5,
    axis: Annotated[list[str] | None, typer.Option(help="tokens, rank, layers or adapters; all by default.")] = None,
    device: Device = "cpu",
    results: DrawnResults = Path("results/growth.json"),
    report_only: ReportOnly = False,
) -> None:
    """What one more token, rank, layer or adapter costs a training step, beside the frozen base alone.

    Interrupted, the same command goes on where it stopped. Half an hour on two cores.
    """
    from functools import partial

    from hf_qlora.bench.results import write_whole
    from hf_qlora.bench.train_step import arms, growth

    _check_choice("--shape", [shape], arms.SHAPES)
    _check_choice("--axis", axis or [], growth.AXES)
    if report_only:
        typer.echo(growth.markdown(_read_results(results)))
        return
    case = arms.Case(shape, batch_size, sequence_length, rank, device=device)
    before = _read_results(results) if results.is_file() else None
    keep = partial(write_whole, results)
    _measured(growth.measure(case, rounds, axis or tuple(growth.AXES), before, keep), results, growth)


@bench.command("checkpointing")
def bench_checkpointing(
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

    _check_choice("--device", [device], checkpointing.CASES)
    if report_only:
        typer.echo(checkpointing.markdown(_read_results(results)))
        return
    case, turns = checkpointing.CASES[device], rounds
    if quick:
        case, turns = replace(case, shape="tiny", batch_size=2, sequence_length=16), 1
    _measured(checkpointing.measure(case, turns), results, checkpointing)


@bench.command("generation")
def bench_generation(
    shape: Shape = "smollm2",
    batch_size: Count = 1,
    prompt_length: Count = 16,
    new_tokens: Count = 128,
    rank: Count = 16,
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

    _check_choice("--shape", [shape], SHAPES)
    _check_choice("--arm", arm or [], arms.ARMS)
    if report_only:
        typer.echo(report.markdown(_read_results(results)))
        return
    case = arms.Generation(shape, batch_size, prompt_length, rank, new_tokens=new_tokens)
    try:
        found = run.measure(case, rounds, arm or arms.possible())
    except RuntimeError as error:
        raise misused(str(error)) from None
    _measured(found, results, report)


@bench.command("quantization")
def bench_quantization(
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
        str | None, typer.Option(help="For precision: a .txt, .jsonl or .json file, a folder of them, or a Hub id.")
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
    from hf_qlora.bench.quantization.run import QuantizationBenchmark
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
        page = found.save(output)
    except (ImportError, OSError, ValueError) as error:
        raise misused(str(error)) from None
    except KeyboardInterrupt:
        typer.echo(f"Stopped; the cases that were done are in {output}, and the same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    found.show()
    typer.echo(f"Written to {page}, with plots and every round beside it.")


@bench.command("compare")
def bench_compare(
    first: Annotated[Path, typer.Argument(help="A result of bench quantization, train-step or generation.")],
    second: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    relative: Annotated[
        bool, typer.Option("--relative", help="Divide timings by the reference arm's, which takes the machine out.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what does not differ.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="slower or larger: exit with 1 where a number is, or is missing; give it twice for both."),
    ] = None,
) -> None:
    """Hold two runs against each other: which timings are slower or faster beyond noise, and what else differs."""
    from hf_qlora.bench import compare, runs

    _check_choice("--fail-on", fail_on or [], compare.WORSE)
    try:
        found = compare.compare(runs.read(first), runs.read(second), relative)
    except (ImportError, OSError, ValueError) as error:
        raise misused(str(error)) from None
    compare.show(found, everything)
    if fail_on and (found.missing or set(fail_on) & found.counts().keys()):
        raise typer.Exit(1)


@bench.command("learning-curve")
def bench_learning_curve(
    results: Runs = Path("results/learning_curve.jsonl"),
    steps: Annotated[int, typer.Option(min=2)] = 200,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: Annotated[bool, typer.Option("--report", help="Do nothing; print the table.")] = False,
) -> None:
    """Loss curves of our step and of stock PEFT's, on real weights and data, over three seeds.

    Half an hour on two cores.
    """
    from hf_qlora.bench.train_step import curves

    _check_lines(results)
    if not report_only:
        curves.perform(results, steps, device=device, workers=workers)
    typer.echo(curves.markdown(results) or f"No runs to compare in {results} yet.")


@bench.command("calibrated-nf4")
def bench_calibrated_nf4(
    part: Annotated[
        list[str] | None, typer.Option(help="merge, base, loftq, rows, methods or cost; all by default.")
    ] = None,
    results: Runs = Path("results/calibrated_nf4.jsonl"),
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    report_only: Annotated[bool, typer.Option("--report", help="Do nothing; print the tables.")] = False,
) -> None:
    """What calibrated rounding keeps of an adapter merged into NF4, and of a base, on SmolLM2 and real text.

    Hours on two cores; ten minutes on a GPU with --workers 14. The picture goes beside the results.
    """
    from hf_qlora.bench.calibrated_nf4 import report, run

    names = tuple(part or run.PARTS)
    _check_choice("--part", names, run.PARTS)
    file = results.with_stem(f"{results.stem}_quick") if quick else results
    _check_lines(file)
    if not report_only:
        run.perform(run.QUICK if quick else run.Plan(), file, names, device, workers)
        report.plot(file, file.with_suffix(".png"))
    typer.echo(report.markdown(file) or f"No runs in {file} yet.")


@bench.command("results-classification")
def bench_results_classification(
    results: Runs = Path("results/text_classification.jsonl"),
    seeds: Seeds = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    write: Write = False,
    report_only: ReportOnly = False,
) -> None:
    """Full fine-tuning, LoRA, QLoRA and scales by depth on headlines: examples/text_classification.py over seeds.

    Learning rates first, three for each method, then the seeds, then cost. Hours; goes on where it stopped.
    """
    from dataclasses import replace

    _check_choice("--device", [device], ("cpu", "cuda"))
    _check_whole(write, quick)
    try:
        from hf_qlora.bench.examples import classification, classification_report
    except ImportError as error:
        raise misused(f"{error}. Install what the experiment needs: pip install 'hf-qlora[bench]'") from None
    file = results.with_stem(f"{results.stem}_quick") if quick else results
    _check_lines(file)
    plan = classification.QUICK if quick else replace(classification.Plan(), seeds=tuple(range(1, seeds + 1)))

    def measure(script: Path) -> None:
        classification.measure(plan, file, device, workers, script)

    _example_results(
        classification.SCRIPT, classification_report, plan, file, device, write, None if report_only else measure
    )


@bench.command("skip-list")
def bench_skip_list(
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
    from hf_qlora.bench.results import write_whole

    if report_only:
        typer.echo(skip_list.markdown(_read_results(results)))
        return
    try:
        found = skip_list.measure(budget, draws, answers)
    except ValueError as error:
        raise misused(str(error)) from None
    write_whole(results, found)
    typer.echo(skip_list.markdown(found))


@bench.command("memory-plan")
def bench_memory_plan(
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

    _check_choice("--device", [device], ("cpu", "cuda"))
    if report_only:
        typer.echo(report.markdown(_read_results(results)))
        return
    chosen: tuple[settings.Setting, ...] = settings.CUDA if device == "cuda" else settings.CPU
    if quick:
        chosen = tuple(replace(setting, device=device) for setting in settings.QUICK)
    _measured(run.measure(chosen), results, report)


@bench.command("results-generation")
def bench_results_generation(
    results: Runs = Path("results/text_generation.jsonl"),
    seeds: Seeds = 5,
    cost: Annotated[bool, typer.Option(help="Measure memory and times too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps of everything, to see that it works.")] = False,
    device: Device = "cpu",
    workers: Workers = 1,
    write: Write = False,
    report_only: ReportOnly = False,
) -> None:
    """Full fine-tuning, LoRA and QLoRA on SmolLM2, by examples/text_generation.py over seeds, and what each costs.

    Learning rates first, three for each method, then the seeds, then cost. Hours; goes on where it stopped.
    """
    from dataclasses import replace

    _check_choice("--device", [device], ("cpu", "cuda"))
    _check_whole(write, quick)
    try:
        from hf_qlora.bench.examples import generation, generation_report
    except ImportError as error:
        raise misused(f"{error}. Install what the table needs: pip install 'hf-qlora[bench]'") from None
    file = results.with_stem(f"{results.stem}_quick") if quick else results
    _check_lines(file)
    plan = generation.QUICK if quick else replace(generation.Plan(), seeds=tuple(range(1, seeds + 1)))

    def measure(script: Path) -> None:
        generation.measure(plan, file, device, workers, script, cost)

    _example_results(generation.SCRIPT, generation_report, plan, file, device, write, None if report_only else measure)


def _example_results(
    script: str, report: Any, plan: Any, file: Path, device: str, write: bool, measure: Callable[[Path], None] | None
) -> None:
    """Run an example's study, unless there is nothing to `measure` with, and print its tables; write them if asked."""
    from hf_qlora.bench.examples import pages, runs

    try:
        if measure is None:
            ours = runs.last_origin(file, device)
        else:
            _check_device(device)
            path = runs.example(script)
            ours = runs.origin(path, device)
            measure(path)
        text = report.markdown(file, plan, ours)
        if write and (card := report.card(file, plan, ours)):
            for written in pages.write(Path(script).stem, card, text, runs.checkout()):
                typer.echo(f"Written: {written}")
    except (runs.ExampleError, OSError) as error:
        raise misused(str(error)) from None
    typer.echo(text or f"No runs on {device} in {file} yet.")


def _check_whole(write: bool, quick: bool) -> None:
    if write and quick:
        raise misused("--write is of the whole measurement: leave out --quick.")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise misused("--device cuda: torch sees no GPU; leave it out to measure on the CPU.")


def _check_choice(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise misused(f"{option} {unknown} is not known; choose from {sorted(known)}.")


def _read_results(results: Path) -> Any:
    from hf_qlora.bench.results import read_whole

    if not results.is_file():
        raise misused(f"{results} is not there; leave out --report to measure.")
    try:
        return read_whole(results)
    except ValueError as error:
        raise misused(str(error)) from None


def _check_lines(results: Path) -> None:
    from hf_qlora.bench.results import read_lines

    try:
        read_lines(results)
    except ValueError as error:
        raise misused(str(error)) from None


def _measured(found: Any, results: Path, report: Any) -> None:
    """Keep what was measured, draw it and print it, as the module `report` does."""
    from hf_qlora.bench.results import write_whole

    write_whole(results, found)
    report.plot(found, results.with_suffix(".png"))
    typer.echo(report.markdown(found))
