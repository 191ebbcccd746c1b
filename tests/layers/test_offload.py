"""Inputs that wait on the host come back as they were, in time, and leave nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from peft import get_peft_model
from torch import Tensor, nn

from hf_qlora import QLoRAConfig, disable_checkpointing, enable_checkpointing
from hf_qlora.layers.offload import IN_FLIGHT, Offload, Waiting


pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

LAYERS = 8


def adapted(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Eager attention: its backward sums in one order."""
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": LAYERS, "attn_implementation": "eager", "attention_dropout": 0.1, **changes}
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    model = get_peft_model(llama(**sizes).to("cuda", dtype), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def tokens(length: int = 64, rows: int = 4) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length)).cuda()


def step(model: Any, backward: Callable[[Tensor], None] = Tensor.backward) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    backward(loss)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(gradient.any() for gradient in expected.values())
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def layers_of(model: Any) -> Any:
    return model.base_model.model.model.layers


def offload_of(model: Any) -> Offload:
    found = layers_of(model)[0]._gradient_checkpointing_func
    assert isinstance(found, Offload)
    return found


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    made: list[weakref.ref[Tensor]] = []
    original = Waiting.__init__

    def recorded(self: Waiting, *args: Any) -> None:
        original(self, *args)
        made.append(weakref.ref(self.host))

    monkeypatch.setattr(Waiting, "__init__", recorded)
    return made


@pytest.mark.parametrize(
    "settings", [{"mode": "full"}, {"mode": "budget", "budget_bytes": 6_000_000}, {"mode": "offload"}]
)
def test_gradients_are_those_without_checkpointing(settings: dict[str, Any]) -> None:
    """Dropout masks too, which CUDA draws by a generator of its own."""
    model = adapted()
    expected = step(model)
    assert_identical(step(model), expected)  # so the model is deterministic
    enable_checkpointing(model, **settings)
    for _ in range(3):
        assert_identical(step(model), expected)


@pytest.mark.parametrize("late", ["copies", "layers"])
def test_nothing_comes_too_late(late: str) -> None:
    """Each stream in turn far behind the other: an operation that does not wait for the other would read too early."""
    model = adapted()
    enable_checkpointing(model, "full")
    expected = step(model)
    enable_checkpointing(model, "offload")
    step(model)
    stream = offload_of(model).streams[torch.device("cuda", torch.cuda.current_device())]

    def sleep(*_: Any) -> None:
        with torch.cuda.stream(stream if late == "copies" else torch.cuda.current_stream()):
            torch.cuda._sleep(20_000_000)  # cycles: some 10 ms

    for layer in layers_of(model):
        layer.input_layernorm.register_forward_pre_hook(sleep)
        layer.mlp.register_forward_pre_hook(sleep)
    for _ in range(2):
        assert_identical(step(model), expected)


def test_the_host_holds_nothing_after_backward(hosts: list[weakref.ref[Tensor]]) -> None:
    model = adapted()
    enable_checkpointing(model, "offload")
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert len(hosts) == LAYERS
    assert all(host().is_pinned() for host in hosts)
    loss.backward()
    assert not [host for host in hosts if host() is not None]
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert sum(host() is not None for host in hosts) == LAYERS
    del loss  # a graph that is dropped
    torch.cuda.synchronize()
    assert not [host for host in hosts if host() is not None]
    with torch.no_grad():
        model(tokens())
    model.eval()(tokens())
    assert len(hosts) == 2 * LAYERS


def test_the_last_inputs_stay_and_the_others_go() -> None:
    model = adapted()
    enable_checkpointing(model, "offload")
    made: list[Waiting] = []
    send = offload_of(model).send
    offload_of(model).send = lambda x: made.append(send(x)) or made[-1]  # type: ignore[method-assign]
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert [waiting.on_device is not None for waiting in made] == [False] * (LAYERS - IN_FLIGHT) + [True] * IN_FLIGHT
    loss.backward()


def test_a_graph_may_be_used_twice_and_beside_another() -> None:
    model = adapted()

    def twice(loss: Tensor) -> None:
        other = model(input_ids=tokens(32), labels=tokens(32)).loss
        loss.backward(retain_graph=True)
        other.backward()
        loss.backward()

    enable_checkpointing(model, "full")
    expected = step(model, twice)
    enable_checkpointing(model, "offload")
    assert_identical(step(model, twice), expected)


def test_the_peak_is_lower_by_what_waits() -> None:
    """24 inputs of 8 MiB: all but those in flight are away when the peak is reached."""
    layers, size = 24, 8 * 1024 * 512 * 2
    model = adapted(num_hidden_layers=layers, hidden_size=512, intermediate_size=512, attn_implementation="sdpa")
    ids = tokens(1024, rows=8)

    def peak() -> int:
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    enable_checkpointing(model, "full")
    full = peak()
    enable_checkpointing(model, "offload")
    offloaded = peak()
    disable_checkpointing(model)
    none = peak()
    # in flight, on their way back, in use by the layer, and one for what the allocator rounds
    assert full - offloaded >= (layers - IN_FLIGHT - 4) * size
    assert none > full
