"""`hf-qlora quant-report` and `hf-qlora quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qlora.commands.outcome import (
    make_place,
    refused,
    say_and_write,
    stopped,
    terminated_as_interrupted,
    write_report,
)
from hf_qlora.commands.rows import Calibrate, HeldOut, Length, Rows, RowsSeed, check_rows_are_used
from hf_qlora.console import INTERRUPTED


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
        for file in filter(None, (json, plot)):
            make_place(file)
        quant_report.show(
            model, block_size or [64], budget, dtype=dtype, every_layer=every_layer, json=json, plot=plot
        )
    except (ImportError, OSError, ValueError) as error:
        raise refused(error) from None
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None


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
    compute_dtype: Annotated[
        str | None,
        typer.Option(help="Of NF4 layers' products: float32, bfloat16 or float16; by default the dtype."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Calibrate although the model knows less of the token ids than one that guesses, and write it "
            "although it loses more, calibrated, than rounded to nearest.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a saved model in OUTPUT.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the whole report into this .json file.")] = None,
) -> None:
    """Quantize a saved model to NF4, as bitsandbytes and transformers load it; calibrated on text, if it is given."""
    from hf_qlora import NF4Config
    from hf_qlora.quant.calibrate.errors import CalibrationRefused
    from hf_qlora.quantize_files import quantize_files

    try:
        if report is not None:
            make_place(report, output)
        skipped = NF4Config().skip_modules if skip_modules is None else tuple(skip_modules)
        config = NF4Config(
            double_quant=not no_double_quant,
            block_size=block_size,
            skip_modules=skipped,
            compute_dtype=compute_dtype,
        )
        check_rows_are_used(calibrate, rows, length, held_out, seed)
        with terminated_as_interrupted():
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
                force=force,
                overwrite=overwrite,
            )
    except CalibrationRefused as error:
        typer.echo(str(error.report))
        write_report(error.report, report)
        raise refused(error) from None
    except (ImportError, OSError, ValueError) as error:
        raise refused(error) from None
    except KeyboardInterrupt:
        raise stopped(output) from None
    say_and_write(found, output, report)
