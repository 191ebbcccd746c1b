"""What is named as a model: refused before it is loaded where it is none, and told from others by its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers as tf
from architectures import llama
from byte_tokenizer import byte_tokenizer

from hf_qlora.data import models
from hf_qlora.data.errors import DataError
from hf_qlora.data.models import PIECE_BYTES, PIECES, check_model, folder_sha256, loading, readable_tokenizer


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "bert": tf.BertConfig(**SIZES, vocab_size=300),
    "llama": tf.LlamaConfig(**SIZES, vocab_size=300),
    "t5": tf.T5Config(),
    "gpt2": tf.GPT2Config(),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    llama(vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["/nonexistent", "./nothing", "a/b/c", "two words", "rows.jsonl"])
def test_a_path_that_is_not_there_is_said_to_be_so(name: str) -> None:
    with pytest.raises(DataError, match=f"--model {name} is not there"):
        check_model(name)


def test_what_may_be_on_the_hub_is_left_to_loading(model: Path) -> None:
    for name in ("nobody/nothing", "gpt2", str(model)):
        check_model(name)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        check_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(DataError, match="is a file"):
        check_model(str(file))


@pytest.mark.parametrize("config", [{"base_model_name_or_path": "me/base"}, []])
def test_an_adapter_is_refused_with_the_way_on(config: object, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    base = "me/base" if config else "another model"
    with pytest.raises(DataError, match=rf"is an adapter of {base}, .*PeftModel\.from_pretrained.* or merge it"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_model_without_a_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"--model {tmp_path} has no tokenizer"):
        readable_tokenizer(str(tmp_path))


def test_a_tokenizer_that_reads_is_taken(model: Path) -> None:
    assert readable_tokenizer(str(model))("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


def test_weights_that_are_cut_off_are_one_sentence(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"Cannot load the model 'mine': .* cut off or damaged"), loading("mine"):
        tf.AutoModelForCausalLM.from_pretrained(model)


def test_other_weights_have_another_hash(model: Path, tmp_path: Path) -> None:
    before = folder_sha256(str(model))
    (model / "README.md").write_text("a card", encoding="utf-8")
    copy = shutil.copytree(model, tmp_path / "copy")
    assert folder_sha256(str(copy)) == folder_sha256(str(model)) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert folder_sha256(str(copy)) != before
    assert folder_sha256("me/hub") is folder_sha256(None) is None


@pytest.mark.parametrize("size", [PIECE_BYTES, PIECES * PIECE_BYTES + 1, 3 * PIECES * PIECE_BYTES])
def test_both_ends_of_a_large_file_are_in_its_hash(size: int, tmp_path: Path) -> None:
    found = set()
    for place in (None, 0, size - 1, PIECE_BYTES // 2):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        found.add(folder_sha256(str(tmp_path)))
    assert len(found) == 4


@pytest.mark.parametrize("place", [0, 100, 50_000, 99_999])
def test_pieces_are_spread_over_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """5 pieces of 101 bytes of 100,000: at 0, 24,974, 49,949, …, and the last ends with the file."""
    monkeypatch.setattr(models, "PIECES", 5)
    monkeypatch.setattr(models, "PIECE_BYTES", 101)
    data = bytearray(100_000)
    (tmp_path / "a").write_bytes(data)
    before = models.sampled_sha256(tmp_path / "a")
    data[place] = 1
    (tmp_path / "b").write_bytes(data)
    assert (models.sampled_sha256(tmp_path / "b") != before) == (place != 50_000 + 50)
