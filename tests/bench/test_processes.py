"""Work in other processes: every job comes back with its own result, and an error ends what has not begun."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_qlora.bench.processes import side_by_side


JOBS = [(f"job {number}", (float(number),)) for number in range(5)]


def _root(x: float) -> tuple[float, int, int]:
    return math.sqrt(x), os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_comes_back_with_its_result(workers: int) -> None:
    """From this process where it is the only one; else from others, which share the cores."""
    found = dict(side_by_side(_root, JOBS, workers))
    assert {job: root for job, (root, _, _) in found.items()} == {f"job {n}": math.sqrt(n) for n in range(5)}
    pids, threads = ({line[part] for line in found.values()} for part in (1, 2))
    if workers == 1:
        assert pids == {os.getpid()}
    else:
        assert os.getpid() not in pids
        assert threads == {max(1, (os.cpu_count() or 1) // workers)}


def test_an_error_is_the_callers() -> None:
    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        list(side_by_side(math.sqrt, [*JOBS, ("bad", (-1.0,))], 1))


def _wait_for(file: str) -> str:
    """A job that ends when the file is there; where that never comes, after ten seconds."""
    end = time.monotonic() + 10
    while not Path(file).exists() and time.monotonic() < end:
        time.sleep(0.05)
    return file


def _fail_and_allow(file: str) -> str:
    if Path(file).suffix == ".wait":
        return _wait_for(file)
    Path(file).with_suffix(".wait").touch()
    raise ValueError("a job that fails")


def test_an_error_is_the_callers_and_what_runs_beside_it_is_kept(tmp_path: Path) -> None:
    # The first job waits for a file which the second makes before it fails: both have begun when one fails.
    jobs = [(name, (str(tmp_path / name),)) for name in ("job.wait", "job.fail")]
    found = []
    with pytest.raises(ValueError, match="a job that fails"):
        found.extend(side_by_side(_fail_and_allow, jobs, 2))
    assert [job for job, _ in found] == ["job.wait"]


_PARENT = """
from hf_qlora.bench.processes import apart
from tests.bench.test_processes import say_and_sleep
import sys
if __name__ == "__main__":
    apart(say_and_sleep, sys.argv[1])
"""


def say_and_sleep(file: str) -> None:
    partial = Path(file).with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(file)
    time.sleep(120)


def test_nothing_goes_on_when_the_caller_is_killed(tmp_path: Path) -> None:
    script, said = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(_PARENT)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, str(script), str(said)], env=os.environ | {"PYTHONPATH": str(root)})
    _until(said.exists, 120)
    child = int(said.read_text())
    assert child != parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not _is_running(child), 20)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Whether it is there and no zombie, which waits for init to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
