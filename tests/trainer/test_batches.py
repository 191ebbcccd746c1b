"""Examples with nothing in them, or nothing to learn: the loss stays finite, and it is said."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama
from peft import LoraConfig, get_peft_model
from runs import adapters, base, qlora
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_qlora import QLoRAConfig


FULL = list(range(1, 9))
LEARNS = {"input_ids": FULL, "labels": FULL}
MASKED = {"input_ids": FULL, "labels": [-100] * 8}
EMPTY: dict[str, list[int]] = {"input_ids": [], "labels": []}
ONE = {"input_ids": [3], "labels": [3]}  # its only label is in the first position, which predicts nothing
PROMPT = {"input_ids": FULL, "labels": [5] + [-100] * 7}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(values: list[list[int]], pad: int) -> Tensor:
        filled = [row + [pad] * (longest - len(row)) for row in values]
        return torch.tensor(filled, dtype=torch.long).reshape(len(values), longest)

    return {
        "input_ids": padded([example["input_ids"] for example in examples], 0),
        "labels": padded([example["labels"] for example in examples], -100),
        "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
    }


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))


def run(model: Any, folder: Path, examples: list[dict[str, list[int]]], **options: Any) -> tuple[Trainer, Gradients]:
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    seen = Gradients()
    made = Trainer(
        model, arguments, train_dataset=examples, eval_dataset=examples, data_collator=collate, callbacks=[seen]
    )
    made.train()
    return made, seen


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("nothing", [MASKED, ONE, PROMPT], ids=["masked", "one-token", "prompt-only"])
def test_a_batch_without_labels_has_a_loss_of_zero_and_a_warning(
    tmp_path: Path, nothing: dict[str, list[int]], chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = qlora(chunked_loss=chunked)
    before = adapters(model)
    with caplog.at_level(logging.WARNING, "hf_qlora"):
        made, seen = run(model, tmp_path, [nothing] * 2)
    assert losses(made) == [0.0, 0.0]
    assert seen.norms == [0.0, 0.0]
    assert made.evaluate()["eval_loss"] == 0.0
    assert caplog.text.count("No label is left to learn from") == 1
    assert all(torch.equal(p, before[name]) for name, p in adapters(model).items())


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("nothing", [MASKED, EMPTY], ids=["masked", "empty"])
def test_an_example_without_labels_changes_nothing_for_the_others(
    tmp_path: Path, nothing: dict[str, list[int]], chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    alone, seen_alone = run(qlora(chunked_loss=chunked, lora_dropout=0.0), tmp_path, [LEARNS, LEARNS])
    made, seen = run(qlora(chunked_loss=chunked, lora_dropout=0.0), tmp_path, [LEARNS, nothing])
    # the same mean over labels; sums over one row and over two, in fp32
    assert losses(made) == pytest.approx(losses(alone), rel=1e-5)
    assert seen.norms == pytest.approx(seen_alone.norms, rel=1e-4)
    assert "No label" not in caplog.text


def test_a_masked_batch_among_accumulated_ones_counts_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = qlora(lora_dropout=0.0)
    examples = [LEARNS, LEARNS, MASKED, MASKED]
    made, seen = run(model, tmp_path, examples, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    alone, seen_alone = run(qlora(lora_dropout=0.0), tmp_path, [LEARNS, LEARNS])
    assert losses(made) == pytest.approx(losses(alone), rel=1e-5)
    assert seen.norms == pytest.approx(seen_alone.norms, rel=1e-4)
    assert "No label" not in caplog.text


def test_a_batch_of_empty_examples_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_ids of shape \(2, 0\).*dataset\.filter"):
        run(qlora(), tmp_path, [EMPTY, EMPTY])


def test_a_stock_adapter_is_left_to_trainer(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made, _ = run(get_peft_model(base(), config), tmp_path, [MASKED] * 2)
    assert all(math.isnan(loss) for loss in losses(made))


def test_a_transformers_model_with_an_adapter_of_ours_is_helped_too(tmp_path: Path) -> None:
    model: Any = llama()
    model.add_adapter(QLoRAConfig(r=2, target_modules=["q_proj"]))
    made, _ = run(model, tmp_path, [MASKED] * 2)
    assert losses(made) == [0.0, 0.0]
