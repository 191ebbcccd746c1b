"""Chats as tokens with labels on the answer only, and what a model makes of them: likelihoods, and answers of its own.

    row = encode(tokenizer, chat)      {"input_ids": prompt + answer + its end, "labels": −100 … + answer + its end, …}
    collate([row, …])                  a batch for training, padded on the right
    log_likelihoods(model, rows)       of each answer; `perplexity` of all of their tokens
    generate(model, tokenizer, rows)   an answer to each prompt, padded on the left

Prompt and answer are tokenized apart, as they are when an answer is generated: no token reaches over the border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from hf_qlora.data.chats import Messages, render


NO_LABEL = -100  # left out by the models' cross entropy

Row = dict[str, Any]  # input_ids, labels, start (of the answer), answer


def encode(tokenizer: Any, chat: Messages) -> Row:
    """A chat as tokens; labels on the answer and the token that ends it."""
    prompt = render(tokenizer, chat[:-1], add_generation_prompt=True)
    whole = render(tokenizer, chat).rstrip()
    if not whole.startswith(prompt):  # templates that open an answer otherwise when it is still to come
        whole = prompt + chat[-1]["content"] + tokenizer.eos_token
    # Apart, as in generation: tokens do not reach over the beginning of the answer.
    start, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :]))
    labels = [NO_LABEL] * len(start) + end
    return {"input_ids": start + end, "labels": labels, "start": len(start), "answer": chat[-1]["content"]}


def tokens_of(row: Row) -> int:
    """Of the answer, with the one that ends it."""
    return len(row["input_ids"]) - int(row["start"])


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row: (rows, tokens)."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
    }


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[Row], batch_size: int = 16) -> list[float]:
    """Of each answer with its end: the sum of its tokens' log-probabilities, in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    sums: dict[int, float] = {}
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in chosen]).items()}
        labels = batch.pop("labels")[:, 1:]
        of_answer = labels != NO_LABEL  # (rows, tokens − 1)
        logits = model(**batch).logits[:, :-1][of_answer].float()  # (tokens of answers, vocabulary)
        own = -cross_entropy(logits, labels[of_answer], reduction="none")
        parts = own.split(of_answer.sum(1).tolist())
        sums |= {i: part.sum().item() for i, part in zip(chosen, parts, strict=True)}
    return [sums[i] for i in range(len(rows))]


def perplexity(logs: Sequence[float], rows: list[Row]) -> float:
    """exp of the mean negative log-likelihood of the answers' tokens."""
    return math.exp(-sum(logs) / sum(map(tokens_of, rows)))


def generate(model: Any, tokenizer: Any, rows: list[Row], batch_size: int = 64, **how: Any) -> list[str]:
    """The answers, greedy by default, in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["start"])
    longest = max(map(tokens_of, rows))
    answers: dict[int, str] = {}
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        prompts = {"input_ids": [rows[i]["input_ids"][: rows[i]["start"]] for i in chosen]}
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**batch, **{"max_new_tokens": longest, "do_sample": False, **how})
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(chosen, texts, strict=True))
    return [answers[i] for i in range(len(rows))]
