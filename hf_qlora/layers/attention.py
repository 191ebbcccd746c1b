"""How concentrated a layer's attention is, observed while training without changing what is computed.

The mean attention weight is 1/length for every pattern, so it says nothing. Concentration does:

    c = 1 − mean over heads and rows of H(p) / log n,    H(p) = −Σ p log p over the row's n ≥ 2 visible keys,

0 where all keys weigh the same and 1 where one key has everything. Each layer keeps a moving average c̄; its scale is

    a = c̄ / mean of c̄ over the adapted layers, within [½, 2].

A few query rows of a sequence are enough, so that no (tokens, tokens) matrix is made. They are chosen by the number of
observations so far, so that a resumed run chooses as an uninterrupted one does. Layers observe in the first forward of
an optimizer step; a changes when the step is done, so that a forward, its backward and their recomputation under
checkpointing see one a. In eval nothing is observed. What a learned run ends with is a constant for each layer, which
is folded like the others: attention shapes training, and costs nothing afterwards.

Attention modules of transformers fetch their function from `AttentionInterface.get_interface` in every forward. That
is where the observer stands: the function is called with the same arguments, whatever the implementation.
"""

from __future__ import annotations

import functools
import inspect
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

from hf_qlora.layers import depth
from hf_qlora.layers.names import adapted_layers
from hf_qlora.validation import ConfigError


ROWS = 8  # query rows looked at in each sequence
MOMENTUM = 0.1  # of the moving average: the weight of what is new
LIMITS = (0.5, 2.0)

_WATCHES = "_hf_qlora_watches"  # on an attention module
_OTHERS_KEYS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)  # names of attention to another sequence
_live: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch:
    """The observations of one adapter.

    Attributes:
        layers: the adapted LoRA layers with their scales, by the numbered layer they are in.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.layers: dict[str, list[tuple[LoraLayer, depth.DepthScale]]] = {}
        self.seen: dict[str, Tensor] = {}

    def wants(self, layer: str) -> bool:
        """Whether the layer is trained now and has not been observed since the last optimizer step."""
        lora, _ = self.layers[layer][0]
        trains = self.adapter in lora.active_adapters and not lora.disable_adapters and not lora.merged
        return trains and lora.training and layer not in self.seen

    def observe(self, layer: str, value: Tensor) -> None:
        _live.add(self)
        self.seen[layer] = value

    def end_step(self) -> None:
        """Take what was observed into the averages, and the averages into the scales."""
        if not self.seen:
            return
        names = sorted(self.seen)
        values = torch.stack([self.seen[name].float().cpu() for name in names])
        self.seen.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        for name, value in zip(names, values.tolist(), strict=True):
            for _, scale in self.layers[name]:
                scale.observe(value, MOMENTUM)
        averages = {name: layers[0][1].concentration for name, layers in self.layers.items()}
        known = [value for value in averages.values() if value is not None]
        mean = sum(known) / len(known)
        for name, value in averages.items():
            if value is not None and mean > 0:
                for _, scale in self.layers[name]:
                    scale.restore(scale.theta, min(max(value / mean, LIMITS[0]), LIMITS[1]))


def watch(model: nn.Module, adapter: str) -> None:
    """Observe the attention of an adapter's layers.

    Args:
        model: with the adapter's scales attached.

    Raises:
        ConfigError: a layer whose attention cannot be observed, or that has none.
    """
    observer = Watch(adapter)
    for name, layer in adapted_layers(model, adapter):
        found, scale = depth.layer_index(model, name), depth.scale_of(layer, adapter)
        if found is not None and scale is not None:
            observer.layers.setdefault(f"{found[0]}.{found[1]}", []).append((layer, scale))
    for name in observer.layers:
        modules = list(_attentions(model.get_submodule(name)))
        if not modules:
            raise ConfigError(
                f"attention='concentration' cannot observe {name}: {type(model).__name__} has no self-attention there "
                "that goes through transformers' AttentionInterface. Use attention='off'."
            )
        for module in modules:
            module.__dict__.setdefault(_WATCHES, {})[adapter] = (observer, name)
    _stand_in()


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


def _end_step(*args: Any) -> None:
    for observer in list(_live):
        observer.end_step()


def _observe_and_call(
    attend: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> Any:
    for observer, layer in module.__dict__.get(_WATCHES, {}).values():
        if observer.wants(layer):
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            seed = observer.layers[layer][0][1].observations
            value = concentration(module, query, key, mask, seed=seed, **kwargs)
            if value is not None:
                observer.observe(layer, value)
    return attend(module, query, key, *args, **kwargs)


@torch.no_grad()
def concentration(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """c of one layer, a scalar float32 tensor; None where no row sees two keys, or where rows cannot be told apart.

    Args:
        query, key (`torch.Tensor`, (batch, heads, tokens, head_dim)): keys may have fewer heads, and more tokens.
        mask: as attention functions get it: None, bool or additive (batch, 1 or heads, tokens, keys), or padding
            (batch, keys).
        seed: chooses the rows.
    """
    (batch, heads, tokens, size), (kv_heads, keys) = query.shape, key.shape[1:3]
    packed = cu_seq_lens_q is not None  # several sequences in one row, which these arguments do not tell apart
    if packed or keys < tokens or tokens < 2 or not (mask is None or isinstance(mask, Tensor)):
        return None
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(tokens, generator=generator)[:ROWS].to(query.device)
    chosen = query.index_select(2, rows).float().reshape(batch, kv_heads, -1, size)
    scores = (chosen @ key.float().transpose(2, 3)).reshape(batch, heads, -1, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = rows + (keys - tokens)  # where a row's own token is among the keys
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    visible = _visible(mask, rows, own, keys, bool(causal), sliding_window)
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        scores = scores + mask[:, :, rows, :keys].float()
    if position_bias is not None:
        scores = scores + position_bias[:, :, rows, :keys].float()
    n = visible.sum(-1)  # (batch or 1, heads or 1, rows)
    log_p = scores.masked_fill(~visible, -math.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~visible, 0.0)).sum(-1)  # (batch, heads, rows)
    counts = visible.gather(-1, own[:, None].expand(*n.shape, 1)).squeeze(-1) & (n >= 2)  # padding does not see itself
    counts = counts.expand_as(entropy)
    ratio = torch.where(counts, entropy / n.clamp(min=2).float().log(), torch.zeros_like(entropy))
    total = counts.sum()
    return torch.where(total > 0, 1 - ratio.sum() / total.clamp(min=1), torch.full_like(ratio.sum(), math.nan))


def _visible(mask: Tensor | None, rows: Tensor, own: Tensor, keys: int, causal: bool, window: int | None) -> Tensor:
    """Which keys the chosen rows see, (batch or 1, heads or 1, rows, keys)."""
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, rows, :keys]
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    position = torch.arange(keys, device=rows.device)
    ahead = own[:, None] - position[None, :]
    visible = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible = visible & (ahead.abs() < window)
    visible = visible[None, None]
    return visible if mask is None else visible & mask[:, None, None, :keys].bool()
