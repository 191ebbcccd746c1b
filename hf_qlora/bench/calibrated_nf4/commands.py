"""What a user waits for: `hf-qlora quantize` and `merge` as they are typed, from the start of Python to the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model

from hf_qlora.bench.calibrated_nf4 import data, models
from hf_qlora.config import QLoRAConfig


RUN = "from hf_qlora.cli import app; app()"


def commands(device: str, seed: int, rows: int, layers: int | None) -> dict[str, Any]:
    """Both commands on SmolLM2 and chats, with an adapter of random weights, which takes as long as a trained one."""
    with TemporaryDirectory() as name:
        place = Path(name)
        model = models.dense("cpu", layers).to(models.dtype_of(device))
        model.save_pretrained(place / "base")
        data.tokenizer().save_pretrained(place / "base")
        with (place / "chats.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": chat}) + "\n" for chat in data.chats_to_calibrate_on())
        torch.manual_seed(seed)
        adapted = get_peft_model(model, QLoRAConfig(**models.LORA, init_lora_weights=False))
        for key, parameter in adapted.named_parameters():
            if ".lora_B." in key:
                parameter.data *= 0.1
        adapted.save_pretrained(place / "adapter")
        del model, adapted
        options = {"--calibrate": "chats.jsonl", "--rows": str(rows), "--seed": str(seed), "--device": device}
        shared = (*(word for option in options.items() for word in option), "--force")
        return {
            "quantize": _timed(place, "quantize", str(place / "base"), *shared),
            "merge": _timed(place, "merge", "adapter", "--base", str(place / "base"), "--onto", "nf4", *shared),
        }


def _timed(place: Path, command: str, *arguments: str) -> dict[str, Any]:
    """Seconds of a command, those of them that the calibration says it took, and the losses that it measured."""
    to = ("--output", str(place / f"{command}-out"), "--report", "report.json")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, command, *arguments, *to], cwd=place, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"hf-qlora {command} failed:\n{done.stdout}\n{done.stderr}")
    said = json.loads((place / "report.json").read_text(encoding="utf-8"))
    calibration = said["calibration" if command == "merge" else "report"]
    return {"seconds": seconds, "calibrating": calibration["seconds"], "losses": calibration["losses"]}
