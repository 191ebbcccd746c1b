"""TRL's SFTTrainer trains what was asked for, keeps gains in float32, and saves an adapter that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_qlora import AdaptiveDepthLoRAConfig, quantize_model
from hf_qlora.layers import depth
from hf_qlora.layers.chunked_mlp import ChunkedMLP


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.arange(8)[None] % VOCAB


def trainer(model: nn.Module, folder: Path, **settings: Any) -> SFTTrainer:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    rows = torch.randint(2, VOCAB, (8, 8)).tolist()
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )
    config = AdaptiveDepthLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config)


def test_the_mode_of_a_config_is_kept(tmp_path: Path) -> None:
    """TRL enables checkpointing by default, without a mode."""
    settings = {"mode": "budget", "budget_bytes": 10_000_000, "chunk_size": 5}
    sft = trainer(llama(), tmp_path, checkpointing=settings)
    assert sft.args.gradient_checkpointing
    sft.train()
    layer = sft.model.get_base_model().model.layers[0]
    assert layer._gradient_checkpointing_func.func.__self__.limit == 10_000_000
    assert isinstance(layer.mlp, ChunkedMLP)


@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.parametrize("attention", ["off", "concentration"])
def test_gains_are_learned_in_float32(tmp_path: Path, quantized_before: bool, attention: str) -> None:
    """TRL casts the trainable parameters of a model that is 4-bit already to bfloat16, in which θ would not move."""
    base = llama().to(torch.bfloat16)
    if quantized_before:
        quantize_model(base)
    sft = trainer(base, tmp_path, attention=attention)
    scales = depth.scales(sft.model.get_base_model(), "default")
    adapters = {p.dtype for name, p in sft.model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    assert adapters == {torch.bfloat16 if quantized_before else torch.float32}
    sft.train()
    assert scales
    assert all(scale.bias.dtype == torch.float32 for scale in scales.values())
    assert all(scale.theta != 0 for scale in scales.values())
    decayed = {id(p) for group in sft.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert not any(id(scale.bias) in decayed for scale in scales.values())
    observed = [scale.observations for scale in scales.values()]
    assert set(observed) == {3 if attention == "concentration" else 0}


def test_the_saved_adapter_computes_what_was_trained(tmp_path: Path) -> None:
    base = llama()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    sft = trainer(base, tmp_path / "run")
    sft.train()
    sft.save_model(str(tmp_path / "adapter"))
    fresh = llama()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    trained = sft.model.eval()(input_ids=IDS).logits
    # the fold into lora_B and its division round once each
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-5)
