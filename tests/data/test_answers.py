"""Chats as tokens, and what a model makes of them: labels, likelihoods of each answer, answers in order."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import llama
from byte_tokenizer import byte_tokenizer

from hf_qlora.data.answers import collate, encode, generate, log_likelihoods, perplexity, tokens_of


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_only_the_answer_and_its_end_have_labels() -> None:
    tokenizer = byte_tokenizer(chat=True)
    row = encode(tokenizer, chat("1 + 1 =", "two"))
    labelled = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert tokenizer.decode(labelled) == "two<|end|>"
    assert tokenizer.decode(row["input_ids"][: row["start"]]) == "user: 1 + 1 =<|end|>assistant: "
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_padding_has_no_labels() -> None:
    tokenizer = byte_tokenizer(chat=True)
    batch = collate([encode(tokenizer, chat("?", answer)) for answer in ("a", "abcdef")])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] >= 0).sum(1).tolist() == [2, 7]  # and the end of each


def test_likelihoods_and_perplexity_are_those_of_each_token() -> None:
    """Against sums of log-probabilities, one row at a time in float64."""
    model, tokenizer = llama(vocab_size=257), byte_tokenizer(chat=True)
    rows = [encode(tokenizer, chat("?" * n, "ab" * n)) for n in (1, 5, 3)]
    sums = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logs = model(ids).logits[0].double().log_softmax(-1)
        sums.append(sum(logs[place - 1, ids[0, place]].item() for place in range(row["start"], ids.shape[1])))
    found = log_likelihoods(model, rows, batch_size=2)
    # float32 in batches that are padded: sums in another order
    assert found == pytest.approx(sums, rel=1e-5)
    assert list(map(tokens_of, rows)) == [3, 11, 7]  # and the end of each
    assert perplexity(found, rows) == pytest.approx(math.exp(-sum(sums) / 21), rel=1e-5)


def test_answers_come_in_the_order_of_the_rows() -> None:
    """Batched with padding on the left, each is the one that it is alone."""
    torch.manual_seed(0)
    model, tokenizer = llama(vocab_size=257), byte_tokenizer(chat=True)
    rows = [encode(tokenizer, chat("x" * n, "abcdefgh")) for n in (9, 2, 30, 5)]
    together = generate(model, tokenizer, rows, batch_size=3)
    assert together == [generate(model, tokenizer, [row])[0] for row in rows]
    assert len(set(together)) > 1
