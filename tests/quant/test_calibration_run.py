"""From rows to the report: separately built models, processes of their own and counted bytes as oracles."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import os
import signal
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, bert, gpt2, llama
from calibrating import HELD_OUT, LENGTH, calibrated, codes, rows_of, stock_logits, text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from hf_qlora import NF4Config, quantize_model
from hf_qlora.quant import base
from hf_qlora.quant.calibrate import kept, rounder, run, streams
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.group import Method
from hf_qlora.quant.calibrate.loss import mean_loss
from hf_qlora.quant.calibrate.report import CalibrationReport
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.run import calibrate, calibration_report
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.validation import ConfigError


GROUPS = 8  # of the tiny llama: q/k/v, o, gate/up and down, twice


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_losses_are_those_of_models_built_alone(make: Any) -> None:
    dense, rows = make(), rows_of(text(padded=True))
    finished, report = calibrated(dense, rows)
    nearest = quantize_model(copy.deepcopy(dense))
    # One forward and the same bits: what was measured is what there is, nearest and calibrated alike.
    assert report.losses == {
        "dense": mean_loss(dense, rows.measured),
        "nearest": mean_loss(nearest, rows.measured),
        "calibrated": mean_loss(finished, rows.measured),
    }
    assert report.tokens == int(rows.calibration["attention_mask"].sum())


@pytest.mark.parametrize(
    ("nearest", "calibrated", "closed"),
    [(3.0, 2.25, 0.75), (3.0, 2.0, 1.0), (3.0, 3.5, -0.5), (2.0, 2.0, None), (1.5, 1.0, None), (math.nan, 2.0, None)],
)
def test_closed_is_the_share_of_nearest_s_loss(nearest: float, calibrated: float, closed: float | None) -> None:
    losses = {"dense": 2.0, "nearest": nearest, "calibrated": calibrated}
    report = CalibrationReport("rows", 1, 1, 1, "", {}, [], losses)
    assert report.closed == (None if closed is None else pytest.approx(closed))
    assert ("is won back" in str(report)) == (closed is not None)


def test_a_report_is_json_whatever_was_measured() -> None:
    """NaN and infinity are not of JSON, and what reads it may refuse them."""
    report = CalibrationReport("rows", 1, 1, 1, "", {}, [], {"dense": math.nan, "nearest": math.inf})
    read = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert read["losses"] == {"dense": None, "nearest": None}


def test_other_models_have_no_losses() -> None:
    _, report = calibrated(bert(), rows_of(text()))
    assert report.losses == {}
    assert report.closed is None
    assert "loss" not in str(report)


def test_nearest_s_errors_and_changed_codes_are_against_nearest() -> None:
    dense, rows = llama(), rows_of(text())
    finished, report = calibrated(dense, rows)
    plain = quantize_model(copy.deepcopy(dense))
    for layer in report.layers:
        ours, theirs = (model.get_submodule(layer.name).weight for model in (finished, plain))
        ours, theirs = (torch.stack([p.data >> 4, p.data & 15]) for p in (ours, theirs))
        assert layer.changed == pytest.approx(float((ours != theirs).double().mean()))
        assert layer.dropped is None
    first = report.layers[0]  # whose inputs are those of the dense model
    x = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(rows.measured["input_ids"])).detach()
    y, q = (model.get_submodule(first.name)(x).detach() for model in (dense, plain))
    assert first.nearest == pytest.approx(float((q - y).norm() / y.norm()), rel=1e-4)


def test_few_tokens_are_said() -> None:
    _, report = calibrated(llama(), rows_of(text(rows=6)))  # 128 tokens and inputs, 256 of down_proj
    assert any("more inputs than there are tokens" in note and "down_proj" in note for note in report.notes)


def test_the_model_is_a_4_bit_model_like_others() -> None:
    dense, rows = llama(), rows_of(text())
    finished, _ = calibrated(dense, rows, NF4Config(block_size=32, double_quant=False))
    plain = quantize_model(copy.deepcopy(dense), NF4Config(block_size=32, double_quant=False))
    ours, theirs = finished.state_dict(), plain.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    assert finished.config.quantization_config.to_dict() == plain.config.quantization_config.to_dict()


def test_on_layer_hears_of_every_layer() -> None:
    dense = gpt2()
    weights = {name: module.weight.clone() for name, module in dense.named_modules() if hasattr(module, "nf")}
    seen: dict[str, Tensor] = {}

    def on_layer(name: str, weight: Tensor, layer: Linear4bit) -> None:
        assert isinstance(layer, Linear4bit)
        seen[name] = weight.clone()

    quantize_model(dense, calibration=rows_of(text()), on_layer=on_layer)
    assert seen.keys() == weights.keys()
    assert all(torch.equal(seen[name].t(), weights[name]) for name in weights)


def test_the_progress_bar_says_of_which_layer_and_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, in the report's order and with its figures; in the end it is wiped away."""
    shown = io.StringIO()
    monkeypatch.setattr(base, "PROGRESS_DELAY_S", 0)
    monkeypatch.setattr(run, "tqdm", partial(tqdm, file=shown, mininterval=0, miniters=1))
    _, report = calibrated(llama(), rows_of(text()))
    bars = [bar for bar in shown.getvalue().split("\r") if "layer" in bar]
    assert len(report.layers) == 14
    assert [bar for bar in bars if not bar.startswith("Calibrating NF4: ")] == []
    assert [bar.partition("/14 [")[0].rpartition(" ")[2] for bar in bars] == [str(n) for n in range(15)]
    for layer, bar in zip(report.layers, bars[1:], strict=True):
        assert bar.rstrip().endswith(f", {layer.name}: {layer.error:.2%}, nearest {layer.nearest:.2%}]")
    assert shown.getvalue().endswith("\r")
    assert shown.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""


# --- what is refused -------------------------------------------------------------------------------------------------


class FP4Config(NF4Config):
    quant_type = "fp4"


@pytest.mark.parametrize(
    ("config", "calibration", "error", "message"),
    [
        (FP4Config(), rows_of(text()), ConfigError, "rounds to NF4 alone; quant_type is 'fp4'"),
        (None, rows_of(text(rows=3)), CalibrationError, "at least 2 rows"),
        (None, CalibrationRows({"input_ids": torch.full((9, 32), 500)}, 2, "x"), CalibrationError, "0 to 499"),
        (None, Calibration(rows_of(text()), scales="base"), ConfigError, "keeps the scales of an NF4 base"),
    ],
    ids=["fp4", "few rows", "another tokenizer", "no base"],
)
def test_what_cannot_be_done_is_refused_and_nothing_changed(
    config: NF4Config | None, calibration: Any, error: type[Exception], message: str
) -> None:
    model = llama()
    before = codes(model)
    with pytest.raises(error, match=message):
        quantize_model(model, config, calibration=calibration)
    assert codes(model) == before
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    quantize_model(model, calibration=rows_of(text()))


def test_a_4_bit_model_is_refused() -> None:
    model = quantize_model(llama())
    with pytest.raises(BaseModelError, match="Load it dense"):
        quantize_model(model, calibration=rows_of(text()))


@pytest.mark.parametrize("values", [{"scales": "nearest"}, {"order": "gptq"}], ids=str)
def test_settings_that_are_none_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Calibration(rows_of(text()), **values)


def test_a_folder_to_resume_from_is_a_path() -> None:
    with pytest.raises(ConfigError, match="resume=5 must be the path of a folder, or None"):
        Calibration(rows_of(text()), resume=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ["all", "held out"])
def test_where_a_loss_gets_nan_is_named_and_nothing_changed(row: str) -> None:
    """In all rows, or in one that is neither calibrated on nor listened to."""
    model, rows = llama(), rows_of(text())
    broken = model.model.layers[1].input_layernorm
    odd = int(rows.inputs["input_ids"][-1, 5])
    if row == "held out":
        for other in rows.inputs["input_ids"][:-1]:
            other[other == odd] = odd % (VOCAB - 1) + 1
    weight = model.model.embed_tokens.weight if row == "held out" else broken.weight
    at = odd if row == "held out" else 3
    kept = weight.data[at].clone()
    weight.data[at] = float("inf")
    before = codes(model)
    name = "layers.0.self_attn.q_proj" if row == "held out" else "layers.1.self_attn.q_proj"
    with pytest.raises(CalibrationError, match=rf"The inputs of model\.{name} have NaN or infinite values"):
        quantize_model(model, calibration=rows)
    assert codes(model) == before
    weight.data[at] = kept
    quantize_model(model, calibration=rows)


def test_where_a_model_without_a_loss_gets_nan_is_named_too() -> None:
    """In a row that is neither calibrated on nor listened to."""
    model, rows = bert(), rows_of(text())
    odd = int(rows.inputs["input_ids"][-1, 5])
    for other in rows.inputs["input_ids"][:-1]:
        other[other == odd] = odd % (VOCAB - 1) + 1
    next(p for n, p in model.named_parameters() if "word_embeddings" in n).data[odd] = float("inf")
    with pytest.raises(CalibrationError, match=r"The inputs of .*layer\.0\.attention\.self\.query have NaN or inf"):
        quantize_model(model, calibration=rows)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            r"Give fewer rows or shorter ones .* CUDA out of memory",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Give fewer rows or shorter ones"),
        (
            torch.linalg.LinAlgError("not positive-definite"),
            r"\(not positive-definite\)\. Give more rows, or more damp",
        ),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
def test_too_little_memory_or_damping_is_said(
    error: Exception, said: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    stop_after(after, fail, monkeypatch)
    with pytest.raises(CalibrationError, match=said + (r".* Some layers are NF4 already" if after else "")):
        quantize_model(llama(), calibration=rows_of(text()))


def test_scales_of_a_base_in_fp4_are_refused() -> None:
    """NF4's codes would be read by another table."""
    dense, rows = llama(), rows_of(text())
    layers = {name: module for name, module in dense.named_modules() if name.endswith("q_proj")}
    base = {name: quantize_weight(layer.weight, NF4Config()) for name, layer in layers.items()}
    for _, state in base.values():
        state.quant_type = "fp4"
    with pytest.raises(ConfigError, match=r"keeps the scales of an NF4 base; .*q_proj is in fp4"):
        calibrate(dense, layers, NF4Config(), Calibration(rows, scales="base"), base=base)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_head_that_gives_nan_is_told_from_the_layers(value: float) -> None:
    model, rows = llama(), rows_of(text())
    seen = torch.arange(VOCAB) == rows.measured["input_ids"][0, 5]
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.masked_fill(seen, value))
    message = (
        r"The model's loss on the rows to measure on is (nan|inf), though the inputs of all layers to round are fin"
    )
    with pytest.raises(CalibrationError, match=message):
        quantize_model(model, calibration=rows)


def test_a_forced_calibration_is_of_any_ids() -> None:
    model = llama()
    model.lm_head.weight.data *= 40
    with pytest.raises(CalibrationError, match="force=True"):
        quantize_model(model, calibration=rows_of(text()))
    quantize_model(model, calibration=Calibration(rows_of(text()), force=True))


# --- going on after an interruption ----------------------------------------------------------------------------------


def stop_after(groups: int, stop: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Do `stop` when so many groups have been rounded; the rounded ones are counted."""
    done: list[int] = []
    round_group = rounder.round_group

    def counting(*args: Any, **options: Any) -> Any:
        if len(done) == groups:
            stop()
        done.append(1)
        return round_group(*args, **options)

    monkeypatch.setattr(rounder, "round_group", counting)
    return done


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_an_interrupted_run_goes_on(after: int, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rows, config = llama(), rows_of(text()), NF4Config(double_quant=nested)
    expected, straight = calibrated(dense, rows, config)
    calibration = Calibration(rows, resume=tmp_path / "kept")
    with monkeypatch.context() as patch:
        stop_after(after, interrupt, patch)
        broken = copy.deepcopy(dense)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(broken, config, calibration=calibration)
        with pytest.raises(BaseModelError, match="interrupted"):
            quantize_model(broken, config)
    with monkeypatch.context() as patch:
        done = stop_after(99, interrupt, patch)
        found, report = calibrated(dense, calibration, config)
    assert len(done) == GROUPS - after
    assert codes(found) == codes(expected)
    assert report.layers == straight.layers
    assert report.losses == straight.losses


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, in the process that rounds."""
    dense, rows = llama(), rows_of(text())
    calibration = Calibration(rows, resume=tmp_path)
    process = os.fork()
    if process == 0:
        try:
            stop_after(3, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            quantize_model(dense, calibration=calibration)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    done = stop_after(99, interrupt, monkeypatch)
    found, _ = calibrated(dense, calibration)
    assert len(done) == GROUPS - 3
    assert codes(found) == codes(calibrated(dense, rows)[0])


def test_what_was_kept_for_another_run_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rows = llama(), rows_of(text())
    other = copy.deepcopy(dense)
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-3
    skipping = NF4Config(skip_modules=("lm_head", "layers.0.self_attn.q_proj"))
    runs: list[tuple[nn.Module, CalibrationRows, Method, NF4Config]] = [
        (dense, rows, Method(), NF4Config()),
        (dense, rows_of(rows.inputs, HELD_OUT + 1), Method(), NF4Config()),
        (other, rows, Method(), NF4Config()),
        (dense, rows, Method(damping=0.02), NF4Config()),
        (dense, rows, Method(), NF4Config(block_size=32)),
        (dense, rows, Method(), skipping),
    ]
    done = stop_after(99, interrupt, monkeypatch)
    for number, (model, given, method, config) in enumerate(runs):
        calibrated(model, Calibration(given, **dataclasses.asdict(method), resume=tmp_path), config)
        assert len(done) == (number + 1) * GROUPS
    calibrated(dense, Calibration(rows, resume=tmp_path), skipping)
    assert len(done) == len(runs) * GROUPS
    monkeypatch.setattr(kept, "_code", lambda: "of another day")
    calibrated(dense, Calibration(rows, resume=tmp_path), skipping)
    assert len(done) == (len(runs) + 1) * GROUPS


def test_a_layer_left_dense_by_name_makes_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it is fed otherwise."""
    dense, rows = llama(), rows_of(text())
    calibrated(dense, Calibration(rows, resume=tmp_path))
    done = stop_after(99, interrupt, monkeypatch)
    calibrated(dense, Calibration(rows, resume=tmp_path), skip=["layers.0.mlp.down_proj"])
    assert len(done) == GROUPS - 1


@pytest.mark.parametrize("kind", ["cut", "empty", "noise", "one bit", "without tensors", "folder"])
def test_what_was_not_kept_whole_is_ignored(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rows = llama(), rows_of(text())
    expected, _ = calibrated(dense, Calibration(rows, resume=tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == GROUPS
    file = files[3]
    content = file.read_bytes()
    if kind == "without tensors":
        with kept.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({}, file, metadata)
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "noise": os.urandom(1000),
                "one bit": content[:-1] + bytes([content[-1] ^ 1]),
            }[kind]
        )
    done = stop_after(99, interrupt, monkeypatch)
    found, _ = calibrated(dense, Calibration(rows, resume=tmp_path))
    assert len(done) == 1
    assert codes(found) == codes(expected)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")], ids=str)
def test_a_full_disk_costs_nothing_but_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: Any, file: Path, *_: Any) -> None:
        file.write_bytes(b"half")
        raise error

    dense, rows = llama(), rows_of(text())
    monkeypatch.setattr(kept, "save_file", full)
    found, _ = calibrated(dense, Calibration(rows, resume=tmp_path))
    assert codes(found) == codes(calibrated(dense, rows)[0])
    assert not list(tmp_path.iterdir())
    assert "could not be kept" in caplog.text


def test_a_folder_that_cannot_be_is_refused_before_anything_changed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    model = llama()
    before = codes(model)
    with pytest.raises(OSError, match="file"):
        quantize_model(model, calibration=Calibration(rows_of(text()), resume=file))
    assert codes(model) == before
    quantize_model(model, calibration=rows_of(text()))


def test_tied_layers_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rows = llama(), rows_of(text())
    dense.model.layers[1].mlp.down_proj.weight = dense.model.layers[0].mlp.down_proj.weight
    expected, _ = calibrated(dense, Calibration(rows, resume=tmp_path))
    done = stop_after(99, interrupt, monkeypatch)
    found, _ = calibrated(dense, Calibration(rows, resume=tmp_path))
    assert not done
    assert codes(found) == codes(expected)


# --- saved -----------------------------------------------------------------------------------------------------------


def test_stock_transformers_computes_the_same(tmp_path: Path) -> None:
    """In a process that cannot import this package."""
    inputs = text(rows=2)
    model, _ = calibrated(llama(), rows_of(text()))
    model.save_pretrained(tmp_path / "model")
    found = stock_logits(tmp_path / "model", inputs, tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
    # As in tests/interop/test_stock_peft.py: float32 products, of the largest logit.
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


# --- memory ----------------------------------------------------------------------------------------------------------


def test_dense_weights_go_as_their_layers_are_rounded() -> None:
    model = llama()
    alive = {
        name: weakref.ref(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    seen: list[str] = []

    def on_layer(name: str, weight: Tensor, layer: Linear4bit) -> None:
        assert [other for other in seen if alive[other]() is not None] == []
        seen.append(name)

    quantize_model(model, calibration=rows_of(text()), on_layer=on_layer)
    assert len(seen) == len(alive) == 14


class Counted(TorchDispatchMode):
    """The bytes of all storages that operations make and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("vocabulary", [500, 60_000])
def test_the_peak_is_the_model_its_codes_and_one_group(vocabulary: int) -> None:
    """Counted: what operations make beside the dense model, which is there before.

    A group needs five matrices of K × K in float32 (Gram, cross or permuted; one in float64), and sixteen of its
    weights' size. Of all rows there are hidden states and the inputs of one group, twice; of those that
    are in one forward some dozen hidden states, and its widest layer, twice. The codes are there twice, calibrated and
    nearest.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": vocabulary}
    model, rows = llama(**sizes), rows_of(text(rows=128))
    linear = [m.weight for m in model.model.modules() if isinstance(m, nn.Linear)]
    largest = max(weight.numel() for weight in linear)
    widest = 4 * max(weight.shape[1] for weight in linear) ** 2
    group = 5 * widest + 16 * 4 * 2 * largest
    waiting = 4 * 2 * rows.inputs["input_ids"].numel() * (2 * 128 + 512)
    running = 4 * 2 * streams.ROWS_AT_A_TIME * LENGTH * (12 * 128 + 4 * 512)
    packed = 2 * sum(weight.numel() for weight in linear) * 0.53
    logits = 4 * vocabulary * 4 * 32 * 2.5  # four rows that are listened to, and what the loss is taken of
    with Counted() as counted:
        quantize_model(model, calibration=rows)
    assert counted.peak <= group + waiting + running + packed + logits
    if vocabulary == 60_000:  # the logits of all rows would be more than that
        assert 4 * vocabulary * 2 * rows.inputs["input_ids"].numel() > 1.5 * counted.peak


def test_the_report_is_of_the_model_alone() -> None:
    one = llama()
    quantize_model(one, calibration=rows_of(text()))
    assert calibration_report(one) is not None
    assert calibration_report(quantize_model(llama())) is None


def test_a_compiled_model_is_calibrated_as_the_model_that_it_wraps() -> None:
    torch.manual_seed(0)
    dense, rows = llama(), rows_of(text())
    expected, _ = calibrated(dense, rows)
    quantize_model(torch.compile(dense, backend="eager"), calibration=rows)
    assert codes(dense) == codes(expected)
