"""The card of a merged model: what is in it, how much of the adapter is left, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qlora.hub import card, licenses
from hf_qlora.hub.facts import base_id, linked
from hf_qlora.hub.quantized import FORMAT_TAGS, MODEL_PLACEHOLDER, auto_class
from hf_qlora.identity import is_local
from hf_qlora.saving import versions


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Attributes:
        kind: the name of the model's class.
        dtype: of its dense weights.
        packed: whether the others are in 4 bits.
        base: the id or path of what the adapters were merged into.
        base_folder: that it was read from.
        adapters: names in memory, ids or paths.
        adapter_folder: that the adapter was read from, if it was.
    """

    kind: str
    dtype: str
    packed: bool
    base: str
    base_folder: Path
    adapters: list[str]
    adapter_folder: Path | None = None


def write_merged_card(folder: Path, merged: Merged, rows: Mapping[str, str]) -> None:
    """Put what a merged model is into the card of its folder; what a user wrote there stays.

    Args:
        rows: of the table.
    """
    found = card.load(folder)
    if found is None:
        return
    if not found.text.strip():
        found.text = "# Merged model\n"
    auto, task = auto_class(merged.kind)
    base, adapter = _licenses(merged)
    licence = base if adapter in ({}, base) else {}
    facts = {
        "base": linked(merged.base, None),
        "adapters": ", ".join(map(_named, merged.adapters)),
        "merged": {
            "Class": f"{card.code(merged.kind)} in {card.code(merged.dtype)}{', NF4' if merged.packed else ''}",
            **{key: card.code(value, card.LONGEST_SENTENCE) for key, value in rows.items()},
            "Versions": card.code(", ".join(f"{name} {version}" for name, version in versions().items())),
        },
        "auto": auto,
        "here": card.literal(MODEL_PLACEHOLDER),
        "dtype": merged.dtype,
        "packed": merged.packed,
        "licenses": {
            name: card.code(given.get("license", "not stated"))
            for name, given in (("base", base), ("adapter", adapter))
        },
    }
    card.extend(found, "merged", facts, _metadata(merged, task) | dict.fromkeys(licenses.FIELDS) | licence)
    card.write(folder, found)


def _licenses(merged: Merged) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the base and of the adapter, as far as they are known here."""
    base = licenses.known(str(merged.base_folder)) or licenses.known(merged.base)
    return base, {} if merged.adapter_folder is None else licenses.known(str(merged.adapter_folder))


def _named(adapter: str) -> str:
    """A name in memory is no id, though the Hub might have one like it."""
    return linked(adapter, None) if "/" in adapter or is_local(adapter) else card.code(adapter)


def _metadata(merged: Merged, task: str | None) -> dict[str, Any]:
    known = base_id(merged.base)
    tags = ["hf_qlora", *(FORMAT_TAGS if merged.packed else ()), *([f"base_model:finetune:{known}"] if known else ())]
    return {
        "library_name": "transformers",
        "base_model": known,
        "base_model_relation": "finetune" if known else None,
        "pipeline_tag": task,
        "tags": tags,
    }
