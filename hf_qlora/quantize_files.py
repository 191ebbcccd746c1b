"""`hf-qlora quantize`: a dense model's folder in, an NF4 base's folder out, as bitsandbytes and transformers load it.

    config.json, model.safetensors, generation_config.json, the tokenizer    what transformers saves of such a model
    README.md                                                                its card
    hf_qlora_quantization.json                                               base, settings, calibration, fingerprint

The compute dtype that the config names is that of the weights: without one, transformers would multiply in float32.
The folder is there whole or not at all. An adapter that is trained on it has the same fingerprint of its base in its
own file, and names this folder, or where it was pushed to.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedModel

from hf_qlora.config import NF4Config
from hf_qlora.config.fingerprint import Fingerprint
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.config.record import write_json
from hf_qlora.hub import card
from hf_qlora.hub.quantized import write_quantized_card
from hf_qlora.identity import description
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.folder import check_folder, whole_folder
from hf_qlora.merge.load import checked_device, load_model, without_weights
from hf_qlora.merge.sources import base_source, copy_beside
from hf_qlora.quant.base import checked_config, quantize_model
from hf_qlora.quant.calibrate.errors import CalibrationRefused
from hf_qlora.quant.calibrate.kept import beside as kept_beside
from hf_qlora.quant.calibrate.kept import resumable
from hf_qlora.quant.calibrate.report import CalibrationReport
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.run import calibration_report, planned
from hf_qlora.quant.fingerprint import take_fingerprint
from hf_qlora.quant.footprint import Footprint, footprint
from hf_qlora.saving import versions
from hf_qlora.validation import ConfigError


RECORD_NAME = "hf_qlora_quantization.json"
KNOWN = (constants.REPOCARD_NAME, RECORD_NAME)  # written here beside a model; the card is kept and added to
FORMAT_VERSION = 1
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class QuantizedFiles:
    """A quantized base that was written.

    Attributes:
        model: what it was made from.
        output: its folder.
        base: what can be said of it: id, commit, class and dtype.
        quantization: the settings.
        before, after: what the weights take.
        fingerprint: of the quantized weights.
        calibration: the rows that the rounding was fitted on; None where it is to the nearest level.
        report: what was measured of them.
    """

    model: str
    output: str
    base: dict[str, str | None]
    quantization: NF4Config
    before: Footprint
    after: Footprint
    fingerprint: Fingerprint | None
    calibration: CalibrationRows | None = None
    report: CalibrationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: the file beside the model."""
        rows = self.calibration
        return {
            "format_version": FORMAT_VERSION,
            "base": self.base,
            "quantization": self.quantization.to_dict(),
            "calibration": None if rows is None else {"source": rows.source, "fingerprint": rows.fingerprint},
            "report": None if self.report is None else self.report.to_dict(),
            "bytes": {"dense": self.before.total_bytes, "quantized": self.after.total_bytes},
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "versions": versions(),
        }

    @property
    def rounding(self) -> str:
        return "to the nearest level" if self.calibration is None else f"calibrated on {self.calibration.source}"

    def __str__(self) -> str:
        lines = {
            "quantized": f"{self.model}, rounded {self.rounding}",
            "weights": f"{self.after}, were {self.before} in {self.base['dtype']}",
        }
        if self.fingerprint is not None:
            lines["base"] = f"{self.fingerprint.format}, sha256 {self.fingerprint.root[:16]}…"
        lines["saved"] = f"in {self.output}"
        text = "\n".join(f"{name:<10} {line}" for name, line in lines.items())
        return text if self.report is None else f"{text}\n{self.report}"


def quantize_files(
    model: str,
    output: str | os.PathLike[str],
    config: NF4Config | None = None,
    *,
    calibration: Any = None,
    rows: int = 64,
    length: int = 256,
    held_out: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizedFiles:
    """Quantize a saved model to NF4, and save it.

    Args:
        model: a folder or Hub id of a dense model.
        output: the folder for the result: new or empty, and there whole or not at all.
        config: how; `NF4Config()` by default.
        calibration: what to fit the rounding on, as for `calibration_rows`, with `rows`, `length`, `held_out` and
            `seed`, or a `Calibration` of it; None rounds to the nearest level.
        dtype: "float32", "bfloat16" or "float16": what the weights are loaded in, and the dense ones saved in; by
            default what the model's config says.
        device: where it is done; CUDA where there is one, by default.
        force: calibrate on token ids that may be another tokenizer's, and write a calibrated model that loses more on
            the held-out rows than one rounded to nearest.
        overwrite: replace a saved model that is in `output`; of its card, what a user wrote is kept.
        max_shard_bytes: of one file of weights.

    Calibration that is interrupted goes on where it stopped, when it is asked for again.

    Raises:
        MergeError, LoadError: no such model, one that is quantized already, or an output that cannot be used.
        CalibrationError: data that cannot be calibrated on.
        CalibrationRefused: what `force` allows.
        BaseModelError, ConfigError: see `quantize_model`; an unknown dtype or device.
        OSError: the disk is full or read-only; what was in `output` is unchanged.
    """
    target, config, where = Path(output), checked_config(config), checked_device(device)
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; choose one of {tuple(COMPUTE_DTYPES)}.")
    check_folder(target, overwrite, KNOWN)
    folder = base_source(model, None)
    if target.exists() and target.samefile(folder):
        raise MergeError(f"{target} is what is quantized; name another folder for the result.")
    skeleton = without_weights(model)
    size = {"rows": rows, "length": length, "held_out": held_out, "seed": seed}
    asked = None if calibration is None else planned(calibration, skeleton, None, kept_beside(target), **size)
    if asked is not None:
        asked = replace(asked, force=asked.force or force)
    loaded = load_model(model, dtype).to(where)
    before = footprint(loaded)
    config = replace(config, compute_dtype=config.compute_dtype or loaded.dtype)
    with nullcontext() if asked is None else resumable(target, CalibrationRefused):
        quantize_model(loaded, config, calibration=asked)
        _refuse_worse(calibration_report(loaded), force)
        found = QuantizedFiles(
            model=model,
            output=str(target),
            base=description(loaded),
            quantization=config,
            before=before,
            after=footprint(loaded),
            fingerprint=take_fingerprint(loaded),
            calibration=None if asked is None else asked.rows,
            report=calibration_report(loaded),
        )
        with whole_folder(target, overwrite, KNOWN) as stage:
            loaded.save_pretrained(stage, max_shard_size=max_shard_bytes)
            copy_beside(folder, folder, stage)
            _describe(found, loaded, folder, target, stage)
    return found


def _refuse_worse(report: CalibrationReport | None, force: bool) -> None:
    """Raise CalibrationRefused for a calibration that is worse than none."""
    if report is not None and report.is_worse and not force:
        own, nearest = (report.losses[name] for name in ("calibrated", "nearest"))
        raise CalibrationRefused(
            f"Calibrated, the model's loss on {report.measured_on} is {own:.4f} nats a token, and rounded to nearest "
            f"{nearest:.4f}. Give other rows, or more, or leave the calibration out; force writes it all the same.",
            report,
        )


def _describe(found: QuantizedFiles, model: PreTrainedModel, source: Path, before: Path, stage: Path) -> None:
    """Write the record and the card, into which that of a folder that is replaced goes on."""
    write_json(stage / RECORD_NAME, found.to_dict())
    card.carry(before, stage)
    rows = {"Rounded": found.rounding, "Weights": found.after}
    if found.fingerprint is not None:
        rows["Fingerprint"] = f"sha256 {found.fingerprint.root}"
    if found.report is not None:
        rows |= found.report.card_rows()
    write_quantized_card(stage, model, found.quantization, found.model, source, rows)
