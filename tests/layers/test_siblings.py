"""Layers that are given one tensor have the gradients they would have alone, whatever happens between their calls.

The oracle is the same model with every layer a stranger to the others.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import VOCAB, llama
from peft import get_peft_model
from torch import Tensor, nn

from hf_qlora import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.kernels import shared
from hf_qlora.layers import siblings


K = 32
# Sums in float64, in another order.
EXACT = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Attention(nn.Module):
    """Three layers of one input, of several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 48), nn.Linear(K, 16), nn.Linear(K, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def adapted(config: type[QLoRAConfig] = QLoRAConfig, names: int = 1, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        Attention().double(),
        config(r=4, target_modules=["q", "k", "v"], quantization=None, **settings),
        autocast_adapter_dtype=False,
    )
    for i in range(1, names):
        model.add_adapter(f"more_{i}", config(r=2 * i, target_modules=["q", "k"], quantization=None))
    model.base_model.set_adapter(["default", *(f"more_{i}" for i in range(1, names))])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model.train()


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was shared: one entry for each family."""
    found: list[Tensor] = []
    original = siblings.share

    def counted(x: Tensor) -> Any:
        found.append(x)
        return original(x)

    monkeypatch.setattr(siblings, "share", counted)
    return found


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every layer a stranger from now on."""
    return lambda: monkeypatch.setattr(siblings, "shared_input", lambda x, dtype: (x.to(dtype), None))


def gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss(model(x)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if x.grad is not None:
        found["x"], x.grad = x.grad, None
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = expected[name].abs().max().clamp(min=1e-30)
        assert (tensor - expected[name]).abs().max() <= tolerance * scale, name


def weighted(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "all used": weighted,
    "the first unused": lambda y: weighted(y[..., 48:]),
    "the middle unused": lambda y: weighted(y[..., :48]) + weighted(y[..., 64:]),
    "only the last used": lambda y: weighted(y[..., 64:]),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "make",
    [
        adapted,
        lambda: adapted(lora_dropout=0.3),
        lambda: adapted(names=3),
        lambda: adapted(AdaptiveDepthLoRAConfig, depth_profile="constant"),
        lambda: adapted(bias="lora_only"),
    ],
    ids=["plain", "dropout", "three adapters", "gain", "bias"],
)
def test_gradients_are_those_of_strangers(
    make: Callable[[], nn.Module], loss: str, shares: list[Tensor], strangers: Callable[[], None]
) -> None:
    model, x = make(), torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x, LOSSES[loss])
    assert len(shares) == 1
    strangers()
    assert_same(found, gradients(model, x, LOSSES[loss]))


def test_others_may_use_the_input_too(strangers: Callable[[], None]) -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        hidden = x * 2
        (weighted(model(hidden)) + hidden.sin().sum()).backward()
        assert x.grad is not None
        found, x.grad = x.grad, None
        return found

    found = run()
    strangers()
    assert_same({"x": found}, {"x": run()})


def test_a_pass_that_leaves_the_input_out_leaves_nothing_behind() -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    y = weighted(model(x))
    A = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    torch.autograd.grad(y, [A], retain_graph=True)
    once = torch.autograd.grad(y, [x], retain_graph=True)[0]
    again = torch.autograd.grad(y, [x])[0]
    assert torch.equal(once, again)
    (expected,) = torch.autograd.grad(weighted(model(x)), [x])
    assert torch.equal(once, expected)


def test_two_graphs_of_one_input_are_independent() -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    hidden = x * 1
    first, second = weighted(model(hidden)), weighted(model(hidden)) * 2
    (one,) = torch.autograd.grad(first, [x], retain_graph=True)
    (two,) = torch.autograd.grad(second, [x])
    assert_same({"x": two}, {"x": 2 * one})


def test_an_input_changed_in_place_between_calls_is_another() -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    layers = model.base_model.model
    leaf = x.detach().clone().requires_grad_()
    hidden = leaf * 1
    layers.q.train()
    with torch.no_grad():
        expected = layers.k(hidden * 2)
    q = layers.q(hidden.clone())  # its saved input is not what is changed
    layers.q(hidden)
    hidden.mul_(2)
    k = layers.k(hidden)
    assert torch.equal(k, expected)
    (dx,) = torch.autograd.grad(weighted(k), [leaf])
    (alone,) = torch.autograd.grad(weighted(layers.k(leaf * 2)), [leaf])
    assert_same({"x": dx}, {"x": alone})
    assert q.requires_grad


def test_a_hook_that_returns_another_input_is_obeyed(strangers: Callable[[], None]) -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    model.base_model.model.k.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.base_model.model.v.register_full_backward_hook(lambda module, gin, gout: (gin[0] * 5,))
    found = gradients(model, x, weighted)
    strangers()
    assert_same(found, gradients(model, x, weighted))


def test_the_next_input_is_right_after_an_exception_between_siblings(strangers: Callable[[], None]) -> None:
    model, x = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    handle = model.base_model.model.k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    found = gradients(model, x, weighted)
    strangers()
    assert_same(found, gradients(model, x, weighted))


def test_threads_do_not_meet() -> None:
    model = adapted()
    xs = [torch.randn(3, K, dtype=torch.float64, requires_grad=True) for _ in range(8)]
    expected = [torch.autograd.grad(weighted(model(x)), [x])[0] for x in xs]
    found: list[Tensor | None] = [None] * len(xs)

    def run(i: int) -> None:
        for _ in range(10):
            found[i] = torch.autograd.grad(weighted(model(xs[i])), [xs[i]])[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["checkpointing", "offloading"])
def test_saved_inputs_can_be_packed_away(how: str) -> None:
    """Of each layer's input nothing stays with the graph where hooks take what is saved."""
    model = get_peft_model(llama(), QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    inputs: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    ids = torch.randint(0, VOCAB, (2, 7))
    if how == "checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids).loss
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
    alive = [tensor for ref in inputs if (tensor := ref()) is not None]
    assert len(inputs) == 14
    # the inputs of checkpointed layers themselves may be, which are no layer's input here
    assert not alive
    loss.backward()


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    made: list[weakref.ref[Any]] = []

    class Kept(shared.SharedInput):
        def __init__(self) -> None:
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(shared, "SharedInput", Kept)
    return made


def test_nothing_lives_longer_than_the_input_and_the_graph(sums: list[weakref.ref[Any]]) -> None:
    model, leaf = adapted(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    gc.disable()  # reference counts alone must do
    try:
        model(leaf * 1)
        assert len(sums) == 1
        assert sums[0]() is None
        y = weighted(model(leaf * 1))
        y.backward()
        assert siblings._last.shared is None  # the graph of y is there, its tensors are not
        del y
        assert sums[1]() is None
        hidden = leaf * 1
        y = weighted(model(hidden))
        last = siblings._last.shared
        assert last is not None
        assert last.given.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        del last, hidden
        assert siblings._last.shared is None
        y.backward()
    finally:
        gc.enable()


@pytest.mark.parametrize("quantization", [None, NF4Config()], ids=["dense", "nf4"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_a_model_learns_the_same(
    quantization: NF4Config | None, reentrant: bool | None, shares: list[Tensor], strangers: Callable[[], None]
) -> None:
    base = llama().double() if quantization is None else llama()
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", quantization=quantization)
    model = get_peft_model(base, config).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, VOCAB, (2, 7))

    def run() -> dict[str, Tensor]:
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    found = run()
    layers = base.config.num_hidden_layers
    # q, k and v; o; gate and up; down. The first input of the model needs no gradient unless it is checkpointed, and
    # what is checkpointed is computed twice, under reentrant checkpointing without gradients at first.
    assert len(shares) == {None: 4 * layers - 1, False: 8 * layers, True: 4 * layers}[reentrant]
    strangers()
    # float32 sums of other order through two layers; adapters are float32 also over a float64 base
    assert_same(found, run(), 1e-4)
