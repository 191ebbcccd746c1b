"""A calibrated merge into NF4 keeps what rounding to nearest throws away; separately built models are the oracle."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, bert, gpt2, llama, tokens
from byte_tokenizer import byte_tokenizer
from calibrating import HELD_OUT, codes, flat, heard, rows_of, stock_logits, text
from merging import adapted, logits, relative, state_bytes, trained
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from typer.testing import CliRunner

from hf_qlora import NF4Config, QLoRAConfig, merge, quantize_model
from hf_qlora.cli import app
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import in_memory
from hf_qlora.merge.held_out import OutputError
from hf_qlora.merge.report import MergeRefused, MergeReport
from hf_qlora.merge.stream import merge_files
from hf_qlora.quant.calibrate import rounder
from hf_qlora.quant.calibrate.loss import mean_loss
from hf_qlora.quant.calibrate.report import CLEAR_LOSS, CalibrationReport
from hf_qlora.quant.calibrate.rows import CalibrationRows, calibration_rows
from hf_qlora.quant.calibrate.run import calibration_report
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.dequantize import block_scales
from hf_qlora.quant.linear4bit import Linear4bit


def pattern(rows: int = 34, length: int = 32) -> dict[str, Tensor]:
    """Rows that can be learnt: each counts up by a step of its own."""
    start, step = torch.randint(1, 400, (rows, 1)), torch.randint(1, 4, (rows, 1))
    ids = start + step * torch.arange(length)[None]
    return {"input_ids": ids % 499 + 1, "attention_mask": torch.ones(rows, length, dtype=torch.long)}


@pytest.fixture(scope="module")
def learnt() -> tuple[PeftModel, CalibrationRows]:
    """A tiny Llama in NF4 with an adapter that learnt a pattern, and rows of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = pattern()
    model = get_peft_model(llama(), QLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return trained(model, inputs), rows_of(inputs)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_it_keeps_more_of_what_was_learnt_than_nearest(learnt: tuple[PeftModel, CalibrationRows]) -> None:
    model, rows = learnt
    before = state_bytes(model)
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert state_bytes(model) == before
    assert report.kept_by == "loss"
    nearest = merge(model, onto="nf4", force=True).model
    with torch.no_grad(), model.disable_adapter():
        base = mean_loss(model, rows.measured)
    expected = {
        "base": base,
        "unmerged": mean_loss(model, rows.measured),
        "nearest": mean_loss(nearest, rows.measured),
        "merged": mean_loss(report.model, rows.measured),
    }
    assert report.losses == expected
    gain = expected["base"] - expected["unmerged"]
    assert gain > CLEAR_LOSS
    assert report.kept == pytest.approx((expected["base"] - expected["merged"]) / gain)
    assert expected["merged"] < expected["nearest"]
    assert f"{report.kept:.1%} of the adapter, by loss on held-out rows\n" in str(report)
    assert "calibrated on rows" in str(report)
    assert report.to_dict()["losses"] == expected
    assert report.to_dict()["calibration"]["layers"]


def test_the_calibrated_layers_are_measured_against_the_merged_dense_model(
    learnt: tuple[PeftModel, CalibrationRows],
) -> None:
    model, rows = learnt
    report = merge(model, onto="nf4", calibration=rows, force=True)
    dense = merge(model).model
    assert report.calibration is calibration_report(report.model)
    names = [layer.name for layer in report.calibration.layers]
    _, expected = heard(dense, names, rows.measured)
    taken, found = heard(report.model, names, rows.measured)
    for layer in report.calibration.layers:
        y = flat(expected[layer.name], HELD_OUT, None)
        error = (flat(found[layer.name], HELD_OUT, None) - y).norm() / y.norm()
        assert layer.error == pytest.approx(float(error), rel=1e-4)
        base = model.get_base_model().get_submodule(layer.name).get_base_layer()
        with torch.no_grad():
            dropped = (base(taken[layer.name][0]).flatten(0, 1).double() - y).norm() / y.norm()
        assert layer.dropped == pytest.approx(float(dropped), rel=1e-4)
        ours, theirs = (
            torch.stack([w.data.view(torch.uint8) >> 4, w.data.view(torch.uint8) & 15])
            for w in (report.model.get_submodule(layer.name).weight, base.weight)
        )
        assert layer.changed == pytest.approx(float((ours != theirs).double().mean()))


def test_base_scales_are_kept_where_asked_and_codes_where_there_is_nothing_to_merge() -> None:
    model = get_peft_model(llama(), QLoRAConfig(r=4, target_modules="all-linear")).eval()  # ΔW = 0
    calibration = Calibration(rows_of(text()), scales="base", correction=False)
    report = merge(model, onto="nf4", calibration=calibration, force=True)
    base = model.get_base_model()
    for layer in report.calibration.layers:
        theirs = base.get_submodule(layer.name).get_base_layer()
        ours = report.model.get_submodule(layer.name)
        assert torch.equal(ours.weight.data, theirs.weight.data)
        assert torch.equal(block_scales(ours.state), block_scales(theirs.state))
        assert ours.state is not theirs.state
        assert layer.changed == 0
    ids = tokens()
    assert torch.equal(logits(report.model, ids), logits(model, ids))
    assert report.kept == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_to_merge_changes_nothing_in_narrow_dtypes(dtype: torch.dtype) -> None:
    model = get_peft_model(llama().to(dtype), QLoRAConfig(r=4, target_modules="all-linear")).eval()
    calibration = Calibration(rows_of(text()), scales="base", correction=False)
    report = merge(model, onto="nf4", calibration=calibration, force=True)
    assert [layer.name for layer in report.calibration.layers if layer.changed] == []


# --- kinds of models and adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"depth": True}, {"bias": "all"}], ids=str
)
def test_every_kind_of_adapter_is_merged(settings: dict[str, Any]) -> None:
    model, rows = adapted(llama(attention_bias=True), **settings), rows_of(text())
    before = state_bytes(model)
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert state_bytes(model) == before
    closer(report, model, rows)
    assert report.losses["unmerged"] == mean_loss(model, rows.measured)


def closer(report: MergeReport, model: PeftModel, rows: CalibrationRows) -> None:
    """On the rows calibrated on, calibrated logits are nearer to the unmerged model's than nearest's are."""
    nearest = merge(model, onto="nf4", force=True).model
    ids = rows.calibration["input_ids"]
    expected = logits(model, ids)
    found, plain = (float((logits(one, ids) - expected).norm()) for one in (report.model, nearest))
    assert found < plain
    packed = [name for name, module in report.model.named_modules() if isinstance(module, Linear4bit)]
    assert {layer.name for layer in report.calibration.layers} == set(packed)


@pytest.mark.parametrize(
    "settings", [NF4Config(block_size=128, double_quant=False), NF4Config(block_size=32)], ids=str
)
def test_the_merge_is_packed_as_the_base(settings: NF4Config) -> None:
    model, rows = adapted(gpt2(), quantization=settings), rows_of(text())
    report = merge(model, onto="nf4", calibration=rows, force=True)
    states = [module.state for module in report.model.modules() if isinstance(module, Linear4bit)]
    assert {(state.blocksize, state.nested) for state in states} == {(settings.block_size, settings.double_quant)}
    closer(report, model, rows)


def test_a_dense_base_is_rounded_for_the_first_time() -> None:
    model, rows = adapted(llama(), quantization=None), rows_of(text())
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert all(layer.dropped is None for layer in report.calibration.layers)
    closer(report, model, rows)


def test_scales_of_a_base_that_has_none_are_refused() -> None:
    model = adapted(llama(), quantization=None)
    with pytest.raises(ValueError, match="scales='own'"):
        merge(model, onto="nf4", calibration=Calibration(rows_of(text()), scales="base"))


def test_modules_to_save_stay_dense() -> None:
    model = adapted(bert(), task_type="SEQ_CLS", modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    report = merge(model, onto="nf4", calibration=rows_of(text(padded=True)), force=True)
    assert type(report.model.classifier) is nn.Linear
    assert torch.equal(
        report.model.classifier.weight, model.base_model.model.classifier.modules_to_save["default"].weight
    )
    assert report.losses == {}
    assert report.kept_by == "outputs"


@pytest.mark.parametrize(
    "family", [f for f in ARCHITECTURES if f.name in ("t5", "mixtral", "albert")], ids=lambda family: family.name
)
def test_families(family: Any) -> None:
    model = adapted(family.make(), task_type=family.task_type, **family.options)
    report = merge(model, onto="nf4", calibration=rows_of(text(padded=True)), force=True)
    first = report.calibration.layers[0]
    assert first.error < first.dropped


# --- what it is judged by --------------------------------------------------------------------------------------------


def family(name: str) -> tuple[PeftModel, Any]:
    found = next(one for one in ARCHITECTURES if one.name == name)
    return adapted(found.make(), task_type=found.task_type, **found.options), found


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0].double()


def share(report: MergeReport, model: PeftModel, inputs: dict[str, Tensor], there: Any = ...) -> float:
    """1 − ‖ŷ − y‖² / ‖y₀ − y‖², all rows in one batch and in float64; `there` takes the outputs that count."""
    expected = first_output(model, inputs)[there]
    with model.disable_adapter():
        plain = first_output(model, inputs)[there]
    wrong, without = ((y - expected).square().sum() for y in (first_output(report.model, inputs)[there], plain))
    assert report.outputs is not None
    assert report.outputs.merged == pytest.approx(float((wrong / expected.square().sum()).sqrt()), rel=1e-3)
    return 1 - float(wrong / without)


ROUNDED_SHARE = 1e-3  # float32 outputs of rows alone and in a batch: 1e-6 of y, which the adapter moves by some 1e-2


def test_images_are_judged_by_their_outputs_and_not_by_weights() -> None:
    model, _ = family("vit")
    size = model.config.image_size
    rows = CalibrationRows({"pixel_values": torch.randn(40, 3, size, size)}, 8, "images")
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert report.kept_by == "outputs"
    assert report.outputs.rows == 8
    assert report.kept == pytest.approx(share(report, model, rows.measured), abs=ROUNDED_SHARE)
    assert f"{report.kept:.1%} of the adapter, by outputs on held-out rows\n" in str(report)
    of_weights = dataclasses.replace(report, outputs=None)
    assert of_weights.kept_by == "weights"
    assert abs(of_weights.kept - report.kept) > 0.02


def test_text_is_judged_on_the_rows_and_not_on_prose_without_padding() -> None:
    """BERT's hidden states: neither a loss nor a distribution; what padding gives counts for nothing."""
    model = adapted(tf.BertModel(bert().config).eval(), task_type="FEATURE_EXTRACTION")
    rows = rows_of(text(padded=True))
    report = merge(model, onto="nf4", calibration=rows, force=True, texts=[[1, 2, 3]])
    there = rows.measured["attention_mask"].bool()
    assert not there.all()
    assert report.kept_by == "outputs"
    assert report.kept == pytest.approx(share(report, model, rows.measured, there), abs=ROUNDED_SHARE)
    assert report.logits.positions == 3


def test_a_regression_s_one_output_is_judged_too() -> None:
    """The KL of one class is zero, whatever the merge does."""
    config = bert().config
    config.num_labels = 1
    model = adapted(tf.BertForSequenceClassification(config).eval(), task_type="SEQ_CLS")
    rows = rows_of(text(padded=True))
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert report.logits.merged == 0
    assert report.kept == pytest.approx(share(report, model, rows.measured), abs=ROUNDED_SHARE)


def test_a_decoder_beside_an_encoder_reads_the_labels_and_none_of_their_padding_counts() -> None:
    model, _ = family("t5")
    model.config.decoder_start_token_id = 0
    inputs = text(padded=True)
    labels = torch.randint(1, 400, (len(inputs["input_ids"]), 9))
    labels[::2, 5:] = -100
    rows = rows_of({**inputs, "labels": labels})
    report = merge(model, onto="nf4", calibration=rows, force=True)
    start = model.config.decoder_start_token_id
    decoded = torch.cat([torch.full((len(labels), 1), start), labels[:, :-1].clamp(min=0)], 1)
    read = {**inputs, "decoder_input_ids": decoded}
    measured = {name: value[-HELD_OUT:] for name, value in read.items()}
    there = labels[-HELD_OUT:] != -100
    assert report.kept == pytest.approx(share(report, model, measured, there), abs=ROUNDED_SHARE)


def test_an_adapter_without_a_clear_gain_is_judged_by_outputs() -> None:
    model, rows = adapted(llama()), rows_of(text())
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert report.losses["base"] - report.losses["unmerged"] <= CLEAR_LOSS
    assert report.kept_by == "outputs"
    assert report.kept == pytest.approx(share(report, model, rows.measured), abs=ROUNDED_SHARE)


def test_where_no_rows_are_held_out_all_are_measured_and_it_is_said() -> None:
    model, rows = adapted(llama()), rows_of(text(), held_out=0)
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert report.outputs.rows == rows.count
    assert report.kept == pytest.approx(share(report, model, rows.inputs), abs=ROUNDED_SHARE)
    assert "by outputs on the rows calibrated on\n" in str(report)
    assert "held-out" not in str(report)
    assert "held-out" not in str(report.calibration)


def test_outputs_that_are_lost_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = family("vit")
    size = model.config.image_size
    rows = CalibrationRows({"pixel_values": torch.randn(10, 3, size, size)}, 2, "images")
    monkeypatch.setattr(in_memory.held_out, "output_error", lambda *_: OutputError(0.08, 0.1, 2))
    with pytest.raises(MergeRefused, match=r"36.0% of the adapter is left, by outputs on held-out rows: the rows may"):
        merge(model, onto="nf4", calibration=rows)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_rows_for_what_is_not_rounded_are_refused(onto: Any) -> None:
    with pytest.raises(MergeError, match="Only rounding is calibrated"):
        merge(adapted(llama()), onto=onto, original=llama() if onto == "original" else None, calibration=text())


def test_what_keeps_little_is_refused_and_says_why(
    learnt: tuple[PeftModel, CalibrationRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = learnt
    monkeypatch.setattr(in_memory, "LEAST_KEPT", 1.5)
    with pytest.raises(
        MergeRefused, match=r"by loss on held-out rows: the rows may be too few.*force merges all the same"
    ) as caught:
        merge(model, onto="nf4", calibration=rows)
    assert caught.value.report.calibration is not None
    with pytest.raises(MergeRefused, match="Calibrate the rounding"):
        merge(model, onto="nf4")
    assert merge(model, onto="nf4", calibration=rows, force=True).model is not None


def test_force_calibrates_on_ids_that_may_be_another_tokenizers() -> None:
    dense = llama()
    dense.lm_head.weight.data *= 40
    model, rows = adapted(dense), rows_of(text())
    with pytest.raises(ValueError, match="the ids are probably another tokenizer's"):
        merge(model, onto="nf4", calibration=rows)
    report = merge(model, onto="nf4", calibration=rows, force=True)
    assert report.calibration is not None
    assert report.calibration.losses["dense"] > 7  # and guessing has 6.2


def test_rows_that_do_not_fit_are_refused_before_anything_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama())
    before = state_bytes(model)
    monkeypatch.setattr(in_memory, "_merged", lambda *_: pytest.fail("merged"))
    with pytest.raises(ValueError, match="at least 2 rows"):
        merge(model, onto="nf4", calibration=rows_of(text(rows=3)))
    assert state_bytes(model) == before


def report_of(losses: dict[str, float]) -> MergeReport:
    outputs = OutputError(merged=0.1, without=0.2, rows=4)
    return MergeReport("nf4", "b", ["default"], "float32", [], "none", losses=losses, outputs=outputs)


@pytest.mark.parametrize(
    ("base", "unmerged", "kept_by"),
    [
        (3.0, 2.0, "loss"),
        (3.0, 3.0 - CLEAR_LOSS / 2, "outputs"),
        (3.0, 3.5, "outputs"),
        (3.0, float("nan"), "outputs"),
    ],
    ids=["gain", "no clear gain", "harm", "nan"],
)
def test_the_loss_decides_only_where_the_gain_is_clear(base: float, unmerged: float, kept_by: str) -> None:
    report = report_of({"base": base, "unmerged": unmerged, "nearest": 3.0, "merged": 2.1})
    assert report.kept_by == kept_by
    assert report.kept == pytest.approx(0.9 if kept_by == "loss" else 0.75)  # 1 − (0.1 / 0.2)²


def test_interrupted_merges_go_on(
    learnt: tuple[PeftModel, CalibrationRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = learnt
    expected = merge(model, onto="nf4", calibration=rows, force=True)
    round_group, count = rounder.round_group, itertools.count()

    def stops(*args: Any, **options: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return round_group(*args, **options)

    monkeypatch.setattr(rounder, "round_group", stops)
    calibration = Calibration(rows, resume=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(model, onto="nf4", calibration=calibration, force=True)
    assert len(list(tmp_path.iterdir())) == 3
    found = merge(model, onto="nf4", calibration=calibration, force=True)
    assert codes(found.model) == codes(expected.model)
    assert next(count) == 4 + 5


def test_a_merge_onto_other_scales_does_not_go_on(tmp_path: Path) -> None:
    """A layer of zeros has the same dense weights by any scales."""
    model = get_peft_model(llama(), QLoRAConfig(r=4, target_modules="all-linear")).eval()  # ΔW = 0
    layer = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    layer.weight.data.fill_(0x77)
    calibration = Calibration(rows_of(text()), scales="base", resume=tmp_path)
    for again in (False, True):
        layer.state.absmax.copy_(layer.state.absmax.flip(0))
        report = merge(model, onto="nf4", calibration=calibration, force=True)
        assert torch.equal(block_scales(report.model.model.layers[0].mlp.up_proj.state), block_scales(layer.state))
        assert not any("of an earlier run" in note for note in report.notes)
        if again:
            taken_over = merge(model, onto="nf4", calibration=calibration, force=True)
            assert any("of an earlier run" in note for note in taken_over.notes)


def test_what_a_calibrated_base_reported_is_not_the_merged_model_s() -> None:
    base = quantize_model(llama(), calibration=rows_of(text()))
    assert calibration_report(base) is not None
    model = adapted(base)
    assert calibration_report(merge(model).model) is None
    assert calibration_report(merge(model, onto="nf4", force=True).model) is None
    assert calibration_report(base) is not None


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_keeps_what_it_was_taught(smollm2: Path) -> None:
    """Forty steps on instruction pairs; rows of pairs that were not trained on, others held out."""
    from hf_qlora.assets import instruction_pairs

    tokenizer = tf.AutoTokenizer.from_pretrained(smollm2)
    texts = [f"{pair['instruction']}\n\n{pair['prompt']}\n\n{pair['answer']}" for pair in instruction_pairs()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order][:900]
    packed = [token for one in texts[:500] for token in [*tokenizer(one)["input_ids"], tokenizer.eos_token_id]]
    ids = torch.tensor(packed[: len(packed) // 128 * 128]).view(-1, 128)
    base = tf.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = QLoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", quantization=NF4Config())
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    for step in range(40):
        batch = ids[(4 * step) % (len(ids) - 4) :][:4]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    rows = calibration_rows(texts[500:], model, tokenizer, rows=32, length=128)
    report = merge(model, onto="nf4", calibration=rows)
    losses = report.losses
    gain = losses["base"] - losses["unmerged"]
    assert gain > 0.1
    assert report.kept_by == "loss"
    assert report.kept > 0.85
    assert (losses["base"] - losses["nearest"]) / gain < 0.3


def test_a_merge_whose_loss_is_nan_is_refused() -> None:
    losses = {"base": 3.0, "unmerged": 2.0, "nearest": 3.0, "merged": float("nan")}
    report = MergeReport("nf4", "base", ["default"], "float32", [], "", losses=losses)
    with pytest.raises(MergeRefused):
        in_memory.refuse_lost(report, force=False)


# --- from files ------------------------------------------------------------------------------------------------------


SIZE = {"rows": 6, "length": 32, "held_out": 2, "seed": 3}


def files(folder: Path, **settings: Any) -> tuple[Path, Path, str]:
    """A base, an adapter that was trained on it, and text, in files."""
    torch.manual_seed(0)
    base, adapter, speeches = (folder / name for name in ("base", "adapter", "speeches.txt"))
    llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    fresh = tf.AutoModelForCausalLM.from_pretrained(base)
    config = QLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    trained(get_peft_model(fresh, config), pattern()).save_pretrained(adapter)
    speeches.write_text(" ".join(f"Word {number}." for number in range(2000)))
    return base, adapter, str(speeches)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each group that is rounded from now on."""
    round_group, done = rounder.round_group, []

    def counting(*args: Any, **options: Any) -> Any:
        done.append(1)
        return round_group(*args, **options)

    monkeypatch.setattr(rounder, "round_group", counting)
    return done


def test_from_files_it_is_the_same_merge(tmp_path: Path) -> None:
    base, adapter, speeches = files(tmp_path)
    output = tmp_path / "merged"
    report = merge_files(
        str(adapter), output, "nf4", str(base), calibration=speeches, device="cpu", force=True, **SIZE
    )
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), str(adapter))
    rows = calibration_rows(speeches, model, byte_tokenizer(), **SIZE)
    expected = merge(model, "nf4", calibration=rows, force=True)
    found = tf.AutoModelForCausalLM.from_pretrained(output)
    assert codes(found) == codes(expected.model)
    assert report.losses == expected.losses
    assert report.output == str(output)
    assert report.model is None
    record = json.loads((output / "hf_qlora_merge.json").read_text())
    assert record["calibration"] == {
        "source": "6 rows of 32 tokens from speeches.txt, and 2 held out",
        "rows": 6,
        "tokens": 6 * 32,
        "held_out": 2,
        "fingerprint": rows.fingerprint,
    }
    assert (record["kept"], record["kept_by"], record["losses"]) == (report.kept, report.kept_by, report.losses)
    assert str(tmp_path) not in (output / "hf_qlora_merge.json").read_text()
    expected.save_pretrained(output, overwrite=True)  # a folder that has a record can be replaced
    again = json.loads((output / "hf_qlora_merge.json").read_text())
    assert again["calibration"] == {**record["calibration"], "source": rows.source}
    merge(model).save_pretrained(output, overwrite=True)
    assert not (output / "hf_qlora_merge.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(MergeError, match="Only rounding is calibrated"):
        merge_files(str(adapter), tmp_path / "other", "dequantized", str(base), calibration="speeches.txt")


def test_stock_transformers_computes_the_same(learnt: tuple[PeftModel, CalibrationRows], tmp_path: Path) -> None:
    """In a process that cannot import this package."""
    model, rows = learnt
    report = merge(model, onto="nf4", calibration=rows, force=True)
    report.save_pretrained(tmp_path / "merged")
    found = stock_logits(tmp_path / "merged", rows.measured, tmp_path)
    with torch.no_grad():
        expected = report.model(**rows.measured).logits
    # As in tests/interop/test_stock_peft.py: float32 products, of the largest logit.
    assert relative(found, expected) <= 1e-5


def test_a_merge_is_not_said_to_be_worse_than_one_that_lost_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibrationReport, "is_worse", True)
    report = merge(adapted(llama()), onto="nf4", calibration=rows_of(text()), force=True)
    assert "Rounding to nearest loses less" not in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_loads_a_merge_computes_in_the_dtype_of_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Where a config names none, bitsandbytes' layers compute in float32."""
    model = adapted(llama().to(dtype))
    merge(model, onto="nf4", calibration=rows_of(text()), force=True).save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    layers = [module for module in loaded.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {dtype}


@pytest.mark.parametrize("calibrate", [False, True])
def test_an_adapter_that_changes_nothing_is_said_to(calibrate: bool) -> None:
    model = adapted(llama())
    rows = rows_of(text()) if calibrate else None
    assert "changes nothing" not in str(merge(model, onto="nf4", calibration=rows, force=True))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert "nothing was to be kept: the adapter changes nothing" in str(merge(model, onto="nf4", calibration=rows))


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_base_in_8_bits_is_not_rounded(calibrate: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    eight = tf.BitsAndBytesConfig(load_in_8bit=True)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight)
    stock = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(MergeError, match=r"in 8 bits, and only dense and 4-bit bases are rounded.*merge_and_unload"):
        merge(stock, onto="nf4", calibration=rows_of(text()) if calibrate else None, force=True)


def test_codes_are_not_compared_with_those_of_a_base_in_fp4(tmp_path: Path) -> None:
    """Which stand for other levels; with nearest's instead."""
    llama().save_pretrained(tmp_path)
    fp4 = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = adapted(tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fp4), quantization=None)
    report = merge(model, onto="nf4", calibration=rows_of(text()), force=True)
    nearest = merge(model, onto="nf4", force=True).model
    assert report.calibration is not None
    for layer in report.calibration.layers:
        own, other = (found.get_submodule(layer.name).weight.data for found in (report.model, nearest))
        differ = torch.cat([(own ^ other) >> 4, (own ^ other) & 15]) != 0
        assert layer.changed == pytest.approx(float(differ.double().mean()))


def test_another_base_is_refused_before_anything_is_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter, speeches = files(tmp_path, on_base_mismatch="error")
    torch.manual_seed(9)
    llama().save_pretrained(base)
    done = counted(monkeypatch)
    arguments = ("merge", adapter, "--output", tmp_path / "out", "--onto", "nf4", "--calibrate", speeches)
    size = ("--rows", "6", "--length", "32", "--held-out", "2", "--device", "cpu")
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *size)])
    assert result.exit_code == 2
    assert re.search(r"Error: \S+base is another base than the adapter was trained on", result.output)
    assert "kept" not in result.output  # a report of what was not merged
    assert not done
    assert "goes on there" not in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "speeches.txt"}
    forced = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *size, "--force")])
    assert forced.exit_code == 0
    assert "another base than the adapter was trained on" in forced.output


def test_what_is_refused_when_it_is_done_goes_on_with_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter, speeches = files(tmp_path)
    done = counted(monkeypatch)
    options: dict[str, Any] = {"calibration": speeches, "device": "cpu", **SIZE}
    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "refuse_lost", lambda report, force: refused(report))
        with pytest.raises(MergeRefused):
            merge_files(str(adapter), tmp_path / "out", "nf4", str(base), **options)
    groups = len(done)
    assert groups
    assert "the same call with force goes on there" in caplog.text
    merge_files(str(adapter), tmp_path / "out", "nf4", str(base), force=True, **options)
    assert len(done) == groups
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "speeches.txt", "out"}


def refused(report: MergeReport) -> None:
    raise MergeRefused("Little is left.", report)
