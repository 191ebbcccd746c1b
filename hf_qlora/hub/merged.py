"""The card of a merged model: what is in it, how much of the adapter is left, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_qlora.hub import card
from hf_qlora.hub.facts import base_id, base_license, linked
from hf_qlora.hub.quantized import FORMAT_TAGS, MODEL_PLACEHOLDER, auto_class
from hf_qlora.identity import is_local
from hf_qlora.saving import versions


def write_merged_card(
    folder: Path,
    kind: str,
    dtype: str,
    base: str,
    source: Path,
    adapters: Sequence[str],
    rows: Mapping[str, Any],
    packed: bool,
) -> None:
    """Put what a merged model is into the card of its folder; what a user wrote there stays.

    Args:
        kind: the name of its class.
        base: the id or path of what the adapters were merged into.
        source: the folder that it was read from.
        adapters: names in memory, ids or paths.
        rows: of the table.
        packed: whether it is in 4 bits.
    """
    found = card.load(folder)
    if found is None:
        return
    auto, task = auto_class(kind)
    name = linked(base, None)
    if not found.text.strip():
        found.text = f"# {card.code(f'{Path(base).name} with an adapter')}\n"
    licence = base_license(str(source)) or base_license(base)
    facts = {
        "base": name,
        "adapters": ", ".join(_named(adapter) for adapter in adapters),
        "merged": {
            "Class": f"{card.code(kind)} in {card.code(dtype)}{', NF4' if packed else ''}",
            **{key: card.code(value) for key, value in rows.items()},
            "Versions": card.code(", ".join(f"{name} {version}" for name, version in versions().items())),
        },
        "auto": auto,
        "here": card.literal(MODEL_PLACEHOLDER),
        "dtype": dtype,
        "packed": packed,
        "license_of_base": licence.get("license") == found.data.get("license", licence.get("license")),
    }
    known = base_id(base)
    metadata = {
        "library_name": "transformers",
        "base_model": known,
        "base_model_relation": "finetune" if known else None,
        "pipeline_tag": task,
        "tags": ["hf_qlora", *(FORMAT_TAGS if packed else ()), *([f"base_model:finetune:{known}"] if known else ())],
    }
    card.extend(found, "merged", facts, metadata | licence)
    card.write(folder, found)


def _named(adapter: str) -> str:
    """A name in memory is no id, though the Hub might have one like it."""
    return linked(adapter, None) if "/" in adapter or is_local(adapter) else card.code(adapter)
