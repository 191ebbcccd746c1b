"""What stands under the `hf_qlora` key of an adapter_config.json."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_qlora.config.fingerprint import Fingerprint, check_base
from hf_qlora.validation import ConfigError


FORMAT_VERSION = 1
RECORD_KEY = "hf_qlora"
# What describes the weights, and so is kept where a config that was read from a file is saved. The hashes of files are
# not: transformers saves configs beside other weights than were read, and a wrong hash is refused where none is not.
OF_THE_WEIGHTS = ("base", "fingerprint", "labels", "depth", "fold", "versions")
LARGEST_THETA = 1e6  # a gain is bounded by tanh(θ/κ), κ at most 10: far below this it has stopped to move
LARGEST_COUNT = 2**53


def checked_record(record: Any) -> dict[str, Any]:
    """The `hf_qlora` key of an adapter_config.json, with the parts that are read below known to be there."""
    if not isinstance(record, dict):
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}={record!r} must be an object.")
    version = record.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}.format_version={version!r} must be a positive integer.")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"The adapter has format_version {version}; this version of hf-qlora reads up to {FORMAT_VERSION}. "
            "Upgrade hf-qlora."
        )
    originals = record.get("originals")
    expected: dict[str, Any] = {"use_rslora": bool, "alpha_pattern": dict, "init_lora_weights": (bool, str)}
    for name, kind in expected.items():
        if not isinstance(originals, dict) or not isinstance(originals.get(name), kind):
            raise ConfigError(f"adapter_config.json: {RECORD_KEY}.originals has no valid {name!r}: {originals!r}.")
    kinds = {"type": str, "folded": bool, "weights_sha256": str}
    for name, value in record.items():
        if name in kinds and not isinstance(value, kinds[name]):
            raise ConfigError(f"adapter_config.json: {RECORD_KEY}.{name}={value!r} must be a {kinds[name].__name__}.")
    lacking = sorted(kinds.keys() - record.keys() - {"weights_sha256"})
    if lacking:
        raise ConfigError(f"adapter_config.json: {RECORD_KEY} lacks {lacking}.")
    labels = record.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}.labels={labels!r:.200} must be a list of names.")
    depth = record.get("depth", {})
    if not isinstance(depth, dict):
        raise ConfigError(f"adapter_config.json: {RECORD_KEY}.depth={depth!r:.200} must hold numbers by layer.")
    for layer, value in depth.items():
        if not _is_depth(value):
            raise ConfigError(
                f"adapter_config.json: {RECORD_KEY}.depth[{layer!r:.200}]={value!r:.200} must hold theta (within ±"
                f"{LARGEST_THETA:g}), attention (within 0.5 and 2), concentration (within ±2, or null) and "
                "observations (a count), as numbers."
            )
    if "base" in record:
        check_base(record["base"])
    if "fingerprint" in record:
        Fingerprint.from_dict(record["fingerprint"])
    return record


def _is_depth(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("observations")) is not int:
        return False
    if not 0 <= value["observations"] <= LARGEST_COUNT:
        return False
    if value.keys() != {"theta", "attention", "concentration", "observations"}:
        return False
    theta, attention, average = value["theta"], value["attention"], value["concentration"]
    numbers = [theta, attention, 0.0 if average is None else average]
    # Integers too: other writers of JSON make 1 of 1.0.
    if not all(type(n) in (int, float) for n in numbers):
        return False
    return bool(abs(numbers[0]) <= LARGEST_THETA and 0.5 <= attention <= 2 and abs(numbers[2]) <= 2)  # NaN is neither


def json_text(values: Mapping[str, Any], **options: Any) -> str:
    """Values as JSON, which has neither NaN nor infinity: null stands for them."""
    return json.dumps(_finite(values), indent=2, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to a temporary name beside `path`, then rename."""
    aside = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        aside.write_text(json_text(values, sort_keys=True), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
