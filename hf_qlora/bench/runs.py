"""Results of several measurements in one form, in which two runs can be held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_qlora.bench.quantization.result import FILE, QuantizationResult
from hf_qlora.bench.quantization.rows import METRICS, Row, ratios
from hf_qlora.bench.quantization.run import CASES
from hf_qlora.bench.results import read_whole
from hf_qlora.bench.train_step.arms import FLOOR
from hf_qlora.validation import ConfigError


Key = tuple[str, str, str, str]  # case, setting, arm, metric


@dataclass(frozen=True)
class Run:
    """A result that was read.

    Attributes:
        kind: of measurement.
        settings: that both runs should share.
        environments: on what it was measured, by case.
        rows: by case, setting, arm and metric.
        references: of each row of a timing, the row that it can be divided by.
    """

    kind: str
    settings: dict[str, Any]
    environments: dict[str, dict[str, Any]]
    rows: dict[Key, Row]
    references: dict[Key, Key]

    def relative(self) -> dict[Key, Row]:
        """The rows, each timing over its reference's, round by round; timings without one are left out."""
        found = {}
        for key, row in self.rows.items():
            if METRICS[key[3]].kind != "timing":
                found[key] = row
            elif self.references.get(key, key) != key:
                base = self.rows[self.references[key]].values
                found[key] = replace(row, values=ratios(row.values, base))
        return found


def read(path: Path) -> Run:
    """A result of any kind that can be compared, from its file or folder.

    Raises:
        ConfigError: nothing there, or of another kind.
        ValueError: it was changed since it was measured.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} is not there.")
    values = read_whole(file)
    arms = values.get("arms")
    arms = arms if isinstance(arms, dict) else {}
    if "kind" in values:
        return of_suite(QuantizationResult.from_dict(values))
    if arms and "flops" in values and all("step_s" in arm for arm in arms.values()):
        return _of_arms("train-step", "step_s", values, dict.fromkeys(arms, FLOOR))
    if arms and all("generation_s" in arm for arm in arms.values()):
        return _of_arms("generation", "generation_s", values, {name: arm["base"] for name, arm in arms.items()})
    raise ConfigError(f"{file} cannot be compared; give results of bench quantization, train-step or generation.")


def of_suite(found: QuantizationResult) -> Run:
    rows = {(name, row.setting, row.arm, row.metric): row for name, case in found.cases.items() for row in case.rows}
    references = {key: (key[0], key[1], CASES[key[0]].reference, key[3]) for key in rows}
    settings = found.settings | {"model": found.model["name"], "files": found.model["files"]}
    return Run(
        "quantization",
        settings,
        {name: case.environment for name, case in found.cases.items()},
        rows,
        {key: base for key, base in references.items() if base in rows and key[3] == "seconds"},
    )


def _of_arms(kind: str, timing: str, values: Mapping[str, Any], bases: Mapping[str, str]) -> Run:
    """A result that is one case with arms."""
    rows: dict[Key, Row] = {}
    for name, arm in values["arms"].items():
        rows[kind, "", name, "seconds"] = Row(name, "seconds", tuple(arm[timing]))
        single = {"loss": arm.get("loss"), "gradient_norm": arm.get("gradient_norm")}
        single["peak_bytes"] = arm.get("memory", {}).get("peak")
        for metric, value in single.items():
            if value is not None:
                rows[kind, "", name, metric] = Row(name, metric, (value,))
    references = {(kind, "", name, "seconds"): (kind, "", base, "seconds") for name, base in bases.items()}
    return Run(
        kind,
        values["case"],
        {kind: values["with"]},
        rows,
        {key: base for key, base in references.items() if base in rows},
    )
