"""The chats of a data set, or of the default task."""

from __future__ import annotations

import random
from typing import Any

from hf_qlora import assets
from hf_qlora.data.chats import Messages, as_messages, exchange
from hf_qlora.data.errors import DataError, placed
from hf_qlora.data.labelled import placed_rows_in
from hf_qlora.demo.errors import explained


# Sentences of contracts that name somebody. The task's own instruction, 131 tokens long, asks for a chain of thought
# that its answers do not have.
TASK = "ner_finance.dev.v0"
QUESTION = "List the persons, organizations and locations in this sentence, in order, as [NAME - TYPE, ...]."


def read_chats(dataset: str | None, seed: int) -> list[Messages]:
    """The chats of a data set, or of the default task, in an order set by the seed."""
    if dataset is not None:
        with explained(DataError):
            chats = [_chat(place, row) for place, row in placed_rows_in(dataset, seed)]
    else:
        with explained(OSError, ValueError):
            pairs = assets.instruction_pairs([TASK]) + assets.instruction_pairs([TASK], split="test")
        chats = [exchange(f"{QUESTION}\n\n{p['prompt']}", p["answer"]) for p in pairs if p["answer"].startswith("[")]
    random.Random(seed).shuffle(chats)
    return chats


def _chat(place: str, row: Any) -> Messages:
    with placed(place):
        return as_messages(row)
