"""The base that an adapter belongs to: noted where the adapter is put on, written into its JSON, compared on loading.

* `note` samples the base just before the adapter changes anything. That costs milliseconds.
* `describe`, on saving, adds the hashes. They are kept on the model for as long as its bytes lie where they lay and
  its samples are those of before, so that only the first of Trainer's checkpoints pays for them. A base whose samples
  are no longer those that were noted has been changed while the adapter trained; that is a warning. Tensors that the
  adapter's file holds whole (`modules_to_save`, a classifier's head, resized embeddings) are left out: whoever loads
  the file gets them from it, and may have any others in their place before.
* `check`, on loading, compares what the file says with the base at hand, as `on_base_mismatch` asks: before the
  adapter is on the model, or before its tensors are set.

Where weights cannot be read (on the meta device, offloaded, sharded over processes), nothing is noted, written or
compared; a debug line says so, or a warning where a difference was to be an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from hf_qlora.config import QLoRAConfig
from hf_qlora.config.fingerprint import Fingerprint
from hf_qlora.config.qlora import check_on_base_mismatch
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.comparison import Comparison, compare
from hf_qlora.quant.fingerprint import identity_of, take_fingerprint
from hf_qlora.quant.names import wrapped_name
from hf_qlora.rehearsal import is_rehearsal
from hf_qlora.validation import CHANGES_BASE


logger = logging.getLogger(__name__)

# Where the Hub's client keeps what it has downloaded: models--org--name/snapshots/commit.
_IN_CACHE = re.compile(r"models--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
_NOTED = "_hf_qlora_noted"  # on a base: samples by the adapter's name
_SAID = "_hf_qlora_said_to_have_changed"  # on a base: names by the adapter's name
_HASHED = "_hf_qlora_hashed"  # on a base: where its bytes lay, and their fingerprint

_asked: ContextVar[str | None] = ContextVar("on_base_mismatch", default=None)


@contextmanager
def asking(on_base_mismatch: str | None) -> Iterator[None]:
    """Within it that is done, whatever the config says; None is the config's.

    PEFT's `load_adapter` and its Auto classes pass no settings on to the config that they read.
    """
    if on_base_mismatch is None:
        yield
        return
    check_on_base_mismatch(on_base_mismatch)
    before = _asked.set(on_base_mismatch)
    try:
        yield
    finally:
        _asked.reset(before)


def note(base: nn.Module, adapter: str) -> None:
    """Remember what the base is, before an adapter is put on it."""
    if is_rehearsal(base):
        return
    found = take_fingerprint(base, hashed=False)
    if found is None:
        logger.debug("The base of adapter %r cannot be fingerprinted: its weights are not all here.", adapter)
    base.__dict__.setdefault(_NOTED, {})[adapter] = found


def forget(base: nn.Module, adapter: str) -> None:
    """Let go of what was remembered for an adapter that is deleted."""
    for notes in (_NOTED, _SAID):
        base.__dict__.get(notes, {}).pop(adapter, None)


def describe(model: nn.Module, config: QLoRAConfig, adapter: str, saved: Collection[str] = ()) -> dict[str, Any]:
    """What an adapter's JSON is to say of its base: the keys `base` and `fingerprint`, the latter where known.

    Args:
        saved: the names of the tensors in the adapter's file.
    """
    record = config.record or {}
    if config.inference_mode and record.get("quantization") == config.to_dict()["quantization"]:
        return {key: record[key] for key in ("base", "fingerprint") if key in record}  # it was trained there
    base = _base_of(model)
    result: dict[str, Any] = {"base": description(base)}
    in_file = {wrapped_name(name.removeprefix("base_model.model.")) for name in saved}
    if not _changes_base(config):
        _warn_of_change(base, adapter, in_file)
    found = _hashed_as_noted(base, adapter, in_file)
    if found is not None:
        result["fingerprint"] = found.without(in_file).to_dict()
    return result


def check(model: nn.Module, config: QLoRAConfig, adapter: str, record: dict[str, Any] | None, source: str) -> None:
    """Compare a model's base with the one that a file's adapter was trained on.

    Args:
        config: which says what is to happen, by `on_base_mismatch`.
        record: the file's `hf_qlora` key, checked.
        source: the file, for messages.

    Raises:
        BaseModelError: the base is another one, and the config asks for an error.
    """
    base, on_mismatch = _base_of(model), _asked.get() or config.on_base_mismatch
    if not record or "fingerprint" not in record or on_mismatch == "ignore" or is_rehearsal(base):
        return
    found = _hashed_as_noted(base, adapter)
    if found is None:
        logger.log(
            logging.WARNING if on_mismatch == "error" else logging.DEBUG,
            "%s: the base is not compared with the one trained on: its weights are not all here.",
            source,
        )
        return
    expected = Fingerprint.from_dict(record["fingerprint"])
    # A caller's config chose the dense base for an adapter that was trained on a quantized one.
    by_choice = config.quantization is None and record.get("quantization") is not None
    result = compare(expected, found, only_dense=by_choice and not found.layers)
    if result.verdict == "rounding":
        _say_rounded(source, result)
    elif result.verdict == "differs":
        message = _message(source, result, record.get("base", {}), description(base))
        if on_mismatch == "error":
            raise BaseModelError(message)
        logger.warning("%s", message)


def _base_of(model: Any) -> nn.Module:
    """The model without PEFT's two wrappers around it."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _warn_of_change(base: nn.Module, adapter: str, in_file: Collection[str]) -> None:
    """Say once that the base is no longer the one that was noted, where the file does not hold what changed."""
    noted: Fingerprint | None = base.__dict__.get(_NOTED, {}).get(adapter)
    now = take_fingerprint(base, hashed=False)
    if noted is None or now is None or noted.layers.keys() != now.layers.keys():  # PEFT has replicated layers
        return
    changed = compare(noted, now.without(in_file))
    said = base.__dict__.setdefault(_SAID, {})
    if changed.verdict == "differs" and said.get(adapter) != changed.names:
        said[adapter] = changed.names
        logger.warning(
            "The base has changed since adapter %r was put on it: %s. What changed is not part of the adapter, and is "
            "lost unless you save the base too.",
            adapter,
            changed.found,
        )


def _hashed_as_noted(base: nn.Module, adapter: str, in_file: Collection[str] = ()) -> Fingerprint | None:
    """The base's fingerprint with hashes, as far as it is the one noted; else what was noted."""
    noted: Fingerprint | None = base.__dict__.get(_NOTED, {}).get(adapter)
    now = take_fingerprint(base, hashed=False)
    if noted is None or now is None:
        return noted or now
    if noted.layers.keys() != now.layers.keys():  # PEFT has replicated layers
        return noted
    if not noted.layers and compare(noted, now.without(in_file)).verdict == "differs":  # PiSSA and the like did it
        return noted
    where = identity_of(base)
    hashed: tuple[Any, Fingerprint] | None = base.__dict__.get(_HASHED)
    if hashed is None or hashed[0] != where or hashed[1].unhashed() != now:
        taken = take_fingerprint(base)
        if taken is None:
            return noted
        hashed = where, taken
        base.__dict__[_HASHED] = hashed
    return hashed[1]


def _changes_base(config: QLoRAConfig) -> bool:
    init = config.init_lora_weights
    return isinstance(init, str) and init.startswith(CHANGES_BASE)


def description(base: Any) -> dict[str, str | None]:
    """What can be said of a base without reading its weights; a path on this machine is nobody's business."""
    config = getattr(base, "config", None)
    name = str(getattr(base, "name_or_path", None) or "")
    commit = getattr(config, "_commit_hash", None)  # of some versions of transformers; others do not tell
    name, commit = in_cache(name) or (name, commit)
    return {
        "id": None if not name or is_local(name) else name,
        "commit": commit,
        "class": type(base).__name__,
        "dtype": str(getattr(base, "dtype", None)).removeprefix("torch."),
    }


def in_cache(name: str) -> tuple[str, str] | None:
    """The id and the commit of what the Hub's client has downloaded to a path, if it is one of its."""
    found = _IN_CACHE.search(name)
    return (found[1].replace("--", "/"), found[2]) if found else None


def is_local(base_id: str) -> bool:
    """Whether the name of a base is a path on this machine and no id on the Hub."""
    text = str(base_id)
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or Path(text).exists()


def _say_rounded(source: str, result: Comparison) -> None:
    logger.info(
        "%s: the base is the one trained on, rounded otherwise in %d layers (%s, …): another device or number of "
        "threads.",
        source,
        len(result.names),
        result.names[0],
    )


def _message(source: str, result: Comparison, trained: dict[str, Any], now: dict[str, Any]) -> str:
    cause = result.cause
    same_id = trained.get("id") and trained.get("id") == now["id"]
    if same_id and trained.get("commit") and now["commit"] and trained["commit"] != now["commit"]:
        cause = "another revision of the model"
    differences = [
        f"{key} {trained[key]!r:.100}, now {now[key]!r}"
        for key in ("id", "commit", "class", "dtype")
        if trained.get(key) and now[key] and trained[key] != now[key]
    ]
    trained_on = f" Trained on {'; '.join(differences)}." if differences else ""
    return (
        f"{source} was trained on another base than this one: {result.found}. The likely cause is {cause}."
        f"{trained_on} Load the base that it was trained on, or pass on_base_mismatch='ignore' if it is meant for "
        "this one."
    )
