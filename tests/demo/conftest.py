"""A tiny random chat model, its tokenizer, and settings for a run with it that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_qlora.demo import Settings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, a tokenizer of bytes, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} plus one?", "completion": f"It is {i + 1}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=str(tiny / "model"),
        dataset=str(tiny / "rows.jsonl"),
        output=tmp_path / "adapter",
        steps=20,
        batch_size=4,
        rank=4,
        loftq=False,
        learning_rate=1e-2,
        held_out=8,
        max_length=128,
        seed=0,
        save_merged=True,
    )


@pytest.fixture
def tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(settings.model)
