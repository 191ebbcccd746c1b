"""`merge`: seconds, peak memory and KL of merging an adapter into its base.

    merge, dequantized     `hf_qlora.merge`: the base made dense, plus ΔW; with its report, layer by layer and on text
    merge, nf4             the same, rounded to NF4 again, each weight to its nearest level
    merge_and_unload       ours, onto the dense base, without a report
    PEFT's own             `merge_and_unload` of stock PEFT on bitsandbytes' layers, which rounds to NF4 again

KL is mean KL(p ‖ q) in nats, p of the unmerged model and q of the merged one, on the texts of `merge/probe.py`; beside
it stands that of the unmerged model with the adapter left out.
The adapter is random, and each layer's ΔW is 2 % of its W in the norm: KL says what a merge does to an adapter of
that size, and nothing of what it does to a task. A peak is what a merge takes beyond the model that it is given. All
arms take turns in one process of their own, another first in each round. Peak and KL are of a round of its own, before
the three at most that are timed: looking for a peak takes time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from hf_qlora.bench.measure import clock, in_turn, memory, peak_of, reset_peak
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.rows import Row, numbers, timings
from hf_qlora.bench.quantization.settings import Context, Settings, lora
from hf_qlora.bench.train_step.arms import with_stock_layers
from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.merge import merge, probe
from hf_qlora.merge.load import load_model
from hf_qlora.merge.measure import trained_weights
from hf_qlora.quant.base import quantize_model


RELATIVE_DELTA = 0.02
MOST_ROUNDS = 3  # each makes the model anew for each arm


def run(context: Context) -> list[Row]:
    context.at("in a process of its own")
    rounds = min(context.settings.rounds, MOST_ROUNDS)
    context.notes.append(f"Timings are of {rounds} round{'s' * (rounds != 1)}, after one that is not counted.")
    found: dict[str, dict[str, Any]] = context.alone(measure, context.folder, context.settings)
    rows = timings({arm: values["seconds"] for arm, values in found.items()})
    for arm, values in found.items():
        rows += numbers(arm, {"peak_bytes": values["peak"], "kl": values["kl"]})
    return [*rows, *numbers(WITHOUT, {"kl": found[PEFTS]["without"]})]


def measure(folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """All arms, in whatever process this is."""
    unmerged = _ours(folder, settings)
    adapter = scaled(unmerged)
    ids, _ = probe.rows(unmerged.get_base_model(), None, None)
    found: dict[str, dict[str, Any]] = {arm: {"seconds": []} for arm in ARMS}
    for number in range(-1, min(settings.rounds, MOST_ROUNDS)):
        for arm, do in in_turn(ARMS.items(), number):
            model = (_stock if arm == PEFTS else _ours)(folder, settings)
            set_peft_model_state_dict(model, adapter)
            if number < 0:
                found[arm] |= _looked_at(do, model, unmerged, ids, settings.device)
            else:
                gc.collect()
                started = clock(settings.device)
                merged = do(model)
                found[arm]["seconds"].append(clock(settings.device) - started)
                del merged
            del model
    return found


def _looked_at(
    do: Callable[[PeftModel], Any], model: PeftModel, unmerged: PeftModel, ids: Any, device: str
) -> dict[str, float]:
    """The peak and the KL of one merge."""
    reset_peak(device)
    before = memory(device).now
    with peak_of(device) as peak:
        merged = do(model)
    logits = probe.divergence(unmerged, merged, ids)
    return {"peak": max(peak() - before, 0), "kl": logits.merged, "without": logits.without}


def scaled(model: PeftModel, share: float = RELATIVE_DELTA) -> dict[str, Any]:
    """Bring each layer's ΔW to a share of its W in the norm; the adapter's tensors."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            W, T = trained_weights(layer, ["default"])
            layer.lora_B["default"].weight.data *= share * float(W.norm() / (T - W).norm())
    found: dict[str, Any] = get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _base(folder: Path, settings: Settings) -> Any:
    return quantize_model(load_model(str(folder), settings.dtype).to(settings.device), NF4Config())


def _ours(folder: Path, settings: Settings) -> PeftModel:
    return _adapted(_base(folder, settings), settings, QLoRAConfig)


def _stock(folder: Path, settings: Settings) -> PeftModel:
    return _adapted(with_stock_layers(_base(folder, settings)), settings, LoraConfig)


def _adapted(base: Any, settings: Settings, config: type[LoraConfig]) -> PeftModel:
    torch.manual_seed(settings.seed)
    return get_peft_model(base, lora(settings, config, init_lora_weights=False, task_type="CAUSAL_LM")).eval()


PEFTS, WITHOUT = "PEFT's own merge_and_unload", "the adapter left out"
ARMS: dict[str, Callable[[PeftModel], Any]] = {
    "merge, dequantized": lambda model: merge(model).model,
    "merge, nf4": lambda model: merge(model, "nf4", force=True).model,
    "merge_and_unload": lambda model: model.merge_and_unload(),
    PEFTS: lambda model: model.merge_and_unload(),
}
CASE = Case(
    "merge",
    "Merging",
    "KL is how far the merged model is from the unmerged one; where it is no less than that of leaving the adapter "
    "out, rounding to NF4 has lost the adapter. The two merges of this package also measure themselves, layer by "
    "layer and on text, within their seconds.",
    run,
    lambda sizes: 3 * sizes.dense + 2 * sizes.nf4,
)
