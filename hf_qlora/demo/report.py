"""What is printed: findings, the loss while training, and nothing of the libraries' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_qlora.console import ignore_renamed


class Report:
    """Lines of a label and a finding."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, label: str, text: str) -> None:
        self.console.print(f"{label:<12} {text}", soft_wrap=True, markup=False, highlight=False)


class LossBar(TrainerCallback):
    """A progress bar with the loss on a terminal; in a log, a line at each tenth of the way."""

    def __init__(self, report: Report) -> None:
        self.report, self.drawn = report, report.console.is_terminal
        label, loss = TextColumn("training    "), TextColumn("loss {task.fields[loss]}")
        columns = (label, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        self.progress = Progress(*columns, console=report.console, disable=not self.drawn)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, loss="…")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        loss = f"{float(logs['loss']):.3f}"
        self.progress.update(self.task, loss=loss)
        if not self.drawn:
            self.report("training", f"step {state.global_step}/{state.max_steps}, loss {loss}")


def quiet_libraries() -> None:
    """Keep the libraries' bars and a warning without consequences out of the output."""
    transformers_logging.disable_progress_bar()  # "Loading weights", a second or two for a small model
    ignore_renamed()
