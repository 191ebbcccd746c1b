"""SmolLM2 in NF4 and dense, adapters trained on it, and what is measured of a model."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_qlora import assets
from hf_qlora.assets.cache import cached
from hf_qlora.bench.calibrated_nf4 import data
from hf_qlora.bench.measure import environment
from hf_qlora.bench.train_step.arms import with_stock_layers
from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.kernels.emulated import is_emulated
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.calibrate.loss import mean_loss


STEPS, BATCH_SIZE, LEARNING_RATE, RANK = 120, 4, 1e-3, 16
LORA: dict[str, Any] = {
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def dtype_of(device: str) -> torch.dtype:
    """bfloat16, or float32 where a CPU has no products in bfloat16."""
    wanted = torch.bfloat16
    return torch.float32 if is_emulated(torch.empty(0, dtype=wanted, device=device)) else wanted


def dense(device: str, layers: int | None = None) -> Any:
    """The model, or so many layers of random weights, to see that all works."""
    if layers is None:
        return copy.deepcopy(_model(dtype_of(device))).to(device)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(assets.smollm2_135m_instruct(), num_hidden_layers=layers, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(device))
    return model.eval().to(device)


@functools.cache
def _model(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(assets.smollm2_135m_instruct(), dtype=dtype).eval()


def adapted(device: str, seed: int, steps: int, layers: int | None = None, init: str = "default") -> PeftModel:
    """The NF4 base with an adapter that was trained on it.

    Args:
        init: "default" or "loftq".
    """
    model = _fresh(device, seed, layers, init)

    def make(folder: Path, _: Any) -> None:
        train(model, seed, steps)
        state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
        save_file(state, folder / "adapter.safetensors")

    folder = cached(_name(device, seed, steps, layers, init), make)
    set_peft_model_state_dict(model, load_file(folder / "adapter.safetensors", device=device))
    return model.eval()


def reference_losses(device: str, seed: int, steps: int, layers: int | None = None) -> dict[str, dict[str, float]]:
    """The losses that each calibration is compared with: of the unmerged model, its base, and the dense model.

    They are measured once for an adapter, and kept beside it.
    """

    def make(folder: Path, _: Any) -> None:
        model = adapted(device, seed, steps, layers)
        found = {"unmerged": losses(model, layers)}
        with model.disable_adapter():
            found["base"] = losses(model, layers)
        found["dense"] = losses(dense(device, layers), layers)
        (folder / "losses.json").write_text(json.dumps(found), encoding="utf-8")

    folder = cached(f"{_name(device, seed, steps, layers, 'default')}-losses", make)
    found: dict[str, dict[str, float]] = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    return found


def _name(device: str, seed: int, steps: int, layers: int | None, init: str) -> str:
    made = environment(device)
    by = [str(made[name]) for name in ("code", "torch", "transformers", "peft", "bitsandbytes")]
    kind = f"{torch.device(device).type}-{str(dtype_of(device)).removeprefix('torch.')}"
    return "-".join(["calibrated-nf4", *by, init, str(seed), str(steps), str(layers), kind])


def _fresh(device: str, seed: int, layers: int | None, init: str) -> PeftModel:
    base = dense(device, layers)
    torch.manual_seed(seed)
    return get_peft_model(base, QLoRAConfig(**LORA, init_lora_weights=True if init == "default" else init))


def train(model: Any, seed: int, steps: int) -> None:
    """Whole chats, the rate falling to 0."""
    rows, generator = data.training_rows(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        ids = rows[torch.randint(len(rows), (BATCH_SIZE,), generator=generator)].to(model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def peft_merge(device: str, adapter: dict[str, Tensor], layers: int | None = None) -> nn.Module:
    """PEFT's own merge into bitsandbytes' layers, which quantizes the sum again."""
    base = with_stock_layers(quantize_model(dense(device, layers), NF4Config()))
    model = get_peft_model(base, LoraConfig(**LORA))
    set_peft_model_state_dict(model, adapter)
    merged: nn.Module = model.merge_and_unload()
    if not any(isinstance(module, bnb.nn.Linear4bit) for module in merged.modules()):
        raise RuntimeError("PEFT's merge left no 4-bit layer: it is no merge into NF4 that could be compared.")
    return merged


def losses(model: nn.Module, layers: int | None = None) -> dict[str, float]:
    """Nats a token on the test rows of both domains; on a few, where the model is one to see that all works."""
    found, rows = {}, data.TEST_ROWS if layers is None else 2
    for domain in ("chats", "headlines"):
        loss = mean_loss(model, {"input_ids": data.test_rows(domain)[:rows]})
        if loss is None:
            raise RuntimeError(f"{type(model).__name__} gave no loss on the test rows of {domain}.")
        found[domain] = loss
    return found


def answers(model: Any, count: int, batch_size: int = 32) -> list[tuple[str, str]]:
    """Greedy answers to questions, beside those expected."""
    tokenizer, pairs = data.tokenizer(), data.questions(count)
    given: list[str] = []
    for start in range(0, len(pairs), batch_size):
        batch = tokenizer(
            [prompt for prompt, _ in pairs[start : start + batch_size]], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            out = model.generate(
                **batch.to(model.device),
                max_new_tokens=data.LONGEST_ANSWER + 4,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        given += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(text, expected) for text, (_, expected) in zip(given, pairs, strict=True)]
