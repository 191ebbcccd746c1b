"""What is written tensor by tensor is what the safetensors library reads, and what it writes is read one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.tensors import _DTYPES, ShardWriter, TensorFiles


INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def some_tensors() -> dict[str, Tensor]:
    found = {f"of.{dtype}": (10 * torch.rand(3, 5)).to(dtype) for dtype in _DTYPES}
    shapes = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.randn(4, 6).t()}
    return {**found, **shapes, "odd bytes": torch.ones(3, dtype=torch.uint8), "ä.weight": torch.randn(2, 2)}


def write(folder: Path, tensors: dict[str, Tensor], max_bytes: int = 10**9) -> None:
    writer = ShardWriter(folder, list(tensors), max_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and found[name]
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    assert same(load_file(tmp_path / WHOLE), tensors)


def test_shards_are_no_larger_than_asked_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(16, 16) for i in range(10)} | some_tensors()
    write(tmp_path, tensors, max_bytes=3000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    loaded = {name: load_file(tmp_path / name) for name in files}
    assert all(sum(t.nbytes for t in shard.values()) <= 3000 for shard in loaded.values())
    assert all(name in loaded[file] for name, file in index["weight_map"].items())
    assert same({name: t for shard in loaded.values() for name, t in shard.items()}, tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(100), "c": torch.randn(4)}
    write(tmp_path, tensors, max_bytes=64)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_tensors_lie_on_whole_words(tmp_path: Path) -> None:
    """All but those whose size is no multiple of 8 bytes, and these by falling size of their elements."""
    write(tmp_path, {"odd": torch.ones(3, dtype=torch.uint8), **{str(i): torch.randn(4) for i in range(3)}})
    raw = (tmp_path / WHOLE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    offsets = {name: item["data_offsets"] for name, item in json.loads(raw[8 : 8 + size]).items() if name[0] != "_"}
    assert all(start % 8 == 0 for start, _ in offsets.values())


def test_one_tensor_is_read_of_many_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, max_bytes=100)
    files = TensorFiles(tmp_path)
    assert same({name: files.read(name) for name in files.files}, tensors)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, "[1]", "no index of safetensors"),
        (INDEX, "{", "no index of safetensors"),
        (INDEX, '{"weight_map": {"a": "../model.safetensors"}}', "no file beside it"),
        (INDEX, '{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors'"),
        (WHOLE, "not safetensors at all", "cannot be read as safetensors"),
        ("pytorch_model.bin", "pickle", "only safetensors"),
    ],
)
def test_files_that_are_no_model_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path.parent / WHOLE)
    (tmp_path / name).write_text(content)
    with pytest.raises(MergeError, match=message):
        TensorFiles(tmp_path)


def test_a_header_that_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / WHOLE)
    raw = (tmp_path / WHOLE).read_bytes()
    (tmp_path / WHOLE).write_bytes((2**40).to_bytes(8, "little") + raw[8:])
    with pytest.raises(MergeError, match="cannot be read as safetensors"):
        TensorFiles(tmp_path)
