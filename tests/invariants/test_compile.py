"""A compiled model, in one graph, learns what the eager one does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import Trainer, TrainingArguments

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def gradients(step: Any, model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = step(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


OPTIONS = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "plain": QLoRAConfig(**OPTIONS),
    "depth": AdaptiveDepthLoRAConfig(**OPTIONS),
    "narrow products": QLoRAConfig(**OPTIONS, quantization={"compute_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS[name])).train()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, VOCAB, (2, 8))
    loss, expected = gradients(model, model, ids)
    compiled_loss, found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, ids)
    # float32 products, in another order where PEFT's operations stand for the node; or each rounded to bfloat16
    tolerance = 2**-5 if name == "narrow products" else 1e-5
    assert compiled_loss == pytest.approx(loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        largest = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=tolerance * largest)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointing", [None, "full", {"mode": "budget", "budget_bytes": 500_000}])
def test_trainer_compiles_and_learns_the_same(backend: str, checkpointing: Any, tmp_path: Path) -> None:
    """`TrainingArguments(torch_compile=True)`; what it saves is the adapter, under its own names."""
    ids = torch.randint(1, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", checkpointing=checkpointing)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.5, optim="sgd", use_cpu=True,
            report_to="none", logging_steps=1, save_strategy="no", **options,
        )  # fmt: skip
        run = Trainer(get_peft_model(llama(), config), arguments, train_dataset=rows)
        run.train()
        runs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    # float32 products, in another order where PEFT's operations stand for the node; after four steps
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(run.model.unload(), tmp_path / "adapter").eval()
    assert any("lora_B" in name and p.any() for name, p in loaded.named_parameters())
    assert loaded(ids).logits.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("quantized", [True, False])
def test_compiled_products_are_in_the_models_dtype(quantized: bool, autocast: bool) -> None:
    """Or in autocast's. PEFT's own forward would multiply in the adapters' float32, many times slower on GPUs."""
    torch._dynamo.reset()
    options = {} if quantized else {"quantization": None}
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1, **options)
    dtype = torch.float32 if autocast else torch.bfloat16
    model = get_peft_model(llama().to(dtype), config).train()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    dtypes: list[torch.dtype] = []

    def record(graph: Any, inputs: Any) -> Any:
        products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
        dtypes.extend(node.meta["val"].dtype for node in graph.graph.nodes if node.target in products)
        return graph.forward

    x = torch.randn(3, layer.in_features, dtype=dtype, requires_grad=True)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = compiled(x)
    y.sum().backward()
    assert len(dtypes) >= 6  # of W, A and B, forward and backward
    assert set(dtypes) == {torch.bfloat16}
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32
