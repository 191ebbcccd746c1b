"""`merge` gives a new model that computes what was trained, says how far it is from that, and changes nothing else.

Oracles: PEFT's `merge_and_unload` as the layers define it, fp64 arithmetic on weights, the unmerged model's own
logits, and bitsandbytes' quantization of the trained weight.
"""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, Architecture, bert, gpt2, llama, tokens
from merging import adapted, differences, logits, relative, state_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hf_qlora
import hf_qlora.merge.stream
from hf_qlora import NF4Config, QLoRAConfig, merge, quantize_model
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import probe
from hf_qlora.merge.report import MergeRefused
from hf_qlora.quant.linear4bit import Linear4bit


# As in tests/layers/test_linear.py: one rounding of W + ΔW against two products, through two layers in fp32.
MERGED = 1e-5
FLOATS = [torch.float32, torch.bfloat16]


def test_the_function_wins_over_the_package_of_its_name() -> None:
    assert isinstance(hf_qlora.merge, types.FunctionType)
    assert hf_qlora.merge is merge


# --- onto the dequantized base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_merge_equals_merge_and_unload_and_leaves_the_model_alone(family: Architecture) -> None:
    model = adapted(family.make(), task_type=family.task_type, **family.options)
    inputs = family.inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    before, modules = state_bytes(model), {name: id(module) for name, module in model.named_modules()}
    report = merge(model)
    assert state_bytes(model) == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert relative(report.model(**inputs).logits, expected) <= MERGED
    assert not differences(report.model, model.merge_and_unload())
    assert report.kept > 0.999
    assert report.layers or report.notes


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_merged_model_shares_no_memory_and_has_the_dtype(dtype: torch.dtype) -> None:
    model = adapted(llama(tie_word_embeddings=True).to(dtype))
    merged = merge(model).model
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in merged.parameters()}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"depth": True}, {"bias": "all"}], ids=str
)
@pytest.mark.parametrize("quantization", [NF4Config(), NF4Config(block_size=128, double_quant=False), None], ids=str)
def test_every_kind_of_adapter_computes_the_same_merged(quantization: Any, settings: dict[str, Any]) -> None:
    model, ids = adapted(llama(attention_bias=True), quantization=quantization, **settings), tokens()
    expected = logits(model, ids)
    report = merge(model)
    assert relative(logits(report.model, ids), expected) <= MERGED
    assert torch.equal(logits(model, ids), expected)
    assert report.error <= 1e-5  # of ‖ΔW‖, which is some 0.1 of ‖W‖: one fp32 rounding


def test_two_active_adapters_are_merged_together() -> None:
    model, ids = adapted(llama()), tokens()
    model.add_adapter("second", QLoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model, ids)
    report = merge(model)
    assert report.adapters == ["default", "second"]
    assert relative(logits(report.model, ids), expected) <= MERGED


@pytest.mark.parametrize(
    "packed", [False, True], ids=["never evaluated", "after an eval forward with packing allowed"]
)
def test_a_stock_adapter_on_a_stock_4_bit_base_is_merged_exactly(packed: bool, tmp_path: Path) -> None:
    """Where PEFT's own merge rounds ΔW away."""
    llama().save_pretrained(tmp_path)
    base = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=NF4Config().to_bitsandbytes(), dtype=torch.float32
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = packed
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    ids = tokens()
    weights = {name: p.quant_state for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    report = merge(model)
    assert all(p.quant_state is weights[name] for name, p in model.named_parameters() if name in weights)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj) is peft.tuners.lora.bnb.Linear4bit
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    assert relative(logits(report.model, ids), logits(model, ids)) <= MERGED


# --- a prediction that the adapter flips -----------------------------------------------------------------------------


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("repacks", [False, True], ids=["this CPU", "a CPU on which bitsandbytes repacks"])
def test_a_prediction_that_the_adapter_flips_is_flipped_merged(onto: Any, repacks: bool) -> None:
    torch.manual_seed(3)
    original, ids = bert(), tokens()
    model = adapted(copy.deepcopy(original), task_type="SEQ_CLS", target_modules=["query", "value"]).train()
    with model.disable_adapter():
        before = logits(model, ids).argmax(-1)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".lora_" in n], lr=2e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=1 - before).loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = repacks
    assert logits(model, ids).argmax(-1).tolist() == (1 - before).tolist()
    merged = merge(model, onto, original if onto == "original" else None).model
    assert logits(merged, ids).argmax(-1).tolist() == (1 - before).tolist()


# --- onto the original base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_onto_the_original_is_that_weight_plus_the_scaled_product(make: Any, dtype: torch.dtype) -> None:
    original = make().to(dtype)
    model = adapted(copy.deepcopy(original), use_rslora=True)
    before = state_bytes(original)
    report = merge(model, "original", original)
    assert state_bytes(original) == before
    for found in report.layers:
        layer: Any = model.get_base_model().get_submodule(found.name)
        W = original.get_submodule(found.name).weight.double()
        delta = 4.0 * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
        expected = W + (delta.t() if make is gpt2 else delta)
        merged = report.model.get_submodule(found.name).weight
        assert merged.dtype == dtype
        # the fp32 sum, rounded once to dtype
        torch.testing.assert_close(merged.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not differences(report.model.lm_head, original.lm_head)


def test_the_original_can_be_named_by_its_folder(tmp_path: Path) -> None:
    original = llama()
    original.save_pretrained(tmp_path)
    model = adapted(copy.deepcopy(original), target_modules=["q_proj"])
    by_model, by_folder = merge(model, "original", original), merge(model, "original", tmp_path)
    assert not differences(by_model.model, by_folder.model)
    assert by_folder.original == str(tmp_path)
    # Layers without an adapter are the original's too, not the dequantized ones.
    assert torch.equal(by_folder.model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)


def test_the_error_onto_the_original_is_the_quantization_error() -> None:
    original = llama()
    model = adapted(copy.deepcopy(original))
    report = merge(model, "original", original)
    # all of ΔW is in the weights, however far the returned error moves the logits
    assert report.kept == pytest.approx(1, abs=1e-3)
    for found in report.layers:
        W = original.get_submodule(found.name).weight.double()
        layer: Any = model.get_base_model().get_submodule(found.name)
        lost = (W - layer.base_layer.dequantize().double()).norm()
        trained = layer.base_layer.dequantize().double() + layer.get_delta_weight("default").double()
        assert found.error == pytest.approx(float(lost / trained.norm()), rel=1e-4)
        assert found.signal == pytest.approx(1, abs=1e-3)


def another(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)


def another_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-1)


def another_embedding(model: nn.Module) -> None:
    model.model.embed_tokens.weight.data.mul_(-1)


@pytest.mark.parametrize("quantization", [NF4Config(), NF4Config(double_quant=False), None], ids=str)
@pytest.mark.parametrize("change", [another, another_layer, another_embedding])
def test_an_original_with_other_weights_is_refused_or_said(change: Any, quantization: Any) -> None:
    original = llama()
    model = adapted(copy.deepcopy(original), quantization=quantization)
    assert not merge(model, "original", original).notes
    change(original)
    with pytest.raises(MergeError, match=r"is not what the base was made of: .*force merges all the same"):
        merge(model, "original", original)
    report = merge(model, "original", original, force=True)
    assert any("not what the base was made of" in note for note in report.notes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_original_in_another_dtype_is_the_original(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    make = tf.AutoModelForCausalLM.from_pretrained
    model = adapted(make(tmp_path, dtype=torch.bfloat16))
    assert not merge(model, "original", make(tmp_path, dtype=dtype)).notes


def test_a_head_that_is_new_at_every_load_does_not_make_another_original(tmp_path: Path) -> None:
    whole = bert()
    whole.bert.save_pretrained(tmp_path)
    model = adapted(type(whole).from_pretrained(tmp_path), task_type="SEQ_CLS", target_modules=["query"])
    merged = merge(model, "original", tmp_path).model
    assert torch.equal(merged.classifier.weight, model.get_base_model().classifier.modules_to_save.default.weight)


def test_trained_biases_stay_the_adapters_on_the_original() -> None:
    original = llama(attention_bias=True)
    model = adapted(copy.deepcopy(original), bias="all")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data += 1.0
    merged = merge(model, "original", original).model
    for name, parameter in merged.named_parameters():
        if name.endswith(".bias"):
            assert torch.equal(parameter, original.get_parameter(name) + 1.0)


# --- onto NF4 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_onto_nf4_each_weight_has_the_nearest_level(make: Any, tmp_path: Path) -> None:
    model = adapted(make())
    dense, report = merge(model).model, merge(model, "nf4", force=True)
    expected = quantize_model(copy.deepcopy(dense))
    packed = [name for name, module in expected.named_modules() if isinstance(module, Linear4bit)]
    assert len(packed) == len(report.layers)
    assert not differences(report.model, expected)
    report.save_pretrained(tmp_path / "nf4")
    reloaded = type(dense).from_pretrained(tmp_path / "nf4")
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in reloaded.modules())
    assert not differences(reloaded, report.model)


def test_layers_that_were_dense_in_the_base_stay_dense_in_nf4() -> None:
    model = adapted(llama(), quantization=NF4Config(skip_modules=("down_proj",)))
    merged = merge(model, "nf4", force=True).model
    kinds = {type(layer.mlp.down_proj) for layer in merged.model.layers}
    assert kinds == {nn.Linear}
    assert isinstance(merged.model.layers[0].mlp.up_proj, Linear4bit)


def small(factor: float) -> PeftModel:
    """An adapter whose ΔW is far below a step of NF4."""
    model = adapted(llama())
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data *= factor
    return model


def test_a_merge_that_loses_the_adapter_is_refused_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    model = small(0.05)
    before = state_bytes(model)
    with pytest.raises(MergeRefused, match=r"% of the adapter is left, by logits: .*onto='dequantized'") as refused:
        merge(model, "nf4")
    assert state_bytes(model) == before
    report = refused.value.report
    assert report.kept < 0.5
    assert all(layer.steps is not None and layer.steps < 0.1 for layer in report.layers)
    with caplog.at_level("WARNING", logger="hf_qlora"):
        assert merge(model, "nf4", force=True).kept == pytest.approx(report.kept)
    assert f"Rounded to NF4, {max(report.kept, 0):.1%} of the adapter is left, by logits" in caplog.text
    assert "Calibrated on rows like those it was trained on" in caplog.text


def test_a_merge_into_nf4_that_keeps_the_adapter_is_not_refused() -> None:
    report = merge(small(10.0), "nf4")
    assert report.kept > 0.5


def test_an_adapter_that_does_nothing_is_lost_nowhere() -> None:
    model = get_peft_model(llama(), QLoRAConfig(r=2, target_modules=["q_proj"]))
    assert merge(model, "nf4").kept == 1


def test_a_dense_base_is_merged_into_nf4_with_its_first_rounding() -> None:
    model = adapted(llama(), quantization=None)
    report = merge(model, "nf4", force=True)
    assert isinstance(report.model.model.layers[0].mlp.up_proj, Linear4bit)
    assert all(layer.steps is not None for layer in report.layers)
    assert report.error > 0


# --- tied weights ----------------------------------------------------------------------------------------------------

TIED = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "one LoRA on both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
@pytest.mark.parametrize("case", TIED)
def test_tied_weights_come_apart_if_one_of_them_was_trained(case: str, tmp_path: Path) -> None:
    model, ids = adapted(llama(tie_word_embeddings=True), task_type="CAUSAL_LM", **TIED[case]), tokens()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(model, ids)
    report = merge(model)
    assert relative(logits(report.model, ids), expected) <= MERGED
    assert torch.equal(logits(model, ids), expected)
    apart = case != "neither"
    assert any("tied" in note for note in report.notes) == apart
    assert report.model.config.tie_word_embeddings is not apart
    report.save_pretrained(tmp_path / "merged")
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded, ids), logits(report.model, ids))


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_logits_are_compared_by_kl() -> None:
    model = adapted(llama())
    ids = [list(range(1, 20)), list(range(30, 60))]
    report = merge(model, "nf4", texts=ids, force=True)
    totals, positions = [0.0, 0.0], 0
    for row in ids:
        one = torch.tensor([row])
        p = logits(model, one).double().softmax(-1)[0]
        with model.disable_adapter():
            plain = logits(model, one).double().softmax(-1)[0]
        for i, q in enumerate((logits(report.model, one).double().softmax(-1)[0], plain)):
            totals[i] += float((p * (p / q).log()).sum())
        positions += len(row)
    assert report.logits is not None
    assert report.logits.positions == positions == 49
    # fp32 log-probabilities of about 6, subtracted: 4e-7 each, over KLs of about 1e-4
    assert report.logits.merged == pytest.approx(totals[0] / positions, rel=0.02, abs=1e-7)
    assert report.logits.without == pytest.approx(totals[1] / positions, rel=0.02, abs=1e-7)
    assert report.kept == pytest.approx(1 - totals[0] / totals[1], abs=0.02)
    assert "2 given texts" in str(report)


def test_the_report_prints_and_goes_through_json() -> None:
    original = llama()
    report = merge(adapted(copy.deepcopy(original)), "original", original, texts=[[1, 2, 3]])
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert [layer["name"] for layer in values["layers"]] == [layer.name for layer in report.layers]
    text = str(report)
    assert text.splitlines()[0].startswith("merged     default onto LlamaForCausalLM, in float32")
    assert "KL " in text
    errors = [layer.error for layer in report.worst()]
    assert errors == sorted(errors, reverse=True)
    assert max(layer.error for layer in report.layers) == errors[0]
    assert "9 layers whose error is no larger" in text  # of 14
    assert text.splitlines()[-1].startswith("ΔW/step: ΔW in steps between NF4's levels")


def test_a_string_is_one_text() -> None:
    def read(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    report = merge(adapted(llama(), target_modules=["q_proj"]), texts="one string of words", tokenizer=read)
    assert report.logits is not None
    assert (report.logits.positions, report.text) == (4, "1 given text")


@pytest.mark.parametrize("quantization", [NF4Config(), None], ids=["NF4", "dense"])
def test_the_report_says_what_comes_back_and_what_was_compared(quantization: Any) -> None:
    torch.manual_seed(0)
    original = llama()
    model = adapted(copy.deepcopy(original), target_modules=["q_proj"], quantization=quantization)
    report = merge(model, "original", original)
    assert ("the quantization error comes back" in str(report)) == (quantization is not None)
    assert "compared   with the unmerged model" in str(report)
    report.logits, report.text = None, "not compared"
    assert "compared   as weights, with the unmerged model" in str(report)


def test_without_a_tokenizer_random_tokens_are_used_and_said() -> None:
    assert "random tokens" in merge(adapted(llama())).text


def clip() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 80, "eos_token_id": 2},
            vision_config={**sizes, "image_size": 32, "patch_size": 16},
            projection_dim=32,
        )
    )


@pytest.mark.parametrize(
    ("make", "task_type", "reason"),
    [(clip, None, "NoneType"), (lambda: gpt2(n_positions=32), "CAUSAL_LM", "index out of range")],
    ids=["images too", "fewer positions"],
)
def test_a_model_that_does_not_read_the_built_in_text_is_merged_and_said(
    make: Any, task_type: str | None, reason: str
) -> None:
    model = adapted(make().eval(), task_type=task_type, target_modules=["q_proj", "v_proj", "c_attn"])
    report = merge(model)
    assert report.logits is None
    assert "not measured: the model does not read 4 rows of random tokens" in report.text
    assert reason in report.text
    assert report.kept > 0.999
    assert not differences(report.model, model.merge_and_unload())


def test_positions_that_only_the_longer_paragraph_is_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEFAULT_TEXTS", ("a" * 20, "b" * 40))

    def read(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    report = merge(adapted(gpt2(n_positions=32).eval(), target_modules=["c_attn"]), tokenizer=read)
    assert report.logits is None
    assert "not measured: the model does not read two paragraphs" in report.text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts is empty"),
        (["words"], "no tokenizer was found"),
        ([[1, 100_000]], "ids outside 0 to 499"),
        ([[]], "a row has no tokens"),
        ([[-1]], "ids outside"),
        ([1.5], "strings or lists of token ids"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(texts: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge(adapted(llama(), target_modules=["q_proj"]), texts=texts)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(MergeError, match=r"tokenizer='a/path' is none; pass what AutoTokenizer"):
        merge(adapted(llama(), target_modules=["q_proj"]), texts=["words"], tokenizer="a/path")


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training() -> None:
    original = llama()
    model = adapted(copy.deepcopy(original), target_modules=["q_proj"], lora_dropout=0.9).train()
    model.base_model.model.lm_head.eval()  # each module stays as it was
    before = {name: module.training for name, module in model.named_modules()}
    reports = [merge(model, "original", original, texts=[[1, 2, 3]]) for _ in range(2)]
    assert reports[0].logits == reports[1].logits
    assert {name: module.training for name, module in model.named_modules()} == before


# --- what is refused -------------------------------------------------------------------------------------------------


def narrow() -> nn.Module:
    return llama(intermediate_size=128)


def with_adapter() -> PeftModel:
    return adapted(llama(), target_modules=["q_proj"])


def merged_already() -> PeftModel:
    model = with_adapter()
    model.merge_adapter()
    return model


def diverged() -> PeftModel:
    model = with_adapter()
    next(p for n, p in model.named_parameters() if ".lora_A." in n).data[0, 0] = float("nan")
    return model


def biased() -> PeftModel:
    return adapted(llama(), target_modules=["q_proj"], lora_bias=True)


def inactive() -> PeftModel:
    model = with_adapter()
    model.base_model.set_adapter([])
    return model


def disabled() -> PeftModel:
    model = with_adapter()
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            with_adapter,
            {"onto": "int8"},
            r"onto='int8' is not known; choose one of \('dequantized', 'original', 'nf4'\)",
        ),
        (with_adapter, {"onto": "original"}, "onto='original' needs original="),
        (with_adapter, {"original": "somewhere"}, "original= is used with onto='original' alone"),
        (llama, {}, "LlamaForCausalLM is not a PEFT model"),
        (merged_already, {}, r"merged into .*layers\.0.*unmerge_adapter"),
        (diverged, {}, r"lora_A.*NaN"),
        (biased, {}, "lora_bias=True"),
        (inactive, {}, "No adapter is active"),
        (disabled, {}, r"adapters are disabled; merge outside of disable_adapter\(\)"),
        (lambda: "folder", {}, "str is not a PEFT model.* `hf-qlora merge`"),
    ],
)
def test_what_cannot_be_merged_is_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge(make(), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, r"it has no model\.embed_tokens\.weight"),
        (narrow, r"model\.layers\.0\.mlp\.gate_proj\.weight is \(128, 128\), not \(256, 128\)"),
        (lambda: quantize_model(llama()), "is quantized"),
        (lambda: "no/such/folder/at all", "cannot be loaded"),
    ],
    ids=["another architecture", "another shape", "quantized", "not there"],
)
def test_an_original_that_is_another_model_is_named(make: Any, message: str) -> None:
    model = with_adapter()
    with pytest.raises(MergeError, match=message):
        merge(model, "original", make())
