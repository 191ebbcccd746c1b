"""The real weights and data: what a user gets, by counts and known rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_qlora import assets


def test_minilm_puts_a_paraphrase_nearest(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm)
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    paraphrase, other = (vectors[0] @ vectors[1:].T).tolist()
    assert paraphrase > other + 0.3


def test_instruction_pairs_are_held_out() -> None:
    train = assets.instruction_pairs()
    test = assets.instruction_pairs(split="test")
    assert (len(train), len(test)) == (305_225 - 123, 500)  # 123 training rows have a test row's prompt
    assert len({pair["task"] for pair in train}) == len({pair["task"] for pair in test}) == 50
    assert not {(pair["task"], pair["prompt"]) for pair in train} & {(pair["task"], pair["prompt"]) for pair in test}
    assert all(isinstance(pair[key], str) for pair in train for key in ("task", "instruction", "prompt", "answer"))


def test_instruction_pairs_of_one_task() -> None:
    pairs = assets.instruction_pairs(["syllables.dev.v1"])
    assert len(pairs) == 1542
    assert pairs[0] == {
        "task": "syllables.dev.v1",
        "instruction": "Please state the number of syllables in the input word. Reply only with a number and nothing "
        "else.",
        "prompt": "appropriated",
        "answer": "5",
    }
    with pytest.raises(ValueError, match=r"no task is called syllables; choose from .*syllables\.dev\.v1"):
        assets.instruction_pairs(["syllables"])
    with pytest.raises(ValueError, match="split='validation' is not known; choose 'train' or 'test'"):
        assets.instruction_pairs(split="validation")  # type: ignore[arg-type]


def test_sarcasm_headlines() -> None:
    rows = assets.sarcasm_headlines()
    assert len(rows) == len({row["text"] for row in rows}) == 28_498
    assert sum(row["label"] for row in rows) / len(rows) == pytest.approx(0.476, abs=1e-3)
    assert rows[0] == {"text": "thirtysomething scientists unveil doomsday clock of hair loss", "label": 1}
