"""Rows in every layout that is understood, as chats; and what is said of the others."""

from __future__ import annotations

import pytest

from hf_qlora.data.chats import as_messages
from hf_qlora.data.errors import DataError


CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "id": 3},
        {"prompt": "one?", "completion": "two."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two."}]},
        {"conversations": CHAT},
        {"instruction": "one?", "output": "two."},
        {"instruction": "one?", "input": "", "output": "two."},
    ],
)
def test_all_layouts_mean_the_same_chat(row: dict) -> None:
    assert as_messages(row) == CHAT


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert as_messages(row)[0]["content"] == "Add.\n\n1 + 1"


def test_unknown_columns_are_named_with_those_understood() -> None:
    message = "^A row has the columns text, label; understood are messages or conversations; prompt and completion; or"
    with pytest.raises(DataError, match=message):
        as_messages({"text": "a", "label": 1})


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"from": "gpt", "value": 3}] * 2,
        CHAT[:1],
        CHAT[1:],
        "one?",
        [{"role": "user"}, CHAT[1]],
        [None, CHAT[1]],
        None,
    ],
)
def test_what_is_no_chat_is_refused(messages: object) -> None:
    with pytest.raises(DataError, match="ends with the assistant's answer"):
        as_messages({"messages": messages})
