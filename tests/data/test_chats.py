"""Rows in every layout that is understood, as chats; and what is said of the others."""

from __future__ import annotations

import math

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
        {"messages": None, "conversations": CHAT},
        {"messages": [], "conversations": CHAT},
        {"messages": "", "prompt": "one?", "completion": "two."},
        {"messages": math.nan, "prompt": "one?", "completion": "two."},
        {"instruction": "one?", "input": math.nan, "output": "two."},
        {"prompt": "another", "instruction": "one?", "output": "two."},
        {"messages": None, "conversations": None, "prompt": "one?", "completion": "two."},
        {"prompt": None, "completion": None, "instruction": "one?", "output": "two."},
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


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"from": "gpt", "value": 3}] * 2, r"Message 1 .* texts: \{'role': 'assistant', 'content': 3\}"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}], "Message 2 of a row's chat has not 'role'"),
        ([{"role": None, "content": "one?"}, CHAT[1]], "Message 1 of a row's chat has not 'role'"),
        ([None, CHAT[1]], "Message 1 .* as texts: None"),
        (3, "is no chat, a list of 'role' and 'content', .* but 3"),
        ({"role": "user"}, "is no chat, a list of 'role' and 'content'"),
    ],
)
def test_what_is_no_chat_is_refused(messages: object, said: str, answered: bool) -> None:
    with pytest.raises(DataError, match=said):
        as_messages({"messages": messages}, answered=answered)


def test_texts_in_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "?"}]
    assert as_messages({"messages": [{"role": "user", "content": parts}, CHAT[1]]}) == CHAT


@pytest.mark.parametrize("call", [{"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "assistant"}])
def test_calls_of_tools_are_no_answers_to_train_on_and_nothing_to_read(call: dict) -> None:
    with pytest.raises(DataError, match="Message 2 of a row's chat has not 'role' and 'content'"):
        as_messages({"messages": [CHAT[0], call]})
    assert as_messages({"messages": [CHAT[0], call]}, answered=False)[1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("answered", [True, False])
def test_a_chat_in_a_cell_of_csv_is_told_from_one(answered: bool) -> None:
    with pytest.raises(DataError, match=r"a text and no list of messages: \[\{'role.* Write chats into a \.jsonl"):
        as_messages({"messages": str(CHAT)}, answered=answered)


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": []}, []),
        ({"messages": None}, []),
        ({"messages": CHAT[:1]}, CHAT[:1]),
        ({"messages": CHAT[1:]}, CHAT[1:]),
        ({"messages": [*CHAT, CHAT[0]]}, [*CHAT, CHAT[0]]),
        ({"prompt": "one?", "completion": None}, CHAT[:1]),
        ({"prompt": "one?", "completion": math.nan}, CHAT[:1]),
        ({"prompt": None, "completion": None}, []),
        ({"instruction": "one?", "input": None, "output": None}, CHAT[:1]),
        ({"instruction": None, "input": None, "output": None}, []),
        ({"messages": None, "prompt": None, "completion": "two."}, CHAT[1:]),
    ],
)
def test_a_chat_without_an_answer_is_one_where_it_need_not_end_so(row: dict, chat: object) -> None:
    assert as_messages(row, answered=False) == chat
    with pytest.raises(DataError, match="has no question with the assistant's answer at its end"):
        as_messages(row)
