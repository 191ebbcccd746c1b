"""Chats as token ids. Only the answers have labels; a batch is padded to its longest example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_qlora.data.chats import Messages, render
from hf_qlora.data.errors import DataError
from hf_qlora.demo.chats import TASK
from hf_qlora.demo.errors import DemoError, explained
from hf_qlora.demo.settings import Settings


NO_LABEL = -100  # left out by the models' cross entropy


@dataclass(frozen=True)
class Example:
    """A chat as token ids; those from `start` on are the answer and the end of its turn."""

    question: str
    answer: str
    ids: list[int]
    start: int


def choose(
    chats: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> tuple[list[Example], list[Example]]:
    """To train on, and held out: the first that are not too long, no question twice, as many as will be used."""
    examples: dict[str, Example] = {}
    too_long = 0
    wanted = settings.held_out + settings.steps * settings.batch_size
    for messages in chats:
        example = encode(tokenizer, messages)
        if len(example.ids) <= settings.max_length:
            examples.setdefault(example.question, example)
        else:
            too_long += 1
        if len(examples) == wanted:
            break
    needed = settings.held_out + settings.batch_size
    if len(examples) < needed:
        enough = len(examples) + too_long >= needed
        way_out = "Raise --max-length" if enough else "Give more chats, with other questions"
        raise DemoError(
            f"{settings.dataset or TASK} has {len(chats)} chats, {too_long} of them longer than {settings.max_length} "
            f"tokens; {len(examples)} with distinct questions are left, and {settings.held_out} to hold out and "
            f"{settings.batch_size} to train on are needed. {way_out}, or lower --held-out or --batch-size."
        )
    found = list(examples.values())
    return found[settings.held_out :], found[: settings.held_out]


def typical(examples: Sequence[Example]) -> Example:
    """The example whose answer is shown: the one of median length."""
    return sorted(examples, key=lambda example: len(example.ids) - example.start)[len(examples) // 2]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Example:
    """Render a chat with the tokenizer's template; question and answer are tokenized apart, as in generation."""
    with explained(DataError):
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
        whole = render(tokenizer, messages)
    said = messages[-1]["content"]
    # Templates that open the answer otherwise when it is still to come (with a thought) are no prefix of the whole.
    end = whole.removeprefix(prompt) if whole.startswith(prompt) else said + (tokenizer.eos_token or "")
    start: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Example(
        messages[-2]["content"], said, start + tokenizer(end, add_special_tokens=False)["input_ids"], len(start)
    )


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch padded to its longest example, (examples, tokens); labels on the answers only."""
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [tokens.clone() for tokens in ids]
    for example, row in zip(examples, labels, strict=True):
        row[: example.start] = NO_LABEL
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
    }
