"""One forward with two streams is two models: what these compute by themselves, heard by hooks, is the oracle."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, SIZES, VOCAB, Architecture, bert, gpt2, llama
from calibrating import HELD_OUT, LENGTH, ROWS, calibrated, codes, flat, heard, rows_of, text
from torch import Tensor, nn

from hf_qlora import NF4Config, quantize_model
from hf_qlora.quant.calibrate import rounder, streams
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.grams import Grams
from hf_qlora.quant.calibrate.group import Method, round_group
from hf_qlora.quant.calibrate.run import calibration_report
from hf_qlora.quant.dequantize import dequantize_weight
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.quant.packing import quantize_weight


# Products in float32 of other batch sizes, through two layers.
SAME = 1e-4

IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(streams, "ROWS_AT_A_TIME", 3)  # of eight, in three forwards; a fourth has those held out


def images(rows: int = ROWS) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32)}


def whisper() -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config).eval()


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(ROWS, 8, 32), "decoder_input_ids": torch.randint(1, VOCAB, (ROWS, 6))}


def clip() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config={**sizes, "vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**sizes, **IMAGE},
        projection_dim=32,
    )
    return tf.CLIPModel(config).eval()


def pair(decoder: int) -> dict[str, Tensor]:
    mask = text(length=decoder, padded=True)["attention_mask"]
    ids = torch.randint(1, VOCAB, mask.shape) * mask
    return {**text(padded=True), "decoder_input_ids": ids, "decoder_attention_mask": mask}


def of_family(name: str) -> Callable[[], nn.Module]:
    return next(family.make for family in ARCHITECTURES if family.name == name)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (llama, text),
    "llama, padded": (llama, lambda: text(padded=True)),
    "llama, with biases": (lambda: llama(attention_bias=True, mlp_bias=True), text),
    "gpt2": (gpt2, lambda: text(padded=True)),
    "bert, padded": (bert, lambda: text(padded=True)),
    "t5": (of_family("t5"), lambda: pair(9)),
    "albert": (of_family("albert"), lambda: text(padded=True)),
    "mixtral": (of_family("mixtral"), text),
    "qwen2_moe": (of_family("qwen2_moe"), text),
    "vit": (of_family("vit"), images),
    "whisper": (whisper, speech),
    "clip": (clip, lambda: {**images(), **text()}),
}


def masks_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[key] for key in ("attention_mask", "decoder_attention_mask") if key in inputs]


def mask_for(tensors: list[Tensor], inputs: dict[str, Tensor]) -> Tensor | None:
    return next((m for m in masks_of(inputs) if tensors[0].ndim > 2 and tensors[0].shape[1] == m.shape[1]), None)


@pytest.mark.parametrize("case", CASES)
def test_the_streams_are_two_models(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of layers on the held-out rows, and Gram matrices of the others, from separate models."""
    make, make_inputs = CASES[case]
    dense, inputs = make(), make_inputs()
    grams: list[tuple[Tensor, Tensor | None]] = []

    def spy(weights: Any, gram: Tensor, cross: Tensor | None, *args: Any, **options: Any) -> Any:
        grams.append((gram.clone(), None if cross is None else cross.clone()))  # they are used up
        return round_group(weights, gram, cross, *args, **options)

    round_group = rounder.round_group
    monkeypatch.setattr(rounder, "round_group", spy)
    finished, report = calibrated(dense, rows_of(inputs))
    names = [layer.name for layer in report.layers]
    assert {name for name, module in finished.named_modules() if isinstance(module, Linear4bit)} == set(names)
    assert not any("rounded to nearest" in note for note in report.notes)

    held = {key: value[-HELD_OUT:] for key, value in inputs.items()}
    rest = {key: value[:-HELD_OUT] for key, value in inputs.items()}
    _, expected = heard(dense, names, held)
    _, found = heard(finished, names, held)
    for layer in report.layers:
        mask = mask_for(found[layer.name], held)
        y = flat(expected[layer.name], HELD_OUT, mask)
        error = (flat(found[layer.name], HELD_OUT, mask) - y).norm() / y.norm()
        assert layer.error == pytest.approx(float(error), rel=SAME, abs=1e-6), layer.name

    teacher, _ = heard(dense, names, rest)
    student, _ = heard(finished, names, rest)
    wanted = []
    for name in names:
        mask = mask_for(student[name], rest)
        X, X0 = (flat(stream[name][:1], ROWS - HELD_OUT, mask) for stream in (student, teacher))
        wanted.append((X.t() @ X, X.t() @ X0))
    for gram, cross in grams:
        close = [
            ours for ours in wanted if ours[0].shape == gram.shape and (ours[0] - gram).norm() <= SAME * gram.norm()
        ]
        assert close, "a Gram matrix that is no layer's"
        if cross is not None:
            assert any((ours[1] - cross).norm() <= SAME * cross.norm() for ours in close)


def test_a_decoder_reads_the_labels() -> None:
    """As in training: shifted by one, and without what has no label."""
    model, inputs = of_family("t5")(), pair(9)
    model.config.decoder_start_token_id = 0
    labels = torch.randint(1, VOCAB, (ROWS, 9)).masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    written = {**given, "decoder_input_ids": shifted, "decoder_attention_mask": inputs["decoder_attention_mask"]}
    found, expected = (calibrated(model, rows_of(rows))[0] for rows in ({**given, "labels": labels}, written))
    assert codes(found) == codes(expected)
    assert codes(calibrated(model, rows_of(given))[0]) != codes(expected)


def test_a_decoder_without_anything_to_read_is_refused() -> None:
    model, features = whisper(), speech()["input_features"]
    with pytest.raises(CalibrationError, match="give decoder_input_ids or labels too"):
        quantize_model(model, calibration=rows_of({"input_features": features}))
    quantize_model(model, calibration=rows_of({"input_features": features, "labels": torch.ones(ROWS, 4).long()}))


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_siblings_are_found_and_everything_is_rounded(family: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read the same in one block; so many groups are rounded as blocks have different inputs."""
    inputs, dense = CASES[next(case for case in CASES if case.startswith(family.name))][1](), family.make()
    calls = group_sizes(monkeypatch)
    model, report = calibrated(dense, rows_of(inputs))
    assert all(layer.error < 1 for layer in report.layers)
    assert model.is_loaded_in_4bit
    names = [layer.name for layer in report.layers]
    assert set(names) == {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    taken, _ = heard(dense, names, inputs)
    read = Counter((name.rpartition(".")[0], *(x.numpy().tobytes() for x in taken[name])) for name in names)
    assert sorted(calls) == sorted(read.values())


def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights are rounded together, group by group, from now on."""
    calls: list[int] = []
    round_group = rounder.round_group

    def spy(weights: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(weights))
        return round_group(weights, *args, **options)

    monkeypatch.setattr(rounder, "round_group", spy)
    return calls


def test_query_key_and_value_share_a_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = group_sizes(monkeypatch)
    calibrated(llama(), rows_of(text()))
    assert calls == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("make", [llama, bert, of_family("albert")], ids=["llama", "bert", "albert"])
def test_padding_has_no_say(make: Callable[[], nn.Module]) -> None:
    model, inputs = make(), text(padded=True)
    other = {**inputs, "input_ids": inputs["input_ids"] + (1 - inputs["attention_mask"]) * 77}
    assert codes(calibrated(model, rows_of(inputs))[0]) == codes(calibrated(model, rows_of(other))[0])


def test_held_out_rows_have_no_say() -> None:
    model, inputs = llama(), text()
    other = {key: value.clone() for key, value in inputs.items()}
    other["input_ids"][-HELD_OUT:] = torch.randint(1, VOCAB, (HELD_OUT, LENGTH))
    one, first = calibrated(model, rows_of(inputs))
    two, second = calibrated(model, rows_of(other))
    assert codes(one) == codes(two)
    assert first.error != second.error


def test_rows_at_once_and_in_parts_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit but for sums in another order, which in the last layers turn a few codes."""
    dense, rows = llama(), rows_of(text(padded=True))
    _, in_parts = calibrated(dense, rows)
    monkeypatch.setattr(streams, "ROWS_AT_A_TIME", 100)
    _, at_once = calibrated(dense, rows)
    for layer, whole in zip(in_parts.layers, at_once.layers, strict=True):
        assert (layer.name, layer.error) == (whole.name, pytest.approx(whole.error, rel=0.03))
        assert layer.nearest == pytest.approx(whole.nearest, rel=0.03)
    assert in_parts.layers[0].error == pytest.approx(at_once.layers[0].error, rel=1e-6)


def _with_sinks(tokens: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs, one token in 256 with one that is a thousand times as large; and which are ordinary."""
    mix = (torch.eye(128) + 0.5 * torch.randn(128, 128) / 128**0.5) * torch.logspace(0, -1, 128)
    X = torch.randn(tokens, 128) @ mix
    sinks = torch.arange(tokens) % 256 == 0
    X[sinks, 7] = 1000 * (X[sinks, 7] + 1)
    return X, ~sinks


def _sums(X: Tensor, X0: Tensor, cap: float | None) -> Grams:
    sums = Grams(torch.zeros(128, 128), torch.zeros(128, 128), cap)
    sums.add(X0, X)
    sums.finish()
    return sums


def test_tokens_far_above_the_median_count_as_if_they_were_not() -> None:
    """In float64: each of them scaled, alike in both streams, to what the cap allows."""
    X, ordinary = _with_sinks(1024)
    X0 = X + 0.1 * torch.randn_like(X)
    sums = _sums(X, X0, 3.0)
    norms = X.double().norm(dim=1)
    weights = (3.0 * norms.sort().values[511] / norms).clamp(max=1)[:, None]  # torch's median is the lower one
    assert weights[~ordinary].max() < 0.1
    capped, expected = weights * X.double(), weights * X0.double()
    for found, wanted in ((sums.gram, capped.T @ capped), (sums.cross, capped.T @ expected)):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert (_sums(X, X0, None).gram - X.T @ X).norm() <= 1e-5 * (X.T @ X).norm()


def test_a_few_huge_tokens_do_not_take_all_there_is_for_themselves() -> None:
    (inputs, ordinary), W = _with_sinks(10_240), torch.randn(64, 128)
    X, held = inputs[:8192], inputs[8192:][ordinary[8192:]]

    def error(packed: Any) -> float:
        wrong = dequantize_weight(*packed, torch.float32) - W
        return float((held @ wrong.T).norm() / (held @ W.T).norm())

    nearest = error(quantize_weight(W, NF4Config()))
    of_cap = {}
    for cap in (None, 3.0):
        method = Method(cap=cap)
        gram = _sums(X, X, cap).gram
        [packed] = round_group([W], gram, None, NF4Config(), method, dtype=torch.float32)
        of_cap[cap] = error(packed)
    assert of_cap[3.0] < 0.9 * nearest
    assert of_cap[None] > 0.95 * nearest  # else there is nothing to see here


def test_runs_are_alike_and_rows_matter() -> None:
    model, inputs = llama(), text()
    one, two = (codes(calibrated(model, rows_of(inputs))[0]) for _ in range(2))
    assert one == two
    assert one != codes(calibrated(model, rows_of(text()))[0])


def test_without_held_out_rows_all_are_measured() -> None:
    model, inputs = llama(), text()
    finished, report = calibrated(model, rows_of(inputs, 0))
    name = report.layers[-1].name
    y, found = (heard(m, [name], inputs)[1][name][0] for m in (model, finished))
    assert report.layers[-1].error == pytest.approx(float((found - y).norm() / y.norm()), rel=SAME)
    assert "held out" in " ".join(report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_narrow_dtypes(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    dense, inputs = make().to(dtype), text(padded=True)
    finished, report = calibrated(dense, rows_of(inputs))
    held = {key: value[-HELD_OUT:] for key, value in inputs.items()}
    names = [layer.name for layer in report.layers]
    _, expected = heard(dense, names, held)
    _, found = heard(finished, names, held)
    for layer in report.layers:
        mask = mask_for(found[layer.name], held)
        y = flat(expected[layer.name], HELD_OUT, mask)
        error = float((flat(found[layer.name], HELD_OUT, mask) - y).norm() / y.norm())
        assert layer.error == pytest.approx(error, rel=0.05)  # products of other batch sizes round at 2⁻⁸ each
    assert all(module.state.dtype == dtype for module in finished.modules() if isinstance(module, Linear4bit))


def test_the_student_computes_in_the_compute_dtype() -> None:
    """As the finished model does. Of an error of a tenth, bfloat16's 2⁻⁸ is some 5e-4."""
    dense, inputs = odd(Tied())
    finished, report = calibrated(dense, rows_of(inputs), NF4Config(compute_dtype=torch.bfloat16))
    held = {key: value[-HELD_OUT:] for key, value in inputs.items()}
    first = report.layers[0]
    y, found = (heard(model, [first.name], held)[1][first.name][0] for model in (dense, finished))
    assert first.error == pytest.approx(float((found - y).norm() / y.norm()), rel=2e-5)


# --- odd models ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What follows shares the head; x is (rows, length, 64)."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Tied(Odd):
    """Two layers with one weight, fed differently, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.second(self.first(x).relu()).relu()).relu())


class Transposed(Odd):
    """As mixers do: over tokens, with inputs that are not contiguous; and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.over_tokens, self.flattened = nn.Linear(LENGTH, LENGTH), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.flattened(x.flatten(0, 1)).view(x.shape)


class Changed(Odd):
    """One tensor that is changed in place between two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.before(x)
        x.relu_().mul_(2)
        return y + self.after(x)


class Experts(Odd):
    """Each token goes to one of three experts; a fourth is never asked, and one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.never = nn.Linear(64, 64), nn.Linear(64, 64)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).relu().flatten(0, 1)
        chosen, out = (x.flatten(0, 1)[:, 0] * 7).round().long() % 3, torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            index = (chosen == number).nonzero().squeeze(1)
            if len(index):
                out = out.index_add(0, index, expert(h[index]))
        return out.view(x.shape)


class Sorted(Odd):
    """All tokens in one product, but in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.sorted = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).relu().flatten(0, 1)
        order = h[:, 0].argsort(stable=True)
        return torch.empty_like(h).index_copy(0, order, self.sorted(h[order])).view(x.shape)


class Fickle(Odd):
    """Called once more, or once less, in all forwards but the first."""

    def __init__(self, first: int, others: int) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.first, self.others, self.forwards = first, others, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        for _ in range(self.first if self.forwards == 1 else self.others):
            x = self.layer(x).relu()
        return self.last(x)


def odd(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    return model.eval(), {"x": torch.randn(ROWS, LENGTH, 64)}


@pytest.mark.parametrize("make", [Tied, Transposed, Changed])
def test_odd_models_are_two_models_too(make: type[Odd]) -> None:
    dense, inputs = odd(make())
    finished, report = calibrated(dense, rows_of(inputs))
    names = [name for name, module in finished.named_modules() if isinstance(module, Linear4bit)]
    assert sorted(layer.name for layer in report.layers) == sorted(names)
    held = {key: value[-HELD_OUT:] for key, value in inputs.items()}
    _, expected = heard(dense, names, held)
    _, found = heard(finished, names, held)
    for layer in report.layers:
        y = flat(expected[layer.name], HELD_OUT, None)
        error = (flat(found[layer.name], HELD_OUT, None) - y).norm() / y.norm()
        assert layer.error == pytest.approx(float(error), rel=SAME), layer.name


def test_tied_layers_have_one_weight() -> None:
    dense, inputs = odd(Tied())
    finished, _ = calibrated(dense, rows_of(inputs))
    assert torch.equal(finished.first.weight.data, finished.second.weight.data)
    assert finished.first.weight.data_ptr() == finished.second.weight.data_ptr()


@pytest.mark.parametrize("when", ["at once", "late", "of uneven numbers"])
def test_experts_and_what_is_never_called_are_rounded_to_nearest_and_said(when: str) -> None:
    """An expert that gets all tokens of the first rows seems to see the rows in their order."""
    dense, inputs = odd(Experts())
    if when != "at once":
        inputs["x"][:4, :, 0] = 0
    if when == "of uneven numbers":  # three of the second expert's, which is no multiple of the rows
        inputs["x"][0, :3, 0] = 1 / 7
    finished, report = calibrated(dense, rows_of(inputs))
    assert {layer.name for layer in report.layers} == {"inner"}
    plain = quantize_model(copy.deepcopy(dense))
    for name in ("never", *(f"experts.{i}" for i in range(4))):
        assert torch.equal(finished.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert any("rounded to nearest" in note and "their order" in note for note in report.notes)
    assert any("rounded to nearest" in note and "not reached" in note for note in report.notes)
    assert not [name for name, module in finished.named_modules() if "forward" in vars(module)]


def test_rows_in_another_order_are_found_out() -> None:
    """Their number alone says nothing."""
    dense, inputs = odd(Sorted())
    finished, report = calibrated(dense, rows_of(inputs))
    assert {layer.name for layer in report.layers} == {"inner"}
    assert torch.equal(finished.sorted.weight, quantize_model(copy.deepcopy(dense)).sorted.weight)


def test_a_tensor_that_was_changed_in_between_makes_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = group_sizes(monkeypatch)
    dense, inputs = odd(Changed())
    calibrated(dense, rows_of(inputs))
    assert calls == [1, 1]


class Repeating(Odd):
    """A layer of its own reads what a shared layer has just read, which was called before."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.own = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.between = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for own in self.own:
            x = x + self.shared(x) + self.between(own(x))
        return x


def test_what_reads_after_a_repeated_layer_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = group_sizes(monkeypatch)
    dense, inputs = odd(Repeating())
    _, report = calibrated(dense, rows_of(inputs))
    assert calls == [2, 1, 1]
    assert any("2 layers are called more than once" in note for note in report.notes)


def test_a_decoder_as_long_as_its_encoder_has_its_own_padding() -> None:
    model, inputs = of_family("t5")(), pair(LENGTH)
    assert not inputs["attention_mask"].equal(inputs["decoder_attention_mask"])
    before, _ = calibrated(model, rows_of(inputs))
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        changed = inputs[ids].where(inputs[mask].bool(), 7)
        after, _ = calibrated(model, rows_of(inputs | {ids: changed}))
        assert codes(after) == codes(before), ids


def test_a_decoder_that_reads_its_encoder_s_text_has_its_padding() -> None:
    model, inputs = of_family("t5")(), text(padded=True)
    other = {**inputs, "input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)}
    assert not inputs["input_ids"].equal(other["input_ids"])
    assert codes(calibrated(model, rows_of(inputs))[0]) == codes(calibrated(model, rows_of(other))[0])


def test_compiled_layers_change_nothing() -> None:
    dense, inputs = llama(), text()
    expected, _ = calibrated(dense, rows_of(inputs))
    compiled = copy.deepcopy(dense)
    compiled.compile(backend="eager")
    quantize_model(compiled, calibration=rows_of(inputs))
    assert codes(compiled) == codes(expected)


def test_autocast_is_the_model_s_and_not_the_rounding_s(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs, grams = llama(), text(words=20), list[Tensor]()
    round_group = rounder.round_group

    def spy(weights: Any, gram: Tensor, *args: Any, **options: Any) -> Any:
        assert not torch.is_autocast_enabled("cpu")
        grams.append(gram.clone())
        return round_group(weights, gram, *args, **options)

    monkeypatch.setattr(rounder, "round_group", spy)
    _, expected = calibrated(dense, rows_of(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        _, report = calibrated(dense, rows_of(inputs))
    first, again = grams[0], grams[len(grams) // 2]  # of inputs that no product has been in
    assert torch.equal(first, again)
    assert not torch.equal(grams[-1], grams[len(grams) // 2 - 1])
    assert report.error == pytest.approx(expected.error, rel=0.02)
    assert report.error < 0.6 * report.nearest


def test_a_layer_called_less_often_than_it_was_heard() -> None:
    dense, inputs = odd(Fickle(2, 1))
    finished, report = calibrated(dense, rows_of(inputs))
    assert {layer.name for layer in report.layers} == {"layer", "last"}
    assert report.layers[0].error < report.layers[0].nearest
    dense.forwards = finished.forwards = 1
    _, expected = heard(dense, ["last"], inputs)
    _, found = heard(finished, ["last"], inputs)
    y, q = (stream["last"][0][-HELD_OUT:] for stream in (expected, found))
    last = next(layer for layer in report.layers if layer.name == "last")
    assert last.error == pytest.approx(float((q - y).norm() / y.norm()), rel=SAME)


def test_a_layer_called_more_often_than_it_was_heard_is_refused() -> None:
    """Both streams would go through its rounded weight from then on."""
    dense, inputs = odd(Fickle(1, 2))
    with pytest.raises(CalibrationError, match="layer is called more often"):
        quantize_model(dense, calibration=rows_of(inputs))
    assert not any(module._forward_pre_hooks for module in dense.modules())


# --- what is put back ------------------------------------------------------------------------------------------------


def test_modes_caches_and_forwards_are_as_they_were() -> None:
    model = llama().train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    quantize_model(model, calibration=rows_of(text()))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is True
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off() -> None:
    model, rows = bert(), rows_of(text())
    expected = codes(calibrated(model, rows)[0])
    assert codes(calibrated(model.train(), rows)[0]) == expected


def test_they_are_after_an_exception_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    hooked = add_hook_to_module(model.model.layers[1].mlp.down_proj, ModelHook())
    forward = vars(hooked)["forward"]
    calls: list[int] = []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("interrupted")
        return round_group(*args, **options)

    round_group = rounder.round_group
    monkeypatch.setattr(rounder, "round_group", fails)
    with pytest.raises(RuntimeError, match="interrupted"):
        quantize_model(model, calibration=rows_of(text()))
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert [module for module in model.modules() if "forward" in vars(module)] == [hooked]
    assert vars(hooked)["forward"] is forward


def test_gradient_checkpointing_stays_on_and_out_of_the_way() -> None:
    model, inputs = llama(), text()
    expected = codes(calibrated(model, rows_of(inputs))[0])
    model.train()
    model.gradient_checkpointing_enable()
    finished, _ = calibrated(model, rows_of(inputs))
    assert codes(finished) == expected
    assert finished.is_gradient_checkpointing


def test_accelerate_s_hooks_stay() -> None:
    class Counts(ModelHook):
        called = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counts.called += 1
            return args, kwargs

    model, inputs = llama(), text()
    expected = codes(calibrated(model, rows_of(inputs))[0])
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    add_hook_to_module(model.model.layers[0].self_attn.q_proj, Counts())
    add_hook_to_module(model.model.layers[1], AlignDevicesHook(execution_device="cpu"))
    quantize_model(model, calibration=rows_of(inputs))
    assert codes(model) == expected
    before = Counts.called
    with torch.no_grad():
        model(**inputs)
    assert before
    assert Counts.called == before + 1


def test_what_the_config_records_is_recorded_after() -> None:
    """The forward is left at its last layer; what transformers records in it must not pile up."""
    model, inputs = llama(output_hidden_states=True, output_attentions=True, attn_implementation="eager"), text()
    quantize_model(model, calibration=rows_of(inputs))
    with torch.no_grad():
        output = model(**inputs)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert len(output.hidden_states[0]) == ROWS


# --- bad numbers -----------------------------------------------------------------------------------------------------


def test_the_layer_that_gets_nan_is_named_and_nothing_changed() -> None:
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = float("inf")
    before = codes(model)
    with pytest.raises(CalibrationError, match=r"encoder\.layer\.0\.output\.dense.*float16 overflows"):
        quantize_model(model, calibration=rows_of(text()))
    assert codes(model) == before
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = 0
    quantize_model(model, calibration=rows_of(text()))


def test_nan_in_a_row_that_was_not_listened_to_is_named() -> None:
    dense, inputs = odd(Tied())
    with torch.no_grad():
        dense.second.weight.mul_(1e25)
    inputs["x"] *= 1e-25
    inputs["x"][5] *= 1e25
    with pytest.raises(
        CalibrationError, match=r"The inputs of (second|twice) have NaN or infinite values in some rows"
    ):
        quantize_model(dense, calibration=rows_of(inputs))


def test_a_report_that_was_made_is_found() -> None:
    model = llama()
    assert calibration_report(model) is None
    quantize_model(model, calibration=rows_of(text()))
    report = calibration_report(model)
    assert report is not None
    assert [layer.name.rpartition(".")[2] for layer in report.layers[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert SIZES["num_hidden_layers"] * 7 == len(report.layers)
