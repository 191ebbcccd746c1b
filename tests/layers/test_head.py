"""A model whose loss is computed in chunks is the same model: loss, gradients, logits, files.

Oracle: the same model without it, and cross entropy written out over its logits.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
import trl
from architectures import LLAMA_LIKE, SIZES, VOCAB, bert, gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hf_qlora
from hf_qlora import QLoRAConfig, disable_chunked_loss, enable_chunked_loss
from hf_qlora.kernels import loss
from hf_qlora.layers import logits
from hf_qlora.layers.head import ChunkedHead
from hf_qlora.layers.logits import LazyLogits
from hf_qlora.validation import ConfigError


# The order of sums over chunks differs: a few roundings of float32, relative to the largest gradient of a tensor; where
# the gradient is a remainder of larger terms (key biases), of the noise floor beside it.
ROUNDING, FLOOR = 1e-5, 1e-6
ROWS = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loss, "CHUNK_BYTES", ROWS * VOCAB * 4)
    logits._said.clear()


def t5() -> nn.Module:
    sizes = {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0)
    )


def bart() -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = tf.BartConfig(d_model=64, vocab_size=VOCAB, forced_eos_token_id=2, **sides, **heads, **tokens)
    model = tf.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gemma2 (softcap)": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA_LIKE, head_dim=32)),
    "cohere (scale)": lambda: tf.CohereForCausalLM(tf.CohereConfig(**LLAMA_LIKE, bos_token_id=1, eos_token_id=2)),
    "granite (divisor)": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0)),
    "gpt2 (tied)": lambda: gpt2(bos_token_id=1, eos_token_id=1),
    "t5": t5,
    "bart (constant row)": bart,
    "bert (biased)": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, vocab_size=VOCAB)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


def batch(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 16))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels, **more}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs).loss
    out.backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], factor: float = 1) -> None:
    assert abs(float(one[0] - other[0])) <= factor * ROUNDING * abs(float(other[0]))
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, grad in other[1].items():
        assert float((one[1][name] - grad).abs().max()) <= factor * (ROUNDING * float(grad.abs().max()) + FLOOR), name


class Largest(TorchDispatchMode):
    """The most rows of logits that anything within has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor) or isinstance(tensor, LazyLogits) or tensor.is_meta:
                continue
            weight = tuple(tensor.shape[:-1]) in ((128,), (64,))  # transposed
            if tensor.ndim and tensor.shape[-1] == VOCAB and not weight:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 40}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_full_logits_which_are_never_made(name: str, more: dict[str, Any]) -> None:
    if more and name in ("t5", "bart (constant row)", "bert (biased)"):  # their losses take none
        more = {}
    model, inputs = make(name), batch(**more)
    expected, full = step(model, inputs), model(**inputs).logits.detach()
    enable_chunked_loss(model)
    with Largest() as largest:
        found = step(model, inputs)
    assert 0 < largest.rows <= ROWS
    assert_same(found, expected)
    out = model(**inputs)
    assert type(out.logits) is LazyLogits
    assert torch.equal(out.logits.detach(), full)
    out.loss.backward()


def adapted(name: str = "llama", **settings: Any) -> PeftModel:
    values = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "quantization": None}
    return get_peft_model(make(name), QLoRAConfig(**{**values, **settings})).train()


ADAPTED: dict[str, dict[str, Any]] = {
    "frozen head": {},
    "adapted head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "DoRA head": {"target_modules": ["lm_head"], "use_dora": True, "init_lora_weights": False},
    "trained head": {"modules_to_save": ["lm_head"]},
    "4-bit base": {"quantization": {}},
    "4-bit adapted head": {"quantization": {}, "target_modules": ["lm_head"], "init_lora_weights": False},
}


@pytest.mark.parametrize("case", ADAPTED)
def test_adapted_models_have_it_by_default(case: str) -> None:
    model, inputs = adapted(**ADAPTED[case]), batch()
    with Largest() as largest:
        found = step(model, inputs)
    assert 0 < largest.rows <= ROWS
    assert disable_chunked_loss(model)
    assert_same(found, step(model, inputs), factor=10)  # DoRA's norms and 4-bit products: more terms
