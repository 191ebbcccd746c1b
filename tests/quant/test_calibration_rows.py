"""The rows that calibration reads: which documents they are of, what they are held to, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from architectures import VOCAB, bert, gpt2, llama
from byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.rows import CalibrationRows, calibration_rows, plausible


END, START = 0, 257  # of the byte tokenizer


def documents(count: int = 40, length: int = 20) -> list[list[int]]:
    """Document i is token i + 1, over and over."""
    return [[number + 1] * length for number in range(count)]


def sentences(count: int = 40) -> list[str]:
    return [f"This is sentence number {number}, and it says {number * 7}." for number in range(count)]


def with_tokenizer(model: Any, folder: Path, **settings: bool) -> Any:
    """The model as if it had been loaded from a folder with a tokenizer."""
    byte_tokenizer(**settings).save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def pieces(rows: Tensor) -> list[list[int]]:
    """What is between one EOS and the next in rows that follow each other, without the first and the last."""
    found: list[list[int]] = [[]]
    for token in rows.flatten().tolist():
        if token == END:
            found.append([])
        else:
            found[-1].append(token)
    return found[1:-1]


# ── Documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_document_is_in_both_parts() -> None:
    found = calibration_rows(documents(), tokenizer=byte_tokenizer(), rows=16, length=16, held_out=4)
    ids = found.inputs["input_ids"]
    assert (ids.shape, ids.dtype, found.held_out, found.count) == ((20, 16), torch.int64, 4, 20)
    calibrated, measured = (
        set(part["input_ids"].unique().tolist()) - {END} for part in (found.calibration, found.measured)
    )
    assert not calibrated & measured
    assert len(measured) >= 3  # documents of 20 tokens and their end, in 4 rows of 16
    assert found.calibration["input_ids"].equal(ids[:16])
    assert found.measured["input_ids"].equal(ids[16:])


def test_rows_are_whole_documents_joined_by_eos() -> None:
    given = documents()
    found = calibration_rows(given, tokenizer=byte_tokenizer(), rows=64, length=16, held_out=0)  # all there are
    joined = pieces(found.inputs["input_ids"])
    assert len(joined) == 38  # without the first and the last
    assert all(piece in given for piece in joined)
    assert bool(found.inputs["attention_mask"].all())
    assert found.tokens == 40 * 21 // 16 * 16


def test_the_seed_chooses() -> None:
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "rows": 8, "length": 16, "held_out": 2}
    first, again, other = (calibration_rows(documents(), seed=seed, **options) for seed in (0, 0, 1))
    assert first.inputs["input_ids"].equal(again.inputs["input_ids"])
    assert first.fingerprint == again.fingerprint
    held_out = [set(part.measured["input_ids"].unique().tolist()) - {END} for part in (first, other)]
    assert not held_out[0] & held_out[1]
    assert len({first.fingerprint, other.fingerprint, CalibrationRows(first.inputs, 1, "").fingerprint}) == 3


def test_a_document_that_is_there_twice_counts_once() -> None:
    given = documents(10) * 4
    found = calibration_rows(given, tokenizer=byte_tokenizer(), rows=64, length=8, held_out=4)
    measured = set(found.measured["input_ids"].unique().tolist()) - {END}
    assert not measured & set(found.calibration["input_ids"].unique().tolist())
    assert found.tokens <= 10 * 21


def test_rows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    model = with_tokenizer(llama(), tmp_path, start=True)
    ids = calibration_rows(sentences(), model, rows=8, length=32, held_out=2).inputs["input_ids"]
    assert ids.shape == (10, 32)
    assert bool((ids[:, 0] == START).all())
    assert int((ids == START).sum()) == len(ids)
    assert ids[0].tolist()[1:].count(END) <= 1
    plain = calibration_rows(sentences(), with_tokenizer(llama(), tmp_path), rows=8, length=32, held_out=2)
    assert plain.inputs["input_ids"][0, :31].equal(ids[0, 1:])


def test_a_single_document_is_cut_and_its_end_held_out(caplog: pytest.LogCaptureFixture) -> None:
    text = list(range(1, 401))
    found = calibration_rows([text], rows=64, length=16, held_out=8)
    rows = found.inputs["input_ids"]
    assert rows[:-2].flatten().tolist() == text[: (400 - 2 * 16) // 16 * 16]
    assert rows[-2:].flatten().tolist() == text[-32:]  # 8 of 72 rows, where there are 25
    (note,) = found.notes  # which reports repeat
    assert "The held-out rows are the end of the longest document" in note
    assert note in caplog.text
    assert "gives 23 rows to calibrate on and 2 to hold out, where 64 and 8 were asked for." in caplog.text


def test_the_end_of_a_long_document_is_held_out_and_rows_are_drawn_from_all_the_rest() -> None:
    text = list(range(1, 100_001))
    ids = calibration_rows([text], rows=64, length=16, held_out=8).inputs["input_ids"]
    assert ids[64:].flatten().tolist() == text[-8 * 16 :]
    first = ids[:64, 0]
    assert ids[:64].equal(first[:, None] + torch.arange(16))
    assert bool((first.diff() > 0).all())
    # 64 of 6,242 evenly likely places: each tenth of them is empty with probability 0.9⁶⁴ ≈ 0.1 %.
    assert len((first * 10 // 100_000).unique()) == 10


def test_a_book_among_sentences_stays_with_the_rest() -> None:
    """Held out, it would leave nothing to calibrate on."""
    for seed in range(5):
        given = [[400] * 5000, *documents(30, 16)]
        found = calibration_rows(given, rows=64, length=16, held_out=8, seed=seed)
        assert 400 not in found.measured["input_ids"].unique().tolist()
        assert found.held_out == 8


def test_chats_go_through_the_template() -> None:
    tokenizer = byte_tokenizer(chat=True)
    rows = [{"prompt": f"{n} plus one?", "completion": f"It is {n + 1}."} for n in range(40)]
    ids = calibration_rows(rows, tokenizer=tokenizer, rows=64, length=32, held_out=0).inputs["input_ids"]
    said = tokenizer.decode(ids.flatten()).split("<|end|>")[1:-1]
    assert {text.split(":")[0] for text in said} == {"user", "assistant"}  # and no EOS behind the template's own
    with pytest.raises(CalibrationError, match="There are chats, and the model's tokenizer has no chat template"):
        calibration_rows(rows, tokenizer=byte_tokenizer())
    tokenizer.chat_template = "{{ raise_exception('No system here.') }}"
    with pytest.raises(CalibrationError, match=r"chat template cannot render .*plus one.*: No system here\. Leave"):
        calibration_rows(rows, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "list", "Dataset", "IterableDataset", "tokenized", "padded"])
def test_all_ways_to_give_documents_mean_the_same(kind: str, tmp_path: Path) -> None:
    texts, tokenizer = sentences(), byte_tokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "rows": 8, "length": 32, "held_out": 2}
    expected = set(calibration_rows(texts, **options).inputs["input_ids"].unique().tolist())
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    given: Any = texts
    if kind == "txt":
        for number, text in enumerate(texts):
            (tmp_path / f"{number:02}.txt").write_text(text)
        given = tmp_path
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = str(tmp_path / "a.jsonl")
    elif kind == "Dataset":
        given = datasets.Dataset.from_list(rows)
    elif kind == "IterableDataset":
        given = datasets.Dataset.from_list(rows).to_iterable_dataset()
    elif kind == "tokenized":
        given = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    elif kind == "padded":
        longest = max(map(len, texts)) + 8
        given = datasets.Dataset.from_list(rows).map(
            lambda row: tokenizer(row["text"], padding="max_length", max_length=longest), remove_columns=["text", "id"]
        )
    found = calibration_rows(given, **options)
    assert found.inputs["input_ids"].shape == (10, 32)
    decoded = tokenizer.decode(found.inputs["input_ids"].flatten())
    assert len([text for text in texts if text in decoded]) >= 4
    assert set(found.inputs["input_ids"].unique().tolist()) <= expected | set(range(1, 257))
    name = {"txt": tmp_path.name, "jsonl": "a.jsonl"}.get(
        kind, "a " if "Dataset" in kind or kind == "padded" else "given documents"
    )
    assert found.source.startswith(f"8 rows of 32 tokens from {name}")
    assert found.source.endswith(", and 2 held out")


def test_an_encoder_gets_one_document_a_row_as_its_tokenizer_makes_it(tmp_path: Path) -> None:
    model = with_tokenizer(bert(), tmp_path, pair=True)
    texts = sentences()
    found = calibration_rows(texts, model, rows=16, length=40, held_out=4)
    ids, mask = found.inputs["input_ids"], found.inputs["attention_mask"]
    tokenizer = byte_tokenizer(pair=True)
    expected = tokenizer(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
    known = {tuple(row.tolist()) for row in expected["input_ids"]}
    assert len(ids) == 20
    assert {tuple(row.tolist()) for row in ids} <= known
    assert len({tuple(row.tolist()) for row in ids}) == 20
    assert mask.equal((torch.arange(ids.shape[1])[None] < mask.sum(1, keepdim=True)).long())
    assert bool((ids[mask.bool()] != END).all())
    assert found.tokens == int(mask[:16].sum())


def test_an_encoder_with_a_decoder_decodes_the_document_too(tmp_path: Path) -> None:
    config = tf.T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, d_kv=32, vocab_size=VOCAB)
    model = with_tokenizer(tf.T5ForConditionalGeneration(config).eval(), tmp_path, pair=True)
    found = calibration_rows(sentences(), model, rows=8, length=40, held_out=2)
    assert found.inputs["decoder_input_ids"].equal(found.inputs["input_ids"])
    assert model(**found.measured).logits.isfinite().all()


# ── Rows that are ready ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tensor_is_rows_as_they_are() -> None:
    given = torch.randint(1, VOCAB, (12, 32))
    found = calibration_rows(given.int(), llama(), rows=64, length=256, held_out=3)
    assert found.inputs["input_ids"].equal(given)
    assert found.inputs["input_ids"].dtype == torch.int64
    assert found.measured["input_ids"].equal(given[-3:])
    assert found.source == "12 rows of 32 tokens from a tensor, the last 3 held out"
    assert calibration_rows(given, rows=5, held_out=2).inputs["input_ids"].equal(given[:7])


def test_a_loaders_batches_are_joined_and_padded_on_the_right() -> None:
    tokenizer = byte_tokenizer()
    given = [tokenizer(text[: 8 + 5 * number]) for number, text in enumerate(sentences(9))]
    loader = DataLoader(given, batch_size=2, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    found = calibration_rows(loader, llama(), held_out=2)
    for row, mask, item in zip(found.inputs["input_ids"], found.inputs["attention_mask"], given, strict=True):
        assert row[mask.bool()].tolist() == item["input_ids"]
        assert mask.tolist() == [1] * len(item["input_ids"]) + [0] * (len(mask) - len(item["input_ids"]))
    assert found.tokens == sum(len(item["input_ids"]) for item in given[:-2])


def test_batches_of_different_length_without_a_mask_get_one() -> None:
    given = [{"input_ids": torch.ones(4, length, dtype=torch.long), "labels": torch.ones(4)} for length in (32, 8)]
    found = calibration_rows(given, llama(), held_out=1)
    assert set(found.inputs) == {"input_ids", "attention_mask"}
    assert found.inputs["attention_mask"].sum(1).tolist() == [32] * 4 + [8] * 4
    assert found.inputs["input_ids"].equal(found.inputs["attention_mask"])


def test_images_are_rows() -> None:
    images = torch.randn(6, 3, 32, 32)
    found = calibration_rows([{"pixel_values": part} for part in images.split(4)], vit(), rows=4, held_out=2)
    assert found.inputs["pixel_values"].equal(images)
    assert (found.text, found.tokens, set(found.inputs)) == (False, 0, {"pixel_values"})
    assert plausible(vit(), found) is None


def test_rows_of_padding_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(10, 32, dtype=torch.long)
    mask[[2, 5]] = 0
    batch = {"input_ids": torch.arange(320).reshape(10, 32), "attention_mask": mask}
    found = calibration_rows(batch, llama(), held_out=2)
    assert found.inputs["input_ids"][:, 0].tolist() == [32 * n for n in (0, 1, 3, 4, 6, 7, 8, 9)]
    assert "2 of 10 rows are nothing but padding and are left out." in caplog.text


def test_rows_are_checked_and_returned() -> None:
    rows = calibration_rows(torch.randint(300, VOCAB, (12, 32)), held_out=3)
    assert calibration_rows(rows, llama()) is rows
    with pytest.raises(CalibrationError, match="knows 0 to 299: the text was tokenized for another tokenizer"):
        calibration_rows(rows, llama(vocab_size=300))
    with pytest.raises(CalibrationError, match="ViTForImageClassification reads no input_ids"):
        calibration_rows(rows, vit())


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)).eval()


def images_with_nan() -> list[dict[str, Tensor]]:
    images = torch.zeros(10, 3, 32, 32)
    images[3, 0, 0, 0] = torch.nan
    return [{"pixel_values": images}]


def ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: ids(10, 32), {"rows": 1}, "rows=1 must be a whole number of at least 2."),
        (lambda: ids(10, 32), {"length": 4}, "length=4 must be a whole number of at least 8."),
        (lambda: ids(10, 32), {"held_out": -1}, "held_out=-1 must be a whole number of at least 0."),
        (lambda: ids(10, 32), {"seed": None}, "seed=None must be a whole number of at least 0."),
        (lambda: ids(1, 32), {}, "held_out=1 of 1 rows leaves none to calibrate on"),
        (
            lambda: ids(2, 32),
            {},
            "1 row with 32 tokens that are no padding to calibrate on, and 1 held out, are too few",
        ),
        (lambda: ids(3, 32), {}, "at least 2 rows and, of text, 128 tokens are needed"),
        (lambda: ids(320), {}, "A tensor of shape (320,) was given; token ids are (rows, length)."),
        (lambda: torch.ones(16, 32), {}, "input_ids are of shape (16, 32) and torch.float32; they must be whole"),
        (lambda: ids(16, 32) * VOCAB, {}, f"input_ids has ids from {VOCAB} to {VOCAB}, and LlamaForCausalLM knows 0"),
        (lambda: -ids(16, 32), {}, "input_ids has ids from -1 to -1"),
        (
            lambda: {"input_ids": ids(16, 32), "attention_mask": 0 * ids(16, 32)},
            {},
            "All 16 rows are padding, by their attention_mask",
        ),
        (lambda: {"input_ids": ids(16, 32), "attention_mask": ids(16, 8)}, {}, "attention_mask is of shape (16, 8)"),
        (lambda: [{"input_ids": ids(16, 32), "x": ids(3)}], {}, "not all as many rows: {'input_ids': 16, 'x': 3}"),
        (lambda: [{"input_ids": ids(16, 32)}, ids(16, 32)], {"rows": 40}, "Batch 1 is no dict of tensors"),
        (lambda: [{"input_ids": ids(16, 32)}, {"x": ids(3)}], {"rows": 40}, "Batch 1 has ['x'], and batch 0 ['atten"),
        (lambda: [{"input_ids": ids(16, 32), "n": 3}], {}, "Batch 0 has n=3, which is no tensor with rows"),
        (lambda: {"input_ids": [[1, 2], [3]]}, {}, "a dict with input_ids cannot be calibrated on; give a file"),
        (lambda: 3, {}, "3 cannot be calibrated on; give a file, a folder or a data set's id"),
        (lambda: iter(sentences()), {}, "A list_iterator can be gone through once only"),
        (lambda: (text for text in sentences()), {}, "A generator can be gone through once only"),
        (lambda: ["a/1.csv", "a/2.parquet"], {}, "The texts are names of files, as 'a/1.csv', and would be"),
        (list, {}, "There is nothing to calibrate on: the list is empty."),
        (lambda: ["", " \n"], {}, "given documents has no text to read (documents: 2, empty)."),
        (lambda: [[], []], {}, "given documents has no text to read (documents: 2, empty)."),
        (lambda: [[1, 2], 3.5], {}, "Element 1 is 3.5, no text, no list of token ids and no dict"),
        (lambda: ["a", {"text": 3}], {}, "Element 1: The column 'text' has no text, chat or token ids, but 3"),
        (lambda: [{"text": None}, None] * 9, {}, "given documents has no text to read (documents: 18, empty)."),
        (
            lambda: [[1, 2, 3]] * 20,
            {},
            "given documents (19 of 20 documents left out, empty or repeated) gives 0 rows",
        ),
        (lambda: [[n] * 16 for n in range(1, 19)], {}, "given documents gives 1 row of 256 tokens to calibrate on"),
        (lambda: ["a text"], {}, "The data are texts, and no tokenizer lies with the model; put its files"),
        (lambda: [[1] * 300], {}, "given documents gives 0 rows of 256 tokens to calibrate on; at least 2 rows"),
        (lambda: [{"a": 1}], {}, "has the columns a; understood are text; messages"),
        (lambda: "./nowhere.txt", {}, "The file ./nowhere.txt is not there."),
        (lambda: documents(), {"length": 4096}, "length=4096 is more than the model's 2048 positions"),
        (lambda: ids(16, 4096), {}, "The rows have 4096 tokens and LlamaForCausalLM 2048 positions"),
    ],
)
def test_what_cannot_be_calibrated_on_is_said(data: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        calibration_rows(data(), llama(), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images_with_nan, "pixel_values has NaN or infinite values; clean the data."),
        (lambda: ids(16, 32), "ViTForImageClassification reads no input_ids, and the rows are of text; give batches"),
        (
            lambda: [{"pixel_values": torch.zeros(8, 3, n, n)} for n in (16, 32)],
            "pixel_values has rows of shapes [(3, 16, 16), (3, 32, 32)], which cannot be joined",
        ),
        (lambda: [{"pixel_values": torch.zeros(2, 3, 32, 32)}], "1 row to calibrate on, and 1 held out, are too few"),
    ],
)
def test_images_that_cannot_be_calibrated_on_are_said(data: Callable[[], Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        calibration_rows(data(), vit())


def test_inputs_that_a_model_does_not_take_are_named() -> None:
    class Plain(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels

    calibration_rows([{"pixels": torch.zeros(16, 3)}], Plain())
    with pytest.raises(CalibrationError, match=re.escape("Plain does not take ['images']; it takes pixels.")):
        calibration_rows([{"images": torch.zeros(16, 3)}], Plain())


def test_a_tokenizer_that_knows_no_text_is_said() -> None:
    """As transformers makes one for some models without files of a tokenizer."""
    empty = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    with pytest.raises(CalibrationError, match=r"it is probably an empty one.* Pass tokenizer=, or give other text"):
        calibration_rows(sentences(400), llama(), empty, rows=4, length=32, held_out=2)


def test_positions_are_those_of_the_family() -> None:
    with pytest.raises(CalibrationError, match="length=256 is more than the model's 64 positions; give 64 or less"):
        calibration_rows(documents(), gpt2())


def test_fewer_rows_than_asked_for_are_said_and_used(caplog: pytest.LogCaptureFixture) -> None:
    found = calibration_rows(documents(20), tokenizer=byte_tokenizer(), rows=64, length=16, held_out=8)
    total = 20 * 21 // 16
    assert total - 3 <= found.count <= total
    assert found.held_out >= 1
    assert f"gives {found.count - found.held_out} rows to calibrate on and {found.held_out} to hold out" in caplog.text


def test_documents_that_are_left_out_are_said() -> None:
    options: dict[str, Any] = {"rows": 8, "length": 16, "held_out": 2}
    found = calibration_rows([*documents(20), *documents(9), []], **options)
    left_out = "given documents (10 of 30 documents left out, empty or repeated)"
    assert found.source == f"8 rows of 16 tokens from {left_out}, and 2 held out"
    every = calibration_rows(documents(20), **options)
    assert every.source == "8 rows of 16 tokens from given documents, and 2 held out"


@pytest.mark.parametrize("nothing", [None, math.nan, "", []])
def test_what_says_nothing_is_left_out_wherever_it_stands(nothing: object) -> None:
    options: dict[str, Any] = {"rows": 8, "length": 16, "held_out": 2}
    expected = calibration_rows(documents(), **options)
    for given in ([nothing, *documents()], [*documents(), nothing]):
        found = calibration_rows(given, **options)
        assert found.fingerprint == expected.fingerprint
        assert "(1 of 41 documents left out" in found.source


def test_a_data_frame_is_its_rows() -> None:
    pandas = pytest.importorskip("pandas")
    texts = [f"Text number {number}." for number in range(40)]
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "rows": 8, "length": 16, "held_out": 2}
    found = calibration_rows(pandas.DataFrame({"n": range(41), "text": [*texts, None]}), **options)
    assert found.fingerprint == calibration_rows(texts, **options).fingerprint
    ids = pandas.DataFrame({"input_ids": [torch.tensor(document).numpy() for document in documents()]})
    options.pop("tokenizer")
    assert calibration_rows(ids, **options).fingerprint == calibration_rows(documents(), **options).fingerprint


def test_chats_in_a_frame_of_parquet_are_chats(tmp_path: Path) -> None:
    """pandas has arrays where there are lists, and NaN where there is nothing."""
    pandas = pytest.importorskip("pandas")
    chats = [[{"role": "user", "content": f"Number {number}?"}] for number in range(40)]
    pandas.DataFrame({"messages": chats}).to_parquet(tmp_path / "a.parquet")
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(chat=True), "rows": 8, "length": 16, "held_out": 2}
    found = calibration_rows(pandas.read_parquet(tmp_path / "a.parquet"), **options)
    assert found.fingerprint == calibration_rows([{"messages": chat} for chat in chats], **options).fingerprint


def test_a_data_set_gives_the_same_rows_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": document} for document in documents(60)])
    options: dict[str, Any] = {"rows": 8, "length": 16, "held_out": 2, "seed": 3}
    found = calibration_rows(rows, **options)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    assert calibration_rows("me/data", **options).fingerprint == found.fingerprint
    assert calibration_rows(rows, **{**options, "seed": 4}).fingerprint != found.fingerprint
    bad = datasets.Dataset.from_list([*({"text": f"{n}", "n": None} for n in range(9)), {"text": "nine", "n": 1}])
    with pytest.raises(CalibrationError, match="Element 9: The column 'text' has no text, chat or token ids, but 1"):
        calibration_rows(bad.map(lambda row: {"text": row["n"] if row["n"] else None}), **options)


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_nothing_but_the_models_padding_are_refused(masked: bool) -> None:
    pad = ids(16, 32) * 2
    given = {"input_ids": pad, "attention_mask": ids(16, 32)} if masked else pad
    assert calibration_rows(given, llama()).count == 16  # whose config knows none
    with pytest.raises(CalibrationError, match="All 16 rows are padding: every token is 2, the model's pad_token_id"):
        calibration_rows(given, llama(pad_token_id=2))
    pad[3, 3] = 1
    assert calibration_rows(given, llama(pad_token_id=2)).count == 16


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tokenizer_may_be_named_by_its_folder(kind: Callable[[str], Any], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"rows": 8, "length": 32, "held_out": 2}
    found = calibration_rows(sentences(), tokenizer=kind(str(tmp_path)), **options)
    assert found.fingerprint == calibration_rows(sentences(), tokenizer=byte_tokenizer(), **options).fingerprint


@pytest.mark.parametrize("given", ["./nowhere", 5])
def test_what_is_no_tokenizer_is_refused(given: Any) -> None:
    with pytest.raises(CalibrationError, match=f"tokenizer={given!r} is neither a tokenizer nor a folder or Hub id"):
        calibration_rows(sentences(), tokenizer=given)


def test_enough_rows_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = calibration_rows(documents(), tokenizer=byte_tokenizer(), rows=16, length=16, held_out=4)
    assert not caplog.records
    assert found.notes == ()


def test_a_mask_that_is_not_of_tokens_is_refused_with_the_form_that_is_read() -> None:
    causal = torch.ones(32, 32).tril().bool().expand(10, 1, 32, 32)
    inputs = {"input_ids": torch.randint(1, VOCAB, (10, 32)), "attention_mask": causal}
    with pytest.raises(CalibrationError, match=r"\(10, 1, 32, 32\) and .* give a 2-D mask, \(rows, tokens\)"):
        calibration_rows(CalibrationRows(inputs, 2, ""), llama())


# ── Plausible ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def rows() -> CalibrationRows:
    return calibration_rows(torch.randint(1, VOCAB, (12, 32)), held_out=3)


def test_an_untrained_model_is_plausible(rows: CalibrationRows) -> None:
    model = llama()
    loss = plausible(model, rows)
    expected = model(**rows.measured, labels=rows.measured["input_ids"]).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)  # float32, summed in another order
    nothing_held_out = CalibrationRows(rows.inputs, 0, "")
    few = {name: value[:4] for name, value in rows.inputs.items()}
    expected = model(**few, labels=few["input_ids"]).loss.item()
    assert plausible(model, nothing_held_out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("held_out", [3, 0])
def test_ids_of_which_the_model_knows_less_than_one_that_guesses_are_refused(
    rows: CalibrationRows, held_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = llama(), CalibrationRows(rows.inputs, held_out, "12 rows from somewhere")
    model.lm_head.weight.data *= 40
    which = "held-out" if held_out else "some"
    message = rf"a loss of \d+\.\d\d nats a token on {which} rows, where guessing among its tokens has 6\.21: the ids"
    with pytest.raises(CalibrationError, match=f"{message}.*12 rows from somewhere.*force=True"):
        plausible(model, rows)
    assert not caplog.records
    forced = plausible(model, rows, force=True)
    assert forced is not None
    assert forced > 7
    assert re.search(f"{message[:-9]}: is the text tokenized by its own tokenizer", caplog.text)


@pytest.mark.parametrize("given", ["none", "own", "larger", "other"])
def test_texts_as_the_models_own_tokenizer_reads_them_are_warned_of_alone(
    given: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They cannot be another tokenizer's: the model is hardly trained, or cut."""
    model = with_tokenizer(llama(), tmp_path)
    model.lm_head.weight.data *= 40
    tokenizer = None if given == "none" else byte_tokenizer()
    if given == "larger":
        tokenizer.add_tokens(["<another>"])
    elif given == "other":
        words = {chr(number): number for number in range(32, 127)}
        tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, " ")), unk_token=" ")
        tokenizer.backend_tokenizer.pre_tokenizer = Split("", "isolated")
    rows = calibration_rows(sentences(), model, tokenizer, rows=8, length=32, held_out=2)
    assert rows.own_tokens == (given != "other")
    caplog.clear()
    if given == "other":
        with pytest.raises(CalibrationError, match="the ids are probably another tokenizer's"):
            plausible(model, rows)
    else:
        plausible(model, rows)
        assert "it is hardly trained on such text" in caplog.text


def test_ids_that_were_given_are_not_of_the_models_own_tokenizer(tmp_path: Path) -> None:
    model = with_tokenizer(llama(), tmp_path)
    for data in (documents(), [*sentences(), *documents(1)], ids(16, 32)):
        assert not calibration_rows(data, model, rows=8, length=16, held_out=2).own_tokens
