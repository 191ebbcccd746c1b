"""The card of a quantized base: what it is made from and how, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import transformers
from torch import nn

from hf_qlora.config import NF4Config
from hf_qlora.hub import card, licenses
from hf_qlora.hub.facts import PLACEHOLDER, TASKS, base_id, linked, quantization_of
from hf_qlora.saving import versions


MODEL_PLACEHOLDER = PLACEHOLDER.replace("adapter", "model")
FORMAT_TAGS = ("bitsandbytes", "4-bit", "nf4")


def write_quantized_card(
    folder: Path, model: nn.Module, config: NF4Config, base: str, source: Path, rows: Mapping[str, Any]
) -> None:
    """Put what a quantized base is into the card of its folder; what a user wrote there stays.

    Args:
        base: the id or path of the dense model.
        source: the folder that it was read from.
        rows: further ones of the table.
    """
    found = card.load(folder)
    if found is None:
        return
    auto, task = auto_class(type(model).__name__)
    name = linked(base, None)
    if not found.text.strip():
        found.text = f"# {card.code(f'{PureWindowsPath(base_id(base) or base).name} in NF4')}\n"
    licence = licenses.known(str(source)) or licenses.known(base)
    dtype = str(getattr(model, "dtype", None))
    table = {
        "Base": f"{name}, {card.code(type(model).__name__)} in {card.code(dtype.removeprefix('torch.'))}",
        "Quantized": quantization_of(config),
        **{key: card.code(value, card.LONGEST_SENTENCE) for key, value in rows.items()},
        "Versions": card.code(", ".join(f"{name} {version}" for name, version in versions().items())),
    }
    facts = {
        "base": name,
        "quantized": table,
        "auto": auto,
        "here": card.literal(MODEL_PLACEHOLDER),
        "dtype": dtype,
        "settings": _settings(config),
        "license_of_base": licence.get("license") == found.data.get("license", licence.get("license")),
    }
    card.extend(found, "quantized", facts, _metadata(base, task) | dict.fromkeys(licenses.FIELDS) | licence)
    card.write(folder, found)


def auto_class(kind: str) -> tuple[str, str | None]:
    """The auto class that loads a model of a class, and the Hub's name for what it does."""
    for _, auto, task in TASKS.values():
        if auto != "AutoModel" and kind.replace("LMHeadModel", "ForCausalLM").endswith(auto.removeprefix("AutoModel")):
            return auto, task
    return kind if hasattr(transformers, kind) else "AutoModel", None


def _settings(config: NF4Config) -> str:
    """As Python; empty where an adapter's config asks for the same by default."""
    given = {"double_quant": config.double_quant, "block_size": config.block_size}
    default = NF4Config()
    other = [f"{name}={value}" for name, value in given.items() if value != getattr(default, name)]
    return f"NF4Config({', '.join(other)})" if other else ""


def _metadata(base: str, task: str | None) -> dict[str, Any]:
    known = base_id(base)
    return {
        "library_name": "transformers",
        "base_model": known,
        "base_model_relation": "quantized" if known else None,
        "pipeline_tag": task,
        "tags": ["hf_qlora", *FORMAT_TAGS] + ([f"base_model:quantized:{known}"] if known else []),
    }
