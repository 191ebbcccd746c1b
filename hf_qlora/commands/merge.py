"""`hf-qlora merge`."""

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
from hf_qlora.console import misused


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
        str,
        typer.Option(
            help="For adapters of stock PEFT, which do not say: dense; nf4, from a dense base with double-quantized "
            "scales; auto, the base as stored."
        ),
    ] = "auto",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="--onto nf4: merge although less than half of the adapter is left, or --calibrate has token ids of "
            "which the model knows less than one that guesses. Any --onto: although the base is another one, and the "
            "adapter's config says on_base_mismatch='error'.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a saved model in OUTPUT.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the whole report into this .json file.")] = None,
) -> None:
    """Merge a saved adapter into its base, one layer at a time, and measure what each layer loses."""
    from hf_qlora.merge.report import MergeRefused
    from hf_qlora.merge.stream import merge_files

    try:
        if report is not None:
            make_place(report, output)
        check_rows_are_used(calibrate, rows, length, held_out, seed)
        if calibrate is None and device is not None:
            raise misused("--device is where the model runs for --calibrate; other merges run on the CPU.")
        with terminated_as_interrupted():
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
        if error.report.layers:  # else it was refused before anything was measured
            typer.echo(str(error.report))
            write_report(error.report, report)
        raise refused(error) from None
    except (ImportError, OSError, ValueError) as error:
        raise refused(error) from None
    except KeyboardInterrupt:
        raise stopped(output) from None
    say_and_write(found, output, report)
