"""The measurements: time, memory, what is saved for backward, and the rate of a matrix product beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hf_qlora.bench.measure import clock, environment, in_turn, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.bench.train_step.arms import ARMS, Case, Step
from hf_qlora.bench.train_step.saved import counted


WARMUP = 2  # steps of each arm before anything is counted
STEADY = 3  # steps whose peak is taken


def measure(case: Case, rounds: int, arms: Sequence[str] = tuple(ARMS)) -> dict[str, Any]:
    """All of it, as JSON types."""
    with tqdm(total=len(arms) * (1 + rounds), desc="train-step", unit="step") as bar:
        found: dict[str, dict[str, Any]] = {}
        for arm in arms:
            bar.set_postfix_str(f"memory: {arm}")
            found[arm] = {"memory": peak_alone(arm, case)}
            bar.update()

        def on_step(arm: str) -> None:
            bar.set_postfix_str(arm)
            bar.update()

        times, rates, last = interleaved(case, rounds, arms, on_step)
    for arm in arms:
        found[arm] |= times[arm] | last[arm]
    return {
        "case": asdict(case),
        "with": environment(case.device),
        "flops": flops(case),
        "gemm_flops_per_s": statistics.median(rates),
        "arms": found,
    }


def interleaved(
    case: Case, rounds: int, arms: Sequence[str], on_step: Callable[[str], None] = lambda arm: None
) -> tuple[dict[str, dict[str, list[float]]], list[float], dict[str, dict[str, Any]]]:
    """Seconds of each arm's steps in turn, the rate of a matrix product in each round, and how each arm ended."""
    steps = {arm: ARMS[arm].start(case) for arm in arms}
    saved = {arm: saved_bytes(step) for arm, step in steps.items()}
    for number in range(1, WARMUP):
        for step in steps.values():
            step(case.batch(number))
    seconds: dict[str, dict[str, list[float]]] = {arm: {"step_s": []} for arm in arms}
    rates = []
    for number in range(WARMUP, WARMUP + rounds):
        batch = case.batch(number)
        for arm, step in in_turn(steps.items(), number):
            started = clock(case.device)
            step(batch)
            seconds[arm]["step_s"].append(clock(case.device) - started)
            on_step(arm)
        rates.append(gemm_rate(case))
    ends = {
        arm: {
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "saved_bytes": saved[arm],
            "trained_parameters": sum(parameter.numel() for parameter in step.trained),
        }
        for arm, step in steps.items()
    }
    return seconds, rates, ends


def peak_alone(arm: str, case: Case) -> dict[str, int]:
    """`peak_memory` in a process of its own; on CUDA in this one, where the allocator counts each tensor."""
    if torch.device(case.device).type == "cuda":
        reset_peak(case.device)
        return peak_memory(arm, case)
    measured: dict[str, int] = apart(peak_memory, arm, case)
    return measured


def peak_memory(arm: str, case: Case) -> dict[str, int]:
    """Bytes: what the imports took, the model with its optimizer, and the peak of steady steps."""
    imported = memory(case.device).now
    step = ARMS[arm].start(case)
    for number in range(WARMUP):
        step(case.batch(number))
    reset_peak(case.device)
    resting = memory(case.device).now
    for number in range(WARMUP, WARMUP + STEADY):
        step(case.batch(number))
    used = memory(case.device)
    return {
        "imports": imported,
        "resting": resting - imported,
        "peak": used.peak - imported,
        "reserved": used.held,
    }


def saved_bytes(step: Step) -> int:
    """Take a first step; the bytes that its adapted layers keep for backward. 0 where they are checkpointed."""
    if step.case.checkpointing:
        step(step.case.batch(0))
        return 0
    with counted(step.model) as found:
        step(step.case.batch(0))
    return sum(found.values())


def gemm_rate(case: Case, seconds: float = 0.2) -> float:
    """FLOP/s of the layers' largest matrix product in bfloat16, with the case's tokens."""
    sizes = case.architecture()
    x = torch.ones(case.tokens, sizes.hidden_size, dtype=torch.bfloat16, device=case.device)
    W = torch.ones(sizes.intermediate_size, sizes.hidden_size, dtype=torch.bfloat16, device=case.device)
    done, started = 0, clock(case.device)
    while (taken := clock(case.device) - started) < seconds or not done:
        for _ in range(10):
            x @ W.t()
        done += 10
    return done * 2 * x.numel() * len(W) / taken


def flops(case: Case) -> dict[str, float]:
    """Of one step's products: the frozen base's (forward, and backward to the input), and the adapters'.

    Of attention only what a causal mask leaves is counted, half of it.
    """
    with torch.device("meta"):
        model = replace(case, device="meta").dense()
    T = case.tokens
    linear = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    adapted = [(N, K) for N, K in linear if case.architecture().vocab_size != N]
    sizes = case.architecture()
    attention = 2 * T * case.sequence_length * sizes.hidden_size * sizes.num_hidden_layers
    return {
        "base": sum(2 * 2 * T * N * K for N, K in linear) + 3 * attention,  # backward takes two products for each
        "adapters": case.adapters * sum(3 * 2 * T * case.rank * (N + K) for N, K in adapted),
    }
