"""What quantizing a model loses, layer by layer: the report that `quantization_report` returns.

**Outliers** are the layers whose error, in the report's first scheme, stands out of the others':

    log error > median + 3.5 · 1.4826 · max(MAD, 0.01)      over the logs of all layers' errors

MAD is the median distance from the median; 1.4826 MAD is the standard deviation if the logs are Gaussian but for the
outliers, and 3.5 the usual bound (Iglewicz and Hoaglin, 1993). The least MAD keeps layers that are all alike from
having outliers: no error within 5 % of the median is one.

The error of weights is not that of the model: it does not know which inputs a layer gets, nor what becomes of its
outputs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_qlora.config.record import json_text
from hf_qlora.quant import report_text
from hf_qlora.validation import ConfigError


DEVIATIONS = 3.5
CONSISTENT = 1.4826  # standard deviations in a MAD of Gaussian numbers
LEAST_MAD = 0.01


@dataclass(frozen=True)
class LayerQuantization:
    """One layer.

    Attributes:
        shape: (out_features, in_features).
        dense_bytes: of its weight in the dense model; None where there is none.
        nbytes: codes and scales, by scheme.
        errors: ‖W − Q(W)‖ / ‖W‖ by scheme; empty where W is not known.
        norm, peak, kurtosis: of the dense weights, or else of what the codes stand for; see `quant/rounding.py`.
    """

    name: str
    shape: tuple[int, int]
    dense_bytes: int | None
    nbytes: dict[str, int]
    errors: dict[str, float]
    norm: float
    peak: float
    kurtosis: float | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def squared_error(self, scheme: str) -> float:
        """‖W − Q(W)‖²."""
        return (self.errors[scheme] * self.norm) ** 2

    def cost(self, scheme: str) -> int:
        """Bytes that it takes to leave the layer dense."""
        return (self.dense_bytes or 0) - self.nbytes[scheme]


@dataclass
class QuantizationReport:
    """See the module. `str(report)` is the table, `to_json` all of it.

    Attributes:
        model: its class, and its name where it has one.
        dtype: of the dense weights.
        model_bytes: what the model takes as it was given.
        schemes: names, as "nf4-64-dq": type, block size, and double quantization; outliers go by the first.
        yardsticks: the error of Gaussian weights, by scheme.
        layers: one entry for each weight that is quantized; layers that share one are one.
        dense_layers: names of the linear layers that stay dense by themselves.
        budget_bytes: for layers to be left dense; None: not asked.
        left_dense: the layers suggested for it.
        skip_modules: for `NF4Config(skip_modules=report.skip_modules)`, which leaves just those dense in addition.
    """

    model: str
    dtype: str
    model_bytes: int
    schemes: list[str]
    yardsticks: dict[str, float]
    layers: list[LayerQuantization]
    dense_layers: list[str]
    budget_bytes: int | None = None
    left_dense: list[str] = field(default_factory=list)
    skip_modules: list[str] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether there are errors."""
        return all(layer.errors for layer in self.layers)

    def error(self, scheme: str, without: Collection[str] = ()) -> float:
        """‖W − Q(W)‖ / ‖W‖ over all layers, those of `without` as dense."""
        squares = sum(layer.squared_error(scheme) for layer in self.layers if layer.name not in without)
        norm = sum(layer.norm**2 for layer in self.layers)
        return math.sqrt(squares / norm) if norm else 0.0

    def bits(self, scheme: str) -> float:
        """Bits a quantized parameter, codes and scales."""
        return 8 * sum(layer.nbytes[scheme] for layer in self.layers) / sum(layer.numel for layer in self.layers)

    @property
    def outliers(self) -> list[str]:
        """Names of the layers whose error stands out, the largest first."""
        errors = {layer.name: layer.errors[self.schemes[0]] for layer in self.layers} if self.measured else {}
        bound = outlier_bound(errors.values())
        return [name for name in sorted(errors, key=lambda name: -errors[name]) if errors[name] > bound]

    @property
    def extra_bytes(self) -> int:
        """What the suggested layers cost."""
        chosen = set(self.left_dense)
        return sum(layer.cost(self.schemes[0]) for layer in self.layers if layer.name in chosen)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with what follows from the rest."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        derived: dict[str, Any] = {
            "bits": {scheme: self.bits(scheme) for scheme in self.schemes},
            "error": {scheme: self.error(scheme) for scheme in self.schemes} if self.measured else None,
            "outliers": self.outliers,
            "extra_bytes": self.extra_bytes,
        }
        return {**{item.name: getattr(self, item.name) for item in fields(self)}, "layers": layers, **derived}

    def to_json(self) -> str:
        return json_text(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationReport:
        """What `to_dict` gave.

        Raises:
            ConfigError: something is missing.
        """
        try:
            layers = [LayerQuantization(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
            return cls(
                **{item.name: values[item.name] for item in fields(cls) if item.name != "layers"}, layers=layers
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"This is no quantization report: {error!r}.") from error

    def plot(self, path: Path) -> None:
        """Draw the errors by layer and module, a map for each type and block size, into a .png file.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another file, or no errors to draw.
        """
        report_text.plot(self, path)

    def to_text(self, every_layer: bool = False) -> str:
        """The tables: a row for each kind of layer, or for each layer."""
        return report_text.text(self, every_layer)

    def __str__(self) -> str:
        return self.to_text()


def outlier_bound(errors: Iterable[float]) -> float:
    """The error above which a layer is an outlier; see the module."""
    logs = [math.log(error) for error in errors if error > 0]
    if not logs:
        return math.inf
    median = statistics.median(logs)
    mad = statistics.median(abs(log - median) for log in logs)
    return math.exp(median + DEVIATIONS * CONSISTENT * max(mad, LEAST_MAD))
