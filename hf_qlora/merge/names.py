"""The names of modules and parameters in a base that wears adapters, and in the base alone."""

from __future__ import annotations

from hf_qlora.quant.names import is_of_adapter, wrapped_name


__all__ = ["first_sentence", "is_of_adapter", "wrapped_name"]


def first_sentence(error: BaseException) -> str:
    """What an error says first, without line breaks."""
    text = " ".join(str(error).split())
    head, stop, _ = text.partition(". ")
    return head + stop.strip()
