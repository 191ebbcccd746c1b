"""What is pushed is what save_pretrained writes, and what is pulled computes the same: over HTTP, by the usual calls."""

from __future__ import annotations

import pytest
import torch
from hub.conftest import BASE, Model, adapted, logits, tokenizer
from hub.server import Hub
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, pipeline

from hf_qlora import QLoRAConfig


REPO = "alice/adapter"


def test_an_adapter_pushed_is_the_adapter_pulled(hub: Hub, model: Model) -> None:
    expected = logits(model)
    model.push_to_hub(REPO)
    print("\n".join(hub.log))
    print(hub.tree(REPO).keys(), hub.titles(REPO))
    print(hub.tree(REPO)["README.md"].decode()[:600])
    pulled = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), REPO).eval()
    assert torch.equal(logits(pulled), expected)
