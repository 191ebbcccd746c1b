"""How concentrated a layer's attention is, observed while training without changing what is computed.

Each layer keeps a moving average c̄ of what `layers/concentration.py` finds; its scale is

    a = c̄ / mean of c̄ over the adapted layers of the same stack, within [½, 2].

The rows looked at are chosen by the number of observations so far, so that a resumed run chooses as an uninterrupted
one does. Layers observe in the first forward of an optimizer step, never in a recomputation; a changes when the step
is done, or with optimizers that step within backward when that is done, so that a forward, its backward and their
recomputation under checkpointing see one a. What runs without gradients, as generation does, counts only until a
forward with them. In eval nothing is observed. What a learned run ends with is a constant for each layer, which is
folded like the others: attention shapes training, and costs nothing afterwards.

Attention modules of transformers fetch their function from `AttentionInterface.get_interface` in every forward. That
is where the observer stands: the function is called with the same arguments, whatever the implementation.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.modeling_utils import AttentionInterface

from hf_qlora.kernels.shared import is_in_backward
from hf_qlora.layers import depth
from hf_qlora.layers.concentration import concentration
from hf_qlora.layers.depth_scale import DepthScale
from hf_qlora.layers.names import adapted_layers
from hf_qlora.layers.profile import layer_index
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

MOMENTUM = 0.1  # of the moving average: the weight of what is new
LIMITS = (0.5, 2.0)

_WATCHES = "_hf_qlora_watches"  # on an attention module
_OTHERS_KEYS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)  # names of attention to another sequence
_live: weakref.WeakSet[Watch] = weakref.WeakSet()
_numbers = itertools.count()


class Watch:
    """The observations of one adapter.

    Attributes:
        layers: the adapted LoRA layers with their scales, by the numbered layer they are in.
        seen: what was observed since the last optimizer step, and whether with gradients.
        number: in the order in which they were made, which all processes have.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter, self.number = adapter, next(_numbers)
        self.layers: dict[str, list[tuple[LoraLayer, DepthScale]]] = {}
        self.seen: dict[str, tuple[Tensor | None, bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": {}}  # a copy begins its own step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, number=next(_numbers))
        _live.add(self)
        _stand_in()  # it may have come from another process

    def wants(self, layer: str) -> bool:
        """Whether the layer is trained now and has not been observed since the last optimizer step."""
        lora, _ = self.layers[layer][0]
        if self.adapter not in lora.lora_B or is_in_backward():
            return False
        trains = self.adapter in lora.active_adapters and not lora.disable_adapters and not lora.merged
        learns = trains and lora.training and any(own.requires_grad for own in self._stepped(layer))
        _, with_gradients = self.seen.get(layer, (None, False))
        return learns and (layer not in self.seen or (torch.is_grad_enabled() and not with_gradients))

    def observe(self, layer: str, value: Tensor | None) -> None:
        if value is None:
            _say_once(layer)
        _live.add(self)
        self.seen[layer] = value, torch.is_grad_enabled()

    def learns_with(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer steps this adapter."""
        own = {id(parameter) for layer in self.layers for parameter in self._stepped(layer)}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    def _stepped(self, layer: str) -> list[Tensor]:
        """The parameters of a layer by which its steps are known; none where PEFT's functions deleted the adapter."""
        present = [(lora, scale) for lora, scale in self.layers[layer] if self.adapter in lora.lora_B]
        return [own for lora, scale in present for own in (lora.lora_B[self.adapter].weight, scale.bias)]

    def end_step(self) -> None:
        """Take what was observed into the averages, and the averages into the scales."""
        found = self._means()
        self.seen.clear()
        if not found:
            return
        averages: dict[str, float] = {}
        for name, layers in self.layers.items():
            before, value = layers[0][1].concentration, found.get(name)
            if value is not None:
                averages[name] = value if before is None else before + MOMENTUM * (value - before)
            elif before is not None:
                averages[name] = before
        stacks: dict[str, list[float]] = {}
        for name, average in averages.items():
            stacks.setdefault(name.rpartition(".")[0], []).append(average)
        for name, layers in self.layers.items():
            own, a, fellows = averages.get(name), 1.0, stacks.get(name.rpartition(".")[0], [])
            mean = sum(fellows) / len(fellows) if fellows else 0.0
            if own is not None and mean > 0:
                a = min(max(own / mean, LIMITS[0]), LIMITS[1])
            for _, scale in layers:
                scale.see(a, own, scale.observations + 1)

    def _means(self) -> dict[str, float]:
        """What each layer saw, over all processes; layers that saw nothing are left out."""
        names = sorted(self.layers)
        device = self.layers[names[0]][0][1].bias.device
        nothing = torch.full((), math.nan, device=device)
        values = [self.seen.get(name, (None, False))[0] for name in names]
        sums = torch.stack([nothing if value is None else value.to(device).float() for value in values])
        counts = sums.isfinite().float()
        both = torch.stack([sums.nan_to_num(0.0), counts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        total, count = both.tolist()
        return {name: t / n for name, t, n in zip(names, total, count, strict=True) if n}


def watch(model: nn.Module, adapter: str, pattern: str | list[str] | None = None) -> None:
    """Observe the attention of an adapter's layers.

    Args:
        model: with the adapter's scales attached.
        pattern: the config's `layers_pattern`.

    Raises:
        ConfigError: a layer whose attention cannot be observed, or that has none.
    """
    observer = Watch(adapter)
    for name, layer in adapted_layers(model, adapter):
        found, scale = layer_index(model, name, pattern), depth.scale_of(layer, adapter)
        if found is not None and scale is not None:
            observer.layers.setdefault(f"{found[0]}.{found[1]}", []).append((layer, scale))
    watched = {name: list(_attentions(model.get_submodule(name))) for name in observer.layers}
    unseen = [name for name, modules in watched.items() if not modules]
    if unseen:
        raise ConfigError(
            f"attention='concentration' cannot observe {unseen[0]}: {type(model).__name__} has no self-attention "
            "there that goes through transformers' AttentionInterface. Use attention='off'."
        )
    for name, modules in watched.items():
        for module in modules:
            module.__dict__.setdefault(_WATCHES, {})[adapter] = (observer, name)
    if watched:
        _live.add(observer)  # before it has seen anything: another process may be ahead, and they take means together
        _stand_in()


def forget_step(model: nn.Module, adapter: str) -> None:
    """Begin a new step: what was seen since the last one belongs to weights that are gone."""
    for module in model.modules():
        if adapter in module.__dict__.get(_WATCHES, {}):
            module.__dict__[_WATCHES][adapter][0].seen.clear()


def unwatch(model: nn.Module, adapter: str | None = None) -> None:
    """Observe no more, for one adapter or for all."""
    for module in model.modules():
        watches = module.__dict__.get(_WATCHES, {})
        watches.pop(adapter, None) if adapter is not None else watches.clear()
        if not watches:
            module.__dict__.pop(_WATCHES, None)


def _attentions(layer: nn.Module) -> Iterator[nn.Module]:
    for name, module in layer.named_modules():
        forward = inspect.unwrap(type(module).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if "get_interface" in names and not _OTHERS_KEYS.search(f"{name} {type(module).__name__}"):
            yield module


@functools.cache
def _stand_in() -> None:
    """Put the observer between attention modules and their function, once."""
    original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(_observe_and_call, original(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface
    register_optimizer_step_post_hook(_end_step)


def _end_step(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for observer in sorted(_live, key=lambda watch: watch.number):
        if observer.learns_with(optimizer):
            observer.end_step()


def _observe_and_call(
    attend: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if _WATCHES in module.__dict__:
        _observe(module, query, key, args[1] if len(args) > 1 else kwargs.get("attention_mask"), kwargs)
    return attend(module, query, key, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # generators cannot be compiled; the model around can
def _observe(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
    for observer, layer in module.__dict__[_WATCHES].values():
        if observer.wants(layer):
            seed = observer.layers[layer][0][1].observations
            known = {name: value for name, value in options.items() if name != "attention_mask"}
            observer.observe(layer, concentration(module, query, key, mask, seed=seed, **known))


@functools.cache
def _say_once(layer: str) -> None:
    logger.warning(
        "The attention of %s cannot be observed in this form (several sequences in a row, a mask of blocks, attention "
        "sinks, or fewer keys than tokens); without any observation its scale stays 1.",
        layer,
    )
