"""Functions that take turns: one runs at a time, each goes on where it was, and none is left running."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time

import pytest
import torch

from hf_qlora.quant.calibrate.turns import Turn


def test_each_goes_on_where_it_was() -> None:
    said: list[str] = []

    def speaker(name: str) -> Turn:
        def speak() -> None:
            for number in range(3):
                said.append(f"{name}{number}")
                turn.wait()

        turn = Turn(speak, "cpu")
        return turn

    one, other = speaker("a"), speaker("b")
    for turn in (one, other, other, one, one, other):
        turn.go_on()
    assert said == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert not one.ended
    one.go_on()
    assert one.ended
    other.abandon()


def test_what_is_raised_within_is_the_callers() -> None:
    turn = Turn(lambda: 1 / 0, "cpu")
    with pytest.raises(ZeroDivisionError):
        turn.go_on()
    assert turn.ended


def test_torch_s_settings_are_the_makers() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    found: list[object] = []

    def look() -> None:
        found.extend([torch.get_num_threads(), torch.is_grad_enabled(), variable.get()])
        found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    token = variable.set("some")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            turn = Turn(look, "cpu")
        turn.go_on()  # as they were when it was made
        Turn(look, "cpu").go_on()
    finally:
        torch.set_num_threads(before)
        variable.reset(token)
    assert found == [3, False, "some", torch.float16, 3, True, "some", None]


@pytest.mark.parametrize("starts", [False, True])
def test_an_abandoned_one_cleans_up_and_is_gone(starts: bool) -> None:
    done: list[str] = []

    def work() -> None:
        try:
            done.append("began")
            turn.wait()
            done.append("went on")
        finally:
            done.append("cleaned up")

    turn = Turn(work, "cpu")
    before = threading.active_count()
    if starts:
        turn.go_on()
    turn.abandon()
    assert done == (["began", "cleaned up"] if starts else [])
    assert threading.active_count() == before


def test_after_an_interrupt_it_ends_at_the_next_check() -> None:
    def endless() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            turn.check()
            time.sleep(0.01)

    turn = Turn(endless, "cpu")
    with pytest.raises(KeyboardInterrupt):
        turn.go_on()
    assert not turn.ended
    turn.abandon()
    assert turn.ended
