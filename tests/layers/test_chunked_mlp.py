"""An MLP in chunks computes what the whole does, with the intermediate activations of one chunk."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, LLAMA_LIKE, VOCAB, gpt2, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_qlora import QLoRAConfig, disable_checkpointing, enable_checkpointing
from hf_qlora.layers import chunked_mlp
from hf_qlora.layers.chunked_mlp import ChunkedMLP
from hf_qlora.validation import ConfigError


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LENGTH, INTERMEDIATE = 23, 256


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    model = get_peft_model(base, QLoRAConfig(**options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


class Sharded:
    """Before a class, as FSDP's."""


def put_before(module: Any) -> Any:
    """A class of another's put before a module's, in place, as `fully_shard` does."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (Sharded, type(module)), {})
    return type(module)


def test_a_class_that_others_put_before_it_stays() -> None:
    model = adapted(llama())
    expected = step(model)
    enable_checkpointing(model, None, chunk_size=5)
    chunks = step(model)
    mlps = [layer.mlp for layer in model.base_model.model.model.layers]
    sharded = [put_before(mlp) for mlp in mlps]
    rows: list[int] = []
    mlps[0].gate_proj.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[-2]))
    for _ in range(2):
        disable_checkpointing(model)
        disable_checkpointing(model)
        assert [type(mlp) for mlp in mlps] == sharded
        rows.clear()
        found = step(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert rows == [LENGTH]
        enable_checkpointing(model, None, chunk_size=5)
        rows.clear()
        found = step(model)
        assert all(torch.equal(found[name], chunks[name]) for name in expected)
        assert rows[:5] == [5, 5, 5, 5, 3]


def step(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    out = model(**(inputs or {"input_ids": ids, "labels": ids}))
    loss = out.logits.square().mean() if out.loss is None else out.loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        # float32 sums over tokens in another order, through four layers
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


class Largest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the MLP is inside."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            # of weights: 128 rows, or 256 where they are transposed
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (INTERMEDIATE,) and tensor.dtype == torch.float32:
                rows = tensor.numel() // INTERMEDIATE
                self.rows = max(self.rows, rows if rows < 64 else 0)
        return result


@pytest.mark.parametrize("mode", [None, "full", "budget"])
@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"quantization": None}], ids=["lora", "dora", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chunks_equal_the_whole(kind: str, adapter: dict[str, Any], mode: str | None) -> None:
    base = llama() if kind == "llama" else gpt2(resid_pdrop=0.0, n_inner=INTERMEDIATE)
    model = adapted(base, **adapter)
    expected = step(model)
    for size in (1, 5, LENGTH, 100):
        enable_checkpointing(model, mode, 10**6 if mode == "budget" else None, chunk_size=size)
        assert_close(step(model), expected)
    enable_checkpointing(model, "full")  # ends what was enabled before
    assert not any(isinstance(module, ChunkedMLP) for module in model.modules())
    disable_checkpointing(model)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in step(model).items())


@pytest.mark.parametrize("mode", [None, "full"])
def test_intermediate_activations_are_of_one_chunk(mode: str | None) -> None:
    """In forward and in backward: nothing (rows, intermediate) has more rows than a chunk of both sequences."""
    model = adapted(llama(), quantization=None)
    with Largest() as whole:
        step(model)
    assert whole.rows == 2 * LENGTH
    enable_checkpointing(model, mode, chunk_size=5)
    with Largest() as chunked:
        step(model)
    assert chunked.rows == 2 * 5


def test_nothing_of_a_chunk_is_kept_for_backward() -> None:
    model = adapted(llama())
    ids = torch.randint(1, VOCAB, (2, LENGTH))

    def wide(chunk_size: int | None) -> int:
        enable_checkpointing(model, None, chunk_size=chunk_size)
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t.detach(), lambda t: t):
            model(ids)
        return sum(shape[-1:] == (INTERMEDIATE,) and len(shape) > 1 and shape[0] == 2 for shape in shapes)

    assert wide(None) > 0
    assert wide(5) == 0


def test_dropout_is_the_same_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against chunks that are not checkpointed, bit for bit."""
    model = adapted(gpt2(), lora_dropout=0.1)
    enable_checkpointing(model, "full", chunk_size=5)
    found = step(model)
    monkeypatch.setattr(chunked_mlp, "checkpoint", lambda function, x, use_reentrant: function(x))
    expected = step(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("name", ["t5", "vit", "qwen2", "qwen2_moe"])
def test_other_mlps_are_found(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    base = architecture.make()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = adapted(base, task_type=architecture.task_type, **architecture.options)
    inputs: Any = architecture.inputs()
    if name == "t5":
        inputs["use_cache"] = False
    expected = step(model, inputs)
    enable_checkpointing(model, chunk_size=3)
    assert any(isinstance(module, ChunkedMLP) for module in model.modules())
    assert_close(step(model, inputs), expected)


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_layers_without_such_an_mlp_are_refused(name: str) -> None:
    base: Any = next(a for a in ARCHITECTURES if a.name == name).make()
    with pytest.raises(ConfigError, match=r"no MLP that can be computed in chunks.*Leave chunk_size out"):
        enable_checkpointing(base, chunk_size=4)
    assert not base.is_gradient_checkpointing


def test_blocks_of_experts_are_left_alone_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A model whose first layer has an MLP where the other has experts, and none that all tokens share."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**LLAMA_LIKE, **experts))
    for layer in model.model.layers[1:]:
        layer.mlp.shared_expert = nn.Identity()
    enable_checkpointing(model, chunk_size=4)
    assert "1 of 2 layers have no MLP" in caplog.text
    assert [isinstance(layer.mlp, ChunkedMLP) for layer in model.model.layers] == [True, False]


class Attention(nn.Module):
    """It looks like an MLP, but its tokens see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ x


class Shift(nn.Module):
    """Each token sees a little of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + x.roll(1, dims=-2)))


class Twice(Shift):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x)), x


class Gated(Shift):
    """With a parameter of its own, which might be for a position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) * self.gate


@pytest.mark.parametrize("block", [Attention, Shift, Twice, Gated])
def test_what_only_looks_like_an_mlp_is_refused(block: type[nn.Module]) -> None:
    class Layer(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

    class Model(tf.LlamaForCausalLM):
        def __init__(self) -> None:
            super().__init__(tf.LlamaConfig(**{**LLAMA_LIKE, "num_hidden_layers": 0}))
            self.layer = Layer()

    with pytest.raises(ConfigError, match="no MLP"):
        enable_checkpointing(Model(), chunk_size=2)


def test_trying_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the random numbers nor in the mode of the modules."""
    model = adapted(llama(), lora_dropout=0.1)
    layers: Any = model.base_model.model.model.layers
    layers[0].mlp.gate_proj.lora_dropout.eval()
    called: list[bool] = []
    layers[0].mlp.gate_proj.base_layer.register_forward_hook(lambda module, *_: called.append(module.training))
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        enable_checkpointing(model, chunk_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not caplog.records
    assert called == [True] * 3  # bitsandbytes' own layers would be repacked in eval
