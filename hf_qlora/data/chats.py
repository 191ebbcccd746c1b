"""Rows of a data set as chats: lists of messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from hf_qlora.data.errors import DataError, first_line, short


UNDERSTOOD = "messages or conversations; prompt and completion; or instruction and output"
LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's "from"

Messages = list[dict[str, str]]


def as_messages(row: Any, understood: str = UNDERSTOOD, answered: bool = True) -> Messages:
    """A row as a chat, by the first of its layouts that something is said in.

    Args:
        understood: the columns that the caller reads, for the message.
        answered: whether it must have an exchange at least and end with the assistant's answer; else it may also be
            empty, and a message that has no text but, say, calls of tools is one of nothing.

    Raises:
        DataError: columns that are not understood, or no such chat in them.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"A row must be an object with columns ({understood}), and is {short(repr(row))}")
    if not has_chat(row):
        raise DataError(f"A row has the columns {', '.join(map(str, row)) or 'none'}; understood are {understood}.")
    messages = _messages(row)
    if isinstance(messages, str):
        raise DataError(
            f"A row's chat is a text and no list of messages: {short(messages)} Write chats into a .jsonl or .parquet "
            "file; CSV has texts alone."
        )
    if not isinstance(messages, list):
        raise DataError(
            f"A row is no chat, a list of 'role' and 'content', or 'from' and 'value', but {short(repr(messages))}"
        )
    messages = [_said(message, answered) for message in messages]
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            raise DataError(
                f"Message {number} of a row's chat has not 'role' and 'content', or 'from' and 'value', as texts: "
                f"{short(repr(message))}"
            )
    if answered and (len(messages) < 2 or messages[-1]["role"] != "assistant"):
        raise DataError(f"A row's chat has no question with the assistant's answer at its end: {short(str(messages))}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def has_chat(row: Mapping[Any, Any]) -> bool:
    """Whether a row has the columns of a chat, whatever is in them."""
    return any(row.keys() >= set(columns) for columns in LAYOUTS)


def _messages(row: Mapping[Any, Any]) -> Any:
    """What is said in the first layout that has something; nothing where none has."""
    for columns in LAYOUTS:
        if row.keys() >= set(columns) and not all(is_nothing(row[name]) for name in columns):
            if len(columns) == 1:
                return row[columns[0]]
            question, answer = (None if _is_missing(row[name]) else row[name] for name in columns)
            if columns[0] == "instruction":
                parts = [row.get(name) for name in ("instruction", "input")]
                question = "\n\n".join(str(part) for part in parts if not is_nothing(part)) or None
            return exchange(question, answer)
    return []


def exchange(question: Any, answer: Any) -> Messages:
    """Two texts, or two lists of messages, as one chat; None is nothing said."""
    said = [(role, text) for role, text in (("user", question), ("assistant", answer)) if text is not None]
    return [m for role, text in said for m in (text if isinstance(text, list) else [{"role": role, "content": text}])]


def render(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """A chat as one text, by the tokenizer's template.

    Raises:
        DataError: there is none, or it refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "There are chats, and the model's tokenizer has no chat template to render them by. Give texts, or choose "
            "a model made for chat."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        raise DataError(
            f"The model's chat template cannot render {short(str(messages))}: {first_line(error).rstrip('.')}. Leave "
            "such chats out, or choose a model made for chat."
        ) from error


def is_nothing(value: Any) -> bool:
    """Whether a cell says nothing: null, NaN (as pandas has it), or an empty text or list."""
    return _is_missing(value) or (isinstance(value, str | list | tuple) and not value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _said(message: Any, answered: bool) -> Any:
    """A message with a role and content as a text, of ShareGPT's and of texts in parts too; others as they are."""
    if not isinstance(message, Mapping):
        return message
    if {"from", "value"} <= message.keys():
        message = {"role": ROLES.get(str(message["from"]), message["from"]), "content": message["value"]}
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return {**message, "content": "".join(str(part.get("text", "")) for part in content)}
    return {**message, "content": ""} if content is None and not answered else message


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))
