"""What a model reads text by: its tokenizer, its vocabulary, and whether it does."""

from __future__ import annotations

import inspect
import os
from typing import Any

from transformers import AutoTokenizer


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that lies where a model was loaded from; None where there is none, or no whole one."""
    name = getattr(model, "name_or_path", "")
    return tokenizer_in(name) if name else None


def tokenizer_in(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder or Hub id; None where there is none, or no whole one."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):  # none there, or not a whole one
        return None


def vocabulary_of(model: Any) -> int:
    """How many token ids a model knows."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # of models that read more than text, as CLIP
        return int(model.config.get_text_config().vocab_size)


def reads_text(model: Any) -> bool:
    """Whether a model's forward takes token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters
