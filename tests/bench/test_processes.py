"""Work in other processes: every job comes back with its own result, and an error ends the rest."""

from __future__ import annotations

import math
import os

import pytest
import torch

from hf_qlora.bench.processes import apart, side_by_side


JOBS = [(f"job {number}", (float(number),)) for number in range(5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_comes_back_with_its_result(workers: int) -> None:
    found = dict(side_by_side(math.sqrt, JOBS, workers))
    assert found == {f"job {number}": math.sqrt(number) for number in range(5)}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_the_callers(workers: int) -> None:
    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        list(side_by_side(math.sqrt, [*JOBS, ("bad", (-1.0,))], workers))


def test_workers_are_other_processes_and_share_the_cores() -> None:
    assert apart(os.getpid) != os.getpid()
    threads = {count for _, count in side_by_side(torch.get_num_threads, [("a", ()), ("b", ())], 2)}
    assert threads == {max(1, (os.cpu_count() or 1) // 2)}
