"""What is measured of a model, against independent computations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_qlora.demo import DemoError, Settings
from hf_qlora.demo.chats import read_chats
from hf_qlora.demo.examples import encode
from hf_qlora.demo.models import load_chat_model, load_dense_model, perplexity
from hf_qlora.kernels import emulated


def test_perplexity_is_that_of_every_answer_token_alone(
    settings: Settings, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Oracle: one example at a time, without padding, float64 log-probabilities summed token by token."""
    examples = [encode(tokenizer, chat) for chat in read_chats(settings.dataset, 0)[:11]]
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    nats = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0].double()
        for position in range(example.start, len(example.ids)):
            nats.append(-logits[position - 1].log_softmax(-1)[example.ids[position]].item())
    expected = math.exp(sum(nats) / len(nats))
    for batch_size in (1, 4, 16):
        # The models' cross entropy is in float32, over batches of unlike lengths.
        assert perplexity(model, examples, batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_chat_template_is_refused(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    LlamaForCausalLM.from_pretrained(settings.model).save_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DemoError, match="has no chat template; choose a model made for chat"):
        load_chat_model(str(tmp_path))


@pytest.mark.parametrize(("loops", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_dtype_is_one_that_the_processor_multiplies_in(
    loops: bool, dtype: torch.dtype, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated, "_has_loops", lambda _: loops)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_dense_model(settings.model).dtype == dtype
