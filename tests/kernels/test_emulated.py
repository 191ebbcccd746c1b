"""Where the processor does not multiply in a narrow dtype, the nodes multiply in float32 and round what they return.

Oracle: float64, from the same narrow inputs. What is returned in a narrow dtype is within one rounding of it; adapters
and their gradients, which are in float32, as near as float32's sums.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import llama, tokens
from calibrating import rows_of, text
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora import NF4Config, QLoRAConfig, quantize_model
from hf_qlora.kernels import emulated
from hf_qlora.kernels.dora import dora_linear
from hf_qlora.kernels.functional import Adapter, add_adapters, frozen_linear, lora_linear
from hf_qlora.kernels.loss import linear_cross_entropy
from hf_qlora.kernels.planned import planned_device
from hf_qlora.kernels.shared import share
from hf_qlora.quant.calibrate import streams
from hf_qlora.quant.calibrate.loss import mean_loss


K, N, ROWS = 48, 80, 12
NARROW = [torch.bfloat16, torch.float16]
SUMS = 1e-5  # float32's, of 80 products and less, relative to the largest value


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without such instructions, wherever this runs."""
    monkeypatch.setattr(emulated, "_has_loops", lambda dtype: True)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def rounding(dtype: torch.dtype) -> float:
    """Half a step, of the largest value; and float32's sums below it."""
    return torch.finfo(dtype).eps / 2 + SUMS


def make_adapter(gain: bool = False, **more: Any) -> Adapter:
    A, B = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    return Adapter(A, B, 0.7, torch.tensor([1.3], requires_grad=True) if gain else None, **more)


def of(adapter: Adapter, dtype: torch.dtype) -> list[Tensor]:
    given = (adapter.A, adapter.B, adapter.gain)
    return [t.detach().to(dtype).requires_grad_(True) for t in given if t is not None]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, ROWS])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_output_and_gradients_are_float64s_but_for_one_rounding(
    dtype: torch.dtype, gain: bool, count: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated, "PART_BYTES", 4 * K * 33)  # of 80 outputs: 33, 33 and 14
    x, W = torch.randn(rows, K).to(dtype).requires_grad_(True), torch.randn(N, K).to(dtype)
    bias, g = torch.randn(N).to(dtype).requires_grad_(True), torch.randn(rows, N).to(dtype)
    adapters = [make_adapter(gain) for _ in range(count)]
    y = lora_linear(x, lambda: W, bias, adapters)
    own = [t for a in adapters for t in (a.A, a.B, a.gain) if t is not None]
    found = torch.autograd.grad(y, [x, bias, *own], g)

    exact_x, exact_bias = (t.detach().double().requires_grad_(True) for t in (x, bias))
    exact = exact_x @ W.double().t() + exact_bias
    leaves = []
    for adapter in adapters:
        A, B, *c = of(adapter, torch.float64)
        exact = exact + (exact_x @ A.t() @ B.t()) * adapter.scaling * (c[0] if c else 1)
        leaves += [A, B, *c]
    expected = torch.autograd.grad(exact, [exact_x, exact_bias, *leaves], g.double())

    assert y.dtype == found[0].dtype == found[1].dtype == dtype
    assert y.shape == (rows, N)
    if not rows:
        assert all(not gradient.any() for gradient in found)
        return
    assert off(y, exact) <= rounding(dtype)
    assert off(found[0], expected[0]) <= rounding(dtype)
    assert off(found[1], expected[1]) <= rounding(dtype)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == torch.float32
        assert off(one, other) <= SUMS


@pytest.mark.parametrize("dtype", NARROW)
def test_inputs_that_are_shared_sum_their_gradients_unrounded(dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, K).to(dtype).requires_grad_(True)
    weights, adapters = [torch.randn(N, K).to(dtype) for _ in range(3)], [make_adapter() for _ in range(3)]
    given, shared = share(x)
    parts = [lora_linear(given, lambda W=W: W, None, [a], shared) for W, a in zip(weights, adapters, strict=True)]
    g = torch.randn(ROWS, N).to(dtype)
    (found,) = torch.autograd.grad(parts, [x], [g, g, g])
    merged = sum(W.double() + 0.7 * a.B.double() @ a.A.double() for W, a in zip(weights, adapters, strict=True))
    assert found.dtype == dtype
    assert off(found, g.double() @ merged) <= rounding(dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_dora(dtype: torch.dtype) -> None:
    x, W = torch.randn(ROWS, K).to(dtype).requires_grad_(True), torch.randn(N, K).to(dtype)
    magnitude = torch.rand(N).add(0.5).requires_grad_(True)
    adapter = make_adapter(magnitude=magnitude, row_squares=lambda W: W.float().square().sum(1))
    y, g = dora_linear(x, lambda: W, None, adapter), torch.randn(ROWS, N).to(dtype)
    found = torch.autograd.grad(y, [x, adapter.A, adapter.B, magnitude], g)

    A, B = of(adapter, torch.float64)
    m, exact_x = (t.detach().double().requires_grad_(True) for t in (magnitude, x))
    whole = W.double() + 0.7 * B @ A
    exact = (exact_x @ whole.t()) * (m / whole.norm(dim=1).detach())
    expected = torch.autograd.grad(exact, [exact_x, A, B, m], g.double())
    assert y.dtype == found[0].dtype == dtype
    # g is rounded once more, where it is multiplied by m / n; and what m's gradient is summed of is kept narrow.
    for one, other in zip((y, *found), (exact, *expected), strict=True):
        assert off(one, other) <= 2 * rounding(dtype)


@pytest.mark.parametrize("shape", [(ROWS, K), (3, 4, K), (1, K), (2, K), (0, K)], ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_without_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, W, bias = torch.randn(*shape).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    adapter = make_adapter()
    with torch.no_grad():
        y = frozen_linear(x, lambda: W, bias)
        added = add_adapters(y.clone(), x, [(adapter.A, adapter.B, 0.7)])
        narrow = add_adapters(y.clone(), x, [(adapter.A.to(dtype), adapter.B.to(dtype), 0.7)])
    assert y.dtype == added.dtype == dtype
    assert y.shape == (*shape[:-1], N)
    if not x.numel():
        return
    expected = x.double() @ W.double().t() + bias.double()
    with_adapter = y.double() + 0.7 * (x.double() @ adapter.A.double().t() @ adapter.B.double().t())
    assert off(y, expected) <= 2 * rounding(dtype)  # loops, of one row or two, add up in float32 and round too
    assert off(added, with_adapter) <= 2 * rounding(dtype)
    assert off(narrow, with_adapter) <= 8 * rounding(dtype)  # of A and B too, whose roundings add up over r


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_loss_behind_a_head_is_multiplied_in_parts(
    dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated, "PART_BYTES", 4 * K * 33)  # of 80 classes: 33, 33 and 14
    parts = _Widened()
    h, W = torch.randn(ROWS, K).to(dtype).requires_grad_(True), torch.randn(N, K).to(dtype)
    bias, target = torch.randn(N).to(dtype) if biased else None, torch.randint(N, (ROWS,))
    with parts:
        loss = linear_cross_entropy(h, lambda: W, bias, target)
    assert parts.of_weights(K) == [33, 33, 14] * 2  # for the logits, and for their gradient
    (found,) = torch.autograd.grad(loss, [h])
    exact_h = h.detach().double().requires_grad_(True)
    logits = exact_h @ W.double().t() + (0 if bias is None else bias.double())
    expected = nn.functional.cross_entropy(logits, target)
    # Logits and their gradients are rounded to the model's dtype in between.
    assert off(loss.detach(), expected.detach()) <= 2 * rounding(dtype)
    assert off(found, torch.autograd.grad(expected, [exact_h])[0]) <= 4 * rounding(dtype)


def test_a_model_in_bfloat16_trains_as_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and logits of an eval forward, with the loops and without, against float32's."""

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            llama().to(torch.bfloat16).to(dtype),
            QLoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        )
        ids = tokens()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        return {"loss": loss.detach(), "gradient": torch.cat(gradients), "logits": logits}

    found, wide = run(torch.bfloat16), run(torch.float32)
    monkeypatch.setattr(emulated, "_has_loops", lambda dtype: False)
    narrow = run(torch.bfloat16)
    assert found["logits"].dtype == torch.bfloat16
    for name, expected in wide.items():
        error = (found[name].double() - expected.double()).norm()
        # Fewer roundings; up to chance, which has a say in either.
        assert error <= 1.5 * (narrow[name].double() - expected.double()).norm()
        assert error <= 0.05 * expected.double().norm()  # roundings to 8 bits, one after another, over two layers


class _Widened(TorchDispatchMode):
    """The shapes of what is cast to float32 within it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.float32:
            self.shapes.append(result.shape)
        return result

    def of_weights(self, width: int) -> list[int]:
        return [shape[0] for shape in self.shapes if len(shape) == 2 and shape[1] == width and shape[0] != ROWS]


def test_an_output_head_in_eval_mode_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "PART_BYTES", 4 * 128 * 60)
    base = llama().to(torch.bfloat16)
    model = get_peft_model(base, QLoRAConfig(r=4, target_modules=["q_proj"])).eval()
    hidden, parts = torch.randn(ROWS, 128).bfloat16(), _Widened()
    with torch.no_grad(), parts:
        found = model.get_base_model().lm_head(hidden)
    assert len(parts.of_weights(128)) == -(-len(base.lm_head.weight) // 60)
    assert off(found, hidden.double() @ base.lm_head.weight.double().t()) <= rounding(torch.bfloat16)


@pytest.mark.parametrize("dora", [False, True])
def test_backward_within_autocast(dora: bool) -> None:
    """Which PyTorch advises against, and people do."""
    x = torch.randn(ROWS, K).bfloat16().requires_grad_(True)
    W, more = torch.randn(N, K).bfloat16(), {}
    if dora:
        more = {"magnitude": torch.rand(N).add(0.5), "row_squares": lambda W: W.float().square().sum(1)}
    adapter = make_adapter(**more)

    y = dora_linear(x, lambda: W, None, adapter) if dora else lora_linear(x, lambda: W, None, [adapter])
    leaves, g = [x, adapter.A, adapter.B], torch.randn(ROWS, N).bfloat16()
    expected = torch.autograd.grad(y, leaves, g, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, leaves, g)
    assert all(map(torch.equal, found, expected))


def test_dropout_has_one_mask() -> None:
    x, W = torch.randn(ROWS, K).bfloat16().requires_grad_(True), torch.randn(N, K).bfloat16()
    adapter, g = make_adapter(dropout=0.5), torch.randn(ROWS, N).bfloat16()
    torch.manual_seed(3)
    y = lora_linear(x, lambda: W, None, [adapter])
    found = torch.autograd.grad(y, [x, adapter.A], g)
    torch.manual_seed(3)
    wide, A = x.detach().float().requires_grad_(True), adapter.A.detach().requires_grad_(True)
    dropped = nn.functional.dropout(wide, 0.5)
    exact = wide @ W.float().t() + 0.7 * dropped @ A.t() @ adapter.B.t()
    expected = torch.autograd.grad(exact, [wide, A], g.float())
    assert off(y, exact) <= rounding(torch.bfloat16)
    assert off(found[0], expected[0]) <= rounding(torch.bfloat16)
    assert off(found[1], expected[1]) <= SUMS


def test_the_dense_stream_of_a_calibration_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions its layers' errors are those of the same in float32 products, and no loop is run."""
    rows, config = rows_of(text()), NF4Config()
    products = _Products()
    model = llama().to(torch.bfloat16)
    with products:
        Streams = streams.Streams
        run_streams = Streams.run

        def only_here(self: Any, *args: Any) -> None:
            products.counting = True
            run_streams(self, *args)
            products.counting = False

        monkeypatch.setattr(Streams, "run", only_here)
        quantize_model(model, config, calibration=rows)
    assert not products.narrow


class _Products(TorchDispatchMode):
    """Matrix products of narrow tensors within it, while it counts: attention's are no `mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.narrow = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and self.counting:
            self.narrow += result.dtype == torch.bfloat16
        return result


def test_an_nf4_layer_multiplies_what_it_always_has() -> None:
    """The weight is rounded to the compute dtype first, as where there are instructions for it."""
    layer = nn.Sequential(nn.Linear(K, N)).to(torch.bfloat16)
    quantize_model(layer, NF4Config())
    x = torch.randn(ROWS, K).bfloat16()
    with torch.no_grad():
        expected = x.double() @ layer[0].dequantize(torch.bfloat16).double().t() + layer[0].bias.double()
        assert off(layer(x), expected) <= rounding(torch.bfloat16)


def test_what_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulated.is_emulated(torch.zeros(1, dtype=torch.bfloat16))
    assert emulated.is_emulated(torch.zeros(1, dtype=torch.float16))
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert not emulated.is_emulated(torch.zeros(1, dtype=dtype))
    planned = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    assert not emulated.is_emulated(planned)
    token = planned_device.set("cpu")
    found = emulated.is_emulated(planned)
    planned_device.reset(token)
    assert found
    monkeypatch.setattr(emulated, "_has_loops", lambda dtype: False)
    assert not emulated.is_emulated(torch.zeros(1, dtype=torch.bfloat16))


_generator = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator)


WEIGHT, BIAS = drawn(N, K), drawn(N)
PRODUCTS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (nn.functional.linear, (drawn(2, ROWS, K), WEIGHT), {}),
    "linear, biased": (nn.functional.linear, (drawn(2, ROWS, K), WEIGHT), {"bias": BIAS}),
    "addmm, as in Conv1D": (torch.addmm, (BIAS, drawn(ROWS, K), WEIGHT.t()), {}),
    "matmul": (torch.matmul, (drawn(2, 1, ROWS, K), WEIGHT.t()), {}),
    "@": (torch.Tensor.__matmul__, (drawn(2, ROWS, K), WEIGHT.t()), {}),
    "bmm": (torch.bmm, (drawn(2, ROWS, K), drawn(2, K, N)), {}),
    "attention": (
        nn.functional.scaled_dot_product_attention,
        tuple(drawn(2, 4, ROWS, 16) for _ in range(3)),
        {"attn_mask": drawn(1, 1, ROWS, ROWS), "scale": 0.3},
    ),
    "attention, causal": (
        nn.functional.scaled_dot_product_attention,
        tuple(drawn(2, 4, ROWS, 16) for _ in range(3)),
        {"is_causal": True},
    ),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", PRODUCTS)
def test_torchs_own_products_in_a_model_that_is_measured(name: str, dtype: torch.dtype) -> None:
    """As float32 has them on the same narrow inputs, rounded once."""
    product, args, named = PRODUCTS[name]

    def cast(value: Any, to: torch.dtype) -> Any:
        return value.to(dtype).to(to) if isinstance(value, Tensor) else value

    def call(to: torch.dtype) -> Tensor:
        found: Tensor = product(*(cast(v, to) for v in args), **{key: cast(v, to) for key, v in named.items()})
        return found

    with torch.no_grad():
        exact, wide = call(torch.float64), call(torch.float32)
        with emulated.WideProducts():
            found = call(dtype)
            unchanged = call(torch.float32)
    assert found.dtype == dtype
    assert off(found, exact) <= rounding(dtype)
    # the same sums but for float32's order, which may turn a rounding by one step
    assert torch.allclose(found.float(), wide.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(unchanged, wide)


def test_what_torch_refuses_or_writes_elsewhere_is_left_to_it() -> None:
    x, W = torch.randn(ROWS, K).bfloat16(), torch.randn(N, K).bfloat16()
    out = torch.zeros(ROWS, N, dtype=torch.bfloat16)
    with torch.no_grad(), emulated.WideProducts():
        with pytest.raises(TypeError):
            torch.matmul(3, W)
        torch.matmul(x, W.t(), out=out)
        assert nn.functional.linear(x, W[0]).shape == (ROWS,)
        assert nn.functional.linear(input=x, weight=W).dtype == torch.bfloat16
        for wrong in (W.float(), W.half()):
            with pytest.raises(RuntimeError, match="dtype"):
                nn.functional.linear(x, wrong)
        with torch.autocast("cpu"), _Products() as within:
            within.counting = True
            nn.functional.linear(x, W)
        assert within.narrow == 1
    assert off(out, x.double() @ W.double().t()) <= rounding(torch.bfloat16)


def test_products_with_gradients_and_of_few_rows_are_torchs_own() -> None:
    x, W = torch.randn(2, K).bfloat16(), torch.randn(N, K).bfloat16().requires_grad_()
    with emulated.WideProducts():
        with _Products() as within:
            within.counting = True
            y = nn.functional.linear(torch.cat([x, x]), W)
        assert within.narrow == 1
        y.sum().backward()
        with torch.no_grad(), _Products() as within:
            within.counting = True
            nn.functional.linear(x, W)
        assert within.narrow == 1
    assert W.grad is not None


def test_a_dense_model_is_measured_without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama().to(torch.bfloat16).train(), {"input_ids": tokens()}
    with _Products() as within:
        within.counting = True
        found = mean_loss(model, inputs)
        assert within.narrow == 0
    assert model.training
    assert found == pytest.approx(mean_loss(copy.deepcopy(model).float(), inputs), rel=1e-2)  # logits have 8 bits
    monkeypatch.setattr(emulated, "_has_loops", lambda dtype: False)
    with _Products() as within:
        within.counting = True
        mean_loss(model, inputs)
    assert within.narrow > 0


def test_a_compiled_model_is_measured() -> None:
    torch.compiler.reset()
    model, inputs = llama().to(torch.bfloat16).eval(), {"input_ids": tokens()}
    expected = mean_loss(model, inputs)
    model.compile(backend="eager")
    assert mean_loss(model, inputs) == pytest.approx(expected, rel=1e-2)  # a logit has 8 bits, a loss many logits
