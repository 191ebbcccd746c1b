"""A process that is killed while it saves an adapter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama, tokens
from dying import deaths
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_qlora import QLoRAConfig
from hf_qlora.files import AdapterFileError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def adapted(seed: int) -> Any:
    """Each with a scaling of its own, so that the weights of one with the config of another are a mixture."""
    own = {"r": 4, "lora_alpha": 8 * seed, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, QLoRAConfig(**own, task_type="CAUSAL_LM", init_lora_weights=False)).eval()


def loaded(folder: Path) -> Tensor:
    """The logits of what is in the folder."""
    with torch.no_grad():
        return PeftModel.from_pretrained(base(), folder)(input_ids=tokens()).logits


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["adapter", "checkpoint-1"])
def test_a_killed_save_leaves_the_old_adapter_the_new_one_or_what_is_refused_and_repaired(
    name: str, tmp_path: Path
) -> None:
    target, new, expected = tmp_path / name, adapted(2), {}
    for kind, model in (("old", adapted(1)), ("new", new)):
        model.save_pretrained(tmp_path / kind / name)
        expected[kind] = loaded(tmp_path / kind / name)
    shutil.copytree(tmp_path / "old" / name, target)
    found = []
    for _ in deaths(lambda: new.save_pretrained(target), target):
        try:
            seen = loaded(target)
            found.append(next((kind for kind, other in expected.items() if torch.equal(seen, other)), "a mixture"))
        except AdapterFileError:
            found.append("refused")
            new.save_pretrained(target)
            assert torch.equal(loaded(target), expected["new"])
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "old" / name, target)
    assert len(found) >= 20
    assert "old" in found
    assert found == sorted(found, key=["old", "refused", "new"].index)  # once it is new, it stays so
