"""What each way of checkpointing costs in time and saves in memory.

    one model with an adapter, learning rate 0; in each round each arm has its turn: enable it, a step, a timed step
    → seconds, peak, loss and gradient norm of each arm, on the same batches

All arms compute the same: their losses and gradient norms are those of the first one, or an arm is broken. The first
step of a turn is there for the mode to learn what layers keep, and for the allocator to forget the arm before. On
CUDA, where the allocator counts what is allocated, peaks are those of the timed steps; on the CPU, where only a
process's resident memory is counted, each arm's is taken in a process of its own.

The budgets are shares of what the layers keep without checkpointing, which two forwards tell: one to
measure them, one that keeps them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from hf_qlora.bench.measure import clock, environment, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.bench.train_step import report
from hf_qlora.bench.train_step.arms import Case, Step
from hf_qlora.bench.train_step.report import described, mib
from hf_qlora.bench.train_step.run import STEADY, WARMUP
from hf_qlora.config import QLoRAConfig
from hf_qlora.layers.checkpointable import checkpointable_layers
from hf_qlora.layers.checkpointing import enable_checkpointing


NONE = "none"
CASES = {
    "cpu": Case("smollm2", 4, 256, learning_rate=0.0),
    "cuda": Case("llama3-8b", 1, 4096, device="cuda", learning_rate=0.0),
}
Settings = Mapping[str, Any]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All of it, as JSON types."""
    step = _start(case)
    kept = _kept_bytes(step)
    arms = _arms(kept, chunk_size=max(case.sequence_length // 4, 1))
    on_cuda = torch.device(case.device).type == "cuda"
    found: dict[str, dict[str, Any]] = {name: {"settings": dict(arms[name]), "step_s": []} for name in arms}
    with tqdm(total=len(arms) * (rounds + (not on_cuda)), desc="checkpointing", unit="turn") as bar:
        resting = memory(case.device).now

        def on_turn(arm: str) -> None:
            bar.set_postfix_str(arm)
            bar.update()

        for number in range(rounds):
            for name, settings in arms.items():
                on_turn(name)
                peak = _turn(step, settings, number, found[name])
                if on_cuda:
                    before = found[name].get("memory", {"peak": 0})["peak"]
                    found[name]["memory"] = {"resting": resting, "peak": max(before, peak)}
        if not on_cuda:
            del step
            _peaks(case, arms, found, on_turn)
    return {"case": asdict(case), "with": environment(case.device), "kept_bytes": kept, "arms": found}


def _turn(step: Step, settings: Settings, number: int, found: dict[str, Any]) -> int:
    """Two steps of one arm; the peak on CUDA of the second, which is timed."""
    device = step.case.device
    enable_checkpointing(step.model, **settings)
    batch = step.case.batch(number)
    step(batch)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = clock(device)
    step(batch)
    found["step_s"].append(clock(device) - started)
    found["loss"], found["gradient_norm"] = step.loss, step.gradient_norm
    return memory(device).peak


def _peaks(
    case: Case, arms: Mapping[str, Settings], found: dict[str, dict[str, Any]], on_turn: Callable[[str], None]
) -> None:
    for name, settings in arms.items():
        on_turn(name)
        found[name]["memory"] = apart(peak_of_process, case, settings)


def peak_of_process(case: Case, settings: Settings) -> dict[str, int]:
    """Bytes beside the imports: the model with its optimizer, and the peak of steady steps."""
    imported = memory(case.device).now
    step = _start(case)
    enable_checkpointing(step.model, **settings)
    for number in range(WARMUP):
        step(case.batch(number))
    reset_peak(case.device)
    resting = memory(case.device).now
    for number in range(STEADY):
        step(case.batch(number))
    return {"resting": resting - imported, "peak": memory(case.device).peak - imported}


def _start(case: Case) -> Step:
    """An adapted model whose adapter does something."""
    model = get_peft_model(case.dense(), QLoRAConfig(**case.lora()))
    torch.manual_seed(case.seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return Step(model.train(), case, {})


def _kept_bytes(step: Step) -> int:
    """What the layers keep for backward where none is checkpointed."""
    enable_checkpointing(step.model, "budget", budget_bytes=2**62)
    step.model(**step.case.batch(0))  # checkpointed, and measured
    loss = step.model(**step.case.batch(0)).loss
    layer: Any = checkpointable_layers(step.model)[0]
    kept: int = layer._gradient_checkpointing_func.func.__self__.held
    del loss
    return kept


def _arms(kept: int, chunk_size: int) -> dict[str, Settings]:
    return {
        NONE: {"mode": None},
        "full": {"mode": "full"},
        "budget, 50 %": {"mode": "budget", "budget_bytes": kept // 2},
        "budget, 25 %": {"mode": "budget", "budget_bytes": kept // 4},
        "offload": {"mode": "offload"},
        f"full, chunks of {chunk_size:,}": {"mode": "full", "chunk_size": chunk_size},
        f"chunks of {chunk_size:,} alone": {"mode": None, "chunk_size": chunk_size},
    }


def markdown(result: dict[str, Any]) -> str:
    """One row for each arm; ratios are of medians."""
    case, arms = result["case"], result["arms"]
    rounds = len(arms[NONE]["step_s"])
    reference = statistics.median(arms[NONE]["step_s"])
    lines = [
        f"{case['shape']}, {case['batch_size']} × {case['sequence_length']:,} tokens, rank {case['rank']}, {rounds} "
        f"rounds; without checkpointing layers keep {mib(result['kept_bytes'])} MiB; {described(result['with'])}.",
        "",
        "| arm | step, s | ÷ none | peak, MiB | above resting, MiB | ÷ none | loss | gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    most = _above(arms[NONE])
    for name, arm in arms.items():
        median = statistics.median(arm["step_s"])
        lines.append(
            f"| {name} | {median:.3f} | {median / reference:.2f} | {mib(arm['memory']['peak'])} | {mib(_above(arm))} "
            f"| {_above(arm) / most:.2f} | {arm['loss']:.6f} | {arm['gradient_norm']:.6f} |"
        )
    return "\n".join(lines)


def _above(arm: dict[str, Any]) -> int:
    return int(arm["memory"]["peak"] - arm["memory"]["resting"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time, with each round as a point, and of memory."""
    report.plot(result, path)
