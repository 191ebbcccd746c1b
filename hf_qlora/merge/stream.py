"""`merge_files`: from an adapter's files and a base's files to a merged model's.

One layer at a time (`layerwise.py`). The logits are not compared: that takes the model. What cannot be done a layer at
a time (`skeleton.NotStreamable`) is done in memory, and the report says so.
"""

from __future__ import annotations

import copy
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.data.tokenizer import tokenizer_in
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import sources
from hf_qlora.merge.attach import attach
from hf_qlora.merge.folder import CARD, check_folder, whole_folder
from hf_qlora.merge.in_memory import Onto, check_onto, merge, refuse_lost
from hf_qlora.merge.layerwise import Stream
from hf_qlora.merge.load import checked_device
from hf_qlora.merge.record import describe
from hf_qlora.merge.report import MergeRefused, MergeReport
from hf_qlora.merge.seen import SeenBase
from hf_qlora.merge.skeleton import NotStreamable, build, labels, make_base, modules_to_save
from hf_qlora.merge.tensors import TensorFiles
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.calibrate.kept import beside as kept_beside
from hf_qlora.quant.calibrate.kept import resumable
from hf_qlora.quant.calibrate.run import planned
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.selection import quantizable_layers
from hf_qlora.validation import CHANGES_BASE


TrainedOn = Literal["auto", "nf4", "dense"]
REPEATED = ("pissa", "olora")  # initializations that depend on the base's weights alone, not on chance or data
MAX_SHARD_BYTES = 5 * 10**9
QUANTIZATION = "quantization_config"  # of a base that is stored quantized
ROUNDED_HERE = (
    "Stock adapters do not record how their base was quantized. It was rounded to NF4 from {} with double-quantized "
    "scales, for products in that dtype; transformers' defaults are plain scales and products in float32. If it was "
    "otherwise, make that base (hf-qlora quantize BASE --output FOLDER, with --no-double-quant, --dtype and "
    "--compute-dtype), and name it: --base FOLDER."
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def merge_files(
    adapter: str,
    output: str | os.PathLike[str],
    onto: str = "dequantized",
    base: str | None = None,
    *,
    calibration: Any = None,
    rows: int = 64,
    length: int = 256,
    held_out: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trained_on: str = "auto",
    force: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeReport:
    """Merge a saved LoRA adapter into a saved model.

    Args:
        adapter: a folder or Hub id; of this package or of stock PEFT.
        output: the folder for the merged model: new or empty, and there whole or not at all.
        onto: as for `merge`.
        base: a folder or Hub id; by default what the adapter names, in the revision trained on. Dense for
            `onto="original"`.
        calibration: for `onto="nf4"`: what to calibrate the rounding on, as for `calibration_rows`, with `rows`,
            `length`, `held_out` and `seed`. The model then runs, in memory; interrupted, it goes on when asked again.
        device: where the model runs then; CUDA where there is one, by default.
        dtype: "float32", "bfloat16" or "float16": what the base is loaded in, and the result's; by default what the
            adapter was trained in, else what the base's config says.
        trained_on: "nf4" or "dense" for an adapter of stock PEFT, which does not say; "auto" takes the base as stored.
        force: merge although little of the adapter is left in NF4, or although the base is not the one that the
            adapter was trained on and its config says `on_base_mismatch="error"`.
        overwrite: replace a saved model that is in `output`; of its card, what a user wrote is kept.
        max_shard_bytes: of one file of weights.

    Raises:
        MergeError: sources or an output that cannot be used, named.
        MergeRefused: what `force` allows.
        OSError: the disk is full or read-only; what was in `output` is unchanged.
    """
    chosen = check_onto(onto, "the base" if onto == "original" else None, calibration)
    target = Path(output)
    check_folder(target, overwrite, CARD)
    job = _job(adapter, chosen, base, dtype, trained_on)
    for used in (job.adapter_folder, job.base_folder):
        if target.exists() and target.samefile(used):
            raise MergeError(f"{target} is what is merged; name another folder for the result.")
    if calibration is not None:
        where = checked_device(device)
        with suppress(NotStreamable):  # PEFT repeats it on loading
            job.check_initialization()
        size = {"rows": rows, "length": length, "held_out": held_out, "seed": seed}
        asked = planned(calibration, job.skeleton(), job.tokenizer(), kept_beside(target), **size)
        model, judged = job.load(force, where)
        with resumable(target, MergeRefused):
            report = job.in_memory(model, judged, force, asked)
            del model  # the merged one takes its place in memory
            job.write(target, report, overwrite, max_shard_bytes)
        return report
    try:
        stream = job.stream()
        with whole_folder(target, overwrite, CARD) as stage:
            report = stream.run(stage, max_shard_bytes, job.base, job.adapter)
            stream.seen.judge(report, force)
            refuse_lost(report, force)
            job.finish(stage, report, stream.skeleton.base_class, target)
    except NotStreamable as reason:
        report = job.in_memory(*job.load(force), force)
        report.notes.insert(0, f"Merged in memory, not layer by layer: {reason}.")
        job.write(target, report, overwrite, max_shard_bytes)
    report.output = str(target)
    return report


@dataclass(frozen=True)
class _Job:
    """What was asked for: names, and what they turned out to be."""

    adapter: str
    adapter_folder: Path
    config: LoraConfig
    base: str
    base_folder: Path
    onto: Onto
    dtype: torch.dtype | None
    dtype_of: str
    nf4: NF4Config | None
    assumed: bool

    def stream(self) -> Stream:
        self.check_initialization()
        files = TensorFiles(self.base_folder)
        skeleton = build(self.base_folder, self.adapter_folder, self.config, self.nf4, self.dtype, files)
        repacked: set[str] = set()
        if self.onto == "nf4":
            fresh = make_base(self.base_folder, self.config, self.dtype)
            chosen = quantizable_layers(fresh, skeleton.nf4 or NF4Config(), modules_to_save(fresh, self.config))[0]
            repacked = skeleton.packed or set(chosen)
        return Stream(skeleton, files, self.onto, repacked)

    def check_initialization(self) -> None:
        """Refuse, or leave to PEFT, an adapter whose initialization took a part out of the base's weights.

        Raises:
            NotStreamable: PEFT repeats it on loading.
            MergeError: it cannot be repeated from files alone.
        """
        init = str(self.config.init_lora_weights).lower()
        if not init.startswith(CHANGES_BASE) or init == "mica":  # which reads the base alone
            return
        quantized = self.nf4 is not None or sources.stored_quantization(self.base_folder)
        if init not in REPEATED or quantized or self.onto == "original":
            raise MergeError(
                f"init_lora_weights={init!r} changed the weights of the base that the adapter was trained on. From "
                f"files, that is repeated for {REPEATED} alone, on a dense base, and not with onto='original'. Merge "
                "the trained model in Python: merge(model)."
            )
        raise NotStreamable(f"{init} changed the base when training began, which PEFT repeats on the whole model")

    def skeleton(self) -> Any:
        """The base without its weights."""
        return make_base(self.base_folder, self.config, self.dtype)

    def tokenizer(self) -> Any:
        """That of the adapter, or else of the base; None where there is none."""
        return tokenizer_in(self.adapter_folder) or tokenizer_in(self.base_folder)

    def write(self, target: Path, report: MergeReport, overwrite: bool, max_shard_bytes: int) -> None:
        """Save a model that was merged in memory, and let it go."""
        with whole_folder(target, overwrite, CARD) as stage:
            report.model.save_pretrained(stage, max_shard_size=max_shard_bytes)
            self.finish(stage, report, type(report.model), target)
        report.model, report.output = None, str(target)

    def load(self, force: bool, device: Any = "cpu") -> tuple[PeftModel, MergeReport]:
        """The adapter on its base, in memory, and a report that says of the base which it is.

        Raises:
            MergeRefused: it is another base, and the adapter asks for an error; nothing has been measured yet.
        """
        skeleton = self.skeleton()
        model = (
            type(skeleton).from_pretrained(self.base_folder, dtype=skeleton.dtype, **labels(self.config)).to(device)
        )
        if self.nf4 is not None and not isinstance(self.config, QLoRAConfig):
            quantize_model(model, self.nf4)
        seen, config = SeenBase(self.config), copy.deepcopy(self.config)
        if isinstance(config, QLoRAConfig):
            config.on_base_mismatch = "ignore"  # it is compared here
        if self.nf4 is None:
            seen.add("", model)  # which PiSSA and the like change
        peft_model = attach(model, self.adapter_folder, config)
        if self.nf4 is not None:
            seen.add("", peft_model.get_base_model())
        dtype = str(skeleton.dtype).removeprefix("torch.")
        found = MergeReport(self.onto, self.base, [self.adapter], dtype, [], "not compared: nothing was merged")
        seen.judge(found, force)
        return peft_model, found

    def in_memory(
        self, model: PeftModel, judged: MergeReport, force: bool, calibration: Calibration | None = None
    ) -> MergeReport:
        original = self.base_folder if self.onto == "original" else None
        report = merge(model, self.onto, original, calibration=calibration, force=force)
        report.base, report.adapters = self.base, [self.adapter]
        report.notes += judged.notes
        report.another_base = judged.another_base
        return report

    def finish(self, stage: Path, report: MergeReport, kind: type, target: Path) -> None:
        """Say what else a reader must know, and put beside the weights what belongs there."""
        base = AutoConfig.from_pretrained(self.base_folder)
        if self.dtype is not None and base.dtype is not None and self.dtype != base.dtype:
            report.notes.append(f"In {report.dtype}, as {self.dtype_of}; the base's config says {_short(base.dtype)}.")
        if self.nf4 is not None and not isinstance(self.config, QLoRAConfig) and not hasattr(base, QUANTIZATION):
            report.notes.append(ROUNDED_HERE.format(report.dtype))
        if self.assumed:
            report.assumed = True
            report.notes.append(
                "Stock adapters do not record what they were trained on. The base as it is stored was assumed, "
                f"{'in NF4' if report.quantized else 'dense'}; if it was another, name it: --trained-on nf4 or dense."
            )
        if sources.copy_beside(self.base_folder, self.adapter_folder, stage):
            report.notes.append("The tokenizer is the adapter's.")
        describe(stage, report, kind.__name__, self.base_folder, self.adapter_folder, target)


def _job(adapter: str, onto: Onto, base: str | None, dtype: str | None, trained_on: str) -> _Job:
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise MergeError(f"dtype={dtype!r} is not known; choose one of {tuple(COMPUTE_DTYPES)}.")
    if trained_on not in get_args(TrainedOn):
        raise MergeError(f"trained_on={trained_on!r} is not known; choose one of {get_args(TrainedOn)}.")
    adapter_folder, config = sources.adapter_source(adapter)
    name = str(base or config.base_model_name_or_path or "")
    if not name:
        raise MergeError(f"The adapter {adapter} does not name its base; name it with base.")
    trained = sources.trained_base(config)
    folder = sources.base_source(name, _revision(config, trained, name) if base is None else None)
    sources.check_stored(name, folder, onto)
    return _Job(
        adapter=adapter,
        adapter_folder=adapter_folder,
        config=config,
        base=name,
        base_folder=folder,
        onto=onto,
        dtype=COMPUTE_DTYPES.get(str(dtype or trained.get("dtype"))),
        dtype_of="asked" if dtype else "the adapter was trained",
        nf4=_quantization(config, trained_on),
        assumed=trained_on == "auto" and not isinstance(config, QLoRAConfig),
    )


def _revision(config: LoraConfig, trained: dict[str, Any], name: str) -> str | None:
    """The revision that the adapter names, or was trained on."""
    commit = trained.get("commit") if trained.get("id") == name else None
    return config.revision or (commit if _COMMIT.fullmatch(commit or "") else None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantization(config: LoraConfig, trained_on: str) -> NF4Config | None:
    """What the base was quantized to, if it was."""
    if not isinstance(config, QLoRAConfig):
        return NF4Config() if trained_on == "nf4" else None
    found = config.quantization
    if trained_on != "auto" and (found is None) != (trained_on == "dense"):
        says = "a dense base" if found is None else "an NF4 base"
        raise MergeError(f"The adapter says that it was trained on {says}; leave out trained_on={trained_on!r}.")
    assert found is None or isinstance(found, NF4Config)
    return found
