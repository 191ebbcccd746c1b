"""Runs of an example, kept: `python examples/NAME.py … --seed S --json FILE` for each arm and seed.

    for each seed: for each arm: not in the results yet → run → what it wrote into FILE becomes a sealed line

    {"part": "runs", "arm": …, "seed": …, "arguments": […], "found": {…}, "card": "…", "script": …, "with": {…}, …}

The seeds are the outer loop: an experiment that is cut off has whole seeds, with all arms, and goes on where it
stopped. What identifies a run is its part, arm, seed and arguments, the example's source (a hash) and the device: from
these its settings follow, which it says itself in `found`. Rows of another script or device may lie in the same file;
they are not read. Threads and this package's code are kept beside them, and identify nothing.

An example has to take `--seed`, `--device`, `--output FOLDER` and `--json FILE`; the card is the README.md that it
leaves in its output, which is otherwise thrown away.

A study's parts that are no runs of an example, such as times, are lines of the same file, kept by `keep`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hf_qlora
from hf_qlora.bench.measure import environment
from hf_qlora.bench.results import append_line, check_once, read_lines


# Sources of an example, by `fingerprint`, that compute what an earlier one does: what changed is what they check and
# say. Each was seen to give recorded rows again, bit for bit, and goes on with them.
SAME = {
    "a36ec0dcf8c2": "21530a609803",  # text_classification.py
    "09a78ff547b7": "4798554d56ed",  # text_generation.py
}
RATES = "LEARNING_RATES"  # an example's table of default rates, by method
RUNS = "runs"  # the part that a table is of; others are a study's own, as a sweep of learning rates


@dataclass(frozen=True)
class Run:
    """What identifies a run.

    Attributes:
        arguments: of the example, without those that only say where to write, and the seed.
    """

    arm: str
    seed: int
    arguments: tuple[str, ...]
    part: str = RUNS


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        arms: the arguments that make each arm, the reference first.
        arguments: of all arms.
    """

    arms: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    arguments: tuple[str, ...] = ()

    def runs(self) -> Iterator[Run]:
        """In the order in which they are done."""
        for seed in self.seeds:
            for arm, own in self.arms.items():
                yield Run(arm, seed, (*self.arguments, *own))


class ExampleError(RuntimeError):
    """An example that is not there or did not run to its end; the message says which, and what it said."""


def example(name: str) -> Path:
    """The file of an example, which lies beside the package in a checkout and is not in its wheel.

    Raises:
        ExampleError: it is not there.
    """
    path = checkout() / "examples" / name
    if not path.is_file():
        raise ExampleError(f"{path} is not there; the examples come with a checkout of the repository, not by pip.")
    return path


def checkout() -> Path:
    """The folder that the package's own lies in."""
    return Path(hf_qlora.__file__).parents[1]


def imported(script: Path) -> Any:
    """An example as a module, for its functions."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise ExampleError(f"{script} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # where its dataclasses and pickles look for themselves
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Origin:
    """What rows are of, beside their arguments: those of another script or device are never mixed into a table."""

    script: str
    device: str


def origin(script: Path, device: str) -> Origin:
    """Of runs that are made now."""
    return Origin(fingerprint(script), environment(device)["device"])


def last_origin(results: Path, device: str = "cpu") -> Origin | None:
    """That of the last row in the file of such a device; None where there is none."""
    of_cpu = environment("cpu")["device"].partition(",")[0]
    found = [of_row(row) for row in read_lines(results)]
    return next((one for one in reversed(found) if one.device.startswith(of_cpu) == (device == "cpu")), None)


def of_row(row: Mapping[str, Any]) -> Origin:
    return Origin(row.get("script", ""), row["with"]["device"])


def fingerprint(script: Path) -> str:
    """A short sha256 of an example's source, or of an earlier one that is the `SAME`.

    Without its table of default rates: each run is given its own.
    """
    source = script.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == RATES:
            lines[node.lineno - 1 : node.end_lineno] = []
            break
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    return SAME.get(digest, digest)


def perform(script: Path, runs: Iterable[Run], results: Path, device: str = "cpu", workers: int = 1) -> None:
    """Do those runs that are not in the file `results`, in their order, and append each as it ends.

    Args:
        device: cpu or cuda; on the CPU the GPU is hidden from the example.
        workers: runs side by side. The processor's cores are divided among them.

    Raises:
        ExampleError: a run that failed. What ended before is kept, and what ran beside it; no other is begun.
    """
    runs, ours = list(runs), origin(script, device)
    done = {run for run, _ in read(results, ours)}
    todo = [run for run in runs if run not in done]
    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else torch.get_num_threads()
    with (
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc=script.stem, unit="run") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting = {pool.submit(_do, script, run, device, threads): run for run in todo}
        failed: BaseException | None = None
        try:
            for ended in as_completed(waiting):
                if ended.cancelled():
                    continue
                if (error := ended.exception()) is not None:
                    failed = failed or error
                    for other in waiting:
                        other.cancel()  # those that run go on
                    continue
                run, (found, card) = waiting[ended], ended.result()
                values = {"arm": run.arm, "seed": run.seed, "arguments": list(run.arguments)}
                keep(results, run.part, {**values, "found": found, "card": card}, script, device, threads)
                bar.set_postfix_str(f"{run.arm}, seed {run.seed}")
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run have had the Ctrl-C themselves
            raise
        if failed is not None:
            raise failed


def keep(
    results: Path, part: str, values: Mapping[str, Any], script: Path, device: str, threads: int | None = None
) -> None:
    """Append a line of a part, with the environment."""
    with_ = environment(device) | ({} if threads is None else {"threads": threads})
    append_line(results, {"part": part, **values, "script": fingerprint(script), "with": with_})


def lines_of(results: Path, ours: Origin, part: str) -> list[dict[str, Any]]:
    """The file's lines of a part, of that script and device."""
    return [row for row in read_lines(results) if row["part"] == part and of_row(row) == ours]


def read_all(results: Path) -> list[tuple[Origin, Run, dict[str, Any]]]:
    """The runs in a file, each with its whole line ("found", "card", "with").

    Raises:
        ValueError: a line was changed, or a run of one script and device is there twice.
    """
    found = [
        (of_row(row), Run(row["arm"], row["seed"], tuple(row["arguments"]), row["part"]), row)
        for row in read_lines(results)
        if "arm" in row
    ]
    check_once(results, ((run, of) for of, run, _ in found))
    return found


def read(results: Path, ours: Origin) -> list[tuple[Run, dict[str, Any]]]:
    """Those of that script and device."""
    return [(run, row) for of, run, row in read_all(results) if of == ours]


def rows_of(study: Study, results: Path, ours: Origin) -> dict[int, dict[str, dict[str, Any]]]:
    """The study's lines by seed and arm, of the seeds that all arms have, in the study's order."""
    done = dict(read(results, ours))
    table: dict[int, dict[str, dict[str, Any]]] = {}
    for run in study.runs():
        if run in done:
            table.setdefault(run.seed, {})[run.arm] = done[run]
    return {seed: rows for seed, rows in table.items() if len(rows) == len(study.arms)}


def _do(script: Path, run: Run, device: str, threads: int) -> tuple[dict[str, Any], str]:
    """What the example wrote: its findings, and its card."""
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch, "found.json"), Path(scratch, "log.txt")
        output = Path(scratch, script.stem.replace("_", "-"))  # as the card is titled
        command = [sys.executable, str(script), *run.arguments, "--seed", str(run.seed)]
        command += ["--device", device, "--output", str(output), "--json", str(file)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("w", encoding="utf-8") as said:
            code = subprocess.run(command, env=variables, stdout=said, stderr=subprocess.STDOUT).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
            raise ExampleError(f"`{script.name} {' '.join(command[2:])}` ended with {code} and said: {lines[-1]}")
        card = output / "README.md"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found, card.read_text(encoding="utf-8") if card.is_file() else ""
