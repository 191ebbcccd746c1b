"""What the methods of examples/text_generation.py cost: memory, time of a step, speed of generating.

    memory      the peak of steady steps, the longest chats among them, each method in a process of its own
    time        all methods in one process, in turn, on the example's own batches; each with its loss and gradient norm
    generating  the base and QLoRA in turn: dense, NF4, unmerged, merged; see bench/generation. On the CPU only

Models, rows and settings are the example's own. A process makes WARMUP + STEADY steps and one of the longest chats for
the memory, WARMUP + rounds of each method for the time.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_qlora.bench.examples.runs import Origin, imported, keep, lines_of, origin
from hf_qlora.bench.generation import arms as generation_arms
from hf_qlora.bench.generation import report as generation_report
from hf_qlora.bench.generation import run as generation_run
from hf_qlora.bench.measure import clock, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.bench.train_step.arms import Step
from hf_qlora.bench.train_step.run import STEADY, WARMUP


COST = "cost"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A method as the example trains it.

    Attributes:
        arguments: of the example.
    """

    script: Path
    method: str
    learning_rate: float
    device: str
    arguments: tuple[str, ...] = ()


class Training:
    """The steps of a case: its model with optimizer, and its batches."""

    def __init__(self, case: Case) -> None:
        module = imported(case.script)
        with tempfile.TemporaryDirectory() as scratch:
            own = ["--method", case.method, "--device", case.device, "--output", scratch]
            options = module.read_options([*case.arguments, *own])
        tokenizer, model = module.load(options)
        rows, _ = module.choose_rows(options, tokenizer)
        self.case, self.collate, self.size = case, module.collate, options.batch_size
        self.rows = rows
        torch.manual_seed(options.seed)
        model = module.trainable(model, case.method, options.rank).train()
        # Of its case a step reads the device and the learning rate alone, which this one has.
        self.step = Step(model, case, {}, autocast=case.method == "full")  # type: ignore[arg-type]

    def batch(self, number: int) -> dict[str, Tensor]:
        first = number * self.size % (len(self.rows) - self.size + 1)
        return self._collated(self.rows[first : first + self.size])

    def longest(self) -> dict[str, Tensor]:
        """The batch that takes most."""
        return self._collated(sorted(self.rows, key=lambda row: len(row["input_ids"]))[-self.size :])

    def _collated(self, rows: list[Any]) -> dict[str, Tensor]:
        return {name: tensor.to(self.case.device) for name, tensor in self.collate(rows).items()}


class RealGeneration(generation_arms.Generation):
    """With real weights and a real prompt, (1, tokens). They are no fields: results do not have them."""

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        super().__init__(sequence_length=prompt.shape[1], new_tokens=new_tokens)
        vars(self).update(model=model, question=prompt)

    def dense(self) -> Any:
        return vars(self)["model"].requires_grad_(False)

    def prompt(self) -> Tensor:
        prompt: Tensor = vars(self)["question"]
        return prompt


def perform(
    script: Path, arguments: tuple[str, ...], results: Path, rounds: int, rates: Mapping[str, str], device: str
) -> None:
    """Measure what the file `results` does not have with as many rounds, and append it there.

    Args:
        arguments: of the example.
        rates: of each method that is measured.
    """
    ours = origin(script, device)
    done = {(row["what"], row["rounds"], tuple(row["arguments"])) for row in lines_of(results, ours, COST)}
    cases = [Case(script, method, float(rate), device, arguments) for method, rate in rates.items()]
    for what, measure in (("memory", _memory), ("time", _time), ("generating", _generating)):
        if (what, rounds, arguments) in done or (what == "generating" and device != "cpu"):
            continue
        values = {"what": what, "rounds": rounds, "arguments": list(arguments), "found": measure(cases, rounds)}
        keep(results, COST, values, script, device)


def _memory(cases: list[Case], rounds: int) -> dict[str, Any]:
    return {case.method: apart(peak_memory, case) for case in tqdm(cases, desc="memory", unit="method")}


def peak_memory(case: Case) -> dict[str, int]:
    """Bytes beyond what the imports take, in this process: model with optimizer at rest, and the peak of steps."""
    imported(case.script)
    before = memory(case.device).now
    training = Training(case)
    for number in range(WARMUP):
        training.step(training.batch(number))
    reset_peak(case.device)
    resting = memory(case.device).now
    for number in range(WARMUP, WARMUP + STEADY):
        training.step(training.batch(number))
    training.step(training.longest())
    return {"resting": resting - before, "peak": memory(case.device).peak - before}


def _time(cases: list[Case], rounds: int) -> dict[str, Any]:
    every = [Training(case) for case in cases]
    found: dict[str, Any] = {case.method: {"step_s": [], "losses": [], "gradient_norms": []} for case in cases}
    for number in tqdm(range(WARMUP + rounds), desc="time", unit="round"):
        for training in every[number % len(every) :] + every[: number % len(every)]:
            batch, own = training.batch(number), found[training.case.method]
            started = clock(training.case.device)
            training.step(batch)
            if number >= WARMUP:
                own["step_s"].append(clock(training.case.device) - started)
            own["losses"].append(training.step.loss)
            own["gradient_norms"].append(training.step.gradient_norm)
    return found


def _generating(cases: list[Case], rounds: int) -> dict[str, Any]:
    module = imported(cases[0].script)
    with tempfile.TemporaryDirectory() as scratch:
        options = module.read_options([*cases[0].arguments, "--device", "cpu", "--output", scratch])
    tokenizer, model = module.load(options)
    row = module.choose_rows(options, tokenizer)[1][0]
    prompt = torch.tensor([row["input_ids"][: row["start"]]])
    case = RealGeneration(model, prompt, NEW_TOKENS if rounds > 1 else 4)
    names = [name for name in generation_arms.possible() if not name.startswith("stock")]
    return generation_run.measure(case, rounds, names)


def markdown(results: Path, ours: Origin) -> str:
    """The tables of what there is; of several measurements of the same, the last."""
    rows = {row["what"]: row for row in lines_of(results, ours, COST)}
    parts = []
    if {"memory", "time"} <= rows.keys():
        spent, times = rows["memory"]["found"], rows["time"]["found"]
        lines = [
            f"| a step of 8 chats | peak memory, MB | at rest, MB | s, median of {rows['time']['rounds']} | ÷ full | "
            "last loss | last gradient norm |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method, own in times.items():
            median = statistics.median(own["step_s"])
            beside = f"{median / statistics.median(times['full']['step_s']):.2f}" if "full" in times else ""
            lines.append(
                f"| {method} | {spent[method]['peak'] / 1e6:,.0f} | {spent[method]['resting'] / 1e6:,.0f} | "
                f"{median:.2f} | {beside} | {own['losses'][-1]:.3f} | {own['gradient_norms'][-1]:.2f} |"
            )
        parts.append("\n".join(lines))
    if "generating" in rows:
        parts.append(f"Generating: {generation_report.markdown(rows['generating']['found'])}")
    return "\n\n".join(parts)
