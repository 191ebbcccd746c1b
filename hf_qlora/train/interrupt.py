"""Ctrl-C, and going on from it: for scripts around a `Trainer` that may be stopped at any time.

    last = check_run(folder, settings, resume)       # a checkpoint to go on from; refuses what does not fit
    …load, read the data…                            # what is refused here has left no folder
    begin_run(folder, settings)
    trainer.add_callback(stopper := StopOnCtrlC())
    train(trainer, last)
    if stopper.asked:
        print(way_on(folder))

`settings.json` in the folder says what its run is of. A run is gone on with under the same settings only, and its
result is not written over by a run of another kind. Data and weights are settings too, by their hashes: once they are
read, `check_run` is asked again. A folder with files of somebody else's that a run would write over is refused.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_qlora.config.record import write_json as write_json  # scripts write their results with it
from hf_qlora.trainer.checkpoint import checkpoints, last_whole


NOTE = "settings.json"
CARD = "README.md"
KIND = ("method", "model", "dataset")
CONTENTS = {"data_sha256": "data", "model_sha256": "model"}  # settings that are hashes, and of what
PROJECT = (".git", "pyproject.toml")
# In cards that are made, by this package, by Trainer, and by TRL's trainers
_MADE = ("<!-- hf_qlora ", "<!-- This model card has been generated automatically", "It has been trained using [TRL]")
_COUNTER = "early_stopping_patience_counter"

logger = logging.getLogger(__name__)


class RunError(ValueError):
    """A folder that a run cannot start or go on in; the message says why, and what to do."""


class StopOnCtrlC(TrainerCallback):
    """The first Ctrl-C ends training after the step, with a checkpoint; a second one ends it at once.

    Only the main thread may handle signals: in another one training goes on without this.

    Attributes:
        asked: whether there was one; `train` returns as always.
    """

    asked = False
    _handles = False
    _before: Any  # the handler that was there

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = False
        self._handles = threading.current_thread() is threading.main_thread()
        if not self._handles:
            logger.debug("Ctrl-C does not end training with a checkpoint: it runs outside the main thread.")
            return
        before = signal.signal(signal.SIGINT, self._ask)
        stopper = getattr(before, "__self__", None)
        # Training that failed, as by running out of memory, has no end, and has left its own.
        self._before = stopper._before if isinstance(stopper, StopOnCtrlC) else before

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what was there may ignore it, as in the background
        print("\nStopping after this step, with a checkpoint …", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handles:
            # None: a handler that was not set from Python, which Python cannot set again
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._before is None else self._before)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers', which forgets the evaluations without a gain when a run is resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):  # of a checkpoint; else it is the callback itself
            self.early_stopping_patience_counter = saved["attributes"][_COUNTER]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """`trainer.train`, going on from a checkpoint. Where training had ended there, its result is loaded.

    That is so where a run was stopped while its result was tested or saved. Trainer asks after a step whether it was
    the last, and would make one more.
    """
    state = None if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    ended = state is not None and _had_ended(trainer, state)
    if state is not None and trainer.is_world_process_zero():
        print(f"{'had ended at' if ended else 'going on from'} step {state.global_step}", flush=True)
    if state is None or checkpoint is None or not ended:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    folder, model = Path(checkpoint).parent / Path(best or checkpoint).name, trainer.model
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    else:
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
    trainer.state = state


def _had_ended(trainer: Trainer, state: TrainerState) -> bool:
    if state.global_step >= (trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps):
        return True
    for callback in trainer.callback_handler.callbacks:
        saved = state.stateful_callbacks.get(type(callback).__name__)
        if isinstance(callback, EarlyStopping) and isinstance(saved, dict):
            return bool(saved["attributes"][_COUNTER] >= callback.early_stopping_patience)
    return False


def check_run(
    folder: Path, settings: Mapping[str, Any], resume: bool, kind: Sequence[str] = KIND, saves: bool = True
) -> str | None:
    """The checkpoint to go on from; None to start. Nothing is written.

    Args:
        settings: JSON types: all that changes what is learned.
        kind: the settings in which a finished run must agree to be written over.
        saves: whether the run ends with a result.

    Raises:
        RunError: nothing to go on from, a run that was stopped, one of other settings or of another kind, or a folder
            with files of others.
    """
    kind = [name for name in kind if name in settings]
    _check_owner(folder, kind)
    before, last, finished = _noted(folder), last_whole(folder), any(folder.glob("*.safetensors"))
    other = [name for name in settings if name not in before or before[name] != settings[name]]
    if resume:
        if last is None:
            raise RunError(_nothing_to_go_on_from(folder, finished))
        _check_same(folder, before, other)
        return str(last)
    if last is not None:
        raise RunError(f"{folder} has a run that was stopped: add --resume, or name another --output.")
    clash = [name for name in kind if name in other]
    if clash and finished:
        had = ", ".join(f"{name}={before[name]!r}" for name in clash if name in before) or "not of this script"
        raise RunError(f"{folder} holds another result ({had}); name another --output.")
    if finished and not saves:
        raise RunError(f"{folder} holds a result, and this run would save none in its place; name another --output.")
    return None


def _check_owner(folder: Path, kind: Sequence[str]) -> None:
    """Refuse a folder that is somebody else's: a run writes its settings and its card there."""
    if not folder.is_dir() and any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise RunError(f"--output: {folder} is or lies in a file, not a folder, and cannot be written; name another.")
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise RunError(f"--output: {folder} is the folder that you are in, or above it; name one of the run's own.")
    others = [name for name in PROJECT if (folder / name).exists()]
    if (folder / NOTE).exists() and not set(kind) <= _noted(folder).keys():
        others.append(NOTE)
    if (folder / CARD).exists() and not any(mark in _text(folder / CARD) for mark in _MADE):
        others.append(CARD)
    if others:
        raise RunError(
            f"--output: {folder} has a {' and a '.join(others)} of another origin; name a folder of its own."
        )


def _nothing_to_go_on_from(folder: Path, finished: bool) -> str:
    if finished:
        return f"--resume: the run in {folder} is finished; without --resume it is made again, and written over."
    return f"--resume: {folder} has no whole checkpoint; leave out --resume to start."


def _check_same(folder: Path, before: Mapping[str, Any], other: Sequence[str]) -> None:
    if not other:
        return
    if not before:
        raise RunError(f"--resume: {folder} has no {NOTE} any more, so that nobody knows its settings; start another.")
    if given := [name for name in other if name not in CONTENTS]:
        had = ", ".join(f"{name}={before.get(name)!r}" for name in given)
        raise RunError(f"--resume: the run in {folder} was made with another {had}; repeat its arguments.")
    changed = " and the ".join(CONTENTS[name] for name in other)
    raise RunError(
        f"--resume: the {changed} of the run in {folder} changed since it began; put back what was there, or name "
        "another --output to start."
    )


def begin_run(folder: Path, settings: Mapping[str, Any], file: Path | None = None) -> None:
    """Make the folder, and note what its run is of.

    Args:
        file: what will be written at the end; that it can be is found out now.

    Raises:
        RunError: one of them cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NOTE, settings)
        if file is not None:
            if any(part.exists() and not part.is_dir() for part in file.parents):
                raise RunError(f"--json: {file} cannot be written: it lies in a file, not a folder.")
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir() or not os.access(file.parent, os.W_OK):
                raise RunError(
                    f"--json: {file} cannot be written: it is a folder, or lies in one that is not to be written."
                )
    except OSError as error:
        raise RunError(f"{error.filename} cannot be written: {error.strerror}.") from error


def way_on(folder: Path) -> str:
    """What to say to whom a run was stopped under."""
    if not checkpoints(folder):
        return "Stopped; there is no checkpoint yet, so nothing to go on from."
    last = last_whole(folder)
    if last is None:
        return f"Stopped; no checkpoint in {folder} is whole, so there is nothing to go on from."
    return f"Stopped; {last} is there: the same command with --resume goes on from it."


def _noted(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(folder / NOTE))
    except ValueError:  # not there, or not of ours: it says nothing
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """Nothing of a file that is none, or of no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
