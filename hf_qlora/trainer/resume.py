"""Saving checkpoints and going on from them: whole ones, that fit, or an error that says which one does.

`train` picks the last whole checkpoint where it is left to choose, and refuses one that is not, or that was trained
with another scaling, before anything is loaded. The optimizer's state is compared with the optimizer as it is loaded:
torch looks at the numbers of parameters only, and a state of another optimizer or shape would fail in the first step.

Saving into a folder that holds a checkpoint takes its `trainer_state.json` away first: until the new one is written,
last of all, the folder is not whole. If the disk is full, what was written is removed; other errors are left alone.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qlora.config import QLoRAConfig
from hf_qlora.hub.trainer import adapted
from hf_qlora.trainer.checkpoint import CheckpointError, checkpoints, has_optimizer, last_whole, what_is_wrong
from hf_qlora.trainer.optimizers import check_optimizer


logger = logging.getLogger(__name__)

_BITSANDBYTES = {"state1", "__bnb_optimizer_quant_state__"}  # in a state of its optimizers: in memory, on disk
_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")  # of the parameter's shape
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_DEPTH = ("depth_profile", "normalize_depth", "gain_bound", "attention")
_SCALING = ("lora_alpha", "use_rslora", "alpha_pattern", *_OF_DEPTH)
_TORCHS_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")  # in the RuntimeErrors of torch.save


def train(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Find out before training what would fail in it: an optimizer for other devices, a checkpoint to resume from."""
    model = adapted(trainer)
    if model is None:
        return original(trainer, *args, **kwargs)
    check_optimizer(trainer)
    _say_unsaved(trainer)
    given = inspect.signature(original).bind(trainer, *args, **kwargs)
    chosen = given.arguments.get("resume_from_checkpoint")
    if chosen is True:
        chosen = _choose(Path(trainer.args.output_dir))
    elif chosen:
        _check(Path(chosen))
    if isinstance(chosen, str | os.PathLike):
        _check_scaling(model, Path(chosen))
        given.arguments["resume_from_checkpoint"] = str(chosen)
    return original(*given.args, **given.kwargs)


def _say_unsaved(trainer: Trainer) -> None:
    """accelerate's default under FSDP2, with which Trainer leaves adapters out without a word."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if "SHARDED_STATE_DICT" in str(getattr(plugin, "state_dict_type", "")):
        logger.warning(
            "With fsdp_state_dict_type SHARDED_STATE_DICT Trainer writes no adapter, neither with a checkpoint nor in "
            "save_model. Use FULL_STATE_DICT (accelerate launch --fsdp_state_dict_type FULL_STATE_DICT), or call "
            "model.save_pretrained(...) in all processes at the end."
        )


def run_epoch(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Trainer asks after a step whether it was the last: resumed at its end, a run would be trained one step more."""
    if adapted(trainer) is not None and trainer.state.global_step >= trainer.state.max_steps:
        trainer.control.should_training_stop = True
        return
    original(trainer, *args, **kwargs)


def _choose(run: Path) -> Path | bool:
    """The last whole checkpoint of a run; True, which Trainer has an error for, where there is none at all."""
    found = checkpoints(run) if run.is_dir() else []
    if not found:
        return True
    passed: dict[Path, str] = {}
    for chosen in found:
        wrong = what_is_wrong(chosen)
        if wrong is None:
            break
        passed[chosen] = wrong
    else:
        raise CheckpointError(f"No checkpoint in {run} is whole. Of {found[0].name}, {passed[found[0]]}.")
    for folder, wrong in passed.items():
        logger.warning(
            "%s is not whole (%s) and is passed over: training goes on from %s.", folder, wrong, chosen.name
        )
    _say_without_optimizer(chosen)
    return chosen


def _check(folder: Path) -> None:
    """Refuse a checkpoint that is not whole."""
    if not folder.is_dir():
        return  # Trainer says so
    wrong = what_is_wrong(folder)
    if wrong is None:
        _say_without_optimizer(folder)
        return
    whole = last_whole(folder.parent, before=folder)
    way = (
        f"The last whole checkpoint before it is {whole}: train(resume_from_checkpoint={str(whole)!r}), or "
        "train(resume_from_checkpoint=True), which finds it."
        if whole
        else "There is no whole checkpoint before it. If its adapter can be loaded (PeftModel.from_pretrained with "
        "is_trainable=True), training can start anew from that."
    )
    raise CheckpointError(
        f"Training cannot go on from {folder}: {wrong}. Its save was interrupted, or it was changed since. {way}"
    )


def _say_without_optimizer(folder: Path) -> None:
    if not has_optimizer(folder):
        logger.warning(
            "%s was saved without the optimizer (save_only_model): its state, the learning rate's schedule and the "
            "random numbers start anew.",
            folder,
        )


def _check_scaling(model: Any, folder: Path) -> None:
    """Refuse a checkpoint whose ΔW this model would multiply by something else. Other misfits show in loading."""
    for name, config in model.peft_config.items():
        place = folder if name == "default" or not (folder / name).is_dir() else folder / name
        if not isinstance(config, QLoRAConfig) or not (place / CONFIG_NAME).is_file():
            continue
        saved = PeftConfig.from_pretrained(place)
        changed = [kind for kind in _SCALING if getattr(saved, kind, None) != getattr(config, kind, None)]
        if hasattr(saved, "depth_profile") != hasattr(config, "depth_profile"):  # of which one stands for the others
            changed = [kind for kind in changed if kind not in _OF_DEPTH[1:]]
        what = "compute something else than was trained"
        if isinstance(saved, QLoRAConfig) and saved.folds and "lora_alpha" not in changed:  # it is in lora_B
            if not has_optimizer(folder):
                continue
            what = "go on with an optimizer's state for a lora_B of another scale"
        if changed:
            before, now = (", ".join(f"{k}={getattr(of, k, None)!r}" for k in changed) for of in (saved, config))
            raise CheckpointError(
                f"{folder} was trained with {before}, and this model has {now}: it would {what}. Make the model with "
                f"{before}, or start anew from the adapter in the checkpoint."
            )


# ── The optimizer's state ────────────────────────────────────────────────────────────────────────────────────────────


def load_optimizer_and_scheduler(original: Callable[..., None], trainer: Trainer, checkpoint: str | None) -> None:
    if checkpoint is None or adapted(trainer) is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        original(trainer, checkpoint)
        return
    own = [set(group) for group in trainer.optimizer.param_groups]
    try:
        original(trainer, checkpoint)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"The optimizer's state in {checkpoint} does not fit what this model trains ({error}): it is of another "
            "config. Make the model with the config of the checkpoint."
        ) from error
    wrong = _state_misfit(trainer.optimizer, own)
    if wrong:
        raise CheckpointError(
            f"The optimizer's state in {checkpoint} does not fit: {wrong}. Resume with the optim= and the config that "
            "the checkpoint was saved with, or start anew from its adapter."
        )


def _state_misfit(optimizer: Any, own: list[set[str]]) -> str | None:
    """What a loaded state has of another optimizer or of other parameters."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's
    for group, keys in zip(optimizer.param_groups, own, strict=True):
        if lacking := keys - set(group):
            return f"it is of another optimizer than {type(inner).__name__}, and lacks {sorted(lacking)}"
    packs = isinstance(inner, bnb.optim.optimizer.Optimizer8bit)
    for parameter, state in optimizer.state.items():
        is_packed = not _BITSANDBYTES.isdisjoint(state)
        if is_packed != packs and (is_packed or "exp_avg" in state):
            return f"it is of another optimizer than {type(inner).__name__}, and has {sorted(map(str, state))}"
        for key in _STATES:
            found = state.get(key)
            if isinstance(found, torch.Tensor) and found.shape != getattr(parameter, "shape", found.shape):
                return f"{key} of a {tuple(parameter.shape)} parameter has the shape {tuple(found.shape)}"
    return None


# ── Saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_checkpoint(original: Callable[..., None], trainer: Trainer, model: Any, trial: Any, *args: Any) -> None:
    if adapted(trainer) is None:
        original(trainer, model, trial, *args)
        return
    run = Path(trainer._get_output_dir(trial=trial))
    folder = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    writes, was_there = trainer.args.should_save, folder.exists()
    if writes:
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        original(trainer, model, trial, *args)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _of_full_disk(error)
        if cause is None or what_is_wrong(folder) is None:  # what comes after it: a push, the rotation
            raise
        if writes and not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        whole = last_whole(run, before=folder)
        kept = f"{whole} is whole; make room and resume from it" if whole else "There is none before it; make room"
        raise OSError(
            getattr(cause, "errno", None) or errno.ENOSPC,
            f"Saving {folder} failed: {str(cause).partition(chr(10))[0]}. What was written of it "
            f"{'stays, and is not resumed from' if was_there else 'is removed'}. {kept}.",
        ) from error


def _of_full_disk(error: BaseException | None) -> BaseException | None:
    """What says so among an error and its causes, the first of them where there are several."""
    if error is None:
        return None
    is_one = (
        (isinstance(error, OSError) and error.errno in _FULL)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCHS_WRITER))
        or (isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in _FULL))
    )
    return _of_full_disk(error.__cause__) or (error if is_one else None)
