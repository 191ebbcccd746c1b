"""Rounded layers in a folder, so that an interrupted run goes on where it stopped.

A file for each group of layers, whole or not there, under a key: a hash of the model's weights, the rows, and all
settings. What lies there under another key is of another run, and is not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.packing import share_tables


logger = logging.getLogger(__name__)


class Kept:
    """The folder of one run.

    Args:
        key: of the run; see `key_of`.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.folder, self.key, self.is_full = Path(folder), key, False
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, names: Sequence[str], device: torch.device) -> list[Packed] | None:
        """A group's packed weights, or None where it is not there."""
        try:
            with safe_open(self._file(names), framework="pt", device=str(device)) as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # not there, or cut off by a full disk
            return None
        if said.get("digest") != _digest(tensors):  # as after a power failure
            return None
        return [_unpacked(tensors, f"{i}.", device) for i in range(len(names))]

    def put(self, names: Sequence[str], packed: Sequence[Packed]) -> None:
        """Keep a group's packed weights; where that fails, say so and go on."""
        tensors = {}
        for i, (codes, state) in enumerate(packed):
            tensors[f"{i}.codes"] = codes
            tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
        file = self._file(names)
        scratch = file.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, scratch, {"key": self.key, "digest": _digest(tensors)})
            scratch.replace(file)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            if not self.is_full:
                logger.warning(
                    "Rounded layers could not be kept in %s for going on after an interruption: %s", self.folder, error
                )
            self.is_full = True

    def _file(self, names: Sequence[str]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:32]}.safetensors"


def _unpacked(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> Packed:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    codes = own.pop("codes")
    state = QuantState.from_dict(own, device=device)
    share_tables(state)
    return codes, state


def beside(target: Path) -> Path:
    """Where rounded layers are kept for what is to become the folder `target`."""
    return target.parent / f".{target.name}.calibration"


@contextmanager
def resumable(target: Path) -> Iterator[Path]:
    """A folder beside `target` for `Calibration(resume=…)`; it is removed when the block ends well."""
    folder = beside(target)
    try:
        yield folder
    except BaseException:
        if folder.is_dir() and any(folder.iterdir()):
            logger.warning("The layers rounded so far are in %s: the same call goes on there. Else remove it.", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def key_of(model: nn.Module, rows: str, settings: Any) -> str:
    """A hash of a model's parameters and buffers, of rows, and of settings.

    Args:
        rows: their fingerprint.
        settings: anything whose repr says all of it.
    """
    return _digest(model.state_dict(), f"{rows} {settings!r} {torch.__version__}")


def _digest(tensors: Mapping[str, Tensor], start: str = "") -> str:
    digest = hashlib.blake2b(start.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
