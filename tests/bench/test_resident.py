"""Memory on the CPU: pages of files are not in it, mapped weights are, and a peak is seen."""

from __future__ import annotations

import gc
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama
from safetensors.torch import load_file, save_file

from hf_qlora.bench import measure, resident
from hf_qlora.bench.quantization import memory
from hf_qlora.bench.quantization.settings import Settings
from hf_qlora.quant.base import quantize_model


MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MiB in bfloat16."""
    where = tmp_path_factory.mktemp("bfloat16")
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5}
    torch.manual_seed(0)
    model = llama(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=256).bfloat16()
    assert 38 * MIB < sum(parameter.nbytes for parameter in model.parameters()) < 42 * MIB
    model.save_pretrained(where)
    return where


def test_in_place_less_is_resident_than_dense(folder: Path) -> None:
    """Of a checkpoint that is mapped, whose pages stay in the resident set when its weights are packed."""
    found = {arm: memory.measure(arm, folder, Settings()) for arm in ("dense", "NF4, quantized in place")}
    for arm, values in found.items():
        # The allocator and the libraries keep a few MiB of a first forward.
        assert values["resident_bytes"] == pytest.approx(values["weight_bytes"], abs=12 * MIB), arm
        assert values["peak_bytes"] >= values["resident_bytes"]
    dense, packed = found["dense"], found["NF4, quantized in place"]
    assert packed["resident_bytes"] < dense["resident_bytes"] - 15 * MIB


def test_mapped_weights_are_those_that_are_tensors(tmp_path: Path) -> None:
    save_file({name: torch.ones(MIB, dtype=torch.bfloat16) for name in "abcd"}, tmp_path / "w.safetensors")
    before = resident.mapped_weights()
    weights = load_file(tmp_path / "w.safetensors")
    views = [weights["a"].view(2, -1), weights["a"].view(2, -1).t()]  # of the same bytes
    assert resident.mapped_weights() - before == 8 * MIB
    del weights["d"], views
    gc.collect()
    assert resident.mapped_weights() - before == 6 * MIB
    weights["b"].add_(1)  # now a copy of the process's own
    page = mmap.PAGESIZE
    assert resident.mapped_weights() - before == pytest.approx(4 * MIB, abs=2 * page)


def test_pages_of_files_are_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    measure.reset_peak("cpu")
    before, whole = measure.memory("cpu"), resident.resident().files
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE)) == 0
        assert resident.resident().files - whole > 60 * MIB
        after = measure.memory("cpu")
        assert abs(after.now - before.now) < 8 * MIB
        assert abs(after.peak - before.peak) < 8 * MIB


def test_a_peak_before_pages_of_files_is_seen(tmp_path: Path) -> None:
    """As in loading: what the process makes and gives back, then as much of a file, which hides it."""
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    with measure.peak_of("cpu") as peak:
        before = resident.resident().made
        with mmap.mmap(-1, 64 * MIB) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.1)  # many looks
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE)) == 0
            time.sleep(0.1)
    assert 60 * MIB < peak() - before < 80 * MIB


def test_a_system_that_does_not_tell_files_apart_is_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_text("VmHWM:\t 300 kB\nVmRSS:\t 200 kB\n")
    monkeypatch.setattr(resident, "Path", lambda _: tmp_path / "status")
    assert resident.resident() == resident.Resident(200 * 1024, 300 * 1024, 0)


def test_the_packed_model_has_its_dense_weights_alone_in_the_file(folder: Path) -> None:
    before = resident.mapped_weights()
    model = quantize_model(memory._dense(folder, Settings()))
    gc.collect()
    left = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.dtype == torch.bfloat16)
    assert resident.mapped_weights() - before == pytest.approx(left, rel=0.02)  # norms of a few hundred bytes
