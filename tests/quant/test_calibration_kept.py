"""Kept layers are read by the run that they belong to and by no other; runs without them are the oracle."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama
from calibrating import calibrated, codes, rows_of, text
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_qlora import NF4Config, calibration_report, quantize_model
from hf_qlora.quant.calibrate import kept
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.kept import Kept, beside, key_of, resumable
from hf_qlora.quant.calibrate.report import CalibrationReport
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.packing import quantize_weight


GROUPS = 8  # of the tiny llama: q/k/v, o, gate/up and down, twice
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def resumed(report: CalibrationReport) -> int:
    """How many groups of layers a run took over."""
    found = [int(note.split()[0]) for note in report.notes if "of an earlier run" in note]
    return sum(found)


# --- what makes it another run ---------------------------------------------------------------------------------------


FASTER = {"rope_type": "default", "rope_theta": 100.0}


def unchanged(model: nn.Module) -> nn.Module:
    return model


def same_weights(model: nn.Module, **settings: Any) -> nn.Module:
    """Another model with the same state_dict."""
    made = type(model)(type(model.config)(**{**model.config.to_dict(), **settings})).eval()
    made.load_state_dict(model.state_dict())
    assert codes(made) == codes(model)
    return made


def attention_by_hand(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


def other_class(model: nn.Module) -> nn.Module:
    norm = model.model.norm
    norm.__class__ = type("OtherNorm", (type(norm),), {})
    return model


def other_buffer(model: nn.Module) -> nn.Module:
    """That is in no state_dict."""
    model.model.rotary_emb.inv_freq[1] += 0.01
    return model


def with_buffer(make: Callable[[], torch.Tensor]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.register_buffer("table", make())
        return model

    return change


def tied(model: nn.Module) -> nn.Module:
    """Rounded together, once."""
    first, second = model.model.layers
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    return model


def alike(model: nn.Module) -> nn.Module:
    """With the same values, and rounded apart."""
    tied(model).model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[0].mlp.down_proj.weight.clone())
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(unchanged, partial(same_weights, rope_parameters=FASTER), id="positions"),
        pytest.param(unchanged, partial(same_weights, rms_norm_eps=1e-2), id="norms"),
        pytest.param(unchanged, partial(same_weights, hidden_act="relu"), id="activation"),
        pytest.param(unchanged, attention_by_hand, id="attention"),
        pytest.param(unchanged, other_class, id="class"),
        pytest.param(unchanged, other_buffer, id="buffer"),
        pytest.param(
            with_buffer(lambda: torch.zeros(4)), with_buffer(lambda: torch.zeros(4, dtype=torch.int32)), id="dtype"
        ),
        pytest.param(with_buffer(lambda: torch.zeros(4)), with_buffer(lambda: torch.zeros(2, 2)), id="shape"),
        pytest.param(tied, alike, id="tied"),
    ],
)
def test_the_key_knows_what_layers_are_fed(one: Any, other: Any) -> None:
    model = llama()
    left, right = one(copy.deepcopy(model)), other(copy.deepcopy(model))
    assert key_of(left, "rows", 1) != key_of(right, "rows", 1)
    assert key_of(right, "rows", 1) == key_of(copy.deepcopy(right), "rows", 1)


def test_the_key_knows_the_rows_the_settings_and_how_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    keys = {key_of(model, "rows", 1), key_of(model, "other rows", 1), key_of(model, "rows", 2)}
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(key_of(model, "rows", 1))
    for package in kept.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(kept, "version", lambda name, package=package: "0" if name == package else "1")
            keys.add(key_of(model, "rows", 1))
    assert len(keys) == 4 + len(kept.PACKAGES)


def test_the_key_knows_the_scales_that_are_kept() -> None:
    model, weight = llama(), torch.randn(64, 64)
    codes_, state = quantize_weight(weight, NF4Config())
    _, other = quantize_weight(2 * weight, NF4Config())
    keys = [key_of(model, "rows", 1, {"name": (codes_, found)}) for found in (state, other)]
    assert len({*keys, key_of(model, "rows", 1), key_of(model, "rows", 1, {"other": (codes_, state)})}) == 4


def test_the_key_does_not_know_where_a_model_came_from(tmp_path: Path) -> None:
    model, keys = llama(), set()
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": name}))
        loaded = type(model).from_pretrained(tmp_path / name)
        assert loaded.config.transformers_version == name
        keys.add(key_of(loaded, "rows", 1))
    assert len(keys) == 1


def test_a_model_that_computes_something_else_does_not_go_on(tmp_path: Path) -> None:
    model, rows = llama(), rows_of(text())
    calibrated(model, Calibration(rows, resume=tmp_path))
    other = same_weights(model, hidden_act="relu")
    found, report = calibrated(other, Calibration(rows, resume=tmp_path))
    assert resumed(report) == 0
    assert codes(found) == codes(calibrated(other, rows)[0])


class StatefulNorm(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_modules_with_a_state_of_their_own_are_kept_too(tmp_path: Path) -> None:
    model, rows = llama(), rows_of(text())
    norm = model.model.norm
    norm.__class__ = type("Norm", (type(norm), StatefulNorm), {})
    expected, _ = calibrated(model, Calibration(rows, resume=tmp_path))
    found, report = calibrated(model, Calibration(rows, resume=tmp_path))
    assert resumed(report) == GROUPS
    assert codes_of_layers(found) == codes_of_layers(expected)


def codes_of_layers(model: nn.Module) -> dict[str, bytes]:
    return {name: found for name, found in codes(model).items() if "extra_state" not in name}


# --- what is of another group ----------------------------------------------------------------------------------------


def test_another_layer_s_file_is_not_read(tmp_path: Path) -> None:
    """Of the same run, and of the same shape."""
    model, rows = llama(), rows_of(text())
    expected, _ = calibrated(model, Calibration(rows, resume=tmp_path))
    folder = Kept(tmp_path, "")
    one, other = (folder._file([f"model.layers.{i}.self_attn.o_proj"]) for i in range(2))
    shutil.copy(one, other)
    found, report = calibrated(model, Calibration(rows, resume=tmp_path))
    assert resumed(report) == GROUPS - 1
    assert codes(found) == codes(expected)


def packed(N: int = 64, K: int = 128, **settings: Any) -> Packed:
    return quantize_weight(torch.randn(N, K), NF4Config(**settings))


def cut(packed: Packed) -> Packed:
    return packed[0][:-1], packed[1]


@pytest.mark.parametrize(
    "there",
    [
        [packed(128, 64)],
        [packed(64, 64)],
        [packed(block_size=128)],
        [packed(double_quant=False)],
        [cut(packed())],
        [(packed()[0].to(torch.int8), packed()[1])],
    ],
    ids=["turned", "smaller", "block size", "flat", "codes cut", "codes of another dtype"],
)
def test_what_does_not_fit_the_layers_is_not_read(there: list[Packed], tmp_path: Path) -> None:
    folder, like = Kept(tmp_path, "key"), packed()
    folder.put(["a"], there)
    assert folder.get({"a": like}, CPU) is None
    folder.put(["a"], [like])
    assert folder.get({"a": like}, CPU) is not None
    assert folder.get({"b": like}, CPU) is None
    assert Kept(tmp_path, "other").get({"a": like}, CPU) is None


def test_layers_of_another_call_are_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Kept(tmp_path, "key").put(["a"], [packed()])
    Kept(tmp_path, "key")
    assert not caplog.records
    (tmp_path / "b.safetensors").write_text("cut off")
    Kept(tmp_path, "other")
    assert f"2 groups of layers in {tmp_path}, of a call with other rows, settings" in caplog.text


def test_fewer_layers_than_asked_for_are_not_read(tmp_path: Path) -> None:
    folder, like = Kept(tmp_path, "key"), packed()
    folder.put(["a", "b"], [like])
    assert folder.get({"a": like, "b": like}, CPU) is None


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_half_written_files_of_a_killed_run_go(tmp_path: Path) -> None:
    folder = Kept(tmp_path, "key")
    folder.put(["a"], [packed()])
    (file,) = tmp_path.iterdir()
    left = file.with_suffix(".12345.partial")
    left.write_bytes(b"half")
    others = [tmp_path / "notes.partial", tmp_path / "film.1.partial"]
    for other in others:
        other.write_text("mine")
    calibrated(llama(), Calibration(rows_of(text()), resume=tmp_path))
    assert not left.exists()
    assert file.exists()
    assert all(other.read_text() == "mine" for other in others)


class Refused(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), ": the same call goes on there."),
        (OSError("full"), ": the same call goes on there."),
        (Refused("no"), ": the same call with force goes on there."),
        (CalibrationError("no"), ": only a call with other rows or settings that was stopped before goes on there."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_said_of_kept_layers_is_true(
    error: BaseException, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = beside(tmp_path / "out")

    def stop(empty: bool) -> None:
        if not empty:
            (folder / "file.safetensors").write_text("")
        raise error

    for empty in (True, False):
        folder.mkdir()
        with pytest.raises(type(error)), resumable(tmp_path / "out", Refused):
            stop(empty)
        assert folder.exists() == (not empty)
        assert (f"{folder}{said} Else remove it." in caplog.text) == (not empty)
    caplog.clear()
    with pytest.raises(type(error)), resumable(tmp_path / "out", Refused):  # before anything else was rounded
        stop(True)
    earlier = f"Layers rounded before are in {folder}: the call that rounded them goes on there. Else remove it."
    assert (earlier in caplog.text) == (type(error) is not Refused)
    (folder / "file.safetensors").rename(folder / "notes")
    with pytest.raises(type(error)), resumable(tmp_path / "out", Refused):
        stop(True)
    assert (folder / "notes").exists()  # which is nobody's layers
    with resumable(tmp_path / "out", Refused):
        pass
    assert not folder.exists()


# --- inference mode --------------------------------------------------------------------------------------------------


def test_inference_mode_changes_nothing() -> None:
    """And what is made in it can be trained through, where the dense weights could be."""
    model, rows = llama(), rows_of(text())
    expected, straight = calibrated(model, rows)
    with torch.inference_mode():
        quantize_model(model, calibration=rows)
    report = calibration_report(model)
    assert report is not None
    assert report.losses == straight.losses
    assert codes(model) == codes(expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model(**rows.inputs, labels=rows.inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


class Changing(nn.Module):
    """Layers that read one tensor, which is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values + 1
        y: Tensor = self.first(x)
        return y + self.second(x.relu_())


class Latents(nn.Module):
    """Layers that read a weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 200, 64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, pixel_values: Tensor) -> Tensor:
        latents = self.latents.expand(len(pixel_values), -1, -1)
        return self.first(latents) + self.second(pixel_values)


@pytest.mark.parametrize("make", [llama, Changing, Latents])
def test_models_made_in_inference_mode_are_calibrated(make: Any) -> None:
    rows = rows_of(text() if make is llama else {"pixel_values": torch.randn(10, 200, 64)})
    with torch.inference_mode():
        torch.manual_seed(0)
        model = make()
        quantize_model(model, calibration=rows)
    torch.manual_seed(0)
    assert codes(model) == codes(quantize_model(make(), calibration=rows))
