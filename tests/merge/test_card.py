"""The card of a merged model: what is in it, and what a user has written into it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import llama, tokens
from calibrating import rows_of, text
from huggingface_hub import ModelCard
from merging import adapted, logits, relative

from hf_qlora import merge
from hf_qlora.hub.merged import Merged, write_merged_card
from hf_qlora.merge.stream import merge_files
from hf_qlora.quantize_files import quantize_files


Saved = Callable[..., tuple[Path, Path]]


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_from_files_it_says_what_is_merged_and_not_where_it_was(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(task_type="CAUSAL_LM")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    report = merge_files(str(adapter), tmp_path / "out", base=str(base))
    card = card_of(tmp_path / "out")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hf_qlora"],
    }
    assert card.text.startswith("# Merged model\n")
    assert "`base` with the adapter `adapter` merged into it.\n" in card.text
    assert "| Weights are | `the base that the adapter was trained on, dense, plus ΔW` |" in card.text
    assert f"| Weights | `error {report.error:.3g} of ‖ΔW‖ over 14 layers` |" in card.text
    assert "| Kept |" not in card.text
    assert "needs neither PEFT nor bitsandbytes." in card.text
    assert "`apache-2.0`. The base's: `apache-2.0`. The adapter's: `not stated`." in card.text
    assert str(tmp_path) not in card.content
    assert "not compared" not in card.text


def test_calibrated_it_says_what_is_left_and_its_lines_load_the_model(tmp_path: Path) -> None:
    model, rows, ids = adapted(llama()), rows_of(text()), tokens()
    report = merge(model, onto="nf4", calibration=rows, force=True)
    report.save_pretrained(tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert card.data.tags == ["hf_qlora", "bitsandbytes", "4-bit", "nf4"]
    assert card.data.base_model is None
    assert "a base without a name with the adapter `default` merged into it, in 4 bits" in card.text
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in report.losses.items())
    assert f"| Loss | `{losses} nats a token on held-out rows` |" in card.text
    assert f"| Kept | `{report.kept:.1%} of the adapter, by outputs on held-out rows` |" in card.text
    assert re.findall(r"\| Note \d+ \| `(.*)` \|", card.text) == report.calibration.notes
    (snippet,) = re.findall(r"(?ms)^```python\n(.*?)^```", card.text)
    scope: dict[str, Any] = {}
    exec(snippet.replace("path/or/id/of/this/model", str(tmp_path / "out")), scope)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in scope["model"].modules())
    # As in tests/interop/test_stock_peft.py: float32 products, of the largest logit.
    assert relative(logits(scope["model"], ids), logits(report.model, ids)) <= 1e-5


@pytest.mark.parametrize("way", ["from files", "in memory"])
def test_what_a_user_wrote_stays_where_a_model_is_replaced(way: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    model = adapted(llama(), target_modules=["q_proj"])
    for time in ("first", "again"):
        if way == "from files":
            merge_files(str(adapter), tmp_path / "out", base=str(base), overwrite=True)
        else:
            merge(model).save_pretrained(tmp_path / "out", overwrite=True)
        file = tmp_path / "out" / "README.md"
        text = file.read_text()
        assert text.count("## Merge\n") == 1
        if time == "first":
            file.write_text(text.replace("library_name", "license: mit\nlibrary_name") + "\n## Mine\n\nAbout it.\n")
    assert text.endswith("## Mine\n\nAbout it.\n")
    assert card_of(tmp_path / "out").data.license == "mit"


def test_ids_of_the_hub_are_linked(tmp_path: Path) -> None:
    merged = Merged("BertForSequenceClassification", "float32", False, "me/base", tmp_path, ["me/adapter", "default"])
    write_merged_card(tmp_path, merged, {})
    card = card_of(tmp_path)
    link = "[`me/{0}`](https://huggingface.co/me/{0})"
    assert f"{link.format('base')} with the adapter {link.format('adapter')}, `default` merged into it." in card.text
    assert card.data.base_model == "me/base"
    assert card.data.base_model_relation == "finetune"
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text


@pytest.mark.parametrize(
    ("of_base", "of_adapter", "license"),
    [
        ("mit", "mit", "mit"),
        ("mit", "cc-by-nc-4.0", None),
        ("mit", None, "mit"),
        (None, "mit", None),
        (None, None, None),
    ],
)
def test_the_licence_is_stated_where_base_and_adapter_agree(
    of_base: str | None, of_adapter: str | None, license: str | None, saved: Saved, tmp_path: Path
) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    for folder, given in ((base, of_base), (adapter, of_adapter)):
        (folder / "README.md").write_text(f"---\nlicense: {given}\n---\n" if given else "# No licence\n")
    merge_files(str(adapter), tmp_path / "out", base=str(base))
    card = card_of(tmp_path / "out")
    assert card.data.license == license
    said = f"The base's: `{of_base or 'not stated'}`. The adapter's: `{of_adapter or 'not stated'}`."
    assert said in card.text


def test_nothing_of_a_merge_that_is_replaced_stays(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    out = tmp_path / "out"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n")
    merge_files(str(adapter), out, base=str(base))
    write_merged_card(out, Merged("LlamaForCausalLM", "float32", False, "me/base", base, ["default"]), {})
    assert card_of(out).data.base_model == "me/base"
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(base, tmp_path / "other")
    merge_files(str(adapter), out, base=str(tmp_path / "other"), overwrite=True)
    card = card_of(out)
    assert card.data.license == "mit"
    assert not {"base_model", "base_model_relation", "license_name"} & card.data.to_dict().keys()
    assert not re.search("my-terms|`base`|me/base", card.content)
    (tmp_path / "other" / "README.md").unlink()
    merge_files(str(adapter), out, base=str(tmp_path / "other"), overwrite=True)
    assert card_of(out).data.license is None
    quantize_files(str(tmp_path / "other"), out, overwrite=True, device="cpu")
    card = card_of(out)
    assert card.text.count("<!-- hf_qlora ") == 1
    assert "merged into it" not in card.text
    assert card.data.tags == ["hf_qlora", "bitsandbytes", "4-bit", "nf4"]


@pytest.mark.parametrize("onto", ["dequantized", "original", "nf4"])
def test_another_base_is_said(onto: str, saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    torch.manual_seed(9)
    llama().save_pretrained(base)
    merge_files(str(adapter), tmp_path / "out", onto, str(base), force=True)
    assert "| Base | `another one than the adapter was trained on` |" in card_of(tmp_path / "out").text


def test_sentences_are_not_cut(tmp_path: Path) -> None:
    note = "A sentence of which each word counts. " * 8
    merged = Merged("LlamaForCausalLM", "float32", True, "base", tmp_path, ["default"])
    write_merged_card(tmp_path, merged, {"Note 1": note})
    assert f"| Note 1 | `{note.strip()}` |" in card_of(tmp_path).text


def test_a_class_that_is_not_transformers_is_not_imported_from_it(tmp_path: Path) -> None:
    write_merged_card(tmp_path, Merged("MyThing", "float32", False, "base", tmp_path, ["default"]), {})
    assert "from transformers import AutoModel\n" in card_of(tmp_path).text


def test_a_card_that_cannot_be_read_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    base, adapter = saved(target_modules=["q_proj"])
    merge_files(str(adapter), tmp_path / "out", base=str(base))
    (tmp_path / "out" / "README.md").write_text("---\n: [\n---\nmine\n")
    merge_files(str(adapter), tmp_path / "out", base=str(base), overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "---\n: [\n---\nmine\n"
    assert torch.equal(*(model.lm_head.weight for model in map(llama_from, (base, tmp_path / "out"))))


def llama_from(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder)
