"""The command line: one verb for each job, and `bench` with the measurements."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_qlora.bench.commands import bench
from hf_qlora.commands import demo, inspect, merge, plan, quantize
from hf_qlora.console import ignore_renamed, misused


class _Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse what is empty, as an unset variable of a shell is: commands would take it for left out."""
        for before, given in pairwise([self.name or "", *args]):
            if not given or (given.startswith("--") and given.endswith("=")):
                raise misused(f"{given or before} has an empty text behind it; leave it out, or write what is meant.")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
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
    ignore_renamed()


app.command("inspect")(inspect.inspect_adapter)
app.command("plan")(plan.plan)
app.command("quant-report")(quantize.quant_report)
app.command("quantize")(quantize.quantize)
app.command("merge")(merge.merge_adapter)
app.command("demo")(demo.demo)
app.add_typer(bench, name="bench")
