"""Whether a Trainer's checkpoint is whole.

    adapter_model.safetensors, …     checked by the hash in the config beside it (`files.py`)
    optimizer.pt, scheduler.pt       and the like: zip archives; their directory, at the end, has a CRC of each part
    rng_state.pth, training_args.bin
    trainer_state.json               written last: where it can be read, the rest had been written

Trainer writes these into `checkpoint-N` one after the other. A process that is killed leaves what there was, and
`transformers.trainer_utils.get_last_checkpoint` goes by the folder's name alone.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from torch.serialization import get_crc32_options
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qlora import files


class CheckpointError(ValueError):
    """A checkpoint that training cannot go on from; the message says why, and from where it can."""


ARCHIVES = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, SCALER_NAME, TRAINING_ARGS_NAME)
_RANDOM_NUMBERS = re.compile(r"rng_state(_\d+)?\.pth")  # of each process
_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_SHARDED = ("optimizer*", "global_step*", f"rank*-{OPTIMIZER_NAME}")  # of FSDP, DeepSpeed, XLA


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the last one first."""
    found = {path: _NUMBERED.fullmatch(path.name) for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint was made at, by its name; -1 of another folder."""
    match = _NUMBERED.fullmatch(folder.name)
    return int(match[1]) if match else -1


def last_whole(run: Path, before: Path | None = None) -> Path | None:
    """The last checkpoint of a run that is whole, among those before a given one."""
    limit = None if before is None else step_of(before)
    earlier = (folder for folder in checkpoints(run) if limit is None or step_of(folder) < limit)
    return next((folder for folder in earlier if what_is_wrong(folder) is None), None)


def what_is_wrong(folder: Path) -> str | None:
    """What keeps training from going on exactly from a folder; None where it is a whole checkpoint."""
    return _state_problem(folder / TRAINER_STATE_NAME) or _archive_problem(folder) or _adapter_problem(folder)


def has_optimizer(folder: Path) -> bool:
    """Whether it was saved with the optimizer's state, not with `save_only_model`."""
    return any(path.name != TRAINING_ARGS_NAME for path in _archives(folder)) or _is_sharded(folder)


def _is_sharded(folder: Path) -> bool:
    return any(
        path.name not in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN) for kind in _SHARDED for path in folder.glob(kind)
    )


def _archives(folder: Path) -> list[Path]:
    """Those of Trainer; callbacks may have put others beside them."""
    return sorted(
        path
        for path in folder.iterdir()
        if (path.name in ARCHIVES or _RANDOM_NUMBERS.fullmatch(path.name)) and path.is_file()
    )


def _state_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name}, which is written last, is not there"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"{path.name} is cut off or changed"
    return None if isinstance(state, dict) and "global_step" in state else f"{path.name} has no global_step"


def _archive_problem(folder: Path) -> str | None:
    archives = _archives(folder)
    for path in archives:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip() if get_crc32_options() else None
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:  # zipfile's, of changed bytes
            return f"{path.name} cannot be read ({error})"
        if bad is not None:
            return f"{path.name} is damaged (at {bad})"
    names = {path.name for path in archives}
    if names - {TRAINING_ARGS_NAME} and not _is_sharded(folder):
        if not names & {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN}:
            return f"{OPTIMIZER_NAME} is not there"
        if SCHEDULER_NAME not in names:
            return f"{SCHEDULER_NAME} is not there"
        if not any(map(_RANDOM_NUMBERS.fullmatch, names)):
            return "rng_state.pth is not there"
    return None


def _adapter_problem(folder: Path) -> str | None:
    try:
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            adapter = files.adapter_folder(place)
            if adapter is not None:
                adapter.check()
    except (files.AdapterFileError, ValueError) as error:
        return str(error)
    return None
