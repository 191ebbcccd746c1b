"""Whether the layers that a quantization report suggests are worth their bytes: perplexity against random layers.

SmolLM2, bfloat16, and the answers of the demo's task. Nothing is trained. Every arm is the model in NF4 but for some
layers that stay dense: those suggested for a budget, or layers drawn at random, each that still fits, for the bytes
that the suggested ones take.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_qlora.bench.measure import environment
from hf_qlora.config import NF4Config
from hf_qlora.demo.chats import read_chats
from hf_qlora.demo.examples import choose
from hf_qlora.demo.models import default_model, load_chat_model, load_dense_model, perplexity
from hf_qlora.demo.settings import Settings
from hf_qlora.quant import skip_list
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.report import QuantizationReport
from hf_qlora.quant.survey import quantization_report


SEED = 0


def measure(budget: str, draws: int, answers: int) -> dict[str, Any]:
    """The perplexities on so many answers, and what each arm left dense.

    Raises:
        ConfigError: a budget that cannot be read, before anything is loaded, or that fits no layer.
    """
    skip_list.bytes_of(budget, 0)
    base = default_model()
    tokenizer, model = load_chat_model(base)
    settings = Settings(None, None, Path(), 1, 1, 1, False, 1e-3, answers, 160, SEED, False)
    _, examples = choose(read_chats(None, SEED), tokenizer, settings)
    dense = perplexity(model, examples)
    report = quantization_report(model, quant_types=("nf4",), budget=budget)
    arms = {"none": [], "suggested": report.left_dense}
    arms |= {f"random {i}": draw(report, i) for i in range(1, draws + 1)}
    found = {}
    for name, layers in arms.items():
        model = load_dense_model(base)
        _quantize(model, layers)
        found[name] = {"perplexity": perplexity(model, examples), **_described(report, layers)}
    return {"budget": budget, "answers": answers, "dense": dense, "arms": found, "with": environment("cpu")}


def draw(report: QuantizationReport, seed: int) -> list[str]:
    """Random layers for the bytes that the suggested ones take."""
    scheme, left, drawn = report.schemes[0], report.extra_bytes, []
    for layer in random.Random(seed).sample(report.layers, len(report.layers)):
        if layer.cost(scheme) <= left:
            drawn.append(layer.name)
            left -= layer.cost(scheme)
    return drawn


def _quantize(model: nn.Module, dense: list[str]) -> None:
    quantize_model(model, NF4Config(skip_modules=("lm_head", *dense)))


def _described(report: QuantizationReport, layers: list[str]) -> dict[str, Any]:
    scheme = report.schemes[0]
    costs = {layer.name: layer.cost(scheme) for layer in report.layers}
    return {"layers": layers, "bytes": sum(costs[name] for name in layers), "error": report.error(scheme, layers)}


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each arm."""
    lines = [
        f"{result['answers']} answers; dense: {result['dense']:.3f}.",
        "",
        "| left dense | layers | MiB | error of weights | perplexity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, arm in result["arms"].items():
        lines.append(
            f"| {name} | {len(arm['layers'])} | {arm['bytes'] / 2**20:.1f} | {arm['error']:.4f} | "
            f"{arm['perplexity']:.3f} |"
        )
    return "\n".join(lines)
