"""What Trainer pushes by itself, where its model has an adapter of ours: errors explained, none silent, no token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from torch import nn
from transformers import Trainer

from hf_qlora.config import QLoRAConfig
from hf_qlora.hub.errors import explained, explanation
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


def adapted(trainer: Trainer) -> nn.Module | None:
    """The module with an adapter of ours, by PEFT or by `add_adapter` of transformers; wrappers may be around it."""
    modules: Iterator[nn.Module] = trainer.model.modules()
    for module in modules:
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and any(isinstance(config, QLoRAConfig) for config in configs.values()):
            return module
    return None


def save(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    _hide_token(trainer)
    original(trainer, *args, **kwargs)


def _hide_token(trainer: Trainer) -> None:
    if trainer.args.hub_token is not None and adapted(trainer) is not None:
        trainer.args.hub_token = Unsaved(trainer.args.hub_token)


def init_hf_repo(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    model = adapted(trainer)
    if model is None:
        original(trainer, *args, **kwargs)
        return
    warn_of_local_bases(model)
    with explained(trainer.args.hub_model_id or trainer.args.output_dir):
        original(trainer, *args, **kwargs)


def push_to_hub(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    if adapted(trainer) is None:
        return original(trainer, *args, **kwargs)
    with explained(trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir):
        return original(trainer, *args, **kwargs)


def push_from_checkpoint(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Trainer starts a push in the background here, in the place of those that are done, and drops their errors."""
    _hide_token(trainer)  # a sharded model is pushed without `_save`
    before = getattr(trainer, "push_in_progress", None)
    original(trainer, *args, **kwargs)
    if before is not None and trainer.push_in_progress is not before and adapted(trainer) is not None:
        _report(before.jobs, trainer.hub_model_id)


def finish_current_push(original: Callable[..., None], trainer: Trainer) -> None:
    """Trainer waits for its pushes in the background here, and drops their errors."""
    original(trainer)
    running = getattr(trainer, "push_in_progress", None)
    if running is not None and adapted(trainer) is not None:
        _report(running.jobs, trainer.hub_model_id)
        trainer.push_in_progress = None


def _report(jobs: list[Future[Any]], repo_id: str) -> None:
    for error in filter(None, (job.exception() for job in jobs if job.done() and not job.cancelled())):
        logger.error("%s (%s)", explanation(error, repo_id), str(error).partition("\n")[0])
