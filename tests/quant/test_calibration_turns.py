"""Functions that take turns: each goes on where it was, and none is left behind."""

from __future__ import annotations

import contextvars

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
    assert other.ended


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_raised_within_is_the_callers(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    turn = Turn(fail, "cpu")
    with pytest.raises(error):
        turn.go_on()
    assert turn.ended
    turn.abandon()


def _settings() -> list[object]:
    return [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")]


def test_torch_s_settings_are_each_side_s_own() -> None:
    """Those of the maker to begin with; and what one changes around its `wait` is not the other's."""
    variable = contextvars.ContextVar("variable", default="none")
    found: list[object] = []

    def work() -> None:
        found.append([*_settings(), variable.get()])
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            turn.wait()
            found.append(_settings())
        found.append(_settings())

    variable.set("some")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        turn = Turn(work, "cpu")
    turn.go_on()
    assert _settings() == [True, False, torch.bfloat16]
    with torch.no_grad():
        turn.go_on()
        assert _settings() == [False, False, torch.bfloat16]
    maker = [False, True, torch.float16]
    assert found == [[*maker, "some"], [True, False, torch.float16], maker]
    assert turn.ended


@pytest.mark.parametrize("starts", [False, True])
def test_an_abandoned_one_cleans_up(starts: bool) -> None:
    done: list[str] = []

    def work() -> None:
        try:
            done.append("began")
            turn.wait()
            done.append("went on")
        finally:
            done.append("cleaned up")

    turn = Turn(work, "cpu")
    if starts:
        turn.go_on()
    turn.abandon()
    assert done == (["began", "cleaned up"] if starts else [])


def test_an_abandoned_one_leaves_the_callers_settings() -> None:
    """Contexts that it leaves put back its own."""

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            turn.wait()

    with torch.no_grad():
        turn = Turn(work, "cpu")
    turn.go_on()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turn.abandon()
        assert _settings() == [True, True, torch.bfloat16]
