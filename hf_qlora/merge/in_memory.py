"""`merge`: a model in memory, merged into a new one."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from typing import Any, Literal, get_args

import bitsandbytes as bnb
import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.linear import Linear4bit
from hf_qlora.merge import held_out, measure, probe
from hf_qlora.merge.measure import LayerMerge
from hf_qlora.merge.names import is_of_adapter, wrapped_name
from hf_qlora.merge.original import load_original, name_of, other_weights, take_weights
from hf_qlora.merge.report import MergeRefused, MergeReport
from hf_qlora.merge.twin import give_own_weights, tied_groups, twin, untie_split
from hf_qlora.quant.base import (
    PROGRESS_DELAY_S,
    forget_quantization,
    is_quantized,
    quantize_model,
)
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.run import calibration_report, planned
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit
from hf_qlora.quant.linear4bit import dense_weight
from hf_qlora.quant.quantizer import compute_dtype_of, dequantize_layers


logger = logging.getLogger(__name__)

Onto = Literal["dequantized", "original", "nf4"]
ONTO: tuple[Onto, ...] = get_args(Onto)

LEAST_KEPT = 0.5  # of the adapter; below, a merge into NF4 is refused
NEARLY_ALL = 0.99  # below, there is a warning of one that is not calibrated


def merge(
    model: PeftModel,
    onto: Onto = "dequantized",
    original: str | os.PathLike[str] | nn.Module | None = None,
    *,
    texts: probe.Texts | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    force: bool = False,
) -> MergeReport:
    """Merge a model's active LoRA adapters into a new model, and measure what that does to it.

    The given model stays as it is. The new one takes the memory of the dense base.

    Args:
        model: a PEFT model with LoRA adapters, on a dense or an NF4 base.
        onto: "dequantized" adds ΔW to the base as it was trained on, made dense: the function that was trained.
            "original" adds it to the dense base that was quantized. "nf4" rounds the sum to NF4 again, which without
            `calibration` loses most of the adapter.
        original: for `onto="original"`: a folder, a Hub id, or a model of the base's class, which stays as it is.
        texts: what to compare the logits on: a string, strings, or lists of token ids. By default two paragraphs of
            prose, or random tokens where the base has no tokenizer.
        tokenizer: for strings; by default the one that lies with the base.
        calibration: for `onto="nf4"`: rows to calibrate the rounding on, like those that the adapter was trained on;
            whatever `calibration_rows` takes, or a `Calibration`. Takes minutes. What is kept is then measured on its
            held-out rows, and not on `texts`.
        force: merge although less than half of the adapter is left in NF4, or although the original is not what the
            base was made of, or the token ids to calibrate on may be another tokenizer's.

    Returns:
        the report; `report.model` is the merged model.

    Raises:
        MergeRefused: less than half of the adapter would be left in NF4.
        CalibrationError: rows that cannot be used.
        MergeError: a model without LoRA adapters, with none active, merged already, or broken; an unknown `onto`; an
            original that is missing, quantized, of another architecture or with other weights.
    """
    check_onto(onto, original, calibration)
    names = _check_model(model)
    reference = twin(model, share=True)
    reference.base_model.check_mergeable(names, safe_merge=False)
    base = reference.get_base_model()
    ids, text = probe.rows(base, texts, tokenizer)
    if ids and texts is None:
        ids, text = probe.readable(reference, ids, text)
    dense = None if original is None else load_original(original, base)
    _refuse_8_bits(base, onto)
    other = "" if dense is None else other_weights(dense, base)
    if other and not force:
        raise MergeError(
            f"original {name_of(original)} is not what the base was made of: {other}. Name the model that was "
            "quantized; force merges all the same."
        )
    if calibration is not None:  # read before anything long
        calibration = planned(calibration, base, tokenizer)
        calibration = replace(calibration, force=calibration.force or force)
    merged, notes = _merged(model, names, dense)
    if other:
        notes.append(f"The original is not what the base was made of: {other}.")
    if onto == "nf4":
        config, stay_dense = _packing(base)
        quantize_model(merged, config, skip=stay_dense, calibration=calibration, base=_packed_weights(base))
    layers = _measured(reference, merged, names, dense, notes)
    logits = probe.divergence(reference, merged, ids) if ids else None
    report = MergeReport(
        onto=onto,
        base=str(getattr(base, "name_or_path", "") or type(base).__name__),
        original=None if original is None else name_of(original),
        adapters=names,
        dtype=str(_dtype(merged)).removeprefix("torch."),
        layers=layers,
        text=text,
        logits=logits,
        quantized=is_quantized(base),
        notes=notes,
        model=merged,
        calibration=None if calibration is None else calibration_report(merged),
    )
    if report.calibration is not None:
        report.notes += report.calibration.notes
        report.losses = held_out.losses(reference, calibration.rows, report.calibration.losses)
        report.outputs = held_out.output_error(reference, merged, calibration.rows)
    refuse_lost(report, force)
    return report


def _packed_weights(base: nn.Module) -> dict[str, Packed]:
    """The base's packed weights by the names that they have without adapters."""
    return {
        wrapped_name(name): (module.weight.data, module.state)
        for name, module in base.named_modules()
        if isinstance(module, BaseLinear4bit)
    }


def _refuse_8_bits(base: nn.Module, onto: str) -> None:
    """PEFT merges into its layers and leaves them in 8 bits, so that there is no dense sum to round."""
    if onto == "nf4" and any(isinstance(module, bnb.nn.Linear8bitLt) for module in base.modules()):
        raise MergeError(
            "The base is in 8 bits, and only dense and 4-bit bases are rounded to NF4. Load it dense or in 4 bits, "
            "which are other bases than was trained on; PEFT's merge_and_unload() keeps the 8 bits."
        )


def check_onto(onto: str, original: object, calibration: object = None) -> Onto:
    """Refuse an unknown `onto`, and an original or a calibration that is missing or of no use."""
    if onto not in ONTO:
        raise MergeError(f"onto={onto!r} is not known; choose one of {ONTO}.")
    if onto == "original" and original is None:
        raise MergeError("onto='original' needs original=: the folder, the Hub id or the model of the dense base.")
    if onto != "original" and original is not None:
        raise MergeError(f"original= is used with onto='original' alone; onto is {onto!r}.")
    if onto != "nf4" and calibration is not None:
        raise MergeError(f"Only rounding is calibrated, by onto='nf4'; onto is {onto!r}. Leave calibration out.")
    return onto


def refuse_lost(report: MergeReport, force: bool) -> None:
    """Raise MergeRefused for a merge into NF4 that leaves little of the adapter."""
    if report.onto == "nf4" and not report.kept >= LEAST_KEPT and not force:
        left = f"Rounded to NF4, {max(report.kept, 0):.1%} of the adapter is left, by {report.measure}"
        why = "the steps between NF4's levels are larger than ΔW. Calibrate the rounding, with rows like those it was "
        why += "trained on, which keeps most of it in the same 4 bits; merge"
        if report.calibration is not None:
            why = "the rows may be too few, or too far from what the adapter was trained on. Give others, merge"
        raise MergeRefused(
            f"{left}{_unlike_logits(report)}: {why} with onto='dequantized', which keeps all of it; or serve the "
            "adapter unmerged on the NF4 base; force merges all the same.",
            report,
        )
    if report.onto == "nf4" and report.calibration is None and not report.kept >= NEARLY_ALL:
        logger.warning(
            "Rounded to NF4, %.1f%% of the adapter is left, by %s%s. Calibrated on rows like those it was trained on, "
            "the rounding keeps most of it; merged with onto='dequantized', all.",
            100 * max(report.kept, 0),
            report.measure,
            _unlike_logits(report),
        )


def _unlike_logits(report: MergeReport) -> str:
    """Why it is the weights that the share is of: `merge` and `merge_files` measure different ones of one adapter."""
    return f" (the logits were {report.text})" if report.kept_by == "weights" else ""


def _check_model(model: Any) -> list[str]:
    """The names of the adapters to merge."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, nn.Module):
        files = "; for saved files, there is hf_qlora.merge.stream.merge_files, or `hf-qlora merge`"
        raise MergeError(
            f"{type(model).__name__} is not a PEFT model; merge takes what get_peft_model returns"
            f"{files if isinstance(model, str | os.PathLike) else ''}."
        )
    kinds = {config.peft_type for config in model.peft_config.values()}
    if kinds != {PeftType.LORA}:
        raise MergeError(f"The model has adapters of {sorted(kind.value for kind in kinds)}; merge takes LORA alone.")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    merged = [wrapped_name(name).removeprefix("base_model.model.") for name, layer in layers if layer.merged]
    if merged:
        raise MergeError(f"Adapters are merged into {merged[0]} already; call unmerge_adapter() first.")
    names = [name for name in model.active_adapters if any(name in layer.r for _, layer in layers)]
    if not names:
        raise MergeError(f"No adapter is active; choose some of {sorted(model.peft_config)} with set_adapter().")
    if all(layer.disable_adapters for _, layer in layers):
        raise MergeError("The adapters are disabled; merge outside of disable_adapter().")
    for name, parameter in model.named_parameters():
        if ".lora_" in name and not parameter.isfinite().all():
            raise MergeError(f"{name} has NaN or infinite values: its training diverged. Go back to a checkpoint.")
    return names


def _merged(model: PeftModel, names: list[str], dense: nn.Module | None) -> tuple[nn.Module, list[str]]:
    """A new model with the adapters merged, onto the weights of `dense` where it is given; and notes."""
    copied = twin(model)
    base = copied.get_base_model()
    if dense is not None:
        take_weights(base, dense, {model.peft_config[name].bias for name in names})
    groups = tied_groups(base)
    give_own_weights(base, [layer.get_base_layer() for _, layer in _lora_layers(base)])
    for name, layer in tqdm(_lora_layers(base), desc="Merging", unit="layer", delay=PROGRESS_DELAY_S, leave=False):
        if isinstance(layer, Linear4bit) and dense is not None:
            layer.merge(adapter_names=names, onto=dense_weight(dense.get_submodule(name)))
        else:
            layer.merge(adapter_names=names)
    with (
        warnings.catch_warnings()
    ):  # PEFT's, of merging what is merged, and of untied embeddings, which is a note here
        warnings.simplefilter("ignore")
        result: nn.Module = copied.merge_and_unload(adapter_names=names)
    dequantize_layers(result)
    forget_quantization(result)
    return result, untie_split(result, groups)


def _lora_layers(base: nn.Module) -> list[tuple[str, Any]]:
    """The adapted layers by the names that they have in the base."""
    return [(wrapped_name(name), module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _packing(base: nn.Module) -> tuple[NF4Config, list[str]]:
    """How the base is quantized, and the names of what is dense in it."""
    linear = {
        wrapped_name(name): module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_of_adapter(name)
    }
    packed = {name: module for name, module in linear.items() if isinstance(module, BaseLinear4bit)}
    if not packed:
        saved = (name for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
        return NF4Config(), sorted(saved)
    layer = next(iter(packed.values()))
    config = NF4Config(
        double_quant=layer.state.nested,
        block_size=layer.state.blocksize,
        compute_dtype=compute_dtype_of(packed.values()),  # named, or what loads it computes in float32
        skip_modules=(),
    )
    return config, sorted(linear.keys() - packed.keys())


def _measured(
    reference: PeftModel, merged: nn.Module, names: list[str], dense: nn.Module | None, notes: list[str]
) -> list[LayerMerge]:
    found, unmeasured = [], []
    for name, layer in _lora_layers(reference.get_base_model()):
        if not any(adapter in layer.r for adapter in names):
            continue
        if not measure.has_weight(layer):
            unmeasured.append(name)
            continue
        result = merged.get_submodule(name)
        trained = measure.trained_weights(layer, names)
        without = None if dense is None else measure.plain_weight(dense.get_submodule(name))
        found.append(measure.compare(name, layer.get_base_layer(), trained, result, without))
    if unmeasured:
        notes.append(f"{len(unmeasured)} merged layers were not measured as weights ({unmeasured[0]}, …).")
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
