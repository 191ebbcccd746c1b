"""Saving an adapter: whole or not at all.

PEFT's own `save_pretrained` writes into a temporary folder inside the target. What only the model and the files know
(fold factors, depth scales, the base, hashes) is added there, and all of it is moved in at the end, the config last.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_qlora import identity, sharding
from hf_qlora.config import QLoRAConfig
from hf_qlora.config.record import OF_THE_WEIGHTS, RECORD_KEY, write_json
from hf_qlora.files import STATE_NAME, sha256
from hf_qlora.layers import depth, fold


VERSIONED = ("hf-qlora", "peft", "transformers", "torch", "bitsandbytes")
LEFT_OVER_AFTER_S = 3600.0  # a staging folder that old belongs to a process that was killed
_STAGING = ".saving-"
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")  # transformers.trainer_utils.PREFIX_CHECKPOINT_DIR


def save(
    write: Callable[..., None], save_directory: str | os.PathLike[str], model: PeftModel, *args: Any, **kwargs: Any
) -> None:
    """Save a model's adapters with PEFT's own `write`, completed and moved into place.

    Adapters that are sharded over processes are gathered, and the first process writes.

    Raises:
        ValueError: a target that is a file, pickled serialization, or a conversion that folding does not allow.
        OSError: the disk is full or read-only; what was in the folder before is unchanged.
    """
    bound = inspect.signature(write).bind(save_directory, *args, **kwargs)
    bound.apply_defaults()
    state_dict = bound.arguments["kwargs"].get("state_dict")
    with sharding.whole_adapters(model, state_dict) as gathered:
        if gathered and state_dict is None and torch.distributed.get_rank() > 0:
            bound.arguments["is_main_process"] = False
        _save(write, Path(save_directory), model, bound)


def _save(write: Callable[..., None], target: Path, model: PeftModel, bound: inspect.BoundArguments) -> None:
    options = bound.arguments
    if target.is_file():
        raise ValueError(f"{target} is a file; pass a folder to save the adapter in.")
    if not options["safe_serialization"]:
        raise ValueError(
            "safe_serialization=False would pickle the adapter; adapters of hf_qlora are saved as safetensors only."
        )
    chosen = options["selected_adapters"]
    names = list(model.peft_config) if chosen is None else chosen
    outside = [name for name in names if Path(name).is_absolute()]  # torch takes no name with a dot
    if outside:
        raise ValueError(f"Adapters are saved in folders of their names, and {outside} lead out of {target}.")
    ours = [name for name in names if isinstance(model.peft_config.get(name), QLoRAConfig)]
    _check_scales(model, ours, options["kwargs"].get("state_dict"))
    by = {name: fold.factors(model, model.peft_config[name], name) for name in ours}
    if options["path_initial_model_for_weight_conversion"] is not None and any(by.values()):
        raise ValueError(
            "path_initial_model_for_weight_conversion needs the native form: set portable=False in the config."
        )
    unfolded = [name for name in ours if by[name] and _TRAINER_CHECKPOINT.fullmatch(target.name)]
    native = {name: _native_tensors(model, name, options) for name in unfolded}  # in all processes: it may gather
    if not options["is_main_process"]:
        write(*bound.args, **bound.kwargs)
        return
    classes = labels(model)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(target)
        stage = Path(tempfile.mkdtemp(dir=target, prefix=_STAGING))
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot save the adapter in {target}: {error.strerror}. Nothing was changed."
        ) from error
    inference_mode = {name: config.inference_mode for name, config in model.peft_config.items()}
    moving = False
    try:
        if (target / "README.md").is_file():  # PEFT extends it
            shutil.copy(target / "README.md", stage)
        write(stage, *bound.args[1:], **bound.kwargs)
        for name in ours:
            learned = depth.learned(model, name)
            place = stage / name if name != "default" else stage
            with safe_open(place / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
                base = identity.describe(model, model.peft_config[name], name, file.keys())
            known = {**base, "depth": learned, "labels": classes}
            _complete(place, by[name], native.get(name, {}), {key: value for key, value in known.items() if value})
        moves = _moves(stage, target)
        moving = True
        for path, final in moves:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
    except (OSError, SafetensorError) as error:
        state = "Loading refuses the files if they do not belong together" if moving else "What was there is unchanged"
        raise OSError(f"Saving the adapter in {target} failed: {error}. {state}; make room and save again.") from error
    finally:
        for name, mode in inference_mode.items():  # PEFT sets it while it writes
            model.peft_config[name].inference_mode = mode
        shutil.rmtree(stage, ignore_errors=True)


def labels(model: PeftModel) -> list[str]:
    """The names of a classifier's classes, in the order of its outputs; none of any other model."""
    base = model.get_base_model()
    names = getattr(getattr(base, "config", None), "id2label", None) or {}
    if not type(base).__name__.endswith("Classification") or set(names) != set(range(len(names))):
        return []
    return [str(names[i]) for i in range(len(names))]


def _native_tensors(model: PeftModel, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    with fold.exchange("native"):
        tensors = get_peft_model_state_dict(
            model, state_dict=options["kwargs"].get("state_dict"), adapter_name=name, save_embedding_layers=False
        )
    return {
        key: tensor.contiguous() for key, tensor in tensors.items() if ".lora_B" in key or ".lora_embedding_B" in key
    }


def _complete(folder: Path, by: dict[str, float], native: dict[str, Tensor], known: dict[str, Any]) -> None:
    """Add to a staged adapter what only the saved file and the model know."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    record = {name: value for name, value in values[RECORD_KEY].items() if name not in OF_THE_WEIGHTS}
    record |= {"weights_sha256": sha256(folder / SAFETENSORS_WEIGHTS_NAME), "fold": by, "versions": versions()}
    record |= known
    if native:
        save_file(native, folder / STATE_NAME, metadata={"format": "pt"})
        record["state_sha256"] = sha256(folder / STATE_NAME)
    write_json(folder / CONFIG_NAME, values | {RECORD_KEY: record})


def _check_scales(model: PeftModel, names: list[str], state_dict: Mapping[str, Tensor] | None) -> None:
    """Refuse tensors that were trained with other depth scales than the model has, which would be folded wrongly."""
    for name in names:
        for key, tensor in depth.state_tensors(model, name).items():
            given = (state_dict or {}).get(key)
            if given is not None and not torch.equal(given.cpu().nan_to_num(), tensor.cpu().nan_to_num()):
                raise ValueError(
                    f"state_dict has another {key} than the model. Load it into the model first "
                    "(model.load_state_dict), then save the model."
                )


def _remove_left_overs(target: Path) -> None:
    for folder in target.glob(f"{_STAGING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished
            if time.time() - folder.stat().st_mtime > LEFT_OVER_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def versions() -> dict[str, str]:
    return {name: _version(name) for name in VERSIONED}


@functools.cache
def _version(name: str) -> str:
    """Milliseconds to look up, and every save asks for each."""
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _moves(stage: Path, target: Path) -> list[tuple[Path, Path]]:
    """What goes from where to where, the configs last."""
    staged = sorted((path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.name == CONFIG_NAME)
    moves = [(path, target / path.relative_to(stage)) for path in staged]
    for _, final in moves:
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name of a file to write", str(final))
    return moves
