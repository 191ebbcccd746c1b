"""The Triton kernel gives the bits of bitsandbytes and of the reference, run by Triton's interpreter on a CPU.

The interpreter does all but two operations, the product and the rounding to bfloat16, as the GPU does them. For these
the code that the compiler makes for an H100 is read. With a GPU, the kernel runs there too, beside bitsandbytes'.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_qlora.quant import dequantize
from hf_qlora.quant.codebook import dynamic_map, nf4_levels
from hf_qlora.quant.dequantize import dequantize_weight
from hf_qlora.quant.reference import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    WEIGHT_DTYPES,
    NestedAbsmax,
    NF4Tensor,
    dequantize_nf4,
    quantize_nf4,
)


pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf-qlora[triton]'")

NAME = "hf_qlora.kernels.triton"
# One and three weights, a last byte half full, a last block of 16, whole blocks, two programs, a group of 256 scales
# and one of 107 with a last block that is not whole.
SHAPES = [(1, 1), (1, 3), (5, 7), (5, 16), (64, 64), (33, 62), (31, 375)]
BITS = {2: torch.int16, 4: torch.int32}


def load(interpret: bool) -> ModuleType:
    """A copy of the module of its own: whether Triton interprets is settled when it is imported."""
    spec = find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NAME, module)
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return load(interpret=True)


@pytest.fixture(autouse=True)
def _the_interpreted_one(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what imports the kernel; bitsandbytes compiles some dequantizations, 17 s each, for the same numbers."""
    monkeypatch.setitem(sys.modules, NAME, interpreted)
    dequantize._triton_is_right.cache_clear()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    dequantize._triton_is_right.cache_clear()


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(BITS[weight.itemsize])


def by_kernel(kernel: ModuleType, quantized: NF4Tensor, out: Tensor | None = None) -> Tensor:
    scales, nested = quantized.absmax, None
    if isinstance(scales, NestedAbsmax):
        nested = kernel.Nested(dynamic_map(), scales.absmax, scales.offset)
        scales = scales.codes
    weight: Tensor = kernel.dequantize_nf4(
        quantized.packed, scales, nf4_levels(), quantized.shape, quantized.dtype, quantized.block_size, nested, out
    )
    return weight


def bnb_state(quantized: NF4Tensor, shape: tuple[int, ...] | None = None) -> QuantState:
    common = {
        "shape": torch.Size(shape or quantized.shape),
        "dtype": quantized.dtype,
        "blocksize": quantized.block_size,
        "quant_type": "nf4",
        "code": nf4_levels(),
    }
    scales = quantized.absmax
    if isinstance(scales, Tensor):
        return QuantState(scales, **common)
    group = QuantState(scales.absmax, blocksize=NESTED_BLOCK_SIZE, code=dynamic_map(), dtype=torch.float32)
    return QuantState(scales.codes, offset=scales.offset, state2=group, **common)


def assert_same_bits(kernel: ModuleType, quantized: NF4Tensor) -> None:
    found = by_kernel(kernel, quantized)
    assert (found.shape, found.dtype) == (quantized.shape, quantized.dtype)
    # As one row: for other rows that are not whole blocks bitsandbytes' CPU kernels read wrong scales.
    row = bnb_state(quantized, (1, quantized.shape.numel()))
    reference = dequantize_nf4(quantized)
    theirs = bnb.dequantize_4bit(quantized.packed[:, None], row).reshape(quantized.shape)
    # On AVX512-BF16 processors the instruction that rounds to bfloat16 takes subnormal numbers for 0 (VCVTNE2PS2BF16).
    subnormal = (reference != 0) & (reference.abs() < torch.finfo(reference.dtype).smallest_normal)
    flushed = subnormal & (theirs == 0) & (quantized.dtype == torch.bfloat16)
    for expected, exempt in ((reference, torch.zeros_like(flushed)), (theirs, flushed)):
        different = (bits(found) != bits(expected)) & ~exempt
        assert not different.any(), f"{int(different.sum())} of {found.numel()} weights differ"


def weight_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape)
    limits = torch.finfo(dtype)
    if kind == "zero":
        weight[::2] = 0
    elif kind == "huge":
        weight *= 1e30 if dtype != torch.float16 else limits.max / 2
    elif kind == "tiny":  # rows of all magnitudes down to the smallest numbers
        weight *= torch.logspace(0, math.log10(limits.smallest_normal) - 2, shape[0])[:, None]
    return weight.clamp(limits.min, limits.max).to(dtype)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_same_bits_for_all_block_sizes_and_tails(
    interpreted: ModuleType, dtype: torch.dtype, double_quant: bool, block_size: int
) -> None:
    for shape in SHAPES:
        assert_same_bits(interpreted, quantize_nf4(torch.randn(shape).to(dtype), block_size, double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("kind", ["zero", "huge", "tiny"])
def test_same_bits_for_extreme_values(
    interpreted: ModuleType, kind: str, dtype: torch.dtype, double_quant: bool
) -> None:
    for block_size in (32, 64):
        assert_same_bits(interpreted, quantize_nf4(weight_of(kind, (50, 63), dtype), block_size, double_quant))


def test_tiny_values_have_scales_that_are_no_normal_numbers() -> None:
    absmax = quantize_nf4(weight_of("tiny", (50, 63), torch.float32), 64, False).absmax
    assert isinstance(absmax, Tensor)
    assert (absmax[absmax > 0] < 2.0**-126).any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in the interpreter
@given(st.data())
@settings(max_examples=40, deadline=None, database=None)
def test_same_bits_for_any_bytes(interpreted: ModuleType, data: st.DataObject) -> None:
    """Also for codes and scales that no quantization writes, and for weights past float16's largest number."""
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 130)), "shape")
    block_size, dtype = data.draw(st.sampled_from(BLOCK_SIZES)), data.draw(st.sampled_from(WEIGHT_DTYPES))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    blocks = -(-math.prod(shape) // block_size)
    packed = torch.randint(256, (-(-math.prod(shape) // 2),), generator=random, dtype=torch.uint8)
    magnitude = 10.0 ** data.draw(st.integers(-44, 30), "magnitude")
    scales: Tensor | NestedAbsmax = torch.randn(blocks, generator=random) * magnitude
    if data.draw(st.booleans(), "double_quant"):
        codes = torch.randint(256, (blocks,), generator=random, dtype=torch.uint8)
        groups = torch.randn(-(-blocks // NESTED_BLOCK_SIZE), generator=random) * magnitude
        scales = NestedAbsmax(codes, groups, torch.randn((), generator=random) * magnitude)
    assert_same_bits(interpreted, NF4Tensor(packed, scales, torch.Size(shape), dtype, block_size))


def test_same_bits_for_weights_below_the_normal_numbers(interpreted: ModuleType) -> None:
    packed = torch.arange(256).to(torch.uint8).repeat(4)
    for dtype in WEIGHT_DTYPES:
        absmax = torch.full((32,), 2 * float(torch.finfo(dtype).smallest_normal))
        assert_same_bits(interpreted, NF4Tensor(packed, absmax, torch.Size((32, 64)), dtype, 64))


def test_scales_are_rounded_before_the_offset_is_added(interpreted: ModuleType) -> None:
    """The cases in which a fused multiply-add would show, and that there are such cases."""
    blocks = 2048
    nested = NestedAbsmax(torch.arange(blocks).to(torch.uint8), torch.rand(blocks // 256), torch.rand(()))
    packed = torch.full((blocks * 16,), 0xFF, dtype=torch.uint8)
    quantized = NF4Tensor(packed, nested, torch.Size((blocks, 32)), torch.float32, 32)
    levels, groups = dynamic_map()[nested.codes.int()], nested.absmax.repeat_interleave(256)
    fused = (levels.double() * groups.double() + nested.offset.double()).float()
    found = by_kernel(interpreted, quantized)[:, 0]
    assert torch.equal(found, levels * groups + nested.offset)
    assert not torch.equal(found, fused)


def test_out_is_written_and_nothing_beside_it(interpreted: ModuleType) -> None:
    for shape in SHAPES:
        quantized = quantize_nf4(torch.randn(shape).bfloat16(), 64)
        n = quantized.shape.numel()
        around = torch.full((n + 20,), 42.0, dtype=torch.bfloat16)
        out = around[10 : 10 + n].view(shape)
        assert by_kernel(interpreted, quantized, out) is out
        assert torch.equal(out, dequantize_nf4(quantized))
        assert (around[:10] == 42).all()
        assert (around[10 + n :] == 42).all()


def test_a_weight_without_values(interpreted: ModuleType) -> None:
    quantized = NF4Tensor(torch.empty(0, dtype=torch.uint8), torch.empty(0), torch.Size((0, 5)), torch.float32, 64)
    assert by_kernel(interpreted, quantized).shape == (0, 5)


def test_weights_past_two_to_the_31(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two programs of a weight whose offsets take 33 bits. Of its 5 GiB only their pages are ever touched."""
    from triton.runtime.interpreter import interpreter_builder

    tile, kernel = interpreted.TILE, interpreted._dequantize
    numel = 2**32 // 2 + 3 * tile + 6
    tail = slice(numel - tile - 6, None)

    class LastTwo:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def place(x: int, y: int, z: int) -> None:
                interpreter_builder.grid_idx = (x + grid[0] - 2, y, z)

            monkeypatch.setattr(interpreter_builder, "set_grid_idx", place)
            return kernel[(2,)]

    monkeypatch.setattr(interpreted, "_dequantize", LastTwo())
    packed, absmax = torch.empty(numel // 2, dtype=torch.uint8), torch.ones(-(-numel // 4096))
    absmax[-2:] = torch.tensor([0.5, 3.0])
    packed[tail.start // 2 :] = torch.randint(256, ((tile + 6) // 2,), dtype=torch.uint8)
    out = interpreted.dequantize_nf4(packed, absmax, nf4_levels(), (1, numel), torch.float16, 4096)
    codes = torch.stack([packed[tail.start // 2 :] >> 4, packed[tail.start // 2 :] & 15], 1).view(-1)
    scales = absmax[torch.arange(tail.start, numel) // 4096]
    assert torch.equal(out[0, tail], (nf4_levels()[codes.int()] * scales).half())


ARGUMENTS: dict[str, Any] = {
    "packed": torch.zeros(64, dtype=torch.uint8),
    "absmax": torch.zeros(2),
    "levels": torch.zeros(16),
    "shape": (2, 64),
    "dtype": torch.float32,
    "block_size": 64,
}
NESTED: dict[str, Any] = {"table": torch.zeros(256), "absmax": torch.zeros(1), "offset": torch.zeros(())}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": torch.float64}, r"dtype=torch.float64 with block_size=64 is not supported; choose from"),
        ({"block_size": 48}, r"block_size=48 is not supported; choose from .*4096"),
        ({"packed": torch.zeros(63, dtype=torch.uint8)}, r"packed has 63 elements .* needs 64 of torch.uint8 on cpu"),
        ({"packed": torch.zeros(64, dtype=torch.int8)}, r"packed has 64 elements of torch.int8"),
        ({"packed": torch.zeros(128, dtype=torch.uint8)[::2]}, r"packed has .* strides \(2,\); .* contiguous"),
        ({"absmax": torch.zeros(3)}, r"absmax has 3 elements"),
        ({"absmax": torch.zeros(2, dtype=torch.uint8)}, r"absmax has 2 elements of torch.uint8"),
        ({"absmax": torch.zeros(2, device="meta")}, r"absmax has 2 elements of torch.float32 on meta"),
        ({"levels": torch.zeros(15)}, r"levels has 15 elements"),
        ({"out": torch.zeros(2, 63)}, r"out has 126 elements"),
        ({"out": torch.zeros(2, 64).half()}, r"out has 128 elements of torch.float16"),
        ({"out": torch.zeros(64, 2).t()}, r"out has .* strides \(1, 2\)"),
        ({"out": torch.zeros(64, 2)}, r"out has shape \(64, 2\); the weight has \(2, 64\)"),
        ({"nested": {}}, r"absmax has 2 elements of torch.float32"),
        ({"nested": {"table": torch.zeros(255)}}, r"nested.table has 255 elements"),
        ({"nested": {"absmax": torch.zeros(2)}}, r"nested.absmax has 2 elements"),
        (
            {"nested": {"offset": torch.zeros((), dtype=torch.float64)}},
            r"nested.offset has 1 elements of torch.float64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(interpreted: ModuleType, wrong: dict[str, Any], message: str) -> None:
    arguments = ARGUMENTS | wrong
    if "nested" in wrong:
        arguments["nested"] = interpreted.Nested(**NESTED | wrong["nested"])
        if wrong["nested"]:
            arguments["absmax"] = torch.zeros(2, dtype=torch.uint8)
    interpreted.dequantize_nf4(**ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        interpreted.dequantize_nf4(**arguments)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = load(interpret=False)
    assert not compiled.INTERPRETED
    with pytest.raises(ValueError, match=r"is on device cpu; choose 'auto' .* set TRITON_INTERPRET=1 before"):
        compiled.dequantize_nf4(**ARGUMENTS)
    monkeypatch.setitem(sys.modules, NAME, compiled)
    packed, state = bnb.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    with pytest.raises(ValueError, match="is on device cpu"):
        dequantize_weight(packed, state, impl="triton")


# The choice, with a kernel at hand.


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("wanted", [None, *WEIGHT_DTYPES])
@pytest.mark.parametrize("packed_from", WEIGHT_DTYPES)
def test_same_bits_in_every_dtype(packed_from: torch.dtype, wanted: torch.dtype | None, double_quant: bool) -> None:
    """Rounded to the dtype it was quantized from, then to the wanted one, though the kernel may skip the former."""
    weight = torch.randn(40, 128).to(packed_from)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    expected = bnb.dequantize_4bit(packed, state).to(wanted or packed_from)
    for storage in (torch.uint8, torch.bfloat16, torch.float32):  # FSDP needs that of the compute dtype
        stored = packed.view(-1).view(storage)[:, None]
        found = dequantize_weight(stored, state, wanted, impl="triton")
        assert found.dtype == expected.dtype
        assert torch.equal(bits(found), bits(expected))


def test_the_choice_holds_for_all_layers(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = interpreted.dequantize_nf4
    monkeypatch.setattr(interpreted, "dequantize_nf4", lambda *a: calls.append(a) or original(*a))
    packed, state = bnb.quantize_4bit(torch.randn(4, 64), quant_type="nf4", compress_statistics=True)
    for implementation, count in [("auto", 0), ("bitsandbytes", 0), ("triton", 1)]:
        monkeypatch.setattr(dequantize, "implementation", implementation)
        dequantize_weight(packed, state)
        assert len(calls) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "do not know quant_type='fp4'"),
        ({"absmax": torch.zeros(4).bfloat16()}, "do not know scales in torch.bfloat16"),
        ({"nested": True, "state2": QuantState(torch.zeros(1), blocksize=64)}, "do not know scales in groups of 64"),
    ],
)
def test_formats_that_triton_does_not_know(change: dict[str, Any], message: str) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    assert dequantize._triton_serves(packed.device, state, torch.float32)
    for name, value in change.items():
        setattr(state, name, value)
    assert not dequantize._triton_serves(packed.device, state, torch.float32)
    with pytest.raises(ValueError, match=message):
        dequantize_weight(packed, state, impl="triton")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_the_check_passes_the_kernel(dtype: torch.dtype, double_quant: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert dequantize._triton_is_right(torch.device("cpu"), dtype, dtype, 64, double_quant)
    assert not caplog.records


def test_the_check_sees_one_wrong_bit(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = interpreted.dequantize_nf4

    def off_by_one_bit(*args: Any) -> Tensor:
        weight: Tensor = original(*args)
        weight.view(torch.int16)[-1, -1] ^= 1
        return weight

    monkeypatch.setattr(interpreted, "dequantize_nf4", off_by_one_bit)
    with caplog.at_level(logging.WARNING):
        assert not dequantize._triton_is_right(torch.device("cpu"), torch.bfloat16, torch.bfloat16, 64, True)
    assert "1 of 8160 bytes differ. bitsandbytes is used." in caplog.text


# The machine code.


def compile_for_h100(kernel: ModuleType, dtype: str, numel: str = "i32", block_size: int = 64) -> dict[str, str]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(["levels", "table", "group", "offset"], "*fp32")
    signature = {"out": f"*{dtype}", "packed": "*u8", "absmax": "*u8"} | pointers | {"numel": numel, "size": numel}
    run = 2 if dtype == "fp32" else 4
    constants = {"BLOCK": block_size, "NESTED": True, "NATIVE": True, "RUN": run}
    source = ASTSource(
        fn=kernel._dequantize,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(signature))},
    )
    options = {"num_warps": kernel.WARPS, "enable_fp_fusion": False}
    code: dict[str, str] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    return code


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(("dtype", "rounding"), [("fp16", r"cvt\.rn\.f16"), ("bf16", r"cvt\.rn\.bf16"), ("fp32", "")])
def test_code_for_an_h100(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, dtype: str, rounding: str, block_size: int
) -> None:
    """Products that flush, roundings to nearest, nothing fused, stores of 16 bytes, nothing exchanged by threads."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = load(interpret=False)
    for numel in ("i32", "i64"):
        code = compile_for_h100(kernel, dtype, numel, block_size)
        ptx = code["ptx"]
        assert "convert_layout" not in code["ttgir"]
        assert "fma." not in ptx
        assert re.search(rounding, ptx)
        stores = re.findall(r"st\.global\S*", ptx)
        assert stores
        assert all("v4" in store for store in stores)
        products = re.findall(r"mul\S*\.f32", ptx)
        assert products
        assert set(products) == {"mul.rn.ftz.f32"}


# On a GPU.


def seconds(call: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        call()
    start.record()
    for _ in range(50):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 50e3


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_on_a_gpu(
    dtype: torch.dtype, double_quant: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, NAME, load(interpret=False))
    for shape in [*SHAPES, (4096, 14336)]:
        for block_size in BLOCK_SIZES if shape[0] < 4096 else (64,):
            weight = weight_of("tiny" if shape == (33, 62) else "normal", shape, dtype).cuda()
            packed, state = bnb.quantize_4bit(
                weight, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
            )
            expected = bnb.dequantize_4bit(packed, state).view(shape)
            assert torch.equal(bits(dequantize_weight(packed, state, impl="triton")), bits(expected))
    assert dequantize._triton_serves(packed.device, state, dtype)
    moved = packed.nbytes + weight.nbytes
    for impl in ("bitsandbytes", "triton"):
        time = seconds(lambda impl=impl: dequantize_weight(packed, state, impl=impl))
        with capsys.disabled():
            print(f"\n{dtype}, nested={double_quant}, {impl}: {time * 1e6:.0f} µs, {moved / time / 1e9:.0f} GB/s")


@pytest.mark.gpu
def test_the_loss_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, load(interpret=False))
    for dtype in WEIGHT_DTYPES:
        for rows, V in ((1, 1), (3, 1000), (5, 8192), (7, 128_256)):
            for smoothing in (0.0, 0.1):
                check_loss(sys.modules[NAME], dtype, rows, V, smoothing, torch.device("cuda"))


# Half a unit in the last place of the result's dtype. In float32 the interpreter adds thousands one after the other.
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-15}


def check_loss(
    module: ModuleType, dtype: torch.dtype, rows: int, V: int, smoothing: float, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(V)
    z = (4 * torch.randn(rows, V, generator=generator)).to(dtype)
    target = torch.randint(V, (rows,), generator=generator)
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none", label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    found = z.to(device)
    losses = module.logits_to_gradient(found, target.to(device), smoothing)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    # Absolutely: what float32 makes of p − q near 0, and float16's least number, 6e-8.
    torch.testing.assert_close(found.double().cpu(), slope, rtol=2 * ROUNDED[dtype], atol=2e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (2, 64), (2, 9000)], ids=str)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_the_loss_is_that_of_torch(
    dtype: torch.dtype, size: tuple[int, int], smoothing: float, interpreted: ModuleType
) -> None:
    check_loss(interpreted, dtype, *size, smoothing, torch.device("cpu"))


def test_the_loss_of_nothing_and_of_impossible_classes(interpreted: ModuleType) -> None:
    assert interpreted.logits_to_gradient(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    z = torch.tensor([[0.0, -math.inf, 1.0]])
    expected = torch.nn.functional.cross_entropy(z.clone(), torch.tensor([2]))
    assert interpreted.logits_to_gradient(z, torch.tensor([2])) == pytest.approx(float(expected))
    assert z[0, 1] == 0
    assert z.sum() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("z", "target"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 2).t(), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
    ],
    ids=["float64", "strides", "int32", "targets"],
)
def test_logits_it_was_not_written_for_are_refused(z: Tensor, target: Tensor, interpreted: ModuleType) -> None:
    with pytest.raises(ValueError, match="are not supported"):
        interpreted.logits_to_gradient(z, target)


@pytest.mark.parametrize("wanted", [-1, 3, -100])
def test_a_class_that_there_is_not_is_refused(wanted: int, interpreted: ModuleType) -> None:
    """Row 0 has nothing before it, and row 1 would read of row 0 or 2 what may be a gradient by then."""
    with pytest.raises(RuntimeError, match=f"index {wanted} is out of bounds"):
        interpreted.logits_to_gradient(torch.zeros(3, 3), torch.tensor([0, wanted, 2]))
