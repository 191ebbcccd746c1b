"""A try before the real thing: what PEFT would refuse half-way, it refuses on a copy of the model without weights.

Quantizing a base cannot be undone, and PEFT finds most mistakes of a config only while it wraps one layer after the
other, and those of a file only afterwards. The copy has the modules, names and shapes of the model on the meta device,
so that trying costs milliseconds and no memory.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from hf_qlora.config import QLoRAConfig
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}  # names for heads of classification, whether or not they exist

_tried: ContextVar[tuple[nn.Module | None, ...]] = ContextVar("hf_qlora_tried", default=())
_WITHOUT_WEIGHTS = "_hf_qlora_without_weights"  # on a copy made here


def is_rehearsal(model: nn.Module) -> bool:
    """Whether the model is a copy on which something is tried."""
    return bool(getattr(model, _WITHOUT_WEIGHTS, False))


def trial_config(config: QLoRAConfig) -> QLoRAConfig:
    """A copy for a rehearsal: without what needs weights."""
    needs: dict[str, Any] = {"quantization": None, "init_lora_weights": True, "loftq_config": {}, "record": None}
    return dataclasses.replace(copy.deepcopy(config), **needs)


def try_config(
    model: nn.Module, config: QLoRAConfig, adapter_name: str, make: Callable[[nn.Module, QLoRAConfig, str], object]
) -> nn.Module | None:
    """`rehearse` adding a new adapter, and say which of the config's names match nothing."""
    trial = trial_config(config)
    shadow = rehearse(model, adapter_name, lambda copied: make(copied, trial, adapter_name))
    if shadow is not None:
        _warn_of_unmatched(shadow, config, trial)
    return shadow


def rehearse(model: nn.Module, adapter_name: str, step: Callable[[nn.Module], object]) -> nn.Module | None:
    """Run `step`, which adds an adapter, on a copy of `model` without weights.

    Returns:
        the copy as `step` left it; None if it could not be made, or if `step` needs weights.

    Raises:
        Exception: what `step` raises, other than errors that come from the missing weights.
    """
    if any(tensor.device.type == "meta" for tensor in [*model.parameters(), *model.buffers()]):
        return None
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        return None  # what is put aside then would be copied with its data
    try:
        shadow = without_weights(model)
        make_dense(shadow)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        logger.warning(
            "%s cannot be copied (%s), so that mistakes are not found before the base is quantized.",
            type(model).__name__,
            error,
        )
        return None
    setattr(shadow, _WITHOUT_WEIGHTS, True)
    try:
        # PEFT's low_cpu_mem_usage would do the same to the modules that other threads are making.
        with torch.device("meta"), warnings.catch_warnings():  # the real step gives them again
            warnings.simplefilter("ignore")
            step(shadow)
    except RuntimeError:  # torch's, also for what meta tensors cannot do; the real step raises it again if it must
        logger.debug("Trying on a copy without weights failed.", exc_info=True)
        return None
    check_tokens(shadow, adapter_name)
    return shadow


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; packed layers are packed in the copy too, and have dense weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


@contextmanager
def after(shadow: nn.Module | None) -> Iterator[None]:
    """The real step, which was tried on `shadow` (None: could not be); nothing within is tried again."""
    token = _tried.set((shadow,))
    try:
        yield
    finally:
        _tried.reset(token)


def is_real_step() -> bool:
    return bool(_tried.get())


def tried() -> nn.Module | None:
    """The copy on which the running step was tried."""
    return next(iter(_tried.get()), None)


def check_tokens(shadow: nn.Module, adapter_name: str) -> None:
    """Refuse `trainable_token_indices` outside an embedding, which PEFT finds out in the first forward.

    Raises:
        ConfigError: negative, or not below the number of rows.
    """
    for name, module in shadow.named_modules():
        if isinstance(module, TrainableTokensLayer) and adapter_name in module.token_indices:
            if not module.token_indices[adapter_name]:
                raise ConfigError("trainable_token_indices names no token; give some, or None.")
            rows = module.get_base_layer().weight.shape[0]
            outside = [i for i in module.token_indices[adapter_name] if not 0 <= i < rows]
            if outside:
                layer = name.removesuffix(".token_adapter")
                raise ConfigError(
                    f"trainable_token_indices: {outside[:5]} are no rows of {layer}, which has rows 0 to {rows - 1}. "
                    "Resize the embeddings first (model.resize_token_embeddings) if tokens were added."
                )


def _warn_of_unmatched(shadow: nn.Module, config: QLoRAConfig, trial: QLoRAConfig) -> None:
    """PEFT is silent about a misspelt name among others that match."""
    names = [name for name, _ in shadow.named_modules()]
    adapted = [name for name, module in shadow.named_modules() if isinstance(module, LoraLayer)]
    given = config.target_modules
    targets = set() if given is None or isinstance(given, str) else set(given) & set(trial.target_modules or ())
    targets = {part for part in targets if not any(f".{name}".endswith(f".{part}") for name in adapted)}
    # PEFT writes all linear layers into a config that asks for them, also those that are saved whole.
    whole = tuple(f".{name}" for name in config.modules_to_save or ())
    targets = {part for part in targets if not f".{part}".endswith(whole)}
    saved = set(config.modules_to_save or ()) - ADDED_BY_PEFT
    saved = {part for part in saved if not any(f".{part}." in f".{name}." for name in names)}
    for field, unmatched in (("target_modules", targets), ("modules_to_save", saved)):
        if unmatched:
            logger.warning("%s: %s match nothing in %s.", field, sorted(unmatched), type(shadow).__name__)


def make_dense(shadow: nn.Module) -> None:
    """Packed layers without their bytes could not be read; PEFT treats dense ones alike."""
    for module in shadow.modules():
        if isinstance(module, Linear4bit):
            module.become_dense(module.weight.data)
        elif isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = nn.Linear


def _on_meta(tensor: Tensor) -> Tensor:
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return nn.Parameter(torch.empty(state.shape, dtype=state.dtype, device="meta"), requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
    return tensor.to("meta")
