"""What results of each command have in them, by which those of another are told from them: files do not say it.

    a form    the keys that there have to be; with a dot between them, one below another; * is all keys, or all
              items of a list, and at least one

A command whose lines are of several kinds has a form for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


FORMS: Mapping[str, tuple[str, ...]] = {
    "train-step": ("case with flops gemm_flops_per_s arms.*.step_s arms.*.memory",),
    "growth": ("case with rounds axes",),
    "checkpointing": ("case with kept_bytes arms.*.step_s arms.*.memory",),
    "callbacks": ("case with arms.*.step_s arms.*.own_s",),
    "memory-plan": ("with settings.*.plan settings.*.measured",),
    "generation": ("case with arms.*.generation_s arms.*.base",),
    "skip-list": ("budget answers dense arms.*.perplexity",),
    "learning-curve": ("arm seed steps losses",),
    "calibrated-nf4": ("part settings found with",),
    "adaptive-depth": ("run.task found.score with",),
    "results-classification": ("part arm found.validation with", "part rounds methods with"),
    "results-generation": ("part arm found.trained with", "part arm found.base with", "part what found with"),
}


def fits(command: str, result: Any) -> bool:
    """Whether a result, or a line of several, is one of the command's."""
    return any(all(_has(result, path.split(".")) for path in form.split()) for form in FORMS[command])


def _has(values: Any, path: Sequence[str]) -> bool:
    if not path:
        return True
    key, *rest = path
    if key == "*":
        below = list(values.values()) if isinstance(values, Mapping) else values
        return isinstance(below, list) and bool(below) and all(_has(value, rest) for value in below)
    return isinstance(values, Mapping) and key in values and _has(values[key], rest)
