"""Chat models: loading them, and what is measured of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_qlora import assets
from hf_qlora.data.errors import first_line, offline
from hf_qlora.demo.errors import DemoError, explained
from hf_qlora.demo.examples import NO_LABEL, Example, collate
from hf_qlora.kernels.emulated import is_emulated


ANSWER_TOKENS = 40


def default_model() -> str:
    """The folder of the model that is used where none is named."""
    with explained(ImportError, OSError, ValueError):  # no gguf, no network, another file than the pinned one
        return str(assets.smollm2_135m_instruct())


def load_chat_model(base: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer, and the model set to answer greedily.

    Raises:
        DemoError: nothing of that name, not loadable, or no chat template.
    """
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(base), load_dense_model(base)
    except (ImportError, OSError, ValueError) as error:
        raise DemoError(f"Cannot load the model {base!r}: {first_line(error)}{offline()}") from error
    if tokenizer.chat_template is None:
        raise DemoError(
            f"The model {base!r} has no chat template; choose a model made for chat, often called -Instruct."
        )
    # Greedy, and without the sampling settings that transformers would then complain about.
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return tokenizer, model


def load_dense_model(base: str) -> PreTrainedModel:
    """In bfloat16 (float32 on processors and GPUs that only emulate it), on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    emulated = is_emulated(torch.empty(0, dtype=torch.bfloat16))
    if device == "cuda":
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if emulated else torch.bfloat16
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
    return model.eval()


def perplexity(model: Any, examples: Sequence[Example], batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood of the answers' tokens."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.ids))
    total, tokens = 0.0, 0
    for first in range(0, len(by_length), batch_size):
        batch = collate(by_length[first : first + batch_size])
        count = int((batch["labels"] != NO_LABEL).sum())
        with torch.no_grad():
            mean = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss.item()
        total, tokens = total + mean * count, tokens + count
    return math.exp(total / tokens)


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The model's most likely answer, of at most `ANSWER_TOKENS` tokens."""
    prompt = torch.tensor([example.ids[: example.start]], device=model.device)
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        tokens = model.eval().generate(input_ids=prompt, attention_mask=mask, max_new_tokens=ANSWER_TOKENS)
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))


def token_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits at all tokens but padding, where they mean nothing: (tokens, vocabulary)."""
    with torch.no_grad():
        logits: Tensor = model.eval()(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
    return logits.float().cpu()[inputs["attention_mask"].bool()]


def take_probe(model: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The examples as inputs of a model, and the `logits` that this one has for them."""
    inputs = collate(examples)
    del inputs["labels"]
    return {**inputs, "logits": token_logits(model, inputs)}


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """The `largest` difference of two sets of logits, and `relative` to the largest expected logit."""
    largest = (found - expected).abs().max().item()
    return {"largest": largest, "relative": largest / expected.abs().max().item()}
