"""`hf-qlora bench`: a command for each measurement, which is made in the module that the command imports.

step.py, generation.py, suite.py, nf4.py, depth.py, examples.py   the commands, by what they measure
options.py, files.py, forms.py                                    what they share
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from hf_qlora.bench.commands import depth, examples, generation, nf4, step, suite
from hf_qlora.console import INTERRUPTED


class _Measurements(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped; a command that goes on where it stopped has kept what had ended by then.", err=True)
            raise typer.Exit(INTERRUPTED) from None


bench = typer.Typer(cls=_Measurements, help="Measurements that can be run again.", no_args_is_help=True)

for command in (
    suite.quantization,
    suite.compare,
    step.train_step,
    step.growth,
    step.checkpointing,
    step.callbacks,
    step.memory_plan,
    step.learning_curve,
    generation.generation,
    nf4.calibrated_nf4,
    nf4.skip_list,
    depth.adaptive_depth,
    examples.results_classification,
    examples.results_generation,
):
    bench.command()(command)  # its name with hyphens
