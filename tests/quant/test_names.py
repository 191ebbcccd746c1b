"""One reading of what PEFT makes of a base's names, for fingerprints and for merging."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import llama
from peft import get_peft_model

from hf_qlora import QLoRAConfig
from hf_qlora.merge import names as of_merging
from hf_qlora.quant.names import is_of_adapter, wrapped_name


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "an adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_base_with_adapters_has_the_names_of_the_base_alone(options: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    expected = sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    adapted = get_peft_model(model, QLoRAConfig(r=2, quantization=None, **OPTIONS[options])).get_base_model()
    names = [name for name, _ in adapted.named_parameters(remove_duplicate=False)]
    assert sorted(wrapped_name(name) for name in names if not is_of_adapter(name)) == expected


def test_merging_has_no_reading_of_its_own() -> None:
    assert (of_merging.wrapped_name, of_merging.is_of_adapter) == (wrapped_name, is_of_adapter)
