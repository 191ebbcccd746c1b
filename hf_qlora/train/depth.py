"""The scales of `AdaptiveDepthLoRAConfig`, as they move in training."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_qlora import plots
from hf_qlora.layers import depth
from hf_qlora.layers.names import adapted_layers
from hf_qlora.layers.norms import product_norm, weight_norm
from hf_qlora.layers.profile import split_name
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

MAPS = 6  # most steps shown in the plot


class DepthScaleCallback(TrainerCallback):
    """Log the scales of `AdaptiveDepthLoRAConfig` and the size of ΔW, and draw how they moved.

    With every logging step, for each numbered layer and on average over its modules: `depth/<layer>/profile` (f),
    `…/gain` (g), `…/attention` (a), and `…/delta` (‖ΔW‖/‖W‖, with all scales). At the end of training
    `depth_scales.png` in the Trainer's output folder shows f · g · a of all modules, at up to six steps.

    Args:
        trainer: whose `log` reaches what the Trainer reports to. Add with `trainer.add_callback(...)`.
        adapter: by default the active one.
        plot: whether to draw; needs matplotlib.

    Raises:
        ConfigError: the adapter has no scales.
        ImportError: matplotlib is to draw and is not installed.
    """

    def __init__(self, trainer: Trainer, adapter: str | None = None, plot: bool = True) -> None:
        model = getattr(trainer, "model", None)
        if not isinstance(model, PeftModel):
            raise ConfigError(
                f"DepthScaleCallback needs a Trainer of a PeftModel; its model is {type(model).__name__}."
            )
        self.trainer, self.plot = trainer, plot
        self.adapter = adapter or model.active_adapters[0]
        if not depth.scales(model, self.adapter):
            raise ConfigError(
                f"Adapter {self.adapter!r} has no depth scales; DepthScaleCallback is for AdaptiveDepthLoRAConfig."
            )
        if plot:
            plots.pyplot()
        self.weights: dict[str, float] = {}
        self.history: dict[int, dict[tuple[str, str], float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:  # not the callback's own, nor an evaluation's
            self.trainer.log(self._measure(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._measure(state.global_step)
        if self.plot:
            steps = sorted(self.history)
            shown = sorted({steps[round(i * (len(steps) - 1) / (MAPS - 1))] for i in range(MAPS)})
            path = Path(args.output_dir, "depth_scales.png")
            plots.heat_maps({f"step {step}": self.history[step] for step in shown}, path, "f · g · a")
            logger.info("Depth scales are drawn in %s.", path)

    def _measure(self, step: int) -> dict[str, float]:
        """The scales by layer, as they are logged; those by module go into the history."""
        model: nn.Module = self.trainer.model.get_base_model()
        found: dict[str, dict[str, list[float]]] = {}
        self.history[step] = {}
        for name, layer in adapted_layers(model, self.adapter):
            scale = depth.scale_of(layer, self.adapter)
            if scale is None:
                continue
            numbered, module = split_name(model, name, self.trainer.model.peft_config[self.adapter].layers_pattern)
            self.history[step][numbered, module] = scale.value
            if name not in self.weights:
                self.weights[name] = weight_norm(layer.get_base_layer())
            A, B = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
            delta = abs(layer.scaling[self.adapter]) * scale.value * product_norm(B.flatten(1), A.flatten(1))
            values = found.setdefault(numbered, {"profile": [], "gain": [], "attention": [], "delta": []})
            values["profile"].append(scale.profile)
            values["gain"].append(scale.gain)
            values["attention"].append(scale.attention)
            values["delta"].append(delta / self.weights[name])
        return {
            f"depth/{numbered}/{kind}": statistics.fmean(numbers)
            for numbered, values in found.items()
            for kind, numbers in values.items()
        }
