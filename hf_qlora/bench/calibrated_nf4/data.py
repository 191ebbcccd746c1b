"""Text of two domains, in rows: chats about some fifty small tasks, and news headlines.

Chats are what the adapters learn. Rows to train on, to calibrate on and to test on are of other chats, those to test
on of the data's own test split. The data has some training chats twice, prompt and answer: of the some 135 chats in 64
rows to calibrate on (and 8 held out), 0 or 1 is trained on too, of the 500 in 256 rows 2 to 4; none that is tested on
is. Headlines are the other domain: nothing is trained on them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_qlora import assets
from hf_qlora.quant.calibrate.rows import CalibrationRows


LENGTH = 256
TRAINING_ROWS, TEST_ROWS, HELD_OUT = 320, 40, 8
MOST_ROWS = 256  # to calibrate on
LARGEST_TASK = "diabetes.dev.v0"  # 94 % of all rows
LONGEST_ANSWER = 12  # tokens, of those that are to be matched
SEED = 7


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.smollm2_135m_instruct(), padding_side="left")


def training_rows() -> Tensor:
    """(rows, length), of other chats than those to calibrate on, but for the few that the data has twice."""
    return _cut(_chats("train")[: len(_chats("train")) // 2], TRAINING_ROWS)


def test_rows(domain: str) -> Tensor:
    """(rows, length)."""
    texts = _chats("test") if domain == "chats" else _headlines()[:2000]
    return _cut(texts, TEST_ROWS)


def calibration_rows(domain: str, rows: int, seed: int = 0) -> CalibrationRows:
    """Of other chats than those trained on (but see above) and tested on, or of other headlines than those tested on.

    Args:
        seed: of their choice.
    """
    texts = chats_to_calibrate_on() if domain == "chats" else _headlines()[2000:]
    texts = random.Random(seed).sample(texts, len(texts))
    ids = _cut(texts, rows + HELD_OUT)
    return CalibrationRows({"input_ids": ids}, HELD_OUT, f"{rows} rows of {LENGTH} tokens, {domain}")


def chats_to_calibrate_on() -> list[Any]:
    return _chats("train")[len(_chats("train")) // 2 :]


def questions(count: int) -> list[tuple[str, str]]:
    """Prompts, as text, and the short answers that are expected."""
    found = []
    for pair in _pairs("test"):
        if len(tokenizer()(pair["answer"], add_special_tokens=False)["input_ids"]) <= LONGEST_ANSWER:
            turn = [{"role": "user", "content": pair["prompt"]}]
            prompt = tokenizer().apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            found.append((prompt, pair["answer"]))
        if len(found) == count:
            break
    return found


@functools.cache
def _pairs(split: Any) -> list[Any]:
    pairs = [pair for pair in assets.instruction_pairs(split=split) if pair["task"] != LARGEST_TASK]
    random.Random(SEED).shuffle(pairs)
    return pairs


@functools.cache
def _chats(split: str) -> list[Any]:
    return [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["answer"]}]
        for pair in _pairs(split)
    ]


@functools.cache
def _headlines() -> list[str]:
    texts = [headline["text"] for headline in assets.sarcasm_headlines()]
    random.Random(SEED).shuffle(texts)
    return texts


def _cut(texts: Iterable[Any], rows: int) -> Tensor:
    """Texts one behind another, cut into rows."""
    ids: list[int] = []
    for tokens in _tokens(texts):
        ids += tokens
        if len(ids) >= rows * LENGTH:
            return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)
    raise ValueError(f"the texts have {len(ids) // LENGTH} rows of {LENGTH} tokens; {rows} are needed.")


def _tokens(texts: Iterable[Any]) -> Iterator[list[int]]:
    for text in texts:
        plain = f"{text}\n" if isinstance(text, str) else tokenizer().apply_chat_template(text, tokenize=False)
        yield tokenizer()(plain, add_special_tokens=False)["input_ids"]
