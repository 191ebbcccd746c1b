"""The measurements: each a function of its settings and the device, run in whatever process comes to it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_qlora.bench.calibrated_nf4 import data, models
from hf_qlora.bench.measure import clock, map_large_blocks, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.merge import merge
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.run import calibration_report
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.footprint import footprint


ROWS = 64
FEW_ROWS = 8
CAPS = (None, 3.0)
QUESTIONS, SAMPLES = 160, 3
METHODS: dict[str, dict[str, Any]] = {
    "the default": {},
    "no correction": {"correction": False},
    "correction damped by 0.01": {"correction_damping": 0.01},
    "correction damped by 1": {"correction_damping": 1.0},
    "damped by 0.001": {"damping": 0.001},
    "damped by 0.1": {"damping": 0.1},
    "two fits of the scales": {"refits": 2},
    "tokens capped at 3 medians": {"cap": 3.0},
    "the base's scales": {"scales": "base"},
    "inputs in their order": {"order": "given"},
    "scales not fitted": {"refits": 0},
    "codes gone through once": {"refits": 0, "passes": 0},
}
BASES = ("dense", "nearest", "calibrated")
SIZES = {  # hidden size, intermediate size, layers, by device type
    "cpu": ((576, 1536, 30), (1024, 2816, 8), (2048, 5632, 2)),
    "cuda": ((576, 1536, 30), (2048, 8192, 8), (4096, 14336, 4)),
}


def merging(device: str, seed: int, steps: int, rows: int, questions: int, layers: int | None) -> dict[str, Any]:
    """An adapter merged in each way, against the unmerged model and the base alone."""
    model = models.adapted(device, seed, steps, layers)
    found: dict[str, Any] = {"arms": {}}

    def arm(name: str, merged: Any, **more: Any) -> None:
        given = models.answers(merged, questions)
        exact = sum(text.strip() == expected.strip() for text, expected in given) / len(given)
        found["arms"][name] = {
            "loss": models.losses(merged, layers),
            "exact": exact,
            "samples": given[:SAMPLES],
            **more,
        }

    arm("unmerged", model)
    with model.disable_adapter():
        arm("base", model)
    arm(f"{8 * models.dtype_of(device).itemsize} bits", merge(model).model)
    arm("nearest", merge(model, "nf4", force=True).model)
    arm("PEFT's merge", models.peft_merge(device, get_peft_model_state_dict(model), layers))
    for domain in ("chats", "headlines"):
        calibration = data.calibration_rows(domain, rows, seed)
        report = merge(model, "nf4", calibration=calibration, force=True)
        if report.calibration is None:
            raise RuntimeError(f"The merge calibrated on {domain} has no report: it was not calibrated.")
        arm(f"calibrated, {domain}", report.model, kept_on_held_out=report.kept, seconds=report.calibration.seconds)
    return found


def loftq(device: str, seed: int, steps: int, layers: int | None) -> dict[str, Any]:
    """An adapter that starts as what quantizing loses, before and after training, and rounded to nearest."""
    model = models.adapted(device, seed, steps, layers, "loftq")
    found = {"unmerged": models.losses(model, layers)}
    found["nearest"] = models.losses(merge(model, "nf4", force=True).model, layers)
    return found


def base(device: str, seed: int, rows: int, layers: int | None) -> dict[str, Any]:
    """The base alone: dense, rounded to nearest, and calibrated."""
    found: dict[str, Any] = {"dense": {"loss": models.losses(models.dense(device, layers), layers)}}
    found["nearest"] = {"loss": models.losses(quantize_model(models.dense(device, layers), NF4Config()), layers)}
    for domain in ("chats", "headlines"):
        calibrated = quantize_model(
            models.dense(device, layers), NF4Config(), calibration=data.calibration_rows(domain, rows, seed)
        )
        found[f"calibrated, {domain}"] = _calibrated(calibrated, layers)
    return found


def trained(device: str, seed: int, steps: int, rows: int, base: str, layers: int | None) -> dict[str, Any]:
    """An adapter trained on one of `BASES`.

    The base that is calibrated is so on other chats than those it is trained on; 0 or 1 of some 135 is trained on too,
    since the data has some twice.
    """
    model = models.dense(device, layers)
    if base != "dense":
        calibration = data.calibration_rows("chats", rows, seed) if base == "calibrated" else None
        model = quantize_model(model, NF4Config(), calibration=calibration)
    found = {"before": models.losses(model, layers)}
    torch.manual_seed(seed)
    config = QLoRAConfig(**models.LORA, quantization=None if base == "dense" else NF4Config())
    adapted = get_peft_model(model, config)
    models.train(adapted, seed, steps)
    return {**found, "loss": models.losses(adapted, layers)}


def amount(device: str, seed: int, steps: int, rows: int, layers: int | None) -> dict[str, Any]:
    """A merge and a base, calibrated on so many rows of chats."""
    return _both(device, seed, steps, layers, Calibration(data.calibration_rows("chats", rows, seed)))


def capped(device: str, seed: int, steps: int, rows: int, cap: float | None, layers: int | None) -> dict[str, Any]:
    """A merge and a base, calibrated on so many rows of chats, of which tokens with huge inputs are weighed down."""
    return _both(device, seed, steps, layers, Calibration(data.calibration_rows("chats", rows, seed), cap=cap))


def method(device: str, seed: int, steps: int, rows: int, name: str, layers: int | None) -> dict[str, Any]:
    """A merge and a base by one of `METHODS`."""
    calibration = Calibration(data.calibration_rows("chats", rows, seed), **METHODS[name])
    return _both(device, seed, steps, layers, calibration)


def _both(device: str, seed: int, steps: int, layers: int | None, calibration: Calibration) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"loss": loss} for name, loss in models.reference_losses(device, seed, steps, layers).items()
    }
    model = models.adapted(device, seed, steps, layers)
    found["merged"] = _calibrated(merge(model, "nf4", calibration=calibration, force=True).model, layers)
    own = replace(calibration, scales="own")  # a dense base has none of its own
    found["calibrated"] = _calibrated(
        quantize_model(models.dense(device, layers), NF4Config(), calibration=own), layers
    )
    return found


def _calibrated(model: nn.Module, layers: int | None) -> dict[str, Any]:
    report = calibration_report(model)
    if report is None:
        raise RuntimeError("The model has no report of its calibration: it was not calibrated.")
    return {
        "loss": models.losses(model, layers),
        "error": report.error,
        "nearest": report.nearest,
        "seconds": report.seconds,
    }


def cost(device: str, size: int, rows: int) -> dict[str, Any]:
    """Time and memory of calibrating random weights of a size of `SIZES`, in processes of their own.

    On the CPU twice, the second time with large blocks mapped, which takes longer: `peak_bytes` is what is in use
    then, and `heap_bytes` the first time's, with what glibc keeps of what was freed.
    """
    hidden, intermediate, layers = SIZES[torch.device(device).type][size]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    found = _calibrating(device, sizes, rows)
    if torch.device(device).type == "cpu":
        found["heap_bytes"] = found["peak_bytes"]
        found["peak_bytes"] = apart(_calibrating, device, sizes, rows, True)["peak_bytes"]
    return {
        **sizes,
        **found,
        "gram_bytes": 4 * intermediate**2,
        "hidden_states_bytes": 2 * models.dtype_of(device).itemsize * (rows + data.HELD_OUT) * data.LENGTH * hidden,
    }


def _calibrating(device: str, sizes: dict[str, int], rows: int, mapped: bool = False) -> dict[str, Any]:
    if mapped:
        map_large_blocks()
    imported = memory(device).now
    model = _random(device, sizes)
    given = CalibrationRows(
        {"input_ids": torch.randint(0, 512, (rows + data.HELD_OUT, data.LENGTH))}, data.HELD_OUT, "random tokens"
    )
    model_bytes = footprint(model).total_bytes
    reset_peak(device)
    started = clock(device)
    quantize_model(model, NF4Config(), calibration=given)
    return {
        "seconds": clock(device) - started,
        "quantized_params": footprint(model).quantized_params,
        "model_bytes": model_bytes,
        "peak_bytes": memory(device).peak - imported,
    }


def _random(device: str, sizes: dict[str, int]) -> Any:
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(
        vocab_size=512,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads // 3,
        tie_word_embeddings=True,
        initializer_range=0.5 / math.sqrt(sizes["hidden_size"]),  # a loss near that of guessing, as rows must have
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=models.dtype_of(device))
    return model.to(device)
