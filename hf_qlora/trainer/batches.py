"""Batches with nothing to learn from: an empty one is refused, one without labels gets a loss of 0 instead of 0/0."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer

from hf_qlora.hub.trainer import adapted


logger = logging.getLogger(__name__)

_SAID = "_hf_qlora_said_unlabelled"  # on a Trainer


def num_items_in_batch(original: Callable[..., Any], trainer: Trainer, batch_samples: list[Any], *args: Any) -> Any:
    """How many labels the batches of a step have, which their losses are divided by; at least 1.

    Raises:
        ValueError: a batch without a single token.
    """
    count = original(trainer, batch_samples, *args)
    if adapted(trainer) is None:
        return count
    for batch in batch_samples:
        _refuse_empty(batch)
    if count is None or bool(torch.as_tensor(count).any()):
        return count
    if not getattr(trainer, _SAID, False):
        setattr(trainer, _SAID, True)
        logger.warning(
            "No label is left to learn from in a batch (step %d; all are -100 or in the first position): its loss is "
            "0 and it teaches nothing. Often prompts fill the whole max_length, or a template marks no answer. This "
            "is said once.",
            trainer.state.global_step,
        )
    return torch.ones_like(count) if isinstance(count, torch.Tensor) else 1


def _refuse_empty(batch: Any) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, torch.Tensor) and ids.numel() == 0:
        raise ValueError(
            f"A batch has input_ids of shape {tuple(ids.shape)}: all its examples are empty. Remove them, as with "
            "dataset.filter(lambda example: len(example['input_ids']) > 0)."
        )
