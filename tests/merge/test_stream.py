"""Merging from files to files gives the bits of the merge in memory, and files that everyone loads.

Oracles: `PeftModel.from_pretrained(...).merge_and_unload()` on the loaded base, stock loading of the result, and the
unmerged model's logits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, VOCAB, Architecture, gpt2, llama, tokens
from merging import adapted, differences, logits, relative
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_qlora import NF4Config, QLoRAConfig, merge
from hf_qlora.files import AdapterFileError
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import attach, sources
from hf_qlora.merge.report import MergeRefused
from hf_qlora.merge.seen import NOT_SAID, SAME
from hf_qlora.merge.stream import merge_files


MERGED = 1e-5  # as in tests/layers/test_linear.py
Saved = Callable[..., tuple[Path, Path]]


def streamed(report: Any) -> bool:
    return not any("Merged in memory" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_files_merge_to_the_bits_of_merge_and_unload(
    family: Architecture, dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    base, adapter = saved(family.make(), dtype, task_type=family.task_type, **family.options)
    cls = type(family.make())
    model = PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base))
    assert streamed(report) == ("moe" not in family.name and family.name != "mixtral")
    assert not differences(cls.from_pretrained(tmp_path / "merged"), model.merge_and_unload())
    assert report.kept > 0.99


@pytest.mark.parametrize("onto", ["original", "nf4"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_files_merge_to_the_bits_of_merge(make: Any, onto: Any, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(make(), torch.bfloat16)
    cls = type(make())
    model = PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
    expected = merge(model, onto, base if onto == "original" else None, force=True)
    report = merge_files(str(adapter), tmp_path / "merged", onto, str(base), force=True)
    assert streamed(report)
    reloaded = cls.from_pretrained(tmp_path / "merged")
    assert not differences(reloaded, expected.model)
    assert report.layers == [next(x for x in expected.layers if x.name == layer.name) for layer in report.layers]
    assert len(report.layers) == len(expected.layers)
    packed = [module for module in reloaded.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert bool(packed) == (onto == "nf4")
    assert all(layer.compute_dtype == torch.bfloat16 for layer in packed)


KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA and patterns": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 2}},
    "rsLoRA, not folded": {"use_rslora": True, "portable": False},
    "DoRA": {"use_dora": True},
    "depth": {"depth": True},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a trained norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "a dense base": {"quantization": None},
    "a dense base, DoRA": {"quantization": None, "use_dora": True},
    "single scales in blocks of 128": {"quantization": NF4Config(double_quant=False, block_size=128)},
    "dense layers": {"quantization": NF4Config(skip_modules=("down_proj",))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_from_files(kind: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(llama(attention_bias=True), task_type="CAUSAL_LM", **KINDS[kind])
    model, ids = PeftModel.from_pretrained(llama_from(base), adapter).eval(), tokens()
    expected = logits(model, ids)
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base))
    assert streamed(report)
    merged = llama_from(tmp_path / "merged")
    assert relative(logits(merged, ids), expected) <= MERGED
    assert not differences(merged, model.merge_and_unload())


def llama_from(folder: Path, **options: Any) -> nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **options)


TIED = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "one LoRA on both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
@pytest.mark.parametrize("case", TIED)
def test_tied_weights_come_apart_in_files_if_one_was_trained(case: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(llama(tie_word_embeddings=True), task_type="CAUSAL_LM", **TIED[case])
    if case == "a trained head":
        tensors = load_file(adapter / "adapter_model.safetensors")
        name = next(name for name in tensors if "lm_head" in name)
        save_file({**tensors, name: tensors[name] + 0.1}, adapter / "adapter_model.safetensors")
        forget_the_hash(adapter)
    model, ids = PeftModel.from_pretrained(llama_from(base), adapter).eval(), tokens()
    expected = logits(model, ids)
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (case == "neither")
    assert any("tied" in note for note in report.notes) == (case != "neither")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (case != "neither")
    assert relative(logits(llama_from(tmp_path / "merged"), ids), expected) <= MERGED


def forget_the_hash(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["hf_qlora"]["weights_sha256"]
    file.write_text(json.dumps(values))


def test_a_sharded_base_gives_the_same_and_the_result_can_be_sharded(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(llama(), base_options={"max_shard_size": "200KB"})
    assert len(list(base.glob("*.safetensors"))) > 3
    merge_files(str(adapter), tmp_path / "merged", base=str(base), max_shard_bytes=300_000)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    model = PeftModel.from_pretrained(llama_from(base), adapter)
    assert not differences(llama_from(tmp_path / "merged"), model.merge_and_unload())


@pytest.mark.parametrize(("computes", "asked"), [(None, None), ("float16", None), ("float16", "bfloat16")])
@pytest.mark.parametrize("onto", ["dequantized", "nf4"])
def test_a_base_that_is_stored_in_4_bits(onto: Any, computes: Any, asked: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    nf4 = NF4Config(compute_dtype=computes).to_bitsandbytes()
    llama_from(tmp_path / "dense", quantization_config=nf4, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    own = NF4Config(compute_dtype=asked)
    adapted(llama_from(tmp_path / "base"), quantization=own).save_pretrained(tmp_path / "adapter")
    report = merge_files(str(tmp_path / "adapter"), tmp_path / "merged", onto, str(tmp_path / "base"), force=True)
    assert streamed(report)
    model = PeftModel.from_pretrained(llama_from(tmp_path / "base"), tmp_path / "adapter")
    assert not differences(llama_from(tmp_path / "merged"), merge(model, onto, force=True).model)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("quantization_config" in config) == (onto == "nf4")
    if onto == "nf4":  # the adapter's, or as the base: float32 where none was named
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == (asked or computes or "float32")
    with pytest.raises(MergeError, match="stored in NF4; onto='original' needs the dense one"):
        merge_files(str(tmp_path / "adapter"), tmp_path / "other", "original", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "FP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "FP4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
@pytest.mark.parametrize("calibration", [None, "speeches.txt"])
def test_a_base_that_is_stored_otherwise_than_in_nf4_is_refused(
    calibration: Any, stored: dict[str, Any], kind: str, saved: Saved, tmp_path: Path
) -> None:
    base, adapter = saved()
    config = json.loads((base / "config.json").read_text())
    for place in (config, config.setdefault("text_config", {})):
        place["quantization_config"] = stored
        (base / "config.json").write_text(json.dumps(config))
        for onto, said in (
            ("nf4", "from files, bases are merged that are dense or in"),
            ("original", "the dense one"),
        ):
            more = {} if onto == "original" else {"calibration": calibration}
            with pytest.raises(MergeError, match=rf"The base .* is stored in {kind}; .*{said}"):
                merge_files(str(adapter), tmp_path / "merged", onto, str(base), **more)  # type: ignore[arg-type]
        del place["quantization_config"]


@pytest.mark.parametrize("trained_on", ["dense", "nf4"])
def test_an_adapter_of_stock_peft(trained_on: Any, tmp_path: Path) -> None:
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", tokens()
    llama().save_pretrained(base)
    nf4 = NF4Config().to_bitsandbytes() if trained_on == "nf4" else None
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama_from(base, quantization_config=nf4, dtype=torch.float32), config)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.save_pretrained(adapter)
    for chosen in {trained_on, "auto" if trained_on == "dense" else "nf4"}:
        report = merge_files(str(adapter), tmp_path / chosen, base=str(base), trained_on=chosen)
        assert streamed(report)
        assert report.quantized == (trained_on == "nf4")
        assert report.assumed == (chosen == "auto")
        assert ("that the adapter was trained on" in str(report)) == (chosen != "auto")
        assert ("base as it is stored was assumed, dense" in str(report)) == (chosen == "auto")
        assert ("--trained-on nf4" in str(report)) == (chosen == "auto")
        assert ("rounded to NF4 from float32 with double-quantized scales" in str(report)) == (chosen == "nf4")
        assert relative(logits(llama_from(tmp_path / chosen), ids), logits(model, ids)) <= MERGED


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("kind", [LoraConfig, QLoRAConfig])
def test_an_initialization_that_changes_the_base_is_repeated(kind: Any, init: str, tmp_path: Path) -> None:
    """Off by half of the logits where it is not, however little was trained."""
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", tokens()
    llama().save_pretrained(base)
    settings = {"quantization": None} if kind is QLoRAConfig else {}
    config = kind(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init, **settings)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(llama_from(base), config)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base))
    assert streamed(report) == (init == "mica")
    assert relative(logits(llama_from(tmp_path / "merged"), ids), logits(model, ids)) <= MERGED


@pytest.mark.parametrize(
    ("init", "arguments"),
    [
        ("pissa", {"trained_on": "nf4"}),
        ("pissa", {"onto": "original"}),
        ("pissa_niter_4", {}),
        ("corda", {}),
        ("corda", {"onto": "nf4", "calibration": "a.txt", "device": "cpu"}),
        ("lora_ga", {}),
    ],
)
def test_an_initialization_that_cannot_be_repeated_is_refused(
    init: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama_from(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    with pytest.raises(MergeError, match=rf"init_lora_weights='{init}' changed .* Merge the trained model in Python"):
        merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"), **arguments)
    assert not (tmp_path / "merged").exists()


def test_names_of_an_encoder_saved_alone_get_the_prefix_of_the_whole(tmp_path: Path) -> None:
    """A classifier trained on a base that has no head: its base's tensors are called otherwise."""
    torch.manual_seed(1)
    config = tf.BertConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tf.BertModel(config, add_pooling_layer=True).save_pretrained(tmp_path / "base")
    whole = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(whole, task_type="SEQ_CLS", target_modules=["query"])
    ids = tokens()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    report = merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))
    assert streamed(report)
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged, ids), expected) <= MERGED


def llava() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = tf.LlamaConfig(**sizes, vocab_size=500), tf.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=499)
    )


def test_a_model_of_text_and_images_is_made_by_its_own_class(saved: Saved, tmp_path: Path) -> None:
    """Its adapters are trained with task_type="CAUSAL_LM", whose auto class does not know it."""
    base, adapter = saved(llava(), task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model, ids = PeftModel.from_pretrained(type(llava()).from_pretrained(base), adapter).eval(), tokens() % 499
    merge_files(str(adapter), tmp_path / "merged", base=str(base))
    merged = type(llava()).from_pretrained(tmp_path / "merged")
    assert relative(logits(merged, ids), logits(model, ids)) <= MERGED


CLASSES = ["negative", "neutral", "positive"]


@pytest.mark.parametrize("kind", [{}, {"trainable_token_indices": [1, 2]}], ids=["layer by layer", "in memory"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_classifier_keeps_its_classes(count: int, kind: dict[str, Any], tmp_path: Path) -> None:
    """Its base is an encoder that knows nothing of them."""
    torch.manual_seed(1)
    config = tf.BertConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tf.BertModel(config).save_pretrained(tmp_path / "base")
    names = dict(enumerate(CLASSES[:count]))
    whole = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label=names, label2id={name: i for i, name in names.items()}
    )
    model, ids = adapted(whole, task_type="SEQ_CLS", target_modules=["query"], **kind), tokens()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == names
    assert merged.config.label2id == {name: i for i, name in names.items()}
    assert relative(logits(merged, ids), expected) <= MERGED


def test_a_classifier_keeps_its_classes_where_its_base_had_others(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tf.BertForSequenceClassification(tf.BertConfig(**config, num_labels=3)).save_pretrained(tmp_path / "base")
    cls = tf.AutoModelForSequenceClassification
    whole = cls.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    model, ids = adapted(whole, task_type="SEQ_CLS", target_modules=["query"]), tokens()
    model.save_pretrained(tmp_path / "adapter")
    merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))
    merged = cls.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 5
    assert relative(logits(merged, ids), logits(model, ids)) <= MERGED


def test_a_resized_base_is_named_with_the_way_out(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = llama_from(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 4)
    kept = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapted(model, task_type="CAUSAL_LM", target_modules=["q_proj"], **kept).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\(504, 128\).*resize_token_embeddings.*merge\(model\)"):
        merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))


def test_old_names_are_read(saved: Saved, tmp_path: Path) -> None:
    """Checkpoints of old have LayerNorm.gamma, which transformers renames on loading."""
    family = next(family for family in ARCHITECTURES if family.name == "bert")
    base, adapter = saved(family.make(), task_type="SEQ_CLS", target_modules=["query"])
    merge_files(str(adapter), tmp_path / "new", base=str(base))
    file = base / "model.safetensors"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    assert any("gamma" in name for name in old)
    merge_files(str(adapter), tmp_path / "old", base=str(base))
    cls = tf.AutoModelForSequenceClassification
    assert not differences(cls.from_pretrained(tmp_path / "old"), cls.from_pretrained(tmp_path / "new"))


def test_what_lies_beside_the_base_goes_with_the_model(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    beside = {"tokenizer.json": "base", "tokenizer_config.json": "base", "LICENSE": "base", "merges.txt": "base"}
    for name, content in beside.items():
        (base / name).write_text(content)
    (base / "pytorch_model.bin").write_text("pickle")
    merge_files(str(adapter), tmp_path / "merged", base=str(base))
    merged = tmp_path / "merged"
    expected = {*beside, "config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in merged.iterdir()} == expected
    assert (merged / "tokenizer.json").read_text() == "base"
    (adapter / "tokenizer_config.json").write_text("adapter")
    (adapter / "tokenizer.json").write_text("adapter")
    report = merge_files(str(adapter), merged, base=str(base), overwrite=True)
    assert (merged / "tokenizer.json").read_text() == "adapter"
    assert "The tokenizer is the adapter's." in report.notes


def test_the_dtype_can_be_chosen(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved()
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base), dtype="bfloat16")
    assert report.dtype == "bfloat16"
    model = PeftModel.from_pretrained(llama_from(base, dtype=torch.bfloat16), adapter)
    reloaded = llama_from(tmp_path / "merged")
    assert reloaded.dtype == torch.bfloat16
    assert not differences(reloaded, model.merge_and_unload())


@pytest.mark.parametrize("kind", [{}, {"trainable_token_indices": [1, 2]}], ids=["layer by layer", "in memory"])
def test_the_dtype_is_that_of_training(kind: dict[str, Any], tmp_path: Path) -> None:
    """The codes are those of the base as it was loaded, and not of its files."""
    llama().save_pretrained(tmp_path / "base")
    adapted(llama_from(tmp_path / "base", dtype=torch.bfloat16), task_type="CAUSAL_LM", **kind).save_pretrained(
        tmp_path / "adapter"
    )
    report = merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))
    model = PeftModel.from_pretrained(llama_from(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter")
    assert not differences(llama_from(tmp_path / "merged"), merge(model).model)
    assert "In bfloat16, as the adapter was trained; the base's config says float32." in report.notes
    assert SAME in report.notes


COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("base", "revision", "commit", "expected"),
    [
        (None, None, COMMIT, COMMIT),
        (None, "v2", COMMIT, "v2"),
        (None, None, "../elsewhere", None),
        ("org/other", None, COMMIT, None),
    ],
    ids=["trained on", "the config's", "no commit", "another base"],
)
def test_the_revision_is_that_of_training(
    base: Any, revision: Any, commit: str, expected: Any, saved: Saved, tmp_path: Path, monkeypatch: Any
) -> None:
    _, adapter = saved(target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": "org/model", "revision": revision}
    values["hf_qlora"]["base"] |= {"id": "org/model", "commit": commit}
    file.write_text(json.dumps(values))
    asked = []

    def asked_for(name: str, revision: str | None) -> Path:
        asked.append(revision)
        raise MergeError("enough")

    monkeypatch.setattr(sources, "base_source", asked_for)
    with pytest.raises(MergeError, match="enough"):
        merge_files(str(adapter), tmp_path / "merged", base=base)
    assert asked == [expected]


def test_the_adapter_names_its_base(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    assert merge_files(str(adapter), tmp_path / "merged").base == str(base)


def test_a_lossy_merge_into_nf4_is_refused_and_writes_nothing(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved()
    tensors = load_file(adapter / "adapter_model.safetensors")
    small = {name: 0.01 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    forget_the_hash(adapter)
    why = "of the adapter is left, by weights (the logits were not compared: files are merged layer by layer, and the "
    with pytest.raises(MergeRefused, match=re.escape(f"{why}model is not run")):
        merge_files(str(adapter), tmp_path / "merged", "nf4", str(base))
    assert not (tmp_path / "merged").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


# --- which base it is ------------------------------------------------------------------------------------------------


def of_another_model(base: Path) -> None:
    model = llama_from(base)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(base)


def with_another_layer(base: Path) -> None:
    model = llama_from(base)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(-1)  # in NF4, each code is another
    model.save_pretrained(base)


def with_another_head(base: Path) -> None:
    model = llama_from(base)
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(base)


# Single tokens are merged in memory, the others layer by layer.
BASES: dict[str, dict[str, Any]] = {
    "NF4": {},
    "dense": {"quantization": None},
    "two layers of 14": {"target_modules": ["q_proj"]},
    "in memory": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("change", [of_another_model, with_another_layer, with_another_head])
@pytest.mark.parametrize("kind", BASES)
def test_another_base_is_refused_or_named(
    kind: str, change: Any, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = saved(on_base_mismatch="error", task_type="CAUSAL_LM", **BASES[kind])
    right = merge_files(str(adapter), tmp_path / "right", base=str(base))
    assert streamed(right) == (kind != "in memory")
    assert SAME in right.notes
    assert "another base" not in caplog.text
    change(base)
    with pytest.raises(MergeRefused, match=r"base is another base than .*trained on") as refused:
        merge_files(str(adapter), tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()
    assert any("another base" in note for note in refused.value.report.notes)
    forced = merge_files(str(adapter), tmp_path / "merged", base=str(base), force=True)
    assert any("another base" in note for note in forced.notes)
    assert SAME not in forced.notes
    assert "another base" in caplog.text


@pytest.mark.parametrize("asked", ["warn", "ignore"])
def test_another_base_is_merged_where_the_adapter_allows_it_and_said(
    asked: str, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file does not silence its reader."""
    base, adapter = saved(on_base_mismatch=asked)
    of_another_model(base)
    report = merge_files(str(adapter), tmp_path / "merged", base=str(base))
    assert "another base" in caplog.text
    assert any("another base" in note for note in report.notes)
    merged = str(report).splitlines()[0]
    assert merged.endswith("another base than the adapter was trained on, dense, plus ΔW")
    assert "as it was trained" not in str(report)


def test_a_part_of_a_model_has_the_samples_of_the_whole(saved: Saved, tmp_path: Path) -> None:
    """In all kinds of bases: stored dense or packed, tied, in bfloat16, with Conv1D."""
    for number, model in enumerate((llama(tie_word_embeddings=True), gpt2())):
        base, adapter = saved(model, torch.bfloat16)
        assert SAME in merge_files(str(adapter), tmp_path / f"{number}", base=str(base)).notes
    nf4 = NF4Config().to_bitsandbytes()
    llama().save_pretrained(tmp_path / "dense")
    llama_from(tmp_path / "dense", quantization_config=nf4, dtype=torch.bfloat16).save_pretrained(tmp_path / "packed")
    adapted(llama_from(tmp_path / "packed")).save_pretrained(tmp_path / "on packed")
    report = merge_files(str(tmp_path / "on packed"), tmp_path / "merged", base=str(tmp_path / "packed"))
    assert SAME in report.notes


def test_an_adapter_that_does_not_know_its_base_is_merged_and_said(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama_from(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    assert NOT_SAID in merge_files(str(tmp_path / "adapter"), tmp_path / "m", base=str(tmp_path / "base")).notes


# --- what is refused -------------------------------------------------------------------------------------------------


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def of_another_kind(folder: Path) -> Path:
    peft_config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(peft_config))
    return folder


def of_adalora(folder: Path) -> Path:
    peft_config = {"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": 10}
    (folder / "adapter_config.json").write_text(json.dumps(peft_config))
    return folder


def truncated(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    return folder


def with_nan(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    forget_the_hash(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adapter: adapter.parent / "nowhere", "nowhere is not there"),
        (lambda adapter: empty(adapter.parent / "empty"), r"it has no adapter_config\.json"),
        (lambda adapter: without(adapter, "adapter_model.safetensors"), r"adapter_model\.safetensors"),
        (of_another_kind, "is an adapter of kind IA3; LORA alone is merged"),
        (of_adalora, "is an adapter of kind ADALORA; LORA alone is merged"),
        (truncated, "sha256 differs"),
        (with_nan, "NaN"),
        (lambda adapter: "nobody/nothing-of-this-name", "is no folder and not in the Hub's cache"),
    ],
    ids=["not there", "no adapter", "no weights", "IA3", "AdaLoRA", "truncated", "NaN", "an id, offline"],
)
def test_an_adapter_that_cannot_be_merged_is_named(change: Any, message: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    with pytest.raises((MergeError, AdapterFileError), match=message):
        merge_files(str(change(adapter)), tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def lacking(folder: Path) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def misshapen(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    return folder


def another_size(folder: Path) -> Path:
    llama(hidden_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: base.parent / "nowhere", "The base .*nowhere is not there"),
        (lambda base: empty(base.parent / "empty"), r"is no model: it has no config\.json"),
        (lambda base: without(base, "model.safetensors"), r"only safetensors are read.*merge\(model\)"),
        (lacking, r"no weights|has weights for model\.layers\.1\.mlp\.up_proj\.weight"),
        (misshapen, r"model\.norm\.weight is \(3,\), and the model's \(128,\)"),
        (another_size, "does not fit"),
    ],
    ids=["not there", "no model", "no weights", "a tensor missing", "another shape", "another size"],
)
def test_a_base_that_cannot_be_used_is_named(change: Any, message: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved()
    with pytest.raises(ValueError, match=message):
        merge_files(str(adapter), tmp_path / "merged", base=str(change(base)))
    assert not (tmp_path / "merged").exists()


def opt() -> nn.Module:
    config = tf.OPTConfig(hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    return tf.OPTForCausalLM(config)


@pytest.mark.parametrize("route", ["layer by layer", "in memory"])
@pytest.mark.parametrize(
    ("targets", "base", "message"),
    [
        (["q_proj"], opt, r"no weights for model\.decoder\.layers\.0\.self_attn\.q_proj\.lora_A\.weight and 3 more"),
        (
            ["q_proj"],
            lambda: llama(num_hidden_layers=1),
            r"for what is not there: model\.layers\.1\..*and 1 more",
        ),
        (["q_proj"], lambda: llama(hidden_size=64), "size mismatch"),
        (["gate_proj"], opt, "Target modules .*gate_proj.* not found"),
    ],
    ids=["other names", "fewer layers", "another size", "no such layers"],
)
def test_a_stock_adapter_of_another_architecture_is_refused(
    targets: list[str], base: Any, message: str, route: str, tmp_path: Path
) -> None:
    """PEFT leaves out of the model what it finds no place for, and of the adapter what is not in its file."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    rows = [[token % 64 for token in range(first, first + 64)] for first in range(16)]
    how: dict[str, Any] = {}
    if route == "in memory":
        how = {"onto": "nf4", "calibration": rows, "rows": 4, "length": 32, "device": "cpu"}
    with pytest.raises(MergeError, match=rf"adapter does not fit the base: .*{message}"):
        merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"), force=True, **how)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("base_model.model.score.weight", r"has weights for what is not there: score\.weight"),
        ("", r"has no weights for lm_head\.weight"),
    ],
    ids=["under another name", "not in the file"],
)
def test_a_trained_head_of_a_stock_adapter_is_not_left_out(there: str, message: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    file, settings = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(file)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file({**tensors, **({there: head} if there else {})}, file)
    if there:  # as of a model whose head is called so
        settings.write_text(settings.read_text().replace('"lm_head"', '"score"'))
    with pytest.raises(MergeError, match=rf"does not fit the base: it {message}"):
        merge_files(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))


def test_a_device_that_is_full_is_not_taken_for_another_base(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = saved(target_modules=["q_proj"])

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(attach, "get_peft_model", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        merge_files(str(adapter), adapter.parent / "merged", base=str(base))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"onto": "int8"}, "onto='int8' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"trained_on": "int8"}, "trained_on='int8' is not known"),
        ({"trained_on": "dense"}, "trained on an NF4 base; leave out trained_on='dense'"),
    ],
)
def test_a_wrong_choice_is_named(arguments: dict[str, Any], message: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    with pytest.raises(MergeError, match=message):
        merge_files(str(adapter), tmp_path / "merged", base=str(base), **arguments)


def test_the_base_and_the_adapter_are_not_overwritten(saved: Saved) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(MergeError, match="is what is merged"):
        merge_files(str(adapter), base, base=str(base), overwrite=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_lora_bias_is_refused_on_nf4_and_merged_on_a_dense_base(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(llama(attention_bias=True), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(MergeError, match=r"q_proj has an adapter with lora_bias=True"):
        merge_files(str(adapter), tmp_path / "merged", base=str(base))
    model = adapted(llama_from(base), target_modules=["q_proj"], lora_bias=True, quantization=None)
    model.save_pretrained(tmp_path / "dense")
    ids = tokens()
    merge_files(str(tmp_path / "dense"), tmp_path / "merged", base=str(base))
    assert relative(logits(llama_from(tmp_path / "merged"), ids), logits(model, ids)) <= MERGED


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from hf_qlora.merge.stream import merge_files
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
import torch
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge_files(sys.argv[1], sys.argv[3], base=sys.argv[2])  # a tiny one: what the code itself takes
before = peak()
merge_files(sys.argv[4], sys.argv[6], base=sys.argv[5])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_layer(smollm2: Path, saved: Saved, tmp_path: Path) -> None:
    """SmolLM2 in float32, 513 MiB: its largest tensor, the embeddings, has 108 MiB, the largest adapted layer 3.4."""
    tiny_base, tiny_adapter = saved(target_modules=["q_proj"])
    model = get_peft_model(llama_from(smollm2), QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "smollm2-adapter")
    first = [tiny_adapter, tiny_base, tmp_path / "a"]
    second = [tmp_path / "smollm2-adapter", smollm2, tmp_path / "b"]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, first + second)], capture_output=True, text=True, check=True
    )
    extra = int(found.stdout.split()[-1])
    tensors = load_file(smollm2 / "model.safetensors")
    largest = max(tensor.nbytes for tensor in tensors.values())
    whole = sum(tensor.nbytes for tensor in tensors.values())
    adapter = (tmp_path / "smollm2-adapter" / "adapter_model.safetensors").stat().st_size
    # The largest tensor, once mapped from the file and once on its way out, and the adapter.
    assert extra <= 2 * largest + adapter + 32 * 2**20 < whole
