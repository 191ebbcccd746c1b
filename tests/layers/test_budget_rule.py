"""Layers are checkpointed as few as a search finds, and training does what a plan foresees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from peft import get_peft_model

from hf_qlora import QLoRAConfig, enable_checkpointing, plan_memory
from hf_qlora.layers.budget_rule import BudgetTooSmall, number_checkpointed


BATCH, LENGTH, LAYERS = 2, 32, 4
INPUT = BATCH * LENGTH * 128 * 4  # bytes of a layer's, in float32


def test_the_number_is_that_of_a_search() -> None:
    kept, inputs = [50, 70, 60, 90], [10, 20, 10, 10]
    for budget in range(50, 300):
        fits = [n for n in range(5) if sum(inputs[:n]) + sum(kept[n:]) <= budget]
        assert number_checkpointed(budget, kept, inputs, "a batch") == min(fits)
    with pytest.raises(BudgetTooSmall, match=r"budget_bytes=49 is too small for a batch: .* take 50 bytes\. Give"):
        number_checkpointed(49, kept, inputs, "a batch")


def config() -> QLoRAConfig:
    return QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def planned(**settings: Any) -> tuple[int, ...]:
    """The bytes that layers keep."""
    return plan_memory(llama(num_hidden_layers=LAYERS), config(), BATCH, LENGTH, device="cpu", **settings).layer_bytes


@pytest.fixture(scope="module")
def free() -> tuple[int, ...]:
    return planned()


def layers_run_again(budget: int) -> list[int]:
    """The layers that backward runs again in a second step of training, the first of which measures."""
    torch.manual_seed(0)
    model = get_peft_model(llama(num_hidden_layers=LAYERS), config()).train()
    enable_checkpointing(model, "budget", budget_bytes=budget)
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH))
    runs: list[int] = []
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        runs.clear()
        loss.backward()
    return runs


@pytest.mark.parametrize("checkpointed", [0, 1, 3, LAYERS])
def test_training_checkpoints_the_layers_that_a_plan_does(checkpointed: int, free: tuple[int, ...]) -> None:
    """With bytes that are enough by the plan's own count of what layers keep, and by a tenth of a layer more."""
    # the two count alike but for tensors of a row, which a trace sees and autograd does not save
    budget = checkpointed * INPUT + sum(free[checkpointed:]) + free[0] // 10
    expected = (INPUT,) * checkpointed + free[checkpointed:]
    assert planned(checkpointing={"mode": "budget", "budget_bytes": budget}) == expected
    assert layers_run_again(budget) == list(range(checkpointed - 1, -1, -1))
