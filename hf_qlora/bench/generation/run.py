"""The measurement: seconds of each round, and the tokens of the last."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from hf_qlora.bench.generation.arms import ARMS, Bases, Generation
from hf_qlora.bench.measure import clock, environment


WARMUP = 4  # tokens of each arm before anything is counted: layers are repacked in the first


def measure(case: Generation, rounds: int, arms: Sequence[str] = tuple(ARMS)) -> dict[str, Any]:
    """All of it, as JSON types.

    Raises:
        RuntimeError: an arm within `fast_generation`, on a processor that has no such kernel.
    """
    bases = Bases(case)
    models = {name: ARMS[name].build(bases) for name in arms}
    found: dict[str, dict[str, Any]] = {name: {"generation_s": []} for name in arms}
    tokens: dict[str, list[int]] = {}
    with ExitStack() as ways, tqdm(total=rounds * len(arms), desc="generation", unit="round") as bar:
        for name, model in models.items():
            ways.enter_context(ARMS[name].way(model))
            generate(model, case, WARMUP)
        for number in range(rounds):
            # In another order each time, so that no arm always follows the same one.
            order = list(models.items())
            for name, model in order[number % len(order) :] + order[: number % len(order)]:
                bar.set_postfix_str(name)
                started = clock(case.device)
                tokens[name] = generate(model, case, case.new_tokens)
                found[name]["generation_s"].append(clock(case.device) - started)
                bar.update()
    for name in arms:
        exact = tokens.get(ARMS[name].exact)
        found[name]["base"] = ARMS[name].base
        found[name]["same_tokens"] = None if exact is None else leading(tokens[name], exact)
    return {"case": asdict(case), "with": environment(case.device), "arms": found}


def generate(model: Any, case: Generation, count: int) -> list[int]:
    """`count` new tokens of the first sequence, greedily, whatever they are."""
    prompt = case.prompt()
    ids: torch.Tensor = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    new: list[int] = ids[0, prompt.shape[1] :].tolist()
    return new


def leading(found: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    same = [one == other for one, other in zip(found, expected, strict=True)]
    return same.index(False) if False in same else len(same)
