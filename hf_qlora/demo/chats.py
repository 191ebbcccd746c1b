"""Rows of a data set, or of the default task, as chats: lists of messages whose last one is the answer."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_qlora import assets
from hf_qlora.demo.errors import DemoError, explained, first_line, offline
from hf_qlora.demo.report import short


# Sentences of contracts that name somebody. The task's own instruction, 131 tokens long, asks for a chain of thought
# that its answers do not have.
TASK = "ner_finance.dev.v0"
QUESTION = "List the persons, organizations and locations in this sentence, in order, as [NAME - TYPE, ...]."
UNDERSTOOD = "messages; prompt and completion; or instruction and output"
MAX_ROWS = 20_000

Messages = list[dict[str, str]]


def read_chats(dataset: str | None, seed: int) -> list[Messages]:
    """The chats of a data set, or of the default task, in an order set by the seed."""
    if dataset is not None:
        chats = [as_messages(row) for row in read_rows(dataset, seed)]
    else:
        with explained(OSError, ValueError):
            pairs = assets.instruction_pairs([TASK]) + assets.instruction_pairs([TASK], split="test")
        chats = [_exchange(f"{QUESTION}\n\n{p['prompt']}", p["answer"]) for p in pairs if p["answer"].startswith("[")]
    random.Random(seed).shuffle(chats)
    return chats


def read_rows(dataset: str, seed: int) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl file, of a folder's .jsonl files, or of what `datasets.load_dataset` finds.

    Raises:
        DemoError: nothing of that name, or not readable.
    """
    path = Path(dataset)
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if files:
        return [row for file in files for row in _json_lines(file)]
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DemoError(
            f"{dataset!r} is neither a .jsonl file nor a folder with one. For data sets of the Hub and other files: "
            "pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, split="train")
    except (OSError, ValueError) as error:
        raise DemoError(f"Cannot load the data set {dataset!r}: {first_line(error)}{offline()}") from error
    return list(rows.shuffle(seed=seed).select(range(min(len(rows), MAX_ROWS))))


def _json_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DemoError(f"{file}, line {number} is not JSON: {error.msg}.") from error
            if not isinstance(row, dict):
                raise DemoError(f"{file}, line {number} is no JSON object, but {short(line)}")
            yield row


def as_messages(row: Mapping[str, Any]) -> Messages:
    """A row as a chat that ends with the assistant's answer.

    Raises:
        DemoError: columns that are not understood, or no such chat in them.
    """
    if "messages" in row:
        messages = row["messages"]
    elif {"prompt", "completion"} <= row.keys():
        messages = _exchange(row["prompt"], row["completion"])
    elif {"instruction", "output"} <= row.keys():
        question = [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        messages = _exchange("\n\n".join(question), row["output"])
    else:
        raise DemoError(f"The data set has the columns {', '.join(row) or 'none'}; understood are {UNDERSTOOD}.")
    if not _is_chat(messages):
        raise DemoError(
            f"A row is no chat of 'role' and 'content' that ends with the assistant's answer: {short(str(messages))}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _exchange(question: Any, answer: Any) -> Messages:
    """Two texts, or two lists of messages, as one chat."""
    said = (("user", question), ("assistant", answer))
    return [m for role, text in said for m in (text if isinstance(text, list) else [{"role": role, "content": text}])]


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in messages)
        and messages[-1]["role"] == "assistant"
    )
