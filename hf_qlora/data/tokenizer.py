"""What a model reads text by: its tokenizer, its vocabulary, and whether it does."""

from __future__ import annotations

import inspect
import os
from typing import Any

from transformers import AutoTokenizer

from hf_qlora.data.errors import DataError, offline


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


def as_tokenizer(given: Any) -> Any:
    """A tokenizer, of one or of the folder or Hub id that it lies in; None of None.

    Raises:
        DataError: neither of them.
    """
    found = tokenizer_in(given) if isinstance(given, str | os.PathLike) else given
    if given is not None and not callable(found):
        raise DataError(
            f"tokenizer={given!r:.100} is neither a tokenizer nor a folder or Hub id with one; pass what "
            f"AutoTokenizer.from_pretrained returns.{offline()}"
        )
    return found


def knows_as(tokenizer: Any, other: Any) -> bool:
    """Whether all tokens of a tokenizer have the same ids in another, which may know more."""
    return bool(tokenizer.get_vocab().items() <= other.get_vocab().items())


def vocabulary_of(model: Any) -> int:
    """How many token ids a model knows."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # of models that read more than text, as CLIP
        return int(model.config.get_text_config().vocab_size)


def reads_text(model: Any) -> bool:
    """Whether a model's forward takes token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters
