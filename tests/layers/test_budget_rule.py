"""Layers are checkpointed as few as a search finds, and training does what a plan foresees."""

from __future__ import annotations

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


def layers_run_again(budget: int) -> int:
    """How many layers backward runs again in a second step of training, the first of which measures."""
    torch.manual_seed(0)
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(llama(num_hidden_layers=LAYERS), config).train()
    enable_checkpointing(model, "budget", budget_bytes=budget)
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH))
    runs: list[int] = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        runs.clear()
        loss.backward()
    return len(runs)


@pytest.mark.parametrize("checkpointed", range(LAYERS + 1))
def test_training_checkpoints_as_many_layers_as_a_plan(checkpointed: int) -> None:
    """With bytes that are enough by the plan's own count of what layers keep, and by a tenth of a layer more."""
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    free = plan_memory(llama(num_hidden_layers=LAYERS), config, BATCH, LENGTH, device="cpu").layer_bytes
    # the two count alike but for tensors of a row, which a trace sees and autograd does not save
    budget = checkpointed * INPUT + sum(free[checkpointed:]) + free[0] // 10
    settings = {"mode": "budget", "budget_bytes": budget}
    planned = plan_memory(
        llama(num_hidden_layers=LAYERS), config, BATCH, LENGTH, device="cpu", checkpointing=settings
    ).layer_bytes
    assert planned.count(INPUT) == checkpointed
    assert layers_run_again(budget) == checkpointed
