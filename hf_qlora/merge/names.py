"""The names of modules and parameters in a base that wears adapters, and in the base alone."""

from __future__ import annotations

import re

from hf_qlora.quant.names import plain_name


_IN_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.|$)")
_OF_ADAPTERS = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter|trainable_tokens_\w+)(\.|$)")


def wrapped_name(name: str) -> str:
    """The name in the base alone of what has `name` in the base with adapters."""
    return _IN_WRAPPERS.sub("", plain_name(name))


def is_of_adapter(name: str) -> bool:
    """Whether the name in a base with adapters is one of an adapter's own."""
    return bool(_OF_ADAPTERS.search(f".{name}"))


def first_sentence(error: BaseException) -> str:
    """What an error says first, without line breaks."""
    text = " ".join(str(error).split())
    head, stop, _ = text.partition(". ")
    return head + stop.strip()
