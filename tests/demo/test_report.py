"""What a terminal shows while training; what a log shows is in test_demo.py."""

from __future__ import annotations

import io
import types

from rich.console import Console

from hf_qlora.demo.report import LossBar, Report


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    bar = LossBar(Report(Console(file=screen, force_terminal=True, width=80)))
    state = types.SimpleNamespace(max_steps=3, global_step=2)
    with bar.progress:
        bar.on_train_begin(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 1.25})
        bar.on_step_end(None, state, None)
    last = screen.getvalue().rstrip().rpartition("\r")[2]
    assert "2/3" in last
    assert "loss 1.250" in last
