"""Tiny models of every family the package is tested on, made from a config, with inputs that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn


VOCAB = 500
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """A family: how to make a model and its inputs, its PEFT task, and what stays dense."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    task_type: str | None
    dense: tuple[str, ...]  # names of linear layers that must stay dense, by their last component
    options: dict[str, Any]  # for the config: what this family needs


def tokens(length: int = 16) -> Tensor:
    return torch.randint(1, VOCAB, (2, length))


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def _text_pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(8)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def llama(**changes: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA_LIKE, **changes})).eval()


def gpt2(**changes: Any) -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(**{"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **changes})
    ).eval()


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZES, vocab_size=VOCAB)).eval()


def _qwen2() -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA_LIKE)).eval()


def _t5() -> nn.Module:
    config = tf.T5Config(d_model=128, d_ff=256, num_layers=2, num_heads=4, d_kv=32, vocab_size=VOCAB)
    return tf.T5ForConditionalGeneration(config).eval()


def _mixtral() -> nn.Module:
    config = tf.MixtralConfig(**{**LLAMA_LIKE, "intermediate_size": 128, "num_local_experts": 4})
    return tf.MixtralForCausalLM(config).eval()


def _qwen2_moe() -> nn.Module:
    experts = {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**LLAMA_LIKE, **experts)).eval()


def _vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)).eval()


def _albert() -> nn.Module:
    return tf.AlbertForSequenceClassification(tf.AlbertConfig(**SIZES, vocab_size=VOCAB, embedding_size=64)).eval()


ARCHITECTURES = (
    Architecture("llama", llama, _text, "CAUSAL_LM", ("lm_head",), {}),
    Architecture("qwen2", _qwen2, _text, "CAUSAL_LM", ("lm_head",), {}),
    Architecture("gpt2", gpt2, _text, "CAUSAL_LM", ("lm_head",), {}),
    Architecture("bert", bert, _text, "SEQ_CLS", ("classifier",), {}),
    Architecture("t5", _t5, _text_pair, "SEQ_2_SEQ_LM", ("lm_head", "wo"), {}),  # transformers keeps wo in float32
    Architecture("mixtral", _mixtral, _text, "CAUSAL_LM", ("lm_head",), {}),  # routers are no nn.Linear here
    Architecture("qwen2_moe", _qwen2_moe, _text, "CAUSAL_LM", ("lm_head", "shared_expert_gate"), {}),
    Architecture("vit", _vit, _image, None, ("classifier",), {"modules_to_save": ["classifier"]}),
    Architecture("albert", _albert, _text, "SEQ_CLS", ("classifier",), {}),  # one layer object used three times
)
