"""What the methods of examples/text_generation.py cost: memory, time of a step, speed of generating.

    memory      the peak of steady steps, each method in a process of its own
    time        all methods in one process, in turn, on the example's own batches; each with its loss and gradient norm
    generating  the base and QLoRA in turn: dense, NF4, unmerged, merged; see bench/generation

Models, rows and settings are the example's own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qlora import assets
from hf_qlora.bench.examples.runs import example, imported, keep
from hf_qlora.bench.generation import arms as generation_arms
from hf_qlora.bench.generation import report as generation_report
from hf_qlora.bench.generation import run as generation_run
from hf_qlora.bench.measure import clock, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.bench.results import read_lines
from hf_qlora.bench.train_step.arms import Step
from hf_qlora.bench.train_step.run import STEADY, WARMUP


METHODS = ("full", "lora", "qlora")
COST = "cost"


@functools.cache
def _script() -> Any:
    return imported(example("text_generation.py"))


@functools.cache
def _rows() -> list[Any]:
    """Those that the example trains on."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_135m_instruct())
    every = [_script().encode(tokenizer, chat) for chat in _script().default_chats("train")]
    return [row for row in every if len(row["input_ids"]) <= 160]


@functools.cache
def _dense() -> Any:
    return AutoModelForCausalLM.from_pretrained(assets.smollm2_135m_instruct(), dtype=torch.bfloat16)


@dataclass(frozen=True)
class Training:
    """A step of a method, as `train_step.Step` wants it."""

    method: str
    device: str
    learning_rate: float
    batch_size: int = 8
    rank: int = 16
    seed: int = 0

    def step(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(assets.smollm2_135m_instruct(), dtype=torch.bfloat16)
        torch.manual_seed(self.seed)
        model = _script().trainable(model.to(self.device), self.method, self.rank)
        return Step(model.train(), self, {}, autocast=self.method == "full")  # type: ignore[arg-type]

    def batch(self, number: int) -> dict[str, Tensor]:
        rows = _rows()[number * self.batch_size : (number + 1) * self.batch_size]
        return {name: tensor.to(self.device) for name, tensor in _script().collate(rows).items()}


@dataclass(frozen=True)
class RealGeneration(generation_arms.Generation):
    """With real weights and a real prompt."""

    def dense(self) -> Any:
        return _dense().requires_grad_(False)

    def prompt(self) -> Tensor:
        row = _rows()[0]
        return torch.tensor([row["input_ids"][: row["start"]]])


def perform(results: Path, rounds: int, rates: Mapping[str, str], device: str) -> None:
    """Measure what the file `results` does not have with as many rounds, and append it there."""
    done = {(row["what"], row["rounds"]) for row in read_lines(results) if row["part"] == COST}
    cases = [Training(method, device, float(rates[method])) for method in METHODS if method in rates]
    for what, measure in (("memory", _memory), ("time", _time), ("generating", _generating)):
        if (what, rounds) in done or (what == "generating" and device != "cpu"):
            continue
        keep(results, COST, {"what": what, "rounds": rounds, "found": measure(cases, rounds)}, device)


def _memory(cases: list[Training], rounds: int) -> dict[str, Any]:
    return {case.method: apart(peak_memory, case) for case in tqdm(cases, desc="memory", unit="method")}


def peak_memory(case: Training) -> dict[str, int]:
    """Bytes beyond what the imports take, in this process: model with optimizer at rest, and the peak of steps."""
    _rows()
    imported_ = memory(case.device).now
    step = case.step()
    for number in range(WARMUP):
        step(case.batch(number))
    reset_peak(case.device)
    resting = memory(case.device).now
    for number in range(WARMUP, WARMUP + STEADY):
        step(case.batch(number))
    return {"resting": resting - imported_, "peak": memory(case.device).peak - imported_}


def _time(cases: list[Training], rounds: int) -> dict[str, Any]:
    steps = {case: case.step() for case in cases}
    found: dict[str, Any] = {case.method: {"step_s": [], "losses": [], "gradient_norms": []} for case in cases}
    for number in tqdm(range(WARMUP + rounds), desc="time", unit="round"):
        order = list(steps.items())
        for case, step in order[number % len(order) :] + order[: number % len(order)]:
            batch, own = case.batch(number), found[case.method]
            started = clock(case.device)
            step(batch)
            if number >= WARMUP:
                own["step_s"].append(clock(case.device) - started)
            own["losses"].append(step.loss)
            own["gradient_norms"].append(step.gradient_norm)
    return found


def _generating(cases: list[Training], rounds: int) -> dict[str, Any]:
    prompt = RealGeneration().prompt().shape[1]
    case = replace(RealGeneration(), sequence_length=prompt, new_tokens=64 if rounds > 1 else 4)
    names = [name for name in generation_arms.possible() if not name.startswith("stock")]
    return generation_run.measure(case, rounds, names)


def markdown(results: Path) -> str:
    """The tables of what there is; of several measurements of the same, the last."""
    rows = {row["what"]: row for row in read_lines(results) if row["part"] == COST}
    parts = []
    if {"memory", "time"} <= rows.keys():
        spent, times = rows["memory"]["found"], rows["time"]["found"]
        lines = [
            f"| a step of 8 chats | peak memory, MB | at rest, MB | s, median of {rows['time']['rounds']} | ÷ full | "
            "last loss | last gradient norm |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        full = statistics.median(times["full"]["step_s"]) if "full" in times else float("nan")
        for method, own in times.items():
            median = statistics.median(own["step_s"])
            lines.append(
                f"| {method} | {spent[method]['peak'] / 1e6:,.0f} | {spent[method]['resting'] / 1e6:,.0f} | "
                f"{median:.2f} | {median / full:.2f} | {own['losses'][-1]:.3f} | {own['gradient_norms'][-1]:.2f} |"
            )
        parts.append("\n".join(lines))
    if "generating" in rows:
        parts.append(f"Generating: {generation_report.markdown(rows['generating']['found'])}")
    return "\n\n".join(parts)
