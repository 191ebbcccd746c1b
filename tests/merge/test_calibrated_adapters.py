"""Several adapters in one calibrated merge: each task's loss, on rows that were neither trained nor calibrated on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import llama
from calibrating import rows_of
from merging import trained
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_qlora import QLoRAConfig, merge
from hf_qlora.quant.calibrate.loss import mean_loss
from hf_qlora.quant.calibrate.rows import CalibrationRows


CONFIG = QLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear")
TASKS = (1, 101)  # by the first of its words
WORDS = 24


def chain(first: int, rows: int = 34, length: int = 32) -> dict[str, Tensor]:
    """New rows of a task: words from `first` on, each with a successor, which follows it seven times in eight.

    What was learnt of some rows is seen on any others.
    """
    successors = torch.randperm(WORDS, generator=torch.Generator().manual_seed(first))
    words = [torch.randint(WORDS, (rows,))]
    for _ in range(length - 1):
        words.append(torch.where(torch.rand(rows) < 1 / 8, torch.randint(WORDS, (rows,)), successors[words[-1]]))
    ids = first + torch.stack(words, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both() -> CalibrationRows:
    """New rows of the tasks by turns; the last ones, which are held out, are of both too."""
    tasks = [chain(first) for first in TASKS]
    return rows_of({key: torch.stack([task[key] for task in tasks], 1).flatten(0, 1) for key in tasks[0]}, 8)


def base() -> nn.Module:
    """A tiny Llama with one weight in 64 twenty times the others: rounding is coarse, and to nearest it costs."""
    model = llama()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            weight[torch.rand_like(weight) < 1 / 64] *= 20
    return model


def losses(model: nn.Module, tasks: dict[int, dict[str, Tensor]]) -> Tensor:
    return torch.tensor([mean_loss(model, rows) for rows in tasks.values()], dtype=torch.float64)


def kept(merged: nn.Module, model: PeftModel, without: Tensor, tasks: dict[int, dict[str, Tensor]]) -> Tensor:
    """The share of the active adapters' gain over a base that loses `without`, by task."""
    gain = without - losses(model, tasks)
    assert (gain > 0.3).all(), "every task must have been learnt"
    return (without - losses(merged, tasks)) / gain


def assert_kept(calibrated: nn.Module, model: PeftModel, without: Tensor, tasks: dict[int, dict[str, Tensor]]) -> None:
    """Over three seeds each task keeps 99.6 % or more, calibrated; to nearest, one of them keeps 98 % or less."""
    nearest = merge(model, onto="nf4", force=True).model
    assert kept(calibrated, model, without, tasks).min() > 0.99
    assert kept(nearest, model, without, tasks).min() < 0.985


@pytest.fixture
def first() -> PeftModel:
    """A base with an adapter that learnt the first task."""
    torch.set_num_threads(1)
    return trained(get_peft_model(base(), dataclasses.replace(CONFIG)), chain(TASKS[0]))


def test_adapters_merged_together_or_weighted_are_each_kept(first: PeftModel) -> None:
    """Each learnt its task on the base, without the other."""
    first.add_adapter("second", dataclasses.replace(CONFIG))
    first.set_adapter("second")
    model, tasks = trained(first, chain(TASKS[1])), {task: chain(task) for task in TASKS}
    with model.disable_adapter():
        without = losses(model, tasks)
    model.base_model.set_adapter(["default", "second"])
    together = merge(model, onto="nf4", calibration=both(), force=True)
    assert together.adapters == ["default", "second"]
    assert_kept(together.model, model, without, tasks)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.7], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    assert_kept(merge(model, onto="nf4", calibration=both(), force=True).model, model, without, tasks)


def test_adapters_merged_one_after_the_other_are_each_kept(first: PeftModel) -> None:
    """The second learns on what the first was merged into, and is merged into that."""
    tasks = {task: chain(task) for task in TASKS}
    with first.disable_adapter():
        without = losses(first, tasks)
    once = merge(first, onto="nf4", calibration=rows_of(chain(TASKS[0])), force=True).model
    assert_kept(once, first, without[:1], {TASKS[0]: tasks[TASKS[0]]})
    model = trained(get_peft_model(once, dataclasses.replace(CONFIG)), chain(TASKS[1]))
    twice = merge(model, onto="nf4", calibration=both(), force=True).model
    assert_kept(twice, model, without, tasks)
    # Rows of the last task alone keep that one, and 94 to 103 % of the one before, as roundings fall.
    partly = merge(model, onto="nf4", calibration=rows_of(chain(TASKS[1])), force=True).model
    shares = kept(partly, model, without, tasks)
    assert shares[1] > 0.99
    assert shares[0] > 0.9
