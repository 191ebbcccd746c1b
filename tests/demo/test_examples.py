"""Chats as token ids, against the tokenizer's own rendering; and the choice of examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_qlora.data.chats import as_messages
from hf_qlora.demo import DemoError, Settings
from hf_qlora.demo.chats import read_chats
from hf_qlora.demo.examples import NO_LABEL, Example, choose, collate, encode, typical


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]


def test_only_the_answer_and_its_end_have_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(tokenizer, CHAT)
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    longer = encode(
        tokenizer, [*CHAT, {"role": "user", "content": "three?"}, {"role": "assistant", "content": "four."}]
    )
    batch = collate([example, longer])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(longer.ids))
    for row, answer in enumerate(["two.<|end|>", "four.<|end|>"]):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != NO_LABEL]) == answer
        assert torch.equal(batch["input_ids"][row][labels != NO_LABEL], labels[labels != NO_LABEL])
    assert batch["attention_mask"].sum(1).tolist() == [len(example.ids), len(longer.ids)]


def test_a_template_that_opens_the_answer_otherwise_keeps_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    opened = tokenizer.chat_template.replace("assistant: {% endif %}", "assistant: <think>{% endif %}")
    tokenizer.chat_template = opened
    example = encode(tokenizer, CHAT)
    assert tokenizer.decode(example.ids) == "user: one?<|end|>assistant: <think>two.<|end|>"


def test_a_template_that_refuses_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DemoError, match=r"cannot render .*one.*: System role not supported\. Leave such"):
        encode(tokenizer, CHAT)


def test_no_question_is_in_both_parts_or_too_long(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
    long = as_messages({"prompt": "x" * settings.max_length, "completion": "y"})
    chats = [long, *read_chats(settings.dataset, 0), *read_chats(settings.dataset, 1)]
    train, held_out = choose(chats, tokenizer, settings)
    questions = [example.question for example in (*train, *held_out)]
    assert (len(train), len(held_out)) == (32, 8)
    assert len(set(questions)) == 40
    assert long[0]["content"] not in questions


def test_too_few_examples_is_an_error_with_the_numbers(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
    chats = read_chats(settings.dataset, 0)
    few, needed = replace(settings, held_out=39), "and 39 to hold out and 4 to train on are needed."
    with pytest.raises(
        DemoError, match=rf"0 of them longer than 128 tokens; 40 with .* are left, {needed} Give more chats, with"
    ):
        choose(chats, tokenizer, few)
    long = [as_messages({"prompt": f"{n}" * settings.max_length, "completion": "y"}) for n in range(3)]
    for count, advice in ((1, "Give more"), (3, "Raise --max-length")):
        with pytest.raises(DemoError, match=rf"{count} of them longer .*; 40 with .* are left, {needed} {advice}"):
            choose([*long[:count], *chats], tokenizer, few)
    with pytest.raises(DemoError, match=r"has 0 chats, .* Give more chats, with other questions, or lower --held-out"):
        choose([], tokenizer, few)


def test_the_shown_answer_is_of_median_length() -> None:
    lengths = [(9, 1), (3, 99), (4, 50), (1, 2), (7, 3)]  # of the answer, and of what is before it
    examples = [Example(str(length), "", [0] * (start + length), start) for length, start in lengths]
    assert typical(examples).question == "4"
