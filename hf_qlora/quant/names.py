"""Names of modules and parameters, without what others put into them."""

from __future__ import annotations

import re


_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What PEFT's layers call the module they wrap, and what of theirs is no part of the base.
_WRAPPED = ("base_layer", "original_module", "token_adapter")
_OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")


def plain_name(name: str) -> str:
    """A module's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def wrapped_name(name: str) -> str:
    """The name in the base alone of what has `name` in the base with adapters."""
    return ".".join(part for part in plain_name(name).split(".") if part not in _WRAPPED)


def is_of_adapter(name: str) -> bool:
    """Whether the name in a base with adapters is one of an adapter's own."""
    return any(part.startswith(_OF_ADAPTERS) for part in name.split("."))
