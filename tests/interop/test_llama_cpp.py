"""llama.cpp, which shares no code with PEFT, computes what was trained: each way of scaling an adapter, on SmolLM2.

Adapters of our model are converted by llama.cpp's own scripts and served over the dense base, both in float32. At each
place of a continuation that llama.cpp chooses, the log-probabilities of its likeliest tokens are held against those of
our unmerged model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import Server, convert_adapters, convert_model
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers import depth


# Nats. The weights are the same numbers on both sides and all sums are in float32, in another order: 3e-4 was the most
# seen. llama.cpp's default, attention in float16, is not used: it is off by 1e-2. A misread scale is by 0.1 or more.
TOLERANCE = 2e-3
TOP, TOKENS = 100, 4
CHAT = [{"role": "user", "content": "Name three colours of the rainbow, and say which of them you like best."}]
TEXTS = ("The capital of France is", "def fibonacci(n):\n    ")

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "quantization": None}
ALPHAS = {"alpha_pattern": {"q_proj": 64, "layers.3.mlp.down_proj": 1, r"layers\.[5-9]\.self_attn\.v_proj": 40}}
RANKS = {"rank_pattern": {"v_proj": 4, "up_proj": 12}}
PORTABLE: dict[str, QLoRAConfig] = {
    "plain": QLoRAConfig(**LORA),
    "rslora": QLoRAConfig(**LORA, use_rslora=True),
    "alpha-pattern": QLoRAConfig(**LORA, **ALPHAS),
    "rank-pattern": QLoRAConfig(**LORA, **RANKS),
    "depth": AdaptiveDepthLoRAConfig(**LORA, depth_profile="linear"),
    "all": AdaptiveDepthLoRAConfig(
        **LORA, **ALPHAS, **RANKS, use_rslora=True, depth_profile="cosine", attention="concentration"
    ),
}
CASES = {**PORTABLE, "unfolded": QLoRAConfig(**LORA, use_rslora=True, portable=False)}


@dataclass(frozen=True)
class Comparison:
    """Largest differences of log-probabilities, in nats.

    Attributes:
        error: of llama.cpp's from ours.
        shift: of ours from ours without the adapter.
        flips: at how many places the adapter changed the likeliest token.
    """

    error: float
    shift: float
    flips: int


def make_model(base: Path) -> PeftModel:
    """All cases as adapters of one model, each with its lora_B, gains and observed attention away from the start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, config in CASES.items():
        torch.manual_seed(1)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        generator = torch.Generator().manual_seed(2)
        # α/√r against α/r; both are then adapters that shift logits by a few units and leave sense in them
        std = 0.03 if config.use_rslora else 0.08
        for key, parameter in model.named_parameters():
            if f".lora_B.{name}." in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for scale in depth.scales(model.get_base_model(), name).values():
            theta, attention = (torch.rand(2, generator=generator) * 1.6 - 0.8).tolist()
            scale.restore(theta, 1.0 if config.attention == "off" else 1 + attention / 2, 0.5, 3)
    return model.eval()


def log_probabilities(model: PeftModel, ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary), in float64 from float32 logits."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def compare(server: Server, model: PeftModel, name: str | None, prompts: Sequence[list[int]]) -> Comparison:
    errors, shifts, flips = [], [], 0
    for ids in prompts:
        adapter = None if name is None else list(CASES).index(name)
        continuation, places = server.log_probabilities(ids, adapter, TOKENS, TOP)
        assert len(continuation) == len(places) == TOKENS
        with model.disable_adapter():
            ours = without = log_probabilities(model, ids + continuation)
        if name is not None:
            model.set_adapter(name)
            ours = log_probabilities(model, ids + continuation)
        for at, found in enumerate(places, start=len(ids) - 1):
            assert len(found) == TOP
            tokens = torch.tensor(list(found))
            errors.append((ours[at, tokens] - torch.tensor(list(found.values()), dtype=torch.float64)).abs().max())
            shifts.append((ours[at, tokens] - without[at, tokens]).abs().max())
            flips += int(ours[at].argmax() != without[at].argmax())
    return Comparison(float(max(errors)), float(max(shifts)), flips)


@pytest.fixture(scope="module")
def compared(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Comparison]:
    folder = tmp_path_factory.mktemp("llama.cpp")
    model = make_model(smollm2)
    model.save_pretrained(str(folder))
    files = {folder / name: folder / f"{name}.gguf" for name in CASES}
    convert_adapters(smollm2, files)
    base = convert_model(smollm2, folder / "base.gguf")
    server = Server(base, list(files.values()), threads=torch.get_num_threads())
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat: Any = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer([*TEXTS, chat])["input_ids"]
    found = {name: compare(server, model, name, prompts) for name in (None, *CASES)}
    base.unlink()  # pytest keeps the folders of three runs, and this is half a gigabyte
    return found


def test_the_base_alone_is_computed_alike(compared: dict[str | None, Comparison]) -> None:
    """Else the other comparisons would measure the conversion of the base."""
    assert compared[None].error <= TOLERANCE


@pytest.mark.parametrize("name", list(PORTABLE))
def test_llama_cpp_computes_what_was_trained(name: str, compared: dict[str | None, Comparison]) -> None:
    assert compared[name].error <= TOLERANCE
    assert compared[name].shift >= 1  # so that an adapter left out, or scaled otherwise, would be seen
    assert compared[name].flips >= 1


def test_what_is_not_folded_is_misread(compared: dict[str | None, Comparison]) -> None:
    """llama.cpp knows no rsLoRA. This is what `portable=True` is for, and it shows that the tests above can fail."""
    assert compared["unfolded"].error > 50 * TOLERANCE
