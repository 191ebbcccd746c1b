"""An adapter's files, read only if they belong together; `saving.py` writes them.

    adapter_model.safetensors        the portable tensors, an ordinary LoRA adapter
    adapter_config.json              the portable config; its `hf_qlora` key holds the hash of the file above
    hf_qlora_state.safetensors       in Trainer checkpoints where something was folded: the native lora_B

Two files cannot be swapped at once for a stock reader; ours refuses a mixture by the hash.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_qlora.config.record import RECORD_KEY, checked_record
from hf_qlora.layers import fold
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

# What PEFT's loading functions pass on to the Hub's client, where given.
HUB_OPTIONS = frozenset(inspect.signature(hf_hub_download).parameters)
STATE_NAME = "hf_qlora_state.safetensors"
LARGEST_CONFIG_BYTES = 2**26  # of a model of 100,000 adapted layers


class AdapterFileError(ValueError):
    """Files that are not a whole adapter; the message names the file, what is wrong with it, and what to do."""


class AdapterTensors(dict[str, Tensor]):
    """The tensors of an adapter file, with what setting them on a model must know.

    Attributes:
        source: the file, for messages.
        form: the form they are in.
        record: what the config beside it has under `hf_qlora`; {} for an adapter that is not ours.
        depth: what the scales of depth had learned, by layer.
        native: lora_B as it was before folding, from a Trainer checkpoint.
        folded_by: the factors that `native` was folded by.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str, form: fold.Form) -> None:
        super().__init__(tensors)
        self.source, self.form = source, form
        self.record: dict[str, Any] = {}
        self.depth: dict[str, dict[str, Any]] = {}
        self.native: dict[str, Tensor] = {}
        self.folded_by: dict[str, float] = {}

    def for_model(self, by: dict[str, float]) -> tuple[dict[str, Tensor], fold.Form]:
        """The tensors to set on a model whose factors are `by`, exact where that is possible, and their form."""
        if self.native and self.folded_by == by:
            return {**self, **self.native}, "native"
        return dict(self), self.form


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter of ours on disk or in the Hub's cache."""

    source: str
    weights: Path
    record: dict[str, Any]
    state: Path | None = None

    def check(self) -> None:
        """Refuse files that do not belong together.

        Raises:
            AdapterFileError: the safetensors file is not the one that the config was saved with.
        """
        expected, found = self.record.get("weights_sha256"), self.weights.stat()
        if expected is not None and expected != _sha256_of(self.weights, found.st_size, found.st_ctime_ns):
            raise AdapterFileError(
                f"{self.weights} is not the file that {CONFIG_NAME} beside it was saved with (sha256 differs): it is "
                "truncated or changed, or a save was interrupted between the two files. Save or download the adapter "
                f"again; if you have rewritten it on purpose, remove weights_sha256 from {CONFIG_NAME}."
            )

    def tensors(self, read: Callable[[], dict[str, Tensor]], device: str | None) -> AdapterTensors:
        """The adapter's tensors; `read` is PEFT's own reader."""
        try:
            result = AdapterTensors(read(), str(self.weights), "portable" if self.record["folded"] else "native")
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(
                f"{self.weights} cannot be read as safetensors ({error}); it is truncated or of another kind. "
                "Save or download the adapter again."
            ) from error
        check_tensors(result, result.source)
        result.record, result.depth = self.record, self.record.get("depth", {})
        expected = self.record.get("state_sha256")
        if expected is not None and self.state is not None and self.state.is_file():
            if sha256(self.state) == expected:
                result.native = load_file(self.state, device=device or "cpu")
                check_tensors(result.native, str(self.state))
                result.folded_by = self.record.get("fold", {})
            else:
                logger.warning("%s is damaged and is not used: training resumes closely, not exactly.", self.state)
        return result


def adapter_folder(model_id: str | os.PathLike[str], **kwargs: Any) -> AdapterFolder | None:
    """The adapter at a local path or Hub id if it is one of ours, else None.

    Args:
        kwargs: what PEFT's `load_peft_weights` takes; those of `hf_hub_download` among them are used.

    Raises:
        AdapterFileError: an adapter of ours without a safetensors file.
    """
    local = Path(model_id, kwargs.get("subfolder") or "")
    if local.is_dir():
        record = _record(local / CONFIG_NAME)
        if record is None:
            return None
        weights = local / SAFETENSORS_WEIGHTS_NAME
        if not weights.is_file():
            pickled = (
                f" {WEIGHTS_NAME} beside it is pickled and is not loaded." if (local / WEIGHTS_NAME).exists() else ""
            )
            raise AdapterFileError(
                f"{weights} does not exist.{pickled} Save the adapter again with safe_serialization=True."
            )
        return AdapterFolder(str(local), weights, record, local / STATE_NAME)
    hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    try:
        record = _record(Path(hf_hub_download(str(model_id), CONFIG_NAME, **hub)))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None  # PEFT asks next and says what is wrong
    if record is None:
        return None
    try:
        weights = Path(hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **hub))
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        raise AdapterFileError(
            f"{model_id} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (" in the cache, and the Hub cannot be asked" if offline else "")
            + "; pickled adapters are not loaded."
        ) from error
    return AdapterFolder(str(model_id), weights, record)


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as they are in it.

    Raises:
        AdapterFileError: not readable as such.
    """
    try:
        return load_file(weights)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{weights} cannot be read as safetensors ({error}).") from error


def check_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse what no adapter holds and what would make every output NaN.

    Raises:
        AdapterFileError: a LoRA tensor that is not of floating point or not finite, or any tensor with NaN.
    """
    for name, tensor in tensors.items():
        is_lora = ".lora_" in name
        if not tensor.is_floating_point():
            if is_lora:
                raise AdapterFileError(
                    f"{source}: {name} has dtype {tensor.dtype}; an adapter's tensors are of floating point. "
                    "The file was written by something else, or changed."
                )
            continue
        values = tensor if tensor.element_size() > 1 else tensor.float()  # torch cannot ask float8
        bad = ~values.isfinite() if is_lora else values.isnan()
        if bad.any():
            raise AdapterFileError(
                f"{source}: {name} has {int(bad.sum())} values of {tensor.numel()} that are NaN or infinite. Training "
                "diverged before it was saved: load an earlier checkpoint."
            )


def has_config(model_id: str | os.PathLike[str], **kwargs: Any) -> bool:
    """Whether the adapter has an adapter_config.json; weights alone are taken to be as the config given with them."""
    local = Path(model_id, kwargs.get("subfolder") or "")
    if local.is_dir():
        found: bool = (local / CONFIG_NAME).is_file()
        return found
    hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    try:
        hf_hub_download(str(model_id), CONFIG_NAME, **hub)
    except (HfHubHTTPError, HFValidationError, OSError):
        return False
    return True


def check_beside(config_file: Path, record: dict[str, Any]) -> None:
    """Refuse a config whose weights lie beside it and are not the ones it was saved with."""
    weights = config_file.with_name(SAFETENSORS_WEIGHTS_NAME)
    if weights.is_file():
        AdapterFolder(str(config_file.parent), weights, record).check()


def check_size(config_file: Path) -> None:
    """Refuse a config so large that reading it as JSON would take all memory."""
    size = config_file.stat().st_size
    if size > LARGEST_CONFIG_BYTES:
        raise AdapterFileError(
            f"{config_file} has {size:,} bytes, an adapter's config at most {LARGEST_CONFIG_BYTES:,}: it is something "
            "else. Download the adapter again."
        )


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size_bytes: int, changed_ns: int) -> str:
    """The hash of a file, which loading asks for several times; the other arguments tell its versions apart."""
    return sha256(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _record(config_file: Path) -> dict[str, Any] | None:
    if not config_file.is_file():
        return None
    check_size(config_file)
    try:
        values = json.loads(config_file.read_text())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{config_file} is not JSON that can be read: {error}.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{config_file} is not an adapter config: it holds {type(values).__name__}, not an object."
        )
    if RECORD_KEY not in values:
        return None
    try:
        return checked_record(values[RECORD_KEY])
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from error
