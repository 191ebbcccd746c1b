"""The loss of a causal language model on rows of text, in nats a token.

A target counts where it and the token before it are no padding; that is every token but the first of its row. A batch
is whole rows, as many as keep the logits within `LOGIT_BYTES`, and of these only some hundred positions are in float32
at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_qlora.data.tokenizer import vocabulary_of
from hf_qlora.kernels.emulated import WideProducts, is_emulated


LOGIT_BYTES = 2**28  # of a batch, if it is more than one row: five rows of 256 tokens of SmolLM2 in float32
BLOCK_BYTES = 2**26  # of float32 logits that the cross entropy is taken of
_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def base_of(model: Any) -> nn.Module:
    """The model without the wrappers of PEFT and torch.compile."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model, with adapters or without, predicts the next token of a text."""
    base = base_of(model)
    name = type(base).__name__
    return (name.endswith(_SUFFIXES) or name in _known()) and not getattr(
        getattr(base, "config", None), "is_encoder_decoder", False
    )


def mean_loss(model: nn.Module, inputs: Mapping[str, Tensor], *, batch_tokens: int = 8192) -> float | None:
    """Cross entropy of the next token, the mean over all tokens that count (see the module).

    Args:
        model: a causal language model, with adapters or without; left in the mode that it is in.
        inputs: of its forward, the first dimension rows: `input_ids` and where there is padding `attention_mask`,
            both (rows, length).
        batch_tokens: at most so many, or one row.

    Returns:
        nats a token; None for a model of another kind. NaN where no token counts.
    """
    if not is_causal_lm(model) or "input_ids" not in inputs:
        return None
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with measuring(model):
        for batch in _batches(inputs, batch_tokens, vocabulary_of(base_of(model))):
            there = {name: value.to(device) for name, value in batch.items()}
            logits = model(**there, use_cache=False).logits
            mask = there.get("attention_mask", torch.ones_like(there["input_ids"])).bool()
            counted = mask[:, 1:] & mask[:, :-1]
            total += _summed(logits[:, :-1], there["input_ids"][:, 1:], counted)
            count += int(counted.sum())
            del logits
    return total / count if count else float("nan")


@contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Within it models are in eval mode, without gradients, and with products as in `kernels/emulated.py`.

    Where these are emulated a compiled model is compiled once more.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        if any(is_emulated(parameter) for model in models for parameter in model.parameters()):
            stack.enter_context(WideProducts())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@functools.cache
def _known() -> set[str]:
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def _batches(inputs: Mapping[str, Tensor], batch_tokens: int, vocabulary: int) -> Iterator[dict[str, Tensor]]:
    given = {name: value for name, value in inputs.items() if name != "labels"}  # the model would take its own loss
    rows, length = given["input_ids"].shape
    at_once = max(1, min(batch_tokens // length, LOGIT_BYTES // (4 * length * vocabulary)))
    for first in range(0, rows, at_once):
        yield {name: value[first : first + at_once] for name, value in given.items()}


def _summed(logits: Tensor, targets: Tensor, counted: Tensor) -> float:
    """The sum of the losses of the targets that count, in float64 over blocks in float32."""
    at_once = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    total = 0.0
    for row, target, counts in zip(logits, targets, counted, strict=True):
        for first in range(0, len(target), at_once):
            part = slice(first, first + at_once)
            losses = nn.functional.cross_entropy(row[part].float(), target[part], reduction="none")
            total += float(losses[counts[part]].sum(dtype=torch.float64))
    return total
