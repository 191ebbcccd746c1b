"""An adapter's files: written whole or not at all, and read only if they belong together.

    adapter_model.safetensors        the portable tensors, an ordinary LoRA adapter
    adapter_config.json              the portable config; its `hf_qlora` key holds the hash of the file above
    hf_qlora_state.safetensors       in Trainer checkpoints where something was folded: the native lora_B

A save happens in a temporary folder inside the target and is moved in at the end, the config last. Two files cannot be
swapped at once for a stock reader; ours refuses a mixture by the hash.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qlora import identity
from hf_qlora.config import QLoRAConfig
from hf_qlora.config.record import RECORD_KEY, checked_record, write_json
from hf_qlora.layers import depth, fold
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

# What PEFT's loading functions pass on to the Hub's client, where given.
HUB_OPTIONS = frozenset(inspect.signature(hf_hub_download).parameters)
STATE_NAME = "hf_qlora_state.safetensors"
VERSIONED = ("hf-qlora", "peft", "transformers", "torch", "bitsandbytes")
LARGEST_CONFIG_BYTES = 2**26  # of a model of 100,000 adapted layers
LEFT_OVER_AFTER_S = 3600.0  # a staging folder that old belongs to a process that was killed
_STAGING = ".saving-"
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")  # transformers.trainer_utils.PREFIX_CHECKPOINT_DIR


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


def save(
    write: Callable[..., None], save_directory: str | os.PathLike[str], model: PeftModel, *args: Any, **kwargs: Any
) -> None:
    """Save a model's adapters with PEFT's own `write`, completed and moved into place.

    Raises:
        ValueError: a target that is a file, pickled serialization, or a conversion that folding does not allow.
        OSError: the disk is full or read-only; what was in the folder before is unchanged.
    """
    bound = inspect.signature(write).bind(save_directory, *args, **kwargs)
    bound.apply_defaults()
    options = bound.arguments
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; pass a folder to save the adapter in.")
    if not options["safe_serialization"]:
        raise ValueError(
            "safe_serialization=False would pickle the adapter; adapters of hf_qlora are saved as safetensors only."
        )
    chosen = options["selected_adapters"]
    names = list(model.peft_config) if chosen is None else chosen
    outside = [name for name in names if Path(name).is_absolute()]  # PyTorch takes no name with a dot
    if outside:
        raise ValueError(f"Adapters are saved in folders of their names, and {outside} lead out of {target}.")
    ours = [name for name in names if isinstance(model.peft_config.get(name), QLoRAConfig)]
    _check_scales(model, ours, options["kwargs"].get("state_dict"))
    by = {name: fold.factors(model, model.peft_config[name], name) for name in ours}
    if options["path_initial_model_for_weight_conversion"] is not None and any(by.values()):
        raise ValueError(
            "path_initial_model_for_weight_conversion needs the native form: set portable=False in the config."
        )
    unfolded = [name for name in ours if by[name] and _TRAINER_CHECKPOINT.fullmatch(target.name)]
    native = {name: _native_tensors(model, name, options) for name in unfolded}  # in all processes: it may gather
    if not options["is_main_process"]:
        write(save_directory, *args, **kwargs)
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(target)
        stage = Path(tempfile.mkdtemp(dir=target, prefix=_STAGING))
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot save the adapter in {target}: {error.strerror}. Nothing was changed."
        ) from error
    bases = {name: identity.describe(model, model.peft_config[name], name) for name in ours}
    inference_mode = {name: config.inference_mode for name, config in model.peft_config.items()}
    moving = False
    try:
        if (target / "README.md").is_file():  # PEFT extends it
            shutil.copy(target / "README.md", stage)
        write(stage, *args, **kwargs)
        for name in ours:
            learned = depth.learned(model, name)
            known = bases[name] | ({"depth": learned} if learned else {})
            _complete(stage / name if name != "default" else stage, by[name], native.get(name, {}), known)
        moves = _moves(stage, target)
        moving = True
        for path, final in moves:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
    except (OSError, SafetensorError) as error:
        state = "Loading refuses the files if they do not belong together" if moving else "What was there is unchanged"
        raise OSError(f"Saving the adapter in {target} failed: {error}. {state}; make room and save again.") from error
    finally:
        for name, mode in inference_mode.items():  # PEFT sets it while it writes
            model.peft_config[name].inference_mode = mode
        shutil.rmtree(stage, ignore_errors=True)


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


def _native_tensors(model: PeftModel, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    with fold.exchange("native"):
        tensors = get_peft_model_state_dict(
            model, state_dict=options["kwargs"].get("state_dict"), adapter_name=name, save_embedding_layers=False
        )
    return {
        key: tensor.contiguous() for key, tensor in tensors.items() if ".lora_B" in key or ".lora_embedding_B" in key
    }


def _complete(folder: Path, by: dict[str, float], native: dict[str, Tensor], known: dict[str, Any]) -> None:
    """Add to a staged adapter what only the saved file and the model know."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    record = values[RECORD_KEY]
    record |= {"weights_sha256": sha256(folder / SAFETENSORS_WEIGHTS_NAME), "fold": by, "versions": _versions()}
    record |= known
    if native:
        save_file(native, folder / STATE_NAME, metadata={"format": "pt"})
        record["state_sha256"] = sha256(folder / STATE_NAME)
    write_json(folder / CONFIG_NAME, values)


def _check_scales(model: PeftModel, names: list[str], state_dict: Mapping[str, Tensor] | None) -> None:
    """Refuse tensors that were trained with other depth scales than the model has, which would be folded wrongly."""
    for name in names:
        for key, tensor in depth.state_tensors(model, name).items():
            given = (state_dict or {}).get(key)
            if given is not None and not torch.equal(given.cpu().nan_to_num(), tensor.cpu().nan_to_num()):
                raise ValueError(
                    f"state_dict has another {key} than the model. Load it into the model first "
                    "(model.load_state_dict), then save the model."
                )


def _remove_left_overs(target: Path) -> None:
    for folder in target.glob(f"{_STAGING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished
            if time.time() - folder.stat().st_mtime > LEFT_OVER_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _moves(stage: Path, target: Path) -> list[tuple[Path, Path]]:
    """What goes from where to where, the configs last."""
    staged = sorted((path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.name == CONFIG_NAME)
    moves = [(path, target / path.relative_to(stage)) for path in staged]
    for _, final in moves:
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name of a file to write", str(final))
    return moves
