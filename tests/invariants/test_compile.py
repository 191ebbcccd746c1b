"""A compiled model, in one graph, learns what the eager one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from peft import get_peft_model
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def gradients(step: Any, model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = step(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("config", [QLoRAConfig, AdaptiveDepthLoRAConfig])
def test_compiled_equals_eager(config: type[QLoRAConfig]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(llama(), config(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, VOCAB, (2, 8))
    loss, expected = gradients(model, model, ids)
    compiled_loss, found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, ids)
    # float32 products, in another order where PEFT's operations stand for the node
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))
