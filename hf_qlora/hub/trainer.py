"""What Trainer pushes by itself, where its model has an adapter of ours: errors explained, none silent, no token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hf_qlora.hub.errors import explained, explanation
from hf_qlora.hub.facts import is_ours
from hf_qlora.hub.push import warn_of_local_bases


logger = logging.getLogger(__name__)


class Unsaved(str):
    """A string that is pickled as None: Trainer pickles its arguments with `hub_token` into a file that it pushes."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> Unsaved:
        return self

    def __deepcopy__(self, memo: Any) -> Unsaved:
        return self


def save(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    if is_ours(trainer.model) and trainer.args.hub_token is not None:
        trainer.args.hub_token = Unsaved(trainer.args.hub_token)
    original(trainer, *args, **kwargs)


def init_hf_repo(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    if not is_ours(trainer.model):
        original(trainer, *args, **kwargs)
        return
    warn_of_local_bases(trainer.model)
    with explained(trainer.args.hub_model_id or trainer.args.output_dir):
        original(trainer, *args, **kwargs)


def push_to_hub(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    if not is_ours(trainer.model):
        return original(trainer, *args, **kwargs)
    with explained(trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir):
        return original(trainer, *args, **kwargs)


def finish_current_push(original: Callable[..., None], trainer: Trainer) -> None:
    """Trainer waits for its pushes in the background here, and drops their errors."""
    original(trainer)
    running = getattr(trainer, "push_in_progress", None)
    if running is None or not is_ours(trainer.model):
        return
    for error in filter(None, (job.exception() for job in running.jobs if job.done() and not job.cancelled())):
        logger.error("%s (%s)", explanation(error, trainer.hub_model_id), str(error).partition("\n")[0])
    trainer.push_in_progress = None
