"""What vLLM reads of an adapter's files gives the function that was trained.

vLLM needs a GPU; this reads as it does (vllm/lora/peft_helper.py, lora_weights.py, lora_model.py): seven keys of the
JSON, one scale and rank for all layers, and tensors that are called lora_A or lora_B. It knows no rank_pattern, which
cannot be folded, so that no case here has one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama, tokens
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers import depth


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "quantization": None}
ALPHAS = {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 40}}
CASES = {
    "plain": QLoRAConfig(**LORA),
    "rslora": QLoRAConfig(**LORA, use_rslora=True),
    "alpha-pattern": QLoRAConfig(**LORA, **ALPHAS),
    "depth": AdaptiveDepthLoRAConfig(**LORA),
    "all": AdaptiveDepthLoRAConfig(**LORA, **ALPHAS, use_rslora=True, attention="concentration"),
}


def read_as_vllm(folder: Path) -> tuple[float, dict[str, Tensor]]:
    """The scale of all layers, and the tensors by module and half: "model.layers.0.self_attn.q_proj.lora_A"."""
    known: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert not known["modules_to_save"]
    assert (known["bias"], known["use_dora"]) == ("none", False)
    root = known["r"] ** 0.5 if known["use_rslora"] else known["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".weight"
    assert all(name.startswith(prefix) and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {t.shape[0] if ".lora_A." in name else t.shape[1] for name, t in tensors.items()} == {known["r"]}
    return known["lora_alpha"] / root, {n.removeprefix(prefix).removesuffix(suffix): t for n, t in tensors.items()}


def trained(name: str, base: nn.Module, folder: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Save a case's adapter, with values as training may leave them; its logits, and those of its base."""
    model = get_peft_model(base, CASES[name])
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.1)
    for scale in depth.scales(model.get_base_model(), "default").values():
        scale.restore(
            theta=0.7, attention=1.0 if CASES[name].attention == "off" else 1.4, concentration=0.5, observations=3
        )
    model.save_pretrained(str(folder))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            return logits, model(input_ids=ids).logits


@pytest.mark.parametrize("name", list(CASES))
def test_vllm_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    base, ids = llama(), tokens()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.08)  # logits of order 1
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    expected, without = trained(name, base, tmp_path, ids)
    scale, tensors = read_as_vllm(tmp_path)
    modules = {key.rpartition(".")[0] for key in tensors}
    for module in modules:
        weights[f"{module}.weight"] += scale * tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]
    served = llama()
    served.load_state_dict(weights)
    with torch.no_grad():
        found = served(input_ids=ids).logits
    # fp32 rounds at 6e-8; ΔW added to W loses one digit, and the layers' sums another
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - without).abs().max() > 0.1
