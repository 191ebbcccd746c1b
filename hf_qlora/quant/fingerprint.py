"""Which base is this? A fingerprint taken where an adapter is trained, compared where it is loaded.

An adapter fits the bytes of the base that it was trained on. Those bytes are the same wherever the same checkpoint is
quantized in the same way, but for rounding: the mean that nested scales are stored against depends on the number of
threads in its last bit, which moves a few 8-bit scales by a step, and devices round ties differently. So a fingerprint
is compared in two steps.

1. sha256 of each layer over its codes, its scales and their nested state. Equal: the same base.
2. Samples: 64 codes and 4 scales a layer (fewer codes in models of very many layers), 8 values of each dense tensor.
   Rounding changes at most 0.1 % of codes, and leaves scales within 1e-4 but for as many; else it is another base.

How much a sample tells. Two unrelated layers agree in 7 % of their codes, so that one layer of another model is found
by itself: 64 codes agree but for 2 with probability 1e-70. A change that moves a share p of a layer's codes escapes
that layer's 64 with probability (1 − p)^64 + …, 4 % at p = 10 %, but over a model's 13,440 (210 layers) 0.1 % are 13:
p = 0.27 %, which is what weights rounded to bfloat16 make of SmolLM2 in float32, is expected to move 36. Counts up to
2 pass everywhere, so that small models raise no false alarm. What changes few codes in few layers is told by its
hash alone, and reads as rounding: it is.

Before either step the form is made canonical: `quant_storage` is read as bytes, and a weight that bitsandbytes has
repacked for a CPU is unpacked. Repacking also rounds scales to bfloat16 and nests them anew, for good, so that these
are compared to 1 % where either side was repacked.

The positions of n weights sampled k times are ⌊frac(i φ) n⌋ for i = 1 … k, φ the golden ratio: spread evenly, the same
everywhere, and nothing that a file could choose. Biases are left out, since LoRA may train them (`bias`); so are copies
that adapters train (`modules_to_save`, tokens), whose originals are in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from hf_qlora.config.fingerprint import HASH_LENGTH, DensePrint, Fingerprint, LayerPrint, rounded
from hf_qlora.quant.linear4bit import NESTED_BLOCK_SIZE, unpacked
from hf_qlora.quant.names import plain_name


CODES_PER_LAYER, FEWEST_CODES, CODES_IN_ALL = 64, 8, 2**16
SCALES_PER_LAYER = 4
VALUES_PER_TENSOR = 8

PASSING_SHARE = 1e-3  # of codes, and of scales, that rounding may change
PASSING_COUNT = 2  # of a layer's, and of a small model's
SCALE_TOLERANCE, REPACKED_TOLERANCE = 1e-4, 1e-2
DENSE_TOLERANCE = 2**-8  # the same value read in bfloat16, 8 bits of precision
UNRELATED = 0.3  # share of equal codes below which weights have nothing to do with each other; chance is 0.07
CAST = 0.99  # share of equal codes above which a cast is the likely cause, where the dtypes differ

# What PEFT's layers call the module they wrap, and the parameters of theirs that are no part of the base.
_INNER = ("base_layer", "original_module", "token_adapter")
_OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")

_PHI = 0x9E3779B97F4A7C15  # frac(φ) · 2⁶⁴
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Comparison:
    """Two fingerprints side by side.

    Attributes:
        verdict: "same", "rounding" (the same base, rounded otherwise), or "differs".
        names: the layers and tensors that differ, in the model's order; by their hashes where it is rounding.
        found: what differs, in words.
        cause: what that suggests.
    """

    verdict: Literal["same", "rounding", "differs"]
    names: tuple[str, ...] = ()
    found: str = ""
    cause: str = ""


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
    layers, dense = list(_quantized(model)), dict(_dense(model))
    if None in layers or not all(map(_is_whole, dense.values())):
        return None
    layers = [layer for layer in layers if layer is not None]
    per_layer = max(FEWEST_CODES, min(CODES_PER_LAYER, CODES_IN_ALL // max(len(layers), 1)))
    hashes = _hashes(layers) if hashed else [""] * len(layers)
    codes = _to_cpu([_sampled_codes(layer, per_layer) for layer in layers])
    scales = _to_cpu([_sampled_scales(layer) for layer in layers])
    values = _to_cpu([_at(tensor, VALUES_PER_TENSOR).float() for tensor in dense.values()])
    prints = {
        layer.name: LayerPrint(digest[:HASH_LENGTH], "".join(f"{code:x}" for code in c), tuple(map(rounded, s)))
        for layer, digest, c, s in zip(layers, hashes, codes, scales, strict=True)
    }
    others = {
        name: DensePrint(tuple(tensor.shape), tuple(map(rounded, v)))
        for (name, tensor), v in zip(dense.items(), values, strict=True)
    }
    root = _root({layer.name: h for layer, h in zip(layers, hashes, strict=True)}, others) if hashed else ""
    repacked = any(hasattr(layer.state, "original_nested") for layer in layers)
    return Fingerprint(root, _format(layers), repacked, prints, others)


def identity_of(model: nn.Module) -> tuple[Any, ...]:
    """Where the bytes of the quantized layers lie: the same as long as nothing was moved or written to."""
    return tuple(layer and (layer.name, *layer.key) for layer in _quantized(model))


def compare(expected: Fingerprint, found: Fingerprint, only_dense: bool = False) -> Comparison:
    """What tells the base at hand, `found`, from the `expected` one.

    Args:
        only_dense: leave quantized layers out, where the base is dense by choice and was quantized.
    """
    if expected.root and expected.root == found.root:
        return Comparison("same")
    layers: dict[str, _LayerDifference] = {}
    if not only_dense:
        structure = _compare_structure(expected, found)
        if structure is not None:
            return structure
        layers = {
            name: _layer_difference(expected.layers[name], layer, expected.repacked or found.repacked)
            for name, layer in found.layers.items()
        }
    dense = {
        name: _dense_difference(expected.dense[name], tensor)
        for name, tensor in found.dense.items()
        if name in expected.dense
    }
    differing = _differing(layers) + [name for name, d in dense.items() if d > PASSING_COUNT]
    if differing:
        return _explained(expected, found, layers, dense, differing)
    changed = [name for name, layer in layers.items() if layer.changed]
    if changed or any(dense.values()):
        return Comparison("rounding", tuple(changed))
    return Comparison("same")


@dataclass(frozen=True)
class _LayerDifference:
    """How many of a layer's samples differ, of how many; `changed` also where only its hash does."""

    codes: int
    of_codes: int
    scales: int
    of_scales: int
    changed: bool

    @property
    def is_another(self) -> bool:
        return self.codes > PASSING_COUNT or self.scales > PASSING_COUNT


def _layer_difference(a: LayerPrint, b: LayerPrint, repacked: bool) -> _LayerDifference:
    of_codes, of_scales = max(len(a.codes), len(b.codes)), max(len(a.scales), len(b.scales))
    codes = of_codes - sum(x == y for x, y in zip(a.codes, b.codes, strict=False))
    tolerance = REPACKED_TOLERANCE if repacked else SCALE_TOLERANCE
    # Nested scales of blocks near zero have the error of the others.
    typical = sum(map(abs, a.scales)) / len(a.scales)
    scales = of_scales - sum(_close(x, y, tolerance, typical) for x, y in zip(a.scales, b.scales, strict=False))
    changed = bool(codes or scales) or bool(a.hash and b.hash and a.hash != b.hash)
    return _LayerDifference(codes, of_codes, scales, of_scales, changed)


def _dense_difference(a: DensePrint, b: DensePrint) -> int:
    """How many sampled values differ; all of them where the shapes do."""
    if a.shape != b.shape or len(a.values) != len(b.values):
        return PASSING_COUNT + max(len(a.values), len(b.values))
    return sum(not _close(x, y, DENSE_TOLERANCE, 1e-4) for x, y in zip(a.values, b.values, strict=True))


def _close(x: float, y: float, tolerance: float, typical: float) -> bool:
    return x == y or (x != x and y != y) or abs(x - y) <= tolerance * max(abs(x), abs(y), typical)


def _differing(layers: dict[str, _LayerDifference]) -> list[str]:
    """The layers that are not the same but for rounding: each by itself, or all that changed where too much did."""
    for differ, of in (("codes", "of_codes"), ("scales", "of_scales")):
        count = sum(getattr(layer, differ) for layer in layers.values())
        if count > max(PASSING_COUNT, PASSING_SHARE * sum(getattr(layer, of) for layer in layers.values())):
            return [name for name, layer in layers.items() if layer.codes or layer.scales]
    return [name for name, layer in layers.items() if layer.is_another]


def _compare_structure(expected: Fingerprint, found: Fingerprint) -> Comparison | None:
    more = [name for name in found.layers if name not in expected.layers]
    fewer = [name for name in expected.layers if name not in found.layers]
    if not more and not fewer:
        if expected.format == found.format:
            return None
        names = tuple(found.layers)
        what = f"its layers are in {found.format}, and were in {expected.format!r:.100}"
        return Comparison("differs", names, what, "quantization with other settings")
    if not expected.layers or not found.layers:
        here, there = ("4-bit", "dense") if found.layers else ("dense", "4-bit")
        cause = "a base loaded in another way"
        return Comparison("differs", (*more, *fewer), f"it is {here}, and was {there}", cause)
    parts = [
        f"{len(names)} layers are 4-bit {here} and not {there} ({names[0]!r:.100}{', …' if len(names) > 1 else ''})"
        for names, here, there in ((more, "here", "there"), (fewer, "there", "here"))
        if names
    ]
    return Comparison("differs", (*more, *fewer), "; ".join(parts), "another model, or other skip_modules")


def _explained(
    expected: Fingerprint,
    found: Fingerprint,
    layers: dict[str, _LayerDifference],
    dense: dict[str, int],
    names: list[str],
) -> Comparison:
    shown = [f"{name}{_in_words(name, expected, found, layers)}" for name in names[:3]]
    quantized = sum(name in layers for name in names)
    counts = []
    if layers:
        counts.append(f"{quantized} of {len(layers)} quantized layers")
    if dense:
        counts.append(f"{len(names) - quantized} of {len(dense)} other tensors")
    what = f"{' and '.join(counts)} differ: {', '.join(shown)}{', …' if len(names) > 3 else ''}"
    return Comparison("differs", tuple(names), what, _cause(expected, found, layers, dense, names))


def _in_words(name: str, expected: Fingerprint, found: Fingerprint, layers: dict[str, _LayerDifference]) -> str:
    if name in layers:
        layer = layers[name]
        return (
            f" ({layer.of_codes - layer.codes} of {layer.of_codes} sampled codes and "
            f"{layer.of_scales - layer.scales} of {layer.of_scales} scales agree)"
        )
    was, now = expected.dense[name].shape, found.dense[name].shape
    return "" if was == now else f" (its shape is {now}, and was {was})"


def _cause(
    expected: Fingerprint,
    found: Fingerprint,
    layers: dict[str, _LayerDifference],
    dense: dict[str, int],
    names: list[str],
) -> str:
    if any(name in dense and expected.dense[name].shape != found.dense[name].shape for name in names):
        return "another vocabulary (were tokens added?), or another model"
    differing = [layers[name] for name in names if name in layers]
    if not differing:
        return "a trained or replaced head or embedding" if layers else "another model, or one trained further"
    equal = 1 - sum(layer.codes for layer in differing) / sum(layer.of_codes for layer in differing)
    others_equal = len(differing) < len(layers)
    if equal < UNRELATED:
        return "layers that were replaced" if others_equal else "another model of the same architecture"
    if len(differing) < len(names):
        return "another revision of the model, or one trained further"
    if equal >= CAST and not others_equal:
        return "weights cast to another dtype before they were quantized, or changed by very little"
    return "an adapter merged into the base, or a base trained further"


# ── Reading a model ──────────────────────────────────────────────────────────────────────────────────────────────────


def _quantized(model: nn.Module) -> Iterator[_Layer | None]:
    """The packed layers, also where a dense one stands in for one while merged; None for one that is not all there."""
    for name, module in model.named_modules():
        for layer in (module, *getattr(module, "_packed", ())):
            if isinstance(layer, bnb.nn.Linear4bit):
                yield _layer(_base_name(name), layer)


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
        if isinstance(module, bnb.nn.Linear4bit) or _is_of_adapter(name) or f"{name}.".startswith(merged or "\0"):
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            if kind.endswith("bias") or _is_of_adapter(kind) or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _base_name(f"{name}.{kind}" if name else kind), parameter.detach()


def _is_of_adapter(name: str) -> bool:
    return any(part.startswith(_OF_ADAPTERS) for part in name.split("."))


def _base_name(name: str) -> str:
    return ".".join(part for part in plain_name(name).split(".") if part not in _INNER)


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
    digest.update(codes[: count // 2])
    if count % 2:
        digest.update(bytes([codes[-1] & 0xF0]))  # the other half of the last byte is nobody's
    parts = [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]
    for part in parts:
        digest.update(part.detach().cpu().contiguous().numpy())
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
    return scales.float()


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
