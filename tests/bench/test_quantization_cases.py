"""What the cases of the suite measure, against numbers that are had in another way."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import llama
from byte_tokenizer import byte_tokenizer
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from hf_qlora import QuantizationBenchmark, quantize_model
from hf_qlora.bench import measure
from hf_qlora.bench.quantization import double_quant, latency, load, memory, merging, precision, tables, train_step
from hf_qlora.bench.quantization.result import Found, QuantizationResult
from hf_qlora.bench.quantization.rows import Row
from hf_qlora.bench.quantization.settings import Context, Settings, described
from hf_qlora.bench.train_step import run as step
from hf_qlora.bench.train_step.arms import CHUNKED, DOCUMENTED
from hf_qlora.merge import probe
from hf_qlora.merge.measure import trained_weights
from hf_qlora.quant.generation import fast_generation
from hf_qlora.quant.reference import dequantize_nf4, quantize_nf4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights are no smaller than those of a trained one, so that NF4 changes what it says."""
    where = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    model = llama()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def found(folder: Path) -> QuantizationResult:
    cases = ["memory", "precision", "double-quant", "train-step", "merge"]
    return QuantizationBenchmark(str(folder), cases, smoke=True).run()


def value(result: QuantizationResult, case: str, arm: str, metric: str, setting: str | None = None) -> float:
    rows = [row for row in result.cases[case].rows if (row.arm, row.metric) == (arm, metric)]
    [row] = [row for row in rows if (not row.layer if setting is None else row.setting == setting)]
    return row.values[0]


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def test_bytes_are_those_of_the_shapes(folder: Path, found: QuantizationResult) -> None:
    model = dense(folder)
    whole = 2 * sum(parameter.numel() for parameter in model.parameters())
    # The rotary embedding's frequencies are two buffers of float32, half a head wide.
    whole += 2 * 4 * (model.config.head_dim // 2)
    weights = [layer.weight.numel() for layer in linear(model).values()]
    codes = sum(n // 2 for n in weights)
    tables = 4 * (16 + 256)  # NF4's levels, and those of 8 bits
    scales = sum(n // 64 + 4 * math.ceil(n / 64 / 256) + 4 for n in weights)
    assert value(found, "memory", "dense", "weight_bytes") == whole
    arm = "NF4, quantized in place"
    assert value(found, "memory", arm, "quantized_bytes") == codes
    assert value(found, "memory", arm, "dense_bytes") == whole - 2 * sum(weights)
    assert 0 <= value(found, "memory", arm, "scale_bytes") - scales <= len(weights) * tables
    kinds = ("quantized_bytes", "scale_bytes", "dense_bytes")
    for name in memory.ARMS:
        total = sum(value(found, "memory", name, kind) for kind in kinds)
        assert value(found, "memory", name, "weight_bytes") == total
    lora = sum(4 * 4 * (layer.in_features + layer.out_features) for layer in linear(model).values())  # rank 4, float32
    adapted = value(found, "memory", "NF4 + LoRA", "dense_bytes")
    assert adapted - value(found, "memory", arm, "dense_bytes") == lora


def test_the_estimate_before_loading_is_what_the_model_takes(folder: Path, found: QuantizationResult) -> None:
    _, sizes, identity = described(folder, Settings(smoke=True))
    assert abs(sizes.dense - value(found, "memory", "dense", "weight_bytes")) <= 1024  # buffers of a few bytes
    packed = value(found, "memory", "NF4, quantized in place", "weight_bytes")
    assert sizes.nf4 == pytest.approx(packed, rel=0.1)  # tables, which it leaves out
    assert identity["parameters"] == sum(p.numel() for p in dense(folder).parameters())


@pytest.mark.parametrize(("arm", "nested"), [("NF4, scales in 8 bits", True), ("NF4, scales in float32", False)])
@pytest.mark.parametrize("size", [64, 128])
def test_double_quant_is_the_specifications(
    folder: Path, found: QuantizationResult, arm: str, nested: bool, size: int
) -> None:
    shapes = {tuple(layer.weight.shape): layer.weight for layer in linear(dense(folder)).values()}
    counts = [weight.numel() for weight in shapes.values()]
    scales = sum(n // size + 4 * math.ceil(n / size / 256) + 4 if nested else 4 * (n // size) for n in counts)
    bits = 4 + 8 * scales / sum(counts)
    assert value(found, "double-quant", arm, "bits", f"blocks of {size}") == pytest.approx(bits, rel=1e-12)
    squares = norm = 0.0
    for layer in linear(dense(folder)).values():
        W = layer.weight.detach()
        back = dequantize_nf4(quantize_nf4(W, size, nested))
        squares += float((W.double() - back.double()).square().sum())
        norm += float(W.double().square().sum())
    error = value(found, "double-quant", arm, "relative_error", f"blocks of {size}")
    # The specification breaks ties and nests in its own order: a few weights of 200,000 move by a step.
    assert error == pytest.approx(math.sqrt(squares / norm), rel=1e-3)


def of_all(model: nn.Module) -> str:
    """A hash of every tensor of a model, and of its dtype."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_reference_is_only_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deck's benchmark cast its reference with `.to(float32)`, in place, and found an error of 0."""
    context, reference = Context(Settings(smoke=True), folder, folder), dense(folder)
    before = of_all(reference)
    monkeypatch.setattr(Context, "dense", lambda _: reference)
    rows = precision.run(context)
    assert of_all(reference) == before
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in reference.modules())
    errors = [row.values[0] for row in rows if row.metric in ("mse", "relative_error", "kl") and row.arm != "dense"]
    assert errors
    assert min(errors) > 0
    again = [row for row in precision.run(context) if row.metric == "relative_error"]
    assert again == [row for row in rows if row.metric == "relative_error"]


def test_layer_errors_are_those_of_the_difference(folder: Path, found: QuantizationResult) -> None:
    reference, packed = dense(folder), quantize_model(dense(folder))
    layers = linear(reference)
    measured = {row.setting for row in found.cases["precision"].rows if row.layer}
    assert measured == set(layers)
    for name, layer in layers.items():
        W, Q = layer.weight.detach().double(), packed.get_submodule(name).dequantize(torch.bfloat16).double()
        expected = {
            "mse": float((W - Q).square().mean()),
            "max_error": float((W - Q).abs().max()),
            "relative_error": float((W - Q).norm() / W.norm()),
        }
        for metric, number in expected.items():
            # Differences of bfloat16 values are exact in float32, sums are in float64.
            assert value(found, "precision", "NF4", metric, name) == pytest.approx(number, rel=1e-6)


def test_divergence_and_perplexity_are_float64s() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, n, 50, generator=generator, dtype=torch.float64) for n in (5, 9)]
    ids = [torch.randint(50, (1, n), generator=generator) for n in (5, 9)]
    p, q = ([each[i].log_softmax(-1).float() for each in logits] for i in (0, 1))
    positions = kl = 0.0
    losses: list[float] = []
    for pair, row in zip(logits, ids, strict=True):
        a, b = (each.softmax(-1) for each in pair)
        kl += sum(float(x * math.log(x / y)) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        positions += len(a)
        losses += [-math.log(float(a[i, row[0, i + 1]])) for i in range(len(a) - 1)]
    assert precision.divergence(p, q) == pytest.approx(kl / positions, rel=1e-6)  # of float32's rounding of logs
    assert precision.divergence(p, p) == 0
    assert precision.perplexity(p, ids) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_perplexity_is_of_the_models_own_loss(folder: Path, found: QuantizationResult) -> None:
    model = dense(folder)
    ids, _ = probe.rows(model, None, None)
    with torch.no_grad():
        total = sum(float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in ids)
    expected = math.exp(total / sum(row.shape[1] - 1 for row in ids))
    # transformers takes the loss of logits in float32 too; the sums are in another order.
    assert value(found, "precision", "dense", "perplexity") == pytest.approx(expected, rel=1e-4)
    assert value(found, "precision", "NF4", "perplexity") != value(found, "precision", "dense", "perplexity")


def test_named_texts_are_what_is_read(folder: Path, tmp_path: Path) -> None:
    model = dense(folder)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times.")
    found = QuantizationBenchmark(
        str(tmp_path / "model"), ["precision"], smoke=True, texts=str(tmp_path / "prose.txt")
    ).run()
    assert found.cases["precision"].notes == ("KL and perplexity are on 1 given text.",)
    text = "It was the best of times, it was the worst of times."
    digest = hashlib.sha256(json.dumps([text]).encode()).hexdigest()
    assert found.settings["texts"] == f"sha256 {digest[:12]}"
    ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert value(found, "precision", "dense", "perplexity") == pytest.approx(math.exp(loss), rel=1e-4)


def test_ours_and_stock_take_the_same_step(found: QuantizationResult) -> None:
    for metric, tolerance in (("loss", 1e-3), ("gradient_norm", 2e-2)):  # bfloat16: 2^-8 of a product
        numbers = [
            row.values[0]
            for row in found.cases["train-step"].rows
            if row.metric == metric and row.arm in (DOCUMENTED, CHUNKED)
        ]
        assert len(numbers) == 2
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance)
        assert numbers[0] > 0


def test_the_train_step_is_of_the_models_own_weights(folder: Path) -> None:
    case = train_step.OfModel("", 2, 16, 4, folder=str(folder))
    model = dense(folder)
    assert of_all(case.dense()) == of_all(model)
    assert case.batch(3)["input_ids"].shape == (2, 16)
    assert case.architecture().intermediate_size == model.config.intermediate_size


def test_rounding_to_nf4_again_loses_more_than_a_dense_merge(found: QuantizationResult) -> None:
    kl = {arm: value(found, "merge", arm, "kl") for arm in (*merging.ARMS, merging.WITHOUT)}
    assert kl["merge, dequantized"] < 0.1 * kl["merge, nf4"]
    assert kl["merge_and_unload"] == pytest.approx(kl["merge, dequantized"], rel=0.5)
    # PEFT rounds the same sum to the same levels; its sum is in bfloat16.
    assert kl[merging.PEFTS] == pytest.approx(kl["merge, nf4"], rel=0.3)


def test_each_layers_delta_is_the_share_of_its_weight(folder: Path) -> None:
    model = merging._ours(folder, Settings(smoke=True))
    merging.scaled(model, 0.02)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            W, T = trained_weights(layer, ["default"])
            assert float((T - W).norm() / W.norm()) == pytest.approx(0.02, rel=1e-3)


def test_arms_of_latency_continue_alike(folder: Path) -> None:
    """Not a broken arm is timed: from the same prompt all NF4 arms say what a forward of the whole text says."""
    models = latency._models(Context(Settings(smoke=True), folder, folder))
    assert (latency.FAST in models) == (not latency._obstacle(Settings(smoke=True)))
    assert any(float(B.detach().abs().max()) > 0 for B in lora_Bs(models[latency.LORA]))
    for B in lora_Bs(models[latency.LORA]):
        B.data.zero_()  # a fresh adapter, which says what its base says
    ids = torch.arange(1, 9)[None]
    with ExitStack() as ways, torch.no_grad():
        expected = models[latency.NF4](input_ids=ids).logits[0, -1].float()
        if latency.FAST in models:
            ways.enter_context(fast_generation(models[latency.FAST]))
        for name in set(models) - {latency.DENSE}:
            model = models[name] if name == latency.FAST else copy.deepcopy(models[name])
            for _ in range(2):  # the first repacks weights
                found = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
                # bitsandbytes' kernel rounds scales to bfloat16: 2^-9 of a weight, through two layers.
                assert float((found - expected).norm() / expected.norm()) < 0.05, name


def lora_Bs(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_B" in name]


def test_seconds_are_of_the_prompt_and_of_each_new_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts its calls, and a clock that counts its readings of it."""

    class Counting(nn.Module):
        calls: list[tuple[int, int]]

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            self.calls.append(tuple(input_ids.shape))  # type: ignore[arg-type]
            output = type("Output", (), {})()
            output.logits, output.past_key_values = torch.zeros(*input_ids.shape, 5), None
            return output

    model = Counting()
    model.calls = []
    monkeypatch.setattr(latency, "clock", lambda _: float(len(model.calls)))
    assert latency.generate(model, torch.ones(3, 7, dtype=torch.long), 4, "cpu") == (1.0, 4.0)
    assert model.calls == [(3, 7), *[(3, 1)] * 4]


def test_a_ratio_is_of_the_reference_in_the_same_round() -> None:
    """A machine that slows down by rounds: the arm takes 2, 2 and 5 times as long, and the medians say 4."""
    rows = (
        Row("dense", "seconds", (1.0, 3.0, 0.5), "decode", 1),
        Row("NF4", "seconds", (2.0, 6.0, 2.5), "decode", 1),
    )
    [table] = tables.of_case(QuantizationResult({}, {}, {"latency": Found(rows, 1.0, {})}), "latency")
    assert table.body[1][table.head.index("÷ dense")] == "2.00"


def test_a_percentile_is_of_ten_rounds_or_none() -> None:
    for count, title in ((9, "most"), (10, "p95")):
        rows = (Row("merge, nf4", "seconds", tuple(float(i) for i in range(1, count + 1))),)
        [table] = tables.of_case(QuantizationResult({}, {}, {"merge": Found(rows, 1.0, {})}), "merge")
        upmost = table.body[0][table.head.index(title)]
        assert upmost == ("9,000" if count == 9 else "9,550")  # 0.95 · 9 steps above 1


def test_names_are_no_markup_in_the_terminal() -> None:
    rows = (Row("[red]a[/red]", "seconds", (1.0,)), Row("[/]", "kl", (1.0,)))
    result = QuantizationResult({}, {}, {"merge": Found(rows, 1.0, {})})
    console = Console(width=160)
    with console.capture() as captured:
        for table in tables.of_case(result, "merge"):
            console.print(tables._rich(table))
    assert "[red]a[/red]" in captured.get()
    assert "[/]" in captured.get()


@pytest.mark.parametrize(
    ("case", "arms"), [("load", 4), ("double-quant", 8), ("merge", len(merging.ARMS)), ("train-step", 3)]
)
def test_another_arm_is_first_in_each_round(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str, arms: int
) -> None:
    """Of what `in_turn` is given in each round, each arm has been the first once, after as many rounds as arms."""
    first: list[str] = []

    def seen(given: Any, number: int) -> Any:
        order = measure.in_turn(given, number)
        assert sorted(map(repr, order)) == sorted(map(repr, measure.in_turn(given, 0)))
        if number >= 0:
            first.append(repr(order[0]))
        return order

    module = {"load": load, "double-quant": double_quant, "merge": merging, "train-step": step}[case]
    monkeypatch.setattr(module, "in_turn", seen)
    monkeypatch.setattr(merging, "MOST_ROUNDS", arms)
    found = QuantizationBenchmark(str(folder), [case], smoke=True, rounds=arms).run()
    assert {len(row.values) for row in found.cases[case].rows if row.metric == "seconds"} == {arms}
    assert len(set(first)) == arms


def test_merging_has_a_round_that_is_not_counted_and_says_how_many_are(found: QuantizationResult) -> None:
    assert found.cases["merge"].notes == ("Timings are of 2 rounds, after one that is not counted.",)
    assert {len(row.values) for row in found.cases["merge"].rows if row.metric == "seconds"} == {2}
    assert all(value(found, "merge", arm, "peak_bytes") >= 0 for arm in merging.ARMS)


def test_the_table_has_ratios_and_rates_of_medians() -> None:
    setting = "decode, batch 8"
    rows = (
        Row("dense", "seconds", (0.25, 0.125, 2.0), setting, 32),
        Row("NF4", "seconds", (0.5, 0.25, 4.0), setting, 32),
    )
    result = QuantizationResult({}, {}, {"latency": Found(rows, 1.0, {})})
    [table] = tables.of_case(result, "latency")
    assert table.head == ("setting", "arm", "median, ms", "÷ dense", "mean", "std", "most", "least", "tokens/s")
    # of 0.25, 0.5 and 4: mean 4.75 / 3; deviations² sum to 8.7916…, over 2
    assert table.body[1] == (setting, "NF4", "500.00", "2.00", "1,583", "2,097", "4,000", "250.00", "64.0")
