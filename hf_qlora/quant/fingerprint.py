"""Which base is this? A fingerprint taken where an adapter is trained; `quant/comparison.py` compares two of them.

An adapter fits the bytes of the base that it was trained on. A fingerprint has, for each quantized layer, a sha256
over its codes, its scales and their nested state, and samples: 64 codes and 4 scales (fewer codes in models of very
many layers). Of what is dense in the base it has 32 values of each tensor (fewer of very many) and no hash: the
embeddings alone may have as many bytes as all codes together. A root is over all of these.

The form is made canonical first: `quant_storage` is read as bytes, and a weight that bitsandbytes has repacked for a
CPU is unpacked. (Repacking also rounds scales for good; the fingerprint says that it has happened.)

The positions of n weights sampled k times are ⌊frac(i φ) n⌋ for i = 1 … k, φ the golden ratio: spread evenly, the same
everywhere, and nothing that a file could choose. Biases are left out, since LoRA may train them (`bias`); so are the
copies that adapters train (`modules_to_save`, tokens), but not the originals of these: what of them an adapter's file
holds is dropped where the fingerprint is written (`identity.describe`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from hf_qlora.config.fingerprint import HASH_LENGTH, DensePrint, Fingerprint, LayerPrint, rounded
from hf_qlora.quant.names import is_of_adapter, wrapped_name
from hf_qlora.quant.packing import unpacked
from hf_qlora.quant.scheme import NESTED_BLOCK_SIZE


CODES_PER_LAYER, FEWEST_CODES, CODES_IN_ALL = 64, 8, 2**16
SCALES_PER_LAYER = 4
VALUES_PER_TENSOR, FEWEST_VALUES, VALUES_IN_ALL = 32, 8, 2**13

_PHI = 0x9E3779B97F4A7C15  # frac(φ) · 2⁶⁴
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Layer:
    """A quantized layer: its parameter, and the same in canonical form, as bytes of two codes each."""

    name: str
    weight: Tensor
    codes: Tensor
    state: QuantState

    @property
    def key(self) -> tuple[int, ...]:
        """Changes where the bytes were replaced or written to, other than through `.data`."""
        tensors = [self.weight, self.state.absmax]
        return tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


def take_fingerprint(model: nn.Module, hashed: bool = True) -> Fingerprint | None:
    """The fingerprint of a model's base, whatever adapters it has; None where weights are not at hand.

    Those are on the meta device, offloaded, or sharded over processes.

    Args:
        hashed: False for the samples alone: milliseconds, where hashes read every byte.
    """
    found, dense = list(_quantized(model)), dict(_dense(model))
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found) or not all(map(_is_whole, dense.values())):
        return None
    per_layer = max(FEWEST_CODES, min(CODES_PER_LAYER, CODES_IN_ALL // max(len(layers), 1)))
    hashes = _hashes(layers) if hashed else [""] * len(layers)
    codes = _to_cpu([_sampled_codes(layer, per_layer) for layer in layers])
    scales = _to_cpu([_sampled_scales(layer) for layer in layers])
    per_tensor = max(FEWEST_VALUES, min(VALUES_PER_TENSOR, VALUES_IN_ALL // max(len(dense), 1)))
    values = _to_cpu([_at(tensor, per_tensor).float() for tensor in dense.values()])
    prints = {
        layer.name: LayerPrint(digest[:HASH_LENGTH], "".join(f"{code:x}" for code in c), tuple(map(rounded, s)))
        for layer, digest, c, s in zip(layers, hashes, codes, scales, strict=True)
    }
    others = {
        name: DensePrint(tuple(tensor.shape), tuple(map(rounded, v)), str(tensor.dtype).removeprefix("torch."))
        for (name, tensor), v in zip(dense.items(), values, strict=True)
    }
    root = _root({layer.name: h for layer, h in zip(layers, hashes, strict=True)}, others) if hashed else ""
    repacked = any(hasattr(layer.state, "original_nested") for layer in layers)
    return Fingerprint(root, _format(layers), repacked, prints, others)


def identity_of(model: nn.Module) -> tuple[Any, ...]:
    """Where the bytes of the quantized layers lie: the same as long as nothing was moved or written to."""
    return tuple(layer and (layer.name, *layer.key) for layer in _quantized(model))


# ── Reading a model ──────────────────────────────────────────────────────────────────────────────────────────────────


def _quantized(model: nn.Module) -> Iterator[_Layer | None]:
    """The packed layers, also where a dense one stands in for one while merged; None for one that is not all there."""
    for name, module in model.named_modules():
        aside = getattr(module, "_packed", ())  # our layers'; another's may be anything
        for layer in (module, *(aside if isinstance(aside, tuple) else ())):
            if isinstance(layer, bnb.nn.Linear4bit):
                yield _layer(wrapped_name(name), layer)


def _layer(name: str, module: Any) -> _Layer | None:
    weight, state = module.weight, getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None or not _is_whole(weight.data) or not _is_whole(state.absmax):
        return None
    codes, state = unpacked(weight.data, state)
    codes = codes.view(torch.uint8).reshape(-1)
    return _Layer(name, weight, codes, state) if len(codes) == -(-state.shape.numel() // 2) else None


def _dense(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that are dense in the base, each once; not of layers with an adapter merged into them."""
    seen: set[int] = set()
    merged: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True:
            merged += (f"{name}.",)
        if isinstance(module, bnb.nn.Linear4bit) or is_of_adapter(name) or f"{name}.".startswith(merged or "\0"):
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            if kind.endswith("bias") or is_of_adapter(kind) or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield wrapped_name(f"{name}.{kind}" if name else kind), parameter.detach()


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's values are here, and not on the meta device or in other processes."""
    return type(tensor) is Tensor and tensor.device.type != "meta" and tensor.numel() > 0


def _format(layers: list[_Layer]) -> str:
    kinds = {
        f"{layer.state.quant_type}, blocks of {layer.state.blocksize}{', nested' if layer.state.nested else ''}"
        for layer in layers
    }
    return " and ".join(sorted(kinds))[:100]


def _hashes(layers: list[_Layer]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing and copying let go of Python's lock
        return list(pool.map(_hash, layers))


def _hash(layer: _Layer) -> str:
    state = layer.state
    count = state.shape.numel()
    digest = hashlib.sha256(f"{tuple(state.shape)} {state.quant_type} {state.blocksize} {state.nested}".encode())
    codes = layer.codes.cpu().numpy()
    digest.update(codes[: count // 2].data)
    if count % 2:
        digest.update(bytes([codes[-1] & 0xF0]))  # the other half of the last byte is nobody's
    parts = [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]
    for part in parts:
        digest.update(part.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _root(hashes: dict[str, str], dense: dict[str, DensePrint]) -> str:
    lines = [f"{name} {digest}" for name, digest in hashes.items()]
    lines += [f"{name} {tensor.shape} {tensor.values}" for name, tensor in dense.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=256)
def positions(count: int, samples: int) -> tuple[int, ...]:
    """Where `count` weights are sampled, spread evenly; fewer positions than `samples` where there are fewer."""
    return tuple((((i * _PHI) % 2**64) * count) >> 64 for i in range(1, min(samples, count) + 1))


@lru_cache(maxsize=256)
def _index(count: int, samples: int, device: torch.device) -> Tensor:
    return torch.tensor(positions(count, samples), dtype=torch.long, device=device)


def _at(tensor: Tensor, samples: int) -> Tensor:
    index = _index(tensor.numel(), samples, tensor.device)
    if tensor.is_contiguous():
        return tensor.reshape(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def _sampled_codes(layer: _Layer, samples: int) -> Tensor:
    index = _index(layer.state.shape.numel(), samples, layer.codes.device)
    pairs = layer.codes[index // 2]
    return torch.where(index % 2 == 0, pairs >> 4, pairs & 0xF)


def _sampled_scales(layer: _Layer) -> Tensor:
    state = layer.state
    index = _index(state.absmax.numel(), SCALES_PER_LAYER, state.absmax.device)
    scales = state.absmax[index]
    if state.nested:
        scales = state.state2.code[scales.long()] * state.state2.absmax[index // NESTED_BLOCK_SIZE] + state.offset
    result: Tensor = scales.float()
    return result


def _to_cpu(tensors: list[Tensor]) -> list[list[Any]]:
    """The tensors' values, with one copy for each device and not one for each tensor."""
    values: dict[int, list[Any]] = {}
    for device in {tensor.device for tensor in tensors}:
        there = [(i, tensor) for i, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensor for _, tensor in there]).tolist()
        done = 0
        for i, tensor in there:
            values[i] = together[done : done + tensor.numel()]
            done += tensor.numel()
    return [values[i] for i in range(len(tensors))]
