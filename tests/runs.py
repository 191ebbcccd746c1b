"""Short runs of Trainer on a tiny quantized model, and what is compared of them, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from architectures import VOCAB, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_qlora import QLoRAConfig


HALF = 3  # steps; an epoch has 4, so that a run is cut within one epoch and ends in the next


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return llama().to(dtype)


def force_packing(model: nn.Module, packing: bool) -> nn.Module:
    """Set on every 4-bit layer what bitsandbytes sets on an AVX512-BF16 processor."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = packing
    return model


def qlora(packing: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(dtype), QLoRAConfig(**{**config, **options}))
    return force_packing(model, packing)


def rows(count: int = 8, seed: int = 7) -> list[dict[str, Tensor]]:
    tokens = torch.randint(1, VOCAB, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


class RNGKeepingTrainer(Trainer):
    """An evaluation's DataLoader draws a seed from torch's generator; here the training's dropout does not see it."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    defaults = {
        "max_steps": 2 * HALF,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    metrics = options.pop("compute_metrics", None)
    return RNGKeepingTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=8),
        callbacks=list(callbacks),
        compute_metrics=metrics,
    )


class StopAndSave(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == HALF:
            control.should_save = control.should_training_stop = True


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_identical(found: Any, expected: Any, path: str = "") -> None:
    """Equal to the bit, through dicts and lists."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_identical(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_identical(a, b, f"{path}[{index}]")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def log(run: Trainer) -> list[dict[str, float]]:
    """Step, loss, gradient norm and learning rate of every step."""
    return [
        {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in run.state.log_history
        if "loss" in entry
    ]


def outcome(run: Trainer) -> dict[str, Any]:
    assert run.optimizer is not None
    return {"adapters": adapters(run.model), "optimizer": run.optimizer.state_dict(), "log": log(run)}


def interrupted(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Train half of the steps and save; the checkpoint's folder."""
    trainer(model, folder, StopAndSave(), **options).train()
    return folder / f"checkpoint-{HALF}"
