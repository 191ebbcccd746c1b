"""safetensors files, read and written one tensor at a time.

The safetensors library maps a file into memory and keeps what was read mapped, and takes a whole file's tensors to
write it. A 14 GB file would so be in memory twice. Here a file is opened anew for each tensor, and written as they
come:

    8 bytes: n | n bytes: JSON with names, dtypes, shapes and offsets, padded with spaces | the tensors, back to back

with n chosen beforehand, large enough. Tensors whose bytes are no multiple of 8 wait until the end of a file, so that
all others lie where a reader can map them.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_qlora.layers.errors import MergeError


ALIGNMENT = 8
_ENTRY_BYTES = 160  # of the header, beside a tensor's name
# https://huggingface.co/docs/safetensors, "Format"; what torch has of it and models are stored in.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class TensorFiles:
    """The tensors of a model folder: one safetensors file, or several with an index.

    Attributes:
        files: the file that each tensor is in; in the order of files, then of names.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in _paths(folder):
            try:
                with safe_open(path, "pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise MergeError(f"{path} cannot be read as safetensors ({error}).") from error

    def read(self, name: str) -> Tensor:
        """One tensor. It is mapped from the file, and must not be written to."""
        path = self.files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise MergeError(f"{path}: {name} cannot be read ({error}).") from error


def _paths(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        whole = folder / SAFE_WEIGHTS_NAME
        if whole.is_file():
            return [whole]
        raise MergeError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; only safetensors are read. Save "
            "the model again with save_pretrained, or load it with its adapter and merge in Python: merge(model)."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MergeError(f"{index} is no index of safetensors files ({error!r}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise MergeError(f"{index} names {name!r}, which is no file beside it.")
    return [folder / name for name in names]


class ShardWriter:
    """Writes tensors into model-00001-of-0000n.safetensors and so on, and the index at the end.

    Args:
        folder: for the files.
        names: upper bounds, in bytes, are taken from these; the tensors may have other names, no longer and no more.
        max_bytes: after which a file is closed and the next one begun.
    """

    def __init__(self, folder: Path, names: list[str], max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        reserved = sum(len(name.encode()) + _ENTRY_BYTES for name in names) + _ENTRY_BYTES
        self.header_bytes = -(-reserved // ALIGNMENT) * ALIGNMENT
        self.shards: list[dict[str, Any]] = []
        self.total_bytes = 0
        self._file: Any = None
        self._waiting: dict[str, Tensor] = {}
        self._used = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or keep it until its file ends."""
        if self._file is None or (self._used and self._used + tensor.nbytes > self.max_bytes):
            self._next()
        self._used += tensor.nbytes
        if tensor.nbytes % ALIGNMENT:
            self._waiting[name] = tensor.detach().clone()
        else:
            self._write(name, tensor)

    def close(self) -> None:
        """End the last file, give all their names, and write the index if there are several."""
        self._end()
        count = len(self.shards)
        weight_map: dict[str, str] = {}
        for number, header in enumerate(self.shards, start=1):
            name = SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._path(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(header, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the file that is being written, which stays as it is."""
        if self._file is not None:
            self._file.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number}"

    def _next(self) -> None:
        self._end()
        self.shards.append({})
        self._file = self._path(len(self.shards)).open("wb")
        self._file.seek(ALIGNMENT + self.header_bytes)
        self._used, self._end_of_data = 0, 0

    def _write(self, name: str, tensor: Tensor) -> None:
        plain = tensor.detach().cpu().contiguous()
        self._file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
        offsets = [self._end_of_data, self._end_of_data + plain.nbytes]
        self.shards[-1][name] = {"dtype": _DTYPES[plain.dtype], "shape": list(plain.shape), "data_offsets": offsets}
        self._end_of_data = offsets[1]
        self.total_bytes += plain.nbytes

    def _end(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        self._waiting = {}
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.shards[-1]}, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.header_bytes) + header.ljust(self.header_bytes))
        self._file.close()
        self._file = None
