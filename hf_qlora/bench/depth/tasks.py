"""What is learned: a chat model's answers, and a classifier's headlines. Real weights, real data, fixed splits."""

from __future__ import annotations

import copy
import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_qlora import assets
from hf_qlora.demo.examples import Example, collate, encode
from hf_qlora.demo.models import perplexity


SPLIT_SEED = 20231


class Task(ABC):
    """A base model with its data, split once and for all.

    Attributes:
        metric: its name; `better` is 1 if more of it is better, −1 if less.
        rates: the learning rates that are tried.
        device: of the models and batches.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    name: ClassVar[str]
    metric: ClassVar[str]
    better: ClassVar[int]
    batch_size: ClassVar[int]
    steps: ClassVar[int]
    rates: ClassVar[tuple[float, ...]]
    shared: ClassVar[dict[str, Any]]  # settings of the config

    @abstractmethod
    def base(self) -> nn.Module:
        """A fresh copy of the base model."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> list[dict[str, Tensor]]:
        """Training batches in the order of the seed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> float:
        """The metric on the split "validation" or "test"."""


class Headlines(Task):
    """Sarcastic or not, with MiniLM (BERT, 6 layers) and a new head; the accuracy on 2,000 headlines."""

    name, metric, better, batch_size, steps = "headlines", "accuracy", 1, 32, 100
    rates = (1e-3, 1.7e-3, 3e-3, 5e-3)
    shared: ClassVar[dict[str, Any]] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["query", "key", "value", "dense"],
        "exclude_modules": ["pooler.dense"],
        "task_type": "SEQ_CLS",
        "quantization": None,
    }

    @functools.cached_property
    def _model(self) -> nn.Module:
        torch.manual_seed(SPLIT_SEED)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(assets.minilm_l6(), num_labels=2)
        return model

    @functools.cached_property
    def _splits(self) -> dict[str, list[Any]]:
        rows = assets.sarcasm_headlines()
        random.Random(SPLIT_SEED).shuffle(rows)
        return {"test": rows[:2000], "validation": rows[2000:3000], "train": rows[3000:]}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(assets.minilm_l6())

    def base(self) -> nn.Module:
        return copy.deepcopy(self._model).to(self.device)

    def batches(self, seed: int, steps: int) -> list[dict[str, Tensor]]:
        chosen = random.Random(seed).sample(self._splits["train"], steps * self.batch_size)
        return [self._batch(chosen[i : i + self.batch_size]) for i in range(0, len(chosen), self.batch_size)]

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> float:
        rows = sorted(self._splits[split][:limit], key=lambda row: len(row["text"]))
        right = 0
        with torch.no_grad():
            for i in range(0, len(rows), 100):
                batch = self._batch(rows[i : i + 100])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(rows)

    def _batch(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        tokens = self._tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=64)
        values = {**tokens, "labels": [row["label"] for row in rows]}
        return {name: torch.tensor(numbers, device=self.device) for name, numbers in values.items()}


class Answers(Task):
    """The answers of 49 small tasks, with SmolLM2 (Llama, 30 layers) in bfloat16; the perplexity of held-out ones."""

    name, metric, better, batch_size, steps = "answers", "perplexity", -1, 8, 24
    rates = (1e-3, 3e-3, 1e-2)
    shared: ClassVar[dict[str, Any]] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "quantization": None,
    }
    largest: ClassVar[str] = "diabetes.dev.v0"  # 94 % of all rows
    max_length: ClassVar[int] = 160

    @functools.cached_property
    def _model(self) -> nn.Module:
        folder = assets.smollm2_135m_instruct()
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model

    @functools.cached_property
    def _splits(self) -> dict[str, list[Example]]:
        test = self._encoded([p for p in assets.instruction_pairs(split="test") if p["task"] != self.largest])
        train = self._encoded([p for p in assets.instruction_pairs() if p["task"] != self.largest])
        return {"test": test[:96], "validation": train[:48], "train": train[48:]}

    def _encoded(self, pairs: list[Any]) -> list[Example]:
        tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_135m_instruct())
        random.Random(SPLIT_SEED).shuffle(pairs)
        chats = [
            [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["answer"]}]
            for pair in pairs
        ]
        examples = (encode(tokenizer, chat) for chat in chats)
        return [example for example in examples if len(example.ids) <= self.max_length]

    def base(self) -> nn.Module:
        return copy.deepcopy(self._model).to(self.device)

    def batches(self, seed: int, steps: int) -> list[dict[str, Tensor]]:
        chosen = random.Random(seed).sample(self._splits["train"], steps * self.batch_size)
        return [self._batch(chosen[i : i + self.batch_size]) for i in range(0, len(chosen), self.batch_size)]

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> float:
        return perplexity(model, self._splits[split][:limit])

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in collate(examples).items()}


TASKS: dict[str, type[Task]] = {task.name: task for task in (Headlines, Answers)}
