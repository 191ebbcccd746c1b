"""Rows to calibrate on, and what a model's layers are fed and give, heard from outside."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from architectures import VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_qlora import NF4Config, quantize_model
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.run import calibration_report


ROWS, HELD_OUT, LENGTH = 10, 2, 32


def text(rows: int = ROWS, length: int = LENGTH, padded: bool = False, words: int = VOCAB) -> dict[str, Tensor]:
    """Random tokens; of few words, the inputs of layers lie in few directions, where calibration gains most."""
    ids, mask = torch.randint(1, words, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if padded:
        mask = (torch.arange(length)[None] < torch.randint(length // 2, length + 1, (rows, 1))).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def rows_of(inputs: dict[str, Tensor], held_out: int = HELD_OUT) -> CalibrationRows:
    return CalibrationRows(inputs, held_out, "a test")


def calibrated(model: nn.Module, calibration: Any, config: NF4Config | None = None, **options: Any) -> Any:
    """A copy of the model, calibrated, and the report."""
    copied = copy.deepcopy(model)
    quantize_model(copied, config, calibration=calibration, **options)
    return copied, calibration_report(copied)


def heard(model: nn.Module, names: list[str], inputs: Mapping[str, Tensor]) -> tuple[dict[str, list[Tensor]], ...]:
    """What layers are called with and what they give, call by call, by name."""
    taken: dict[str, list[Tensor]] = defaultdict(list)
    given: dict[str, list[Tensor]] = defaultdict(list)

    def listener(name: str) -> Any:
        def listen(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            taken[name].append(x.detach().clone())
            given[name].append(output.detach().clone())

        return listen

    handles = [model.get_submodule(name).register_forward_hook(listener(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model.eval()(**inputs)
    for handle in handles:
        handle.remove()
    return taken, given


def flat(tensors: list[Tensor], rows: int, mask: Tensor | None) -> Tensor:
    """(tokens, features), float64, of all calls, without padding."""
    found = []
    for tensor in tensors:
        tensor = tensor.reshape(rows, -1, tensor.shape[-1]).double()
        there = mask is not None and tensor.shape[1] == mask.shape[1]
        found.append(tensor[mask.bool()] if there and mask is not None else tensor.flatten(0, 1))
    return torch.cat(found)


def codes(model: nn.Module) -> dict[str, bytes]:
    """All that a model stores, as bytes."""
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


STOCK = """
import sys
from importlib.abc import MetaPathFinder


class NotThisPackage(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_qlora":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NotThisPackage())
import bitsandbytes, torch, transformers
from safetensors.torch import load_file, save_file

saved, folder = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
for module in model.modules():
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    save_file({"logits": model(**load_file(f"{folder}/inputs.safetensors")).logits}, f"{folder}/out.safetensors")
assert "hf_qlora" not in sys.modules
"""


def stock_logits(saved: Path, inputs: Mapping[str, Tensor], place: Path) -> Tensor:
    """The logits of a saved model, by stock transformers and bitsandbytes in a process without this package."""
    save_file(dict(inputs), place / "inputs.safetensors")
    subprocess.run([sys.executable, "-c", STOCK, str(saved), str(place)], check=True)
    return load_file(place / "out.safetensors")["logits"]
