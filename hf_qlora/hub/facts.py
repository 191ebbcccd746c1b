"""What a model with an adapter says about itself, for its card."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_qlora import plots, saving
from hf_qlora.config import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.hub import card, licenses
from hf_qlora.identity import in_cache, is_local
from hf_qlora.layers import depth
from hf_qlora.layers.depth_scale import DepthScale
from hf_qlora.layers.names import adapted_layers
from hf_qlora.layers.profile import split_name
from hf_qlora.quant.calibrate.run import calibration_report
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.selection import is_named


logger = logging.getLogger(__name__)

PICTURE = "depth.png"
PLACEHOLDER = "path/or/id/of/this/adapter"
BASE_PLACEHOLDER = "path/or/id/of/the/base"
ARXIV = "https://arxiv.org/abs/"
# task_type: PEFT's auto class, transformers', and the Hub's task.
TASKS = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "AutoModel", "feature-extraction"),
}


def is_ours(pushed: Any) -> bool:
    """Whether it is a config of ours, or a model with an adapter that has one."""
    configs = pushed.peft_config.values() if isinstance(pushed, PeftModel) else [pushed]
    return any(isinstance(config, QLoRAConfig) for config in configs)


def create_or_update_model_card(original: Callable[..., None], model: PeftModel, output_dir: str) -> None:
    """PEFT's, called by every save: it would add its template, and replace a user's tags and base."""
    if not is_ours(model):
        original(model, output_dir)
        return
    write_card(model, Path(output_dir))


def write_card(
    model: PeftModel, folder: Path, here: str | None = None, picture: bool = False, tags: list[str] | None = None
) -> None:
    """Put what the model says about itself into the card of a folder.

    Args:
        here: id or path that the adapter will be loaded by, where it is known.
        picture: whether to draw the scales of depth beside the card; left out without matplotlib.
        tags: more of them.
    """
    found = card.load(folder)
    if found is not None:
        add_adapter(found, model, folder, here, picture)
        found.data["tags"] = list(dict.fromkeys([*(found.data.get("tags") or []), *(tags or [])]))
        card.write(folder, found)


def add_adapter(
    found: ModelCard, model: PeftModel, folder: Path, here: str | None, picture: bool, licence: str | None = None
) -> None:
    adapter = _adapter(model)
    config, base = model.peft_config[adapter], model.get_base_model()
    auto_peft, auto, _ = TASKS.get(config.task_type, ("AutoPeftModel", type(base).__name__, None))
    if not found.text.strip():
        found.text = f"# {_title(here, config)}\n"
    quantized = config.quantization
    streams = quantized is None or quantized.block_size == NF4Config().block_size
    known = type(base).__module__.startswith("transformers.")
    dtype = str(getattr(base, "dtype", torch.float32))
    name = base_name(model, config)
    of_base = licenses.known(name)
    calibration = calibration_report(base)
    licence_fields = {"license": licence} if licence else of_base
    facts = {
        "method": _method(config),
        "base": linked(name, config.revision),
        "adapter": _table(model, config, adapter),
        "scales": _scales(model, adapter, config),
        "picture": PICTURE if picture and _draw(model, adapter, config, folder / PICTURE) else None,
        "auto_peft": auto_peft,
        "stock": auto if streams and known else None,
        "quantized": None
        if quantized is None
        else {
            "double_quant": quantized.double_quant,
            "compute_dtype": str(quantized.compute_dtype or dtype),
            "skip": _kept_dense(base, config),
        },
        "calibrated": None if calibration is None else card.code(calibration.rows, card.LONGEST_SENTENCE),
        "classes": len(saving.labels(model)),
        "dtype": dtype,
        "base_literal": card.literal(base_id(name) or BASE_PLACEHOLDER),
        "here": card.literal(here or PLACEHOLDER),
        "license_of_base": not licence and of_base.get("license") == found.data.get("license", of_base.get("license")),
    }
    card.extend(found, "adapter", facts, _metadata(model, config, name, known) | licence_fields)


def task_of(model: PeftModel) -> str | None:
    """The Hub's name for what the model does; None where there is no telling."""
    config, kind = model.peft_config[_adapter(model)], type(model.get_base_model()).__name__
    for suffix, task in (("ForImageClassification", "image-classification"),):
        if kind.endswith(suffix):
            return task
    return TASKS.get(config.task_type, (None, None, None))[2]


def base_name(model: PeftModel, config: QLoRAConfig) -> str:
    named = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None)
    return str(named or "")


def base_id(name: str) -> str | None:
    """The base's id on the Hub, if it is one, or the folder that the Hub's client keeps it in."""
    cached = in_cache(name)
    if cached:
        return card.hub_id(cached[0])
    return None if not name or is_local(name) else card.hub_id(name)


def ask_for_license(model: PeftModel, token: bool | str | None = None) -> None:
    """Ask the Hub for the licence of a model's base, once."""
    base = base_name(model, model.peft_config[_adapter(model)])
    licenses.ask(base, base_id(base), token)


def _adapter(model: PeftModel) -> str:
    """The adapter that the card is about: the default, or else the first of ours."""
    names = [name for name, config in model.peft_config.items() if isinstance(config, QLoRAConfig)]
    return "default" if "default" in names else names[0]


def _title(here: str | None, config: QLoRAConfig) -> str:
    return (
        card.code(here.rpartition("/")[2]) if here else f"{'LoRA' if config.quantization is None else 'QLoRA'} adapter"
    )


def _method(config: QLoRAConfig) -> str:
    kind = f"[LoRA]({ARXIV}2106.09685)" if config.quantization is None else f"[QLoRA]({ARXIV}2305.14314)"
    depth_scaled = isinstance(config, AdaptiveDepthLoRAConfig)
    return f"A {kind} adapter{' scaled by depth' if depth_scaled else ''}"


def linked(name: str, revision: str | None) -> str:
    """The base as others may know it; the folder that it lies in on this machine is nobody's business."""
    if not name:
        return "a base without a name"
    known = base_id(name)
    if known:
        shown = f"[{card.code(known)}](https://huggingface.co/{known})"
    else:
        shown = card.code(PureWindowsPath(name).name if is_local(name) else name)
    return f"{shown} at revision {card.code(revision)}" if revision else shown


def _table(model: PeftModel, config: QLoRAConfig, adapter: str) -> dict[str, str]:
    """Rows of the table, those that say something."""
    modules = sorted({name.rpartition(".")[2] for name, _ in adapted_layers(model.get_base_model(), adapter)})
    weights = sum(p.numel() for name, p in model.named_parameters() if adapter in name.split("."))
    kinds = [name for name in ("use_rslora", "use_dora") if getattr(config, name)]
    others = [name for name in model.peft_config if name != adapter]
    rows = {
        "Base, quantized": quantization_of(_named_here(model, cast("NF4Config | None", config.quantization))),
        "Rank, alpha": f"{config.r}, {config.lora_alpha}" + "".join(f", {card.code(kind)}" for kind in kinds),
        "Ranks of their own": _patterns(config.rank_pattern),
        "Alphas of their own": _patterns(config.alpha_pattern),
        "Dropout": f"{config.lora_dropout:g}",
        "Initialisation": "" if config.init_lora_weights is True else card.code(config.init_lora_weights),
        "Adapted modules": card.code(", ".join(modules)),
        "Trained whole": card.code(", ".join(config.modules_to_save)) if config.modules_to_save else "",
        "Scaled by depth": _depth(config) if isinstance(config, AdaptiveDepthLoRAConfig) else "",
        "Classes": card.code(", ".join(saving.labels(model))) if saving.labels(model) else "",
        "Weights of the adapter": f"{weights:,}",
        "In memory, with the base": str(footprint(model)),
        "Other adapters here": card.code(", ".join(others)) if others else "",
        "Versions": card.code(", ".join(f"{name} {version}" for name, version in saving.versions().items())),
    }
    return {name: value for name, value in rows.items() if value}


def _named_here(model: nn.Module, config: NF4Config | None) -> NF4Config | None:
    """The config without names of modules that this model does not have."""
    if config is None:
        return None
    names = [name for name, _ in model.named_modules()]
    there = tuple(part for part in config.skip_modules if any(is_named(name, [part]) for name in names))
    return dataclasses.replace(config, skip_modules=there)


def _kept_dense(base: nn.Module, config: QLoRAConfig) -> list[str]:
    """What `BitsAndBytesConfig` has to be told not to quantize; empty where it knows by itself, of heads alone."""
    asked = [*cast("NF4Config", config.quantization).skip_modules, *(config.modules_to_save or ())]
    if not {*asked} - {*NF4Config().skip_modules}:
        return []
    linear = [_own_name(name) for name, module in base.named_modules() if type(module) in (nn.Linear, Conv1D)]
    dense = list(dict.fromkeys(name for name in linear if name))
    named = [part for part in dict.fromkeys(asked) if any(is_named(name, [part]) for name in dense)]
    return named + [name for name in dense if not is_named(name, named)]


def _own_name(name: str) -> str:
    """A base's layer by its name in the base; "" for what adapters put beside it."""
    if ".lora_" in name:
        return ""
    return re.sub(r"\.(base_layer|original_module|modules_to_save\..*)$", "", name)


def quantization_of(config: NF4Config | None) -> str:
    if config is None:
        return "no"
    scales = "scales in 8 bits (double quantization)" if config.double_quant else "scales in float32"
    dense = f"; dense by name: {card.code(', '.join(config.skip_modules))}" if config.skip_modules else ""
    compute = f"; products in {card.code(config.to_dict()['compute_dtype'])}" if config.compute_dtype else ""
    return f"NF4 in blocks of {config.block_size}, {scales}{compute}{dense}"


def _patterns(patterns: dict[str, Any]) -> str:
    return card.code(json.dumps(patterns)) if patterns else ""


def _depth(config: AdaptiveDepthLoRAConfig) -> str:
    gain = f"learned gain within e^±{config.gain_bound:g}" if config.learn_gain else "no learned gain"
    return f"profile {card.code(config.depth_profile)}, {gain}, attention {card.code(config.attention)}"


def _grid(model: PeftModel, adapter: str, config: QLoRAConfig) -> dict[tuple[str, str], DepthScale]:
    """The scales by (layer, module)."""
    base: nn.Module = model.get_base_model()
    return {
        split_name(base, name, config.layers_pattern): scale for name, scale in depth.scales(base, adapter).items()
    }


def _scales(model: PeftModel, adapter: str, config: QLoRAConfig) -> list[list[str]]:
    """A row for each layer: its name, and the means of its modules' scales."""
    by_layer: dict[str, list[DepthScale]] = {}
    for (layer, _), scale in _grid(model, adapter, config).items():
        by_layer.setdefault(layer, []).append(scale)
    kinds = ("profile", "gain", "attention", "value")
    return [
        [card.code(layer), *(f"{sum(getattr(one, kind) for one in found) / len(found):.4f}" for kind in kinds)]
        for layer, found in by_layer.items()
    ]


def _draw(model: PeftModel, adapter: str, config: QLoRAConfig, path: Path) -> bool:
    grid = {place: scale.value for place, scale in _grid(model, adapter, config).items()}
    if not grid:
        return False
    try:
        plots.heat_maps({"f · g · a": grid}, path, "f · g · a")
    except ImportError as error:
        logger.info("The card has no picture. %s", error)
        return False
    return True


def _metadata(model: PeftModel, config: QLoRAConfig, base: str, transformers: bool) -> dict[str, Any]:
    known = base_id(base)
    tags = ["lora", "hf_qlora", *(["qlora"] if config.quantization is not None else [])]
    tags += ["transformers"] if transformers else []
    tags += [card.one_line(tag) for tag in getattr(model.get_base_model(), "model_tags", None) or []]
    return {
        "library_name": "peft",
        "base_model": known,
        "base_model_relation": "adapter" if known else None,
        "pipeline_tag": task_of(model),
        "tags": tags + ([f"base_model:adapter:{known}"] if known else []),
    }
