"""What an adapter's JSON says of the base it was trained on, and how that is read: checked, bounded, never run.

    "base":        {"id": "org/model", "commit": "…", "class": "LlamaForCausalLM", "dtype": "bfloat16"}
    "fingerprint": {"root": sha256, "format": "nf4, blocks of 64, nested", "repacked": false,
                    "layers": {name: "hash codes scales"},
                    "dense":  {name: "shape dtype values"}}

One string for each tensor, because each element of a list would be a line of the file. `hash` is the beginning of a
sha256, `codes` are hex digits, one for each sampled weight, `scales` and `values` are decimal numbers with commas
between. `quant/fingerprint.py` says what is sampled and how two of them are compared.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_qlora.validation import ConfigError


DIGITS = 6  # of a number, significant: 1e-6, where scales are compared to 1e-4
HASH_LENGTH = 16  # of a layer, which it only tells from others; the root is whole
LARGEST_COUNT = 100_000  # layers or tensors: no model has more
LARGEST_TEXT = 2_000  # characters for one of them

_NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e[+-]\d\d)?|inf|nan)"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER})*"
_LAYER = re.compile(rf"([0-9a-f]{{{HASH_LENGTH}}}|-) ([0-9a-f]+) ({_NUMBERS})")
_DENSE = re.compile(rf"(?:(\d{{1,12}}(?:x\d{{1,12}})*) )?(?:([a-z]\w{{0,29}}) )?({_NUMBERS})")  # of a scalar no shape
_ROOT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LayerPrint:
    """A quantized layer: its hash ("" where it was not taken), its sampled codes as hex digits, sampled scales."""

    hash: str
    codes: str
    scales: tuple[float, ...]


@dataclass(frozen=True)
class DensePrint:
    """A tensor that is not quantized: its shape, sampled values, and torch's name of its dtype, "" where unknown."""

    shape: tuple[int, ...]
    values: tuple[float, ...]
    dtype: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """A base, by its layers and other tensors in the model's order.

    Attributes:
        root: sha256 over all layers' hashes and all dense samples; "" where a layer has none.
        format: of the quantized layers, for messages; "" where there are none.
        repacked: whether bitsandbytes has repacked layers for a CPU, which rounded their scales to bfloat16.
    """

    root: str
    format: str
    repacked: bool
    layers: dict[str, LayerPrint] = field(default_factory=dict)
    dense: dict[str, DensePrint] = field(default_factory=dict)

    def unhashed(self) -> Fingerprint:
        """The samples alone."""
        layers = {name: replace(layer, hash="") for name, layer in self.layers.items()}
        return replace(self, root="", layers=layers)

    def without(self, names: Collection[str]) -> Fingerprint:
        """Without some of the dense tensors. The root stays: it is of all of the base, and may be equal or not."""
        return replace(self, dense={name: tensor for name, tensor in self.dense.items() if name not in names})

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        layers = {
            name: f"{layer.hash or '-'} {layer.codes} {_shown(layer.scales)}" for name, layer in self.layers.items()
        }
        dense = {
            name: " ".join(filter(None, ("x".join(map(str, tensor.shape)), tensor.dtype, _shown(tensor.values))))
            for name, tensor in self.dense.items()
        }
        own = {"root": self.root, "format": self.format, "repacked": self.repacked}
        return {**own, "layers": layers, "dense": dense}

    @classmethod
    def from_dict(cls, given: Any) -> Fingerprint:
        """Read what `to_dict` has written, in this version or one that says more.

        Raises:
            ConfigError: anything else.
        """
        if not isinstance(given, dict) or not given.keys() >= {"root", "format", "repacked", "layers", "dense"}:
            raise _malformed("", "an object with root, format, repacked, layers and dense", given)
        if not isinstance(given["root"], str) or not (given["root"] == "" or _ROOT.fullmatch(given["root"])):
            raise _malformed(".root", "a sha256", given["root"])
        if not isinstance(given["format"], str) or len(given["format"]) > 100:
            raise _malformed(".format", "a short text", given["format"])
        if not isinstance(given["repacked"], bool):
            raise _malformed(".repacked", "true or false", given["repacked"])
        layers = {
            name: LayerPrint("" if found[1] == "-" else found[1], found[2], _numbers(found[3]))
            for name, found in _parsed(given["layers"], "layers", _LAYER).items()
        }
        dense = {
            name: DensePrint(_sizes(found[1]), _numbers(found[3]), found[2] or "")
            for name, found in _parsed(given["dense"], "dense", _DENSE).items()
        }
        return cls(given["root"], given["format"], given["repacked"], layers, dense)


def rounded(value: float) -> float:
    """The number as it comes back from the JSON, so that what is in memory equals what was written."""
    return float(f"{value:.{DIGITS}g}")


def check_base(base: Any) -> None:
    """Raise ConfigError where the `base` of a record is not an object of short texts."""
    if not isinstance(base, dict) or len(base) > 20:
        raise _malformed("", "an object of a few texts", base, "base")
    for name, value in base.items():
        if not (value is None or (isinstance(value, str) and len(value) <= 500)):
            raise _malformed(f".{name:.50}", "a short text or null", value, "base")


def _parsed(given: Any, part: str, pattern: re.Pattern[str]) -> dict[str, re.Match[str]]:
    if not isinstance(given, Mapping) or len(given) > LARGEST_COUNT:
        raise _malformed(f".{part}", f"an object with at most {LARGEST_COUNT:,} names", given)
    result = {}
    for name, text in given.items():
        fits = isinstance(text, str) and len(text) <= LARGEST_TEXT and len(name) <= LARGEST_TEXT
        found = pattern.fullmatch(text) if fits else None
        if found is None:
            raise _malformed(f".{part}[{name!r:.100}]", "a text as hf_qlora writes it", text)
        result[name] = found
    return result


def _malformed(where: str, expected: str, found: Any, key: str = "fingerprint") -> ConfigError:
    return ConfigError(
        f"adapter_config.json: hf_qlora.{key}{where}={found!r:.100} must be {expected}. Download the adapter again, "
        f"or remove the key {key!r} to load it without comparing bases."
    )


def _shown(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:.{DIGITS}g}" for number in numbers)


def _sizes(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if text else ()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))
