"""Adapters to merge, and what merged models are compared by."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig


def adapted(model: nn.Module, depth: bool = False, **settings: Any) -> PeftModel:
    """The model with an adapter that is not zero, and small against the weights, as trained ones are."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    peft_model = get_peft_model(model, (AdaptiveDepthLoRAConfig if depth else QLoRAConfig)(**values)).eval()
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B" in name:
            parameter.data *= 0.1
    return peft_model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found.float()


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """The names of the tensors that two models do not have alike, bit for bit and in dtype."""
    left, right = one.state_dict(), other.state_dict()
    same = [n for n in left.keys() & right.keys() if left[n].dtype == right[n].dtype and left[n].equal(right[n])]
    return sorted((left.keys() | right.keys()) - set(same))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def trained(model: PeftModel, inputs: dict[str, Tensor], steps: int = 25, lr: float = 5e-3) -> PeftModel:
    """The active adapters, trained to a clear gain."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()
