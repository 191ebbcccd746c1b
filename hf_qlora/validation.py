"""What a config is held to: types, ranges, and what an NF4 base can honour. Used once, when a config is made."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from hf_qlora.patterns import SlowPatternError, check_quick


logger = logging.getLogger(__name__)

# Initialisations that overwrite the base weight (PiSSA 2404.02948, OLoRA 2406.01775, CorDA 2406.05223, LoRA-GA
# 2407.05000) or need to read it dense (MiCA 2604.01694).
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
# Initialisations that PEFT makes in the dtype of the base weight, which is that of packed bytes.
IN_BASE_DTYPE = ("orthogonal",)
# LoRA variants that PEFT's 4-bit layer ignores without a word.
NOT_ON_4BIT = ("velora_config", "monteclora_config", "kasa_config", "use_bdlora", "use_qalora", "megatron_config")


class ConfigError(ValueError):
    """A configuration, in memory or in a file, that cannot be honoured; the message says what to do instead."""


def check_model(model: object) -> None:
    """Refuse what is no model, before something of a model's is looked for in it."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r:.100} is no model; pass one that is loaded, a torch.nn.Module.")


def check_types(config: Any) -> None:
    """Refuse a field whose value is of another type than its annotation; JSON's stand-ins pass (see `matches`)."""
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "lora_alpha":  # PEFT says int, and computes with any number
            continue
        if not matches(value, hints[field.name]):
            raise ConfigError(f"{field.name}={value!r} has the wrong type; expected {_shown(hints[field.name])}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """A class's annotations: milliseconds to evaluate, and every config that is made or read asks."""
    return typing.get_type_hints(kind)


def check_values(config: Any) -> None:
    """Ranges that PEFT checks late, or never."""
    if not _positive(config.r, int):
        raise ConfigError(f"r={config.r!r} must be a positive integer, as r=16.")
    if not _positive(config.lora_alpha, (int, float)):
        raise ConfigError(f"lora_alpha={config.lora_alpha!r} must be a positive number, as lora_alpha=16.")
    dropout = config.lora_dropout
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout={config.lora_dropout!r} must be in [0, 1).")
    patterns_of: dict[str, list[Any]] = {}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = getattr(config, name)
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"{name}={patterns!r} must be a dict from module names to values.")
        for pattern, value in patterns.items():
            if not _positive(value, kind):
                raise ConfigError(f"{name}[{pattern!r}]={value!r} must be positive{', an integer' * (kind is int)}.")
        patterns_of[name] = list(patterns)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), str):
            patterns_of[name] = [getattr(config, name)]
    for name in ("modules_to_save", "layers_pattern"):  # PEFT puts each of them into an expression of its own
        given = getattr(config, name)
        parts = given if isinstance(given, list | tuple | set) else [given]
        patterns_of[name] = [part for part in parts if isinstance(part, str)]
    for name, patterns in patterns_of.items():
        _check_patterns(name, patterns, from_file=config.record is not None)


def check_honoured_on_nf4(config: Any) -> None:
    """Refuse what would change the base, or what 4-bit layers would ignore."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(CHANGES_BASE + IN_BASE_DTYPE):
        raise ConfigError(
            f"init_lora_weights={init!r} rewrites the base weight or needs it dense, which an NF4 base is not. Use "
            "'loftq' (base unchanged), True or 'gaussian', or set quantization=None."
        )
    if init == "loftq":
        loftq = config.loftq_config or {}
        if loftq.get("loftq_iter", 1) != 1 or loftq.get("loftq_bits", 4) != 4:
            raise ConfigError(
                f"loftq_config={loftq} is not supported on NF4: further iterations change the base, and the base has "
                "4 bits. Use loftq_iter=1 and loftq_bits=4, or leave loftq_config out."
            )
    refused = [name for name in NOT_ON_4BIT if getattr(config, name) not in (None, False)]
    if refused:
        raise ConfigError(
            f"{refused} cannot be honoured on an NF4 base: PEFT's 4-bit layers ignore it. Set quantization=None."
        )


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`, or JSON standing for it: a list for a set, a dict for a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is Literal:
        if "pissa" in arguments:  # init_lora_weights: PEFT's Literal has a placeholder for a number, and lacks lora_ga
            arguments += ("lora_ga", value) if str(value).startswith("pissa_niter_") else ("lora_ga",)
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple and Ellipsis not in arguments:
        same_length = isinstance(value, list | tuple) and len(value) == len(arguments)
        return same_length and all(map(matches, value, arguments))
    if origin in (list, set, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple | set | frozenset) and all(matches(item, inner) for item in value)
    if origin is dict or hint is dict:
        inner = arguments[1] if arguments else Any
        return isinstance(value, Mapping) and all(isinstance(k, str) and matches(v, inner) for k, v in value.items())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, typing.cast(type, hint)))
    if hint is float:
        hint = int | float
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf and value < 2**31


def _check_patterns(name: str, patterns: list[Any], from_file: bool) -> None:
    """Refuse what is no regular expression, and what could take hours to match where others have written it."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{name}: {pattern!r:.200} is not a regular expression: {error}.") from error
    texts = [pattern for pattern in patterns if isinstance(pattern, str)]  # another is refused for its type
    try:
        for pattern in texts:
            check_quick(pattern)
        pattern = f"{len(texts)} of them"
        check_quick(*texts)
    except SlowPatternError as error:
        if not from_file:
            _say_once(
                f"{name}: the regular expression {pattern!r:.200} may be slow, and files with it are refused: {error}."
            )
            return
        raise ConfigError(
            f"{name}: the regular expression {pattern!r:.200} is refused: {error}. Write it without, or as a list of "
            "names; a config that is made in Python is not held to this."
        ) from error


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _shown(hint: Any) -> str:
    if hint is bool:
        return "True or False"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
