"""The whole demo: tiny and random, and (slow) as users run it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_qlora.demo import DemoError, Settings, models, run
from hf_qlora.demo.chats import read_chats
from hf_qlora.demo.examples import choose
from hf_qlora.demo.models import perplexity


def test_the_whole_demo(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
    screen = io.StringIO()
    results = run(settings, Console(file=screen, width=80))
    assert results.trained < 0.8 * results.quantized
    # Two bfloat16 computations of the same function: 8 bits, over two layers.
    assert results.merge_difference < 2**-5
    assert results.merged == pytest.approx(results.trained, rel=0.05)
    assert results.reload_difference == 0

    config = json.loads((settings.output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", settings.rank)
    merged = AutoModelForCausalLM.from_pretrained(settings.output / "merged")
    _, held_out = choose(read_chats(settings.dataset, 0), tokenizer, settings)
    assert perplexity(merged, held_out) == pytest.approx(results.merged, rel=1e-3)

    lines = screen.getvalue().splitlines()
    labels = [line.split()[0] for line in lines]
    steps = ["training"] * 10
    assert labels == [
        *("model", "data", "weights", "quantized", "perplexity", *steps, "perplexity"),
        *("question", "reference", "before", "after", "adapter", "reloaded", "merged", "saved", "time"),
    ]
    assert all(str(path) in screen.getvalue() for path in (settings.output, settings.output / "merged"))


def test_a_base_that_cannot_be_quantized_is_explained(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(settings.model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(DemoError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        run(replace(settings, model=str(tmp_path / "broken")), Console(file=io.StringIO()))


def test_an_adapter_that_reloads_as_another_fails_the_demo(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = models.token_logits
    monkeypatch.setattr(
        models, "token_logits", lambda *arguments: honest(*arguments) + 1
    )  # in this process, not in the other
    with pytest.raises(RuntimeError, match=r"does not compute what was trained: its logits differ by"):
        run(replace(settings, steps=1), Console(file=io.StringIO()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_real_demo_learns(settings: Settings, smollm2: Path) -> None:
    real = replace(settings, model=None, dataset=None, steps=40, batch_size=8, rank=16, learning_rate=1e-3)
    results = run(replace(real, held_out=24, max_length=160))
    assert results.trained < results.dense / 2
    assert results.merged == pytest.approx(results.trained, rel=0.05)
    assert results.reload_difference == 0
