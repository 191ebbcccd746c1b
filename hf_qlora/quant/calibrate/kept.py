"""Rounded layers in a folder, so that an interrupted run goes on where it stopped.

A file for each group of layers, whole or not there, under a key: a hash of what decides how a layer is rounded, which
is its weight, and what it is fed. What lies there under another key is of another run, and is not read; nor is what is
of other layers, or is not packed as these are.

Of a model the key knows what transformers makes it of: classes, configs, parameters and buffers. What somebody has set
on a module beside these, as a plain attribute or another forward, it does not see.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_qlora.data.errors import counted
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.packing import share_tables
from hf_qlora.quant.scales import check_scales


logger = logging.getLogger(__name__)

PACKAGES = ("hf-qlora", "torch", "transformers", "bitsandbytes")  # whose versions may round otherwise
# What a config says of where a model came from, and not of what it computes.
_ORIGIN = {"_name_or_path", "architectures", "transformers_version"}
_NAME_LENGTH = 32


class Kept:
    """The folder of one run.

    Args:
        key: of the run; see `key_of`.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.folder, self.key, self.is_full = Path(folder), key, False
        self.folder.mkdir(parents=True, exist_ok=True)
        if others := sum(_key_in(file) != key for file in self.folder.glob("*.safetensors")):
            logger.warning(
                "%s of layers in %s, of a call with other rows, settings, weights or versions, will not be used.",
                counted(others, "group"),
                self.folder,
            )
        for scratch in self.folder.glob(f"{'[0-9a-f]' * _NAME_LENGTH}.*.partial"):  # of a process that was killed
            with suppress(OSError):
                scratch.unlink()

    def get(self, like: Mapping[str, Packed], device: torch.device) -> list[Packed] | None:
        """A group's packed weights, or None where it is not there.

        Args:
            like: for each layer, by name, a weight that is packed as its own is to be.
        """
        names = list(like)
        try:
            with safe_open(self._file(names), framework="pt", device=str(device)) as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # not there, or cut off by a full disk
            return None
        if said.get("digest") != _digest(tensors, json.dumps(names)):  # as after a power failure
            return None
        try:
            return [_unpacked(tensors, f"{i}.", packed, device) for i, packed in enumerate(like.values())]
        except (AssertionError, KeyError, ValueError):  # not packed as these are
            return None

    def put(self, names: Sequence[str], packed: Sequence[Packed]) -> None:
        """Keep a group's packed weights; where that fails, say so and go on."""
        tensors = {}
        for i, (codes, state) in enumerate(packed):
            tensors[f"{i}.codes"] = codes
            tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
        file = self._file(names)
        scratch = file.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, scratch, {"key": self.key, "digest": _digest(tensors, json.dumps(list(names)))})
            scratch.replace(file)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            if not self.is_full:
                logger.warning(
                    "Rounded layers could not be kept in %s for going on after an interruption: %s", self.folder, error
                )
            self.is_full = True

    def _file(self, names: Sequence[str]) -> Path:
        name = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:_NAME_LENGTH]
        return self.folder / f"{name}.safetensors"


def _key_in(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as kept:
            return (kept.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None


def _unpacked(tensors: dict[str, Tensor], prefix: str, like: Packed, device: torch.device) -> Packed:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    codes = own.pop("codes")
    if (codes.shape, codes.dtype) != (like[0].shape, like[0].dtype):
        raise ValueError(f"The codes are {tuple(codes.shape)}, and this layer's {tuple(like[0].shape)}.")
    state = QuantState.from_dict(own, device=device)
    check_scales(state, like[1])
    share_tables(state)
    return codes, state


def beside(target: Path) -> Path:
    """Where rounded layers are kept for what is to become the folder `target`."""
    return target.parent / f".{target.name}.calibration"


@contextmanager
def resumable(target: Path, refused: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """For work with `Calibration(resume=beside(target))`: the folder is removed when the block ends well.

    Args:
        refused: errors that say that the result is not wanted, unless it is forced.
    """
    folder = beside(target)
    earlier = _files(folder)
    try:
        yield
    except BaseException as error:
        if found := _files(folder):
            which, use = "The layers rounded so far", _use_of(error, refused)
            if found == earlier and not isinstance(error, refused):  # which comes when all are rounded
                which, use = "Layers rounded before", "the call that rounded them goes on there"
            logger.warning("%s are in %s: %s. Else remove it.", which, folder, use)
        else:
            with suppress(OSError):  # not there, or somebody's own files are
                folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> set[tuple[str, int]]:
    """What lies there, by name and time."""
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def _use_of(error: BaseException, refused: type[Exception] | tuple[()]) -> str:
    """Which call can go on with what is kept: one that fails in the same way again is none."""
    if isinstance(error, refused):
        return "the same call with force goes on there"
    if isinstance(error, CalibrationError):
        return "only a call with other rows or settings that was stopped before goes on there"
    return "the same call goes on there"


def key_of(model: nn.Module, rows: str, settings: Any, scales: Mapping[str, Packed] | None = None) -> str:
    """A hash of what decides how a model's layers are rounded.

    Args:
        rows: their fingerprint.
        settings: anything whose repr says all of it.
        scales: packed weights whose scales are kept, by name.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    parts = model.named_modules()
    kinds = sorted({tensor.device.type for tensor in tensors.values()})
    facts = {
        "rows": rows,
        "settings": repr(settings),
        "classes": [[name, f"{type(part).__module__}.{type(part).__qualname__}"] for name, part in parts],
        "configs": _configs(model),
        "devices": kinds,
        "autocast": [str(torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)],
        "versions": {name: version(name) for name in PACKAGES},
        "code": _code(),
    }
    for name, (_, state) in (scales or {}).items():
        tensors |= {f"{name} {part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return _digest(tensors, json.dumps(facts, sort_keys=True))


@functools.cache
def _code() -> str:
    """A hash of the source that rounds: of one version there may be several."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _configs(model: nn.Module) -> list[list[str]]:
    """What the configs in a model say of it, and how attention is computed, which they do not write down."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in found:
            said = json.dumps(_without_origin(config.to_dict()), sort_keys=True, default=str)
            found[id(config)] = [name, said, str(getattr(config, "_attn_implementation", None))]
    return list(found.values())


def _without_origin(value: Any) -> Any:
    """A config's dict without what is in `_ORIGIN`, there and in the configs within."""
    if not isinstance(value, dict):
        return value
    return {str(key): _without_origin(item) for key, item in value.items() if key not in _ORIGIN}


def _digest(tensors: Mapping[str, Tensor], start: str) -> str:
    digest = hashlib.blake2b(start.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
