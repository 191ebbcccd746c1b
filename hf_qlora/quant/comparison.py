"""Two fingerprints side by side: the same base, the same but for rounding, or another one, and which.

Quantizing a checkpoint gives the same bytes wherever it is done in the same way, but for rounding: the mean that
nested scales are stored against depends on the number of threads in its last bit, which moves a few 8-bit scales by a
step, and devices round ties differently. So there are two steps.

1. Equal hashes: the same base.
2. Else the samples: rounding changes at most 0.1 % of codes, and leaves scales within 1e-4 but for as many.

How much samples tell. Unrelated layers agree in 7 % of their codes, so that each layer of another model is found by
itself. A change that moves a share p of a layer's codes leaves all 64 samples of it as they were with probability
(1 − p)^64, 4 % at p = 5 %; but over a model of 210 layers 0.1 % of the samples are 13, and a change of all layers by
p = 0.3 %, which is what casting SmolLM2 from float32 to bfloat16 makes, moves 40. Counts up to 2 pass everywhere, so
that small models raise no false alarm. A change of few codes in few layers has another hash and reads as rounding.

Dense values are never rounded otherwise: one that differs is another base. Where the dtypes differ, 2⁻⁸ is allowed.

Scales of a base that bitsandbytes has repacked for a CPU were rounded to bfloat16 and nested anew: where either side
was, 1 % is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_qlora.config.fingerprint import DensePrint, Fingerprint, LayerPrint


PASSING_SHARE = 1e-3  # of codes, and of scales, that rounding may change
PASSING_COUNT = 2  # of a layer's, and of a small model's
SCALE_TOLERANCE, REPACKED_TOLERANCE = 1e-4, 1e-2
DENSE_TOLERANCE = 2**-8  # between dtypes: the same value read in bfloat16, 8 bits of precision
UNRELATED = 0.3  # share of equal codes below which weights have nothing to do with each other; chance is 0.07
MOST = 0.9  # of the layers
CAST = 0.99  # share of equal codes above which a cast is the likely cause


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
        name: _dense_differs(expected.dense[name], tensor)
        for name, tensor in found.dense.items()
        if name in expected.dense
    }
    differing = _differing(layers) + [name for name, differs in dense.items() if differs]
    if differing:
        return _explained(expected, found, layers, dense, differing)
    changed = [name for name, layer in layers.items() if layer.changed]
    if changed:
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


def _dense_differs(a: DensePrint, b: DensePrint) -> bool:
    """Whether the shapes differ, or any of the values that both have: more samples go on where fewer end."""
    tolerance = 0.0 if a.dtype == b.dtype != "" else DENSE_TOLERANCE
    return a.shape != b.shape or not all(
        _close(x, y, tolerance, 1e-4) for x, y in zip(a.values, b.values, strict=False)
    )


def _close(x: float, y: float, tolerance: float, typical: float) -> bool:
    if not (math.isfinite(x) and math.isfinite(y)):
        return x == y or (x != x and y != y)
    return abs(x - y) <= tolerance * max(abs(x), abs(y), typical)


def _differing(layers: dict[str, _LayerDifference]) -> list[str]:
    """The layers that are not the same but for rounding: each by itself, or all that changed where too much did."""
    for differ, of in (("codes", "of_codes"), ("scales", "of_scales")):
        count = sum(getattr(layer, differ) for layer in layers.values())
        if count > max(PASSING_COUNT, PASSING_SHARE * sum(getattr(layer, of) for layer in layers.values())):
            return [name for name, layer in layers.items() if layer.changed]
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
    dense: dict[str, bool],
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
    dense: dict[str, bool],
    names: list[str],
) -> str:
    differing = [layers[name] for name in names if name in layers]
    reshaped = any(name in dense and expected.dense[name].shape != found.dense[name].shape for name in names)
    if not differing:
        if reshaped:
            return "another vocabulary (were tokens added?), or another model"
        return "a trained or replaced head or embedding" if layers else "another model, or one trained further"
    equal = 1 - sum(layer.codes for layer in differing) / sum(layer.of_codes for layer in differing)
    others_equal = len(differing) < MOST * len(layers)
    if equal < UNRELATED:
        return "layers that were replaced" if others_equal else "another model of the same architecture"
    if len(differing) < len(names):
        return "another revision of the model, or one trained further"
    if equal >= CAST and not others_equal:
        return "weights cast to another dtype before they were quantized, or changed by very little"
    return "an adapter merged into the base, a base trained further, or one that was calibrated on other rows, or not"
