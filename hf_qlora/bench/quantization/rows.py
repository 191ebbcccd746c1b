"""What a case returns: rows of raw numbers, and what the numbers are of.

    Row(arm="NF4", setting="decode, batch 8", metric="seconds", values=(0.021, 0.020, …), tokens=8)

An arm is one of the things compared, a setting what it was given to do. A timing has the seconds of each round; what
is counted or computed has one value. `METRICS` says how each is read, shown, and held against another run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


Kind = Literal["timing", "exact", "memory", "computed"]


@dataclass(frozen=True)
class Metric:
    """How a number is shown and compared.

    Attributes:
        title: with its unit, for the head of a column.
        scale: shown is value / scale.
        form: of the shown number.
        kind: "timing" has rounds and noise; "exact" is a count; "memory" what a process was seen to take; "computed"
            follows from the weights, but for rounding.
        worse, better: what another run is, whose value is larger or smaller.
        tolerance: relative; a difference up to it is none.
    """

    title: str
    kind: Kind
    scale: float = 1.0
    form: str = ".3g"
    worse: str = "larger"
    better: str = "smaller"
    tolerance: float = 0.0

    def shown(self, value: float) -> str:
        return format(value / self.scale, self.form)


MIB = 2**20
METRICS: dict[str, Metric] = {
    "seconds": Metric("s", "timing", worse="slower", better="faster"),
    "quantized_bytes": Metric("codes, MiB", "exact", MIB, ",.2f"),
    "scale_bytes": Metric("scales, MiB", "exact", MIB, ",.2f"),
    "dense_bytes": Metric("dense, MiB", "exact", MIB, ",.2f"),
    "weight_bytes": Metric("weights, MiB", "exact", MIB, ",.2f"),
    "bits": Metric("bits a weight", "computed", 1.0, ".4f", tolerance=1e-6),
    # A process's resident memory moves by a few MiB from run to run, with the allocator and the libraries' threads.
    "resident_bytes": Metric("resident, MiB", "memory", MIB, ",.0f", tolerance=0.03),
    "peak_bytes": Metric("peak, MiB", "memory", MIB, ",.0f", tolerance=0.03),
    # What is computed differs between processors and numbers of threads in its last bits, and KL and perplexity by
    # what those bits do to logits in bfloat16.
    "mse": Metric("mean squared error", "computed", tolerance=0.01),
    "max_error": Metric("largest error", "computed", tolerance=0.01),
    "relative_error": Metric("‖W − Q(W)‖ / ‖W‖", "computed", form=".5f", tolerance=0.01),
    "kl": Metric("KL, nats", "computed", form=".3g", tolerance=0.05),
    "perplexity": Metric("perplexity", "computed", form=".3f", tolerance=0.01),
    "loss": Metric("loss, nats", "computed", form=".4f", tolerance=0.01),
    "gradient_norm": Metric("gradient norm", "computed", form=".4f", tolerance=0.05),
}


@dataclass(frozen=True)
class Row:
    """One measured quantity of one arm.

    Attributes:
        values: of a timing, one for each round, in their order.
        tokens: that a round of a timing goes through; 0 where it is of no tokens.
        layer: whether `setting` names a layer of the model.
    """

    arm: str
    metric: str
    values: tuple[float, ...]
    setting: str = ""
    tokens: int = 0
    layer: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"values": list(self.values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        return cls(**{**values, "values": tuple(values["values"])})

    @property
    def median(self) -> float:
        return float(np.median(self.values))


def ratios(values: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    """Of rounds to those of the reference beside them: arms take turns, and what disturbs a round is in both."""
    return tuple(value / base for value, base in zip(values, reference, strict=True))


def numbers(arm: str, found: Mapping[str, float], setting: str = "", layer: bool = False) -> list[Row]:
    """A row for each metric of one value, by name."""
    return [Row(arm, metric, (value,), setting, layer=layer) for metric, value in found.items()]


def timings(seconds: Mapping[str, Sequence[float]], setting: str = "", tokens: int = 0) -> list[Row]:
    """A row for each arm's rounds."""
    return [Row(arm, "seconds", tuple(found), setting, tokens) for arm, found in seconds.items()]


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, standard deviation (of a sample; 0 of one round), median, 95th percentile (linear) and least of rounds."""
    found = np.asarray(list(values), dtype=np.float64)
    return {
        "mean": float(found.mean()),
        "std": float(found.std(ddof=1)) if len(found) > 1 else 0.0,
        "median": float(np.median(found)),
        "p95": float(np.percentile(found, 95)),
        "min": float(found.min()),
    }
