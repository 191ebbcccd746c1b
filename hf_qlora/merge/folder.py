"""A folder that is there whole or not at all: it is filled aside and renamed.

Aside is beside it, on the same disk, as `.NAME.merging-…`. A folder that is to be replaced is renamed to
`.NAME.replaced-…` first; where a process is killed between the two renames, the next one puts it back, once it has
given one that lives the time for its second.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_qlora.layers.errors import MergeError
from hf_qlora.saving import LEFT_OVER_AFTER_S


SECOND_RENAME_S = 1.0  # it follows at once
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "dict.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*.json",
    "chat_template*.jinja",
)
BESIDE = ("generation_config.json", "*processor_config.json", "LICENSE*", *TOKENIZER_FILES)
WEIGHTS = (SAFE_WEIGHTS_NAME, "model-?????-of-?????.safetensors", SAFE_WEIGHTS_INDEX_NAME)
RECORD_NAME = "hf_qlora_merge.json"  # of a calibrated merge
CARD = (constants.REPOCARD_NAME,)  # may be in a folder that is replaced, where the caller keeps it
MODEL = (CONFIG_NAME, *WEIGHTS, RECORD_NAME, *BESIDE)
REPORT_KEYS = {"onto", "base", "adapters", "layers", "kept"}  # of `MergeReport.to_dict`


def check_folder(target: Path, overwrite: bool, known: Collection[str] = ()) -> None:
    """Refuse an output folder that cannot be taken.

    Args:
        known: names of further files that may be in it, because the caller writes or keeps them.

    Raises:
        MergeError: a file, or in one; a folder with things in it, which are not to be overwritten, or not all of a
            saved model.
    """
    if target.is_file():
        raise MergeError(f"{target} is a file; name a folder that is new or empty.")
    above = next((folder for folder in target.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise MergeError(f"There is no place for {target}: {above} is a file, and no folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise MergeError(
            f"{target} is not empty; name a new folder, or replace the model in it: overwrite=True (--overwrite)."
        )
    foreign = next(
        (path.name for path in sorted(target.iterdir()) if not (path.name in known or _is_of_model(path))), None
    )
    if foreign is None and not (target / CONFIG_NAME).is_file():
        foreign = f"no {CONFIG_NAME}"
    if foreign is not None:
        raise MergeError(
            f"{target} is not overwritten: it holds other things than one saved model ({foreign}). Name a new folder, "
            "or empty this one."
        )


@contextmanager
def whole_folder(target: Path, overwrite: bool, known: Collection[str] = ()) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in the target's place if nothing was raised.

    Args:
        known: see `check_folder`.

    Raises:
        MergeError: see `check_folder`.
        OSError: the disk is full or read-only; what was there is unchanged.
    """
    target = Path(os.path.abspath(target))
    with _told(target):
        _repair(target)
        check_folder(target, overwrite, known)
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.merging-"))
    try:
        with _told(target, stage):
            yield stage
        with _told(target):
            check_folder(target, overwrite, known)  # it took a while
            _give_default_permissions(stage)
            _put(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _told(target: Path, stage: Path | None = None) -> Iterator[None]:
    """Say what could not be saved; with a stage, of errors in writing to it, not in reading a base."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if stage is not None and isinstance(error, OSError) and not _is_of_writing(error, stage):
            raise
        message = f"Saving the model in {target} failed: {error}. What was there is unchanged."
        raise (OSError(message) if number is None else OSError(number, message)) from error


def _is_of_writing(error: OSError, stage: Path) -> bool:
    """Errors of files that are open have no name: a full disk, of which the system tells while it writes."""
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return error.errno is not None and (not named or any(name.startswith(str(stage)) for name in named))


def _is_of_model(path: Path) -> bool:
    """Whether a saved model has such a file, or a merge has left its report."""
    if path.is_dir():
        return _is_templates(path)
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in MODEL) or _is_report(path)


def _is_report(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not one that was written by a merge
        return False
    return isinstance(found, dict) and found.keys() >= REPORT_KEYS


def _is_templates(path: Path) -> bool:
    """Whether it is the folder of further chat templates, and no other of its name."""
    return path.name == CHAT_TEMPLATE_DIR and all(file.suffix == ".jinja" for file in path.iterdir())


def _put(stage: Path, target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.replaced-"))
        os.rename(target, old)  # onto an empty folder
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()  # which may be empty
        os.rename(stage, target)


def _repair(target: Path) -> None:
    """Put back what a killed process had moved away, and remove what others left behind."""
    name = glob.escape(target.name)
    for old in target.parent.glob(f".{name}.replaced-*"):
        if not target.exists():
            time.sleep(SECOND_RENAME_S)
        if not target.exists() and old.is_dir() and any(old.iterdir()):
            os.rename(old, target)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for stage in target.parent.glob(f".{name}.merging-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stage.stat().st_mtime > LEFT_OVER_AFTER_S:
                shutil.rmtree(stage, ignore_errors=True)


def _give_default_permissions(stage: Path) -> None:
    """mkdtemp keeps others out, and so does safetensors; a model is as readable as any new folder."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (stage, *stage.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
