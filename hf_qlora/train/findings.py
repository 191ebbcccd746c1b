"""What can be wrong with a training run: what it looks like, what it means, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from torch import nn

from hf_qlora.layers import depth
from hf_qlora.layers.attention import LIMITS
from hf_qlora.train.frozen import is_whole
from hf_qlora.train.gradients import Found
from hf_qlora.train.report import Problem, named


SATURATED = 0.99  # of a gain's bound, where what it still learns is below 2 % of the start's
TRAINED, MODULES = "trained tensors", "adapted modules"
HALF = (torch.bfloat16, torch.float16)


def not_finite(found: Found, of: int, where: str, is_late: bool) -> Problem:
    """Gradients or a loss with NaN or infinity.

    Args:
        of: how many tensors are watched; 0 where gradients cannot be.
        is_late: whether the optimizer has taken the step.
    """
    if not found.not_finite:
        what = "the loss is NaN or infinite" + (", and the gradients are finite" if of else "")
        means = "nothing was learned from it" if of else "what was learned from it cannot be seen here"
    else:
        what = f"the gradient is NaN or infinite in {named(found.not_finite, of, TRAINED)}"
        if len(found.not_finite) == of > 1:  # by the clipping, which Trainer does to an infinite norm, too
            what += "; one is enough, as Trainer's clipping spreads it to all"
        means = "a step with these would make the adapter NaN for good"
        if is_late:
            means = "the optimizer has taken the step, and more since: the adapter is NaN, or damaged"
            where = "not looked for: with logging_nan_inf_filter=False gradients are read with the logs, steps later"
    return Problem(
        found.step,
        what,
        means,
        "compute in bfloat16 instead of float16, lower the learning rate, clip gradients (max_grad_norm), and look at "
        "the batch: labels that are all -100, rows that are empty or all padding"
        + ("; go on from a checkpoint before this step" if is_late and found.not_finite else ""),
        where,
    )


# What gets a gradient only from batches that hold its tokens, by a part of its name: what it means, and what to do.
_SELDOM = {
    "expert": (
        "no token reached these experts",
        "nothing, if the router is meant to leave them out; otherwise larger batches",
    ),
    "trainable_tokens": (
        "no batch held one of these tokens",
        "nothing, if they are rare; otherwise see how the data is tokenized",
    ),
}


def idle(found: Found, of: int, steps: int) -> list[Problem]:
    """Tensors that have learned nothing for many steps; those that seldom do apart."""
    groups: dict[str, list[str]] = {part: [] for part in ("", *_SELDOM)}
    for name in found.idle:
        groups[next((part for part in _SELDOM if part in name), "")].append(name)
    problems = []
    for part, names in groups.items():
        if not names:
            continue
        absent = all(name in found.never for name in names)
        kind = "no gradient" if absent else "a gradient of zero, or none,"
        means, remedy = _SELDOM.get(part, ("they learn nothing", _remedy(len(names) == of)))
        what = f"{kind} for {steps} steps in a row in {named(names, of, TRAINED)}"
        problems.append(Problem(found.step, what, means, remedy, fatal=not part))
    return problems


def _remedy(everything: bool) -> str:
    if everything:
        return "look at the labels (all -100?), the learning rate (0?) and whether the model is in training mode"
    return (
        "take modules that the model does not use out of target_modules, and look for detach(), no_grad() or a layer "
        "below that hands no gradient on; a bitsandbytes layer that was repacked for the CPU is one"
    )


def base_changed(names: list[str], step: int) -> Problem:
    """Frozen tensors whose bytes are others."""
    return Problem(
        step,
        f"the frozen base has changed: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
        "the adapter is trained on a base that nobody else has; loaded on the stored one, it computes something else",
        "look for a merge that was undone, weights assigned or cast in callbacks, or an optimizer that was given all "
        "parameters; train again on a base that is loaded anew",
    )


def base_repacked(names: list[str], of: int, step: int) -> Problem:
    """Layers that bitsandbytes has put into its form for generating on a CPU, in place."""
    return Problem(
        step,
        f"bitsandbytes has repacked {named(names, of, '4-bit layers')} in an eval forward, for this CPU",
        "their scales are rounded to bfloat16, and whether they change is not checked any more; while they are "
        "repacked, training through them gives the layers below no gradient",
        "get_peft_model with a QLoRAConfig, whose layers are not repacked; or load the base anew and set "
        "support_avx512bf16_for_cpu = False on each layer",
        fatal=False,
    )


def changed_dtypes(before: Mapping[str, torch.dtype], now: Mapping[str, torch.dtype], step: int) -> list[Problem]:
    """Trained tensors that were cast while they were trained."""
    changed = [name for name, dtype in now.items() if dtype != before[name]]
    if not changed:
        return []
    return [
        Problem(
            step,
            f"the dtype is {now[changed[0]]} now and was {before[changed[0]]} in {named(changed, len(now), TRAINED)}",
            "something has cast the model while it trains; the optimizer still holds the state of the old dtype",
            "look for model.to(dtype), .half() or .bfloat16() in callbacks",
        )
    ]


def low_precision(trained: Mapping[str, nn.Parameter]) -> list[Problem]:
    """Master copies that are none."""
    low = [name for name, p in trained.items() if p.dtype in HALF]
    if not low:
        return []
    return [
        Problem(
            0,
            f"the dtype is {trained[low[0]].dtype} in {named(low, len(trained), TRAINED)}",
            "steps smaller than 1/256 of a weight are rounded away (1/2048 in float16). TRL casts the adapters of a "
            "model that is in 4 bits already",
            "give TRL's trainers the dense model and peft_config=, or cast back: for p in model.parameters(): if "
            "p.requires_grad: p.data = p.data.float(). If it is meant, ignore this",
            fatal=False,
        )
    ]


def upcast(model: nn.Module) -> list[Problem]:
    """A base that was cast up, as `prepare_model_for_kbit_training` does."""
    computes = {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} & set(HALF)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if not computes or weight is None or weight.requires_grad or weight.dtype != torch.float32:
        return []
    return [
        Problem(
            0,
            f"embeddings are in float32, and the 4-bit layers compute in {computes.pop()}",
            "activations are float32 between the layers: twice the memory, and a head that is several times slower",
            "load the base with dtype=torch.bfloat16, and leave prepare_model_for_kbit_training out: get_peft_model "
            "with a QLoRAConfig does what is needed",
            fatal=False,
        )
    ]


def scales_in_disorder(model: nn.Module, step: int) -> list[Problem]:
    """Scales of depth that are no positive finite numbers, and gains at their bound."""
    scales = {
        f"{name} ({adapter})": scale
        for adapter in getattr(model, "peft_config", {})
        for name, scale in depth.scales(model, adapter).items()
    }
    if not scales:
        return []
    # all at once: each reading waits for the device
    values = [[scale.bias, *([] if scale.observed is None else [scale.observed[:1]])] for scale in scales.values()]
    low, high = LIMITS
    flat = iter(torch.cat([value.detach() for row in values for value in row]).tolist())
    bad, full = [], []
    for (name, scale), row in zip(scales.items(), values, strict=True):
        theta, *attention = [next(flat) for _ in row]
        if not math.isfinite(theta) or not all(low <= a <= high for a in attention):
            bad.append(name)
        elif abs(math.tanh(theta / scale.bound)) > SATURATED:
            full.append(name)
    return [*_scales_not_finite(bad, len(scales), step), *_gains_at_bound(full, len(scales), step)]


def _scales_not_finite(names: list[str], of: int, step: int) -> list[Problem]:
    if not names:
        return []
    return [
        Problem(
            step,
            f"depth scales are not finite, or out of range, in {named(names, of, MODULES)}",
            "the adapters of these layers compute NaN, or something else than was trained",
            "lower gain_lr_ratio, and load the last good checkpoint",
        )
    ]


def _gains_at_bound(names: list[str], of: int, step: int) -> list[Problem]:
    if not names:
        return []
    return [
        Problem(
            step,
            f"gains are at their bound in {named(names, of, MODULES)}",
            "they hardly learn any more",
            "lower gain_lr_ratio or the learning rate, or raise gain_bound",
            fatal=False,
        )
    ]


def absmax_not_finite(model: nn.Module) -> list[Problem]:
    """4-bit layers whose scales are NaN or infinite."""
    states = {
        name: state
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit) and (state := getattr(m.weight, "quant_state", None)) is not None
    }
    scales = {name: [s.offset, s.state2.absmax] if s.nested else [s.absmax] for name, s in states.items()}
    whole = {name: parts for name, parts in scales.items() if all(map(is_whole, parts))}
    bad = [name for name, parts in whole.items() if not all(bool(part.isfinite().all()) for part in parts)]
    if not bad:
        return []
    return [
        Problem(
            0,
            f"scales (absmax) are not finite in {named(bad, len(whole), '4-bit layers')}",
            "these layers give NaN",
            "load the base anew: its file is damaged, or its weights were not finite when it was quantized",
        )
    ]
