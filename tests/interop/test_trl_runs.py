"""TRL's SFTTrainer and DPOTrainer, in each of their ways to take a model: real steps, then save and reload.

TRL casts what is trained to bfloat16, in which small updates round to nothing, where the model is 4-bit before TRL
gets it. A dense model with `peft_config=` keeps float32 masters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ 'user ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
)
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
# each from a dense base in float32
MODELS: dict[str, Callable[[nn.Module, QLoRAConfig], dict[str, Any]]] = {
    "peft_config": lambda base, config: {"model": base, "peft_config": config},
    "a PEFT model": lambda base, config: {"model": get_peft_model(base, config)},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "user", *WORDS])}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    own.add_special_tokens({"additional_special_tokens": []})
    own.chat_template = TEMPLATE
    return own


def sentence(number: int, count: int, words: list[str]) -> str:
    return " ".join(words[(7 * number + 5 * i) % len(words)] for i in range(count))


def chat(number: int, words: list[str] = WORDS[:45]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": sentence(number, 3 + number % 3, WORDS)},
        {"role": "assistant", "content": sentence(number + 1, 4, words)},
    ]


def config(kind: type[QLoRAConfig] = QLoRAConfig, **options: Any) -> QLoRAConfig:
    return kind(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def base() -> nn.Module:
    torch.manual_seed(3)
    return llama()


def assert_reloads(trainer: Any, folder: Path) -> None:
    trainer.save_model(str(folder))
    loaded = PeftModel.from_pretrained(base(), str(folder)).eval()
    trained = trainer.model.cpu().eval()
    ids = torch.arange(3, 15)[None]
    assert trained.active_adapters == ["default"]
    expected = trained(input_ids=ids).logits
    # bfloat16 adapters are float32 again once loaded: the product with them rounds otherwise, by 2**-9 of the
    # adapter's part; float32 ones are folded and divided
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    with trained.disable_adapter():
        assert float((trained(input_ids=ids).logits - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("how", MODELS)
@pytest.mark.parametrize("kind", [QLoRAConfig, AdaptiveDepthLoRAConfig])
def test_supervised_training_on_answers_only(how: str, kind: type[QLoRAConfig], tmp_path: Path) -> None:
    """The labels are the answers' tokens, which alone have a loss."""
    args = SFTConfig(str(tmp_path / "run"), assistant_only_loss=True, **COMMON)
    data = Dataset.from_list([{"messages": chat(i)} for i in range(12)])
    sft = SFTTrainer(args=args, train_dataset=data, processing_class=tokenizer(), **MODELS[how](base(), config(kind)))
    batch = next(iter(sft.get_train_dataloader()))
    kept = batch["labels"] != -100
    assert kept.sum(1).tolist() == [5] * 4  # four words and <eos>
    masters = {p.dtype for name, p in sft.model.named_parameters() if p.requires_grad and "magnitude" not in name}
    assert masters == {torch.float32 if how == "peft_config" else torch.bfloat16}
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_reloads(sft, tmp_path / "adapter")


OFFLOADED = {"activation_offloading": True, "use_cpu": False}  # TRL asks the accelerator that it needs for its type


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"packing": True, "max_length": 16}, id="packing"),
        pytest.param(OFFLOADED, id="offloading", marks=pytest.mark.gpu),
    ],
)
def test_packing_and_offloading(options: dict[str, Any], tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path / "run"), **{**COMMON, **options})
    data = Dataset.from_list([{"messages": chat(i)} for i in range(40)])
    sft = SFTTrainer(model=base(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=config())
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_reloads(sft, tmp_path / "adapter")


@pytest.mark.parametrize("how", [*MODELS, "a trained PEFT model"])
@pytest.mark.parametrize("kind", [QLoRAConfig, AdaptiveDepthLoRAConfig])
def test_preferences_with_the_adapter_as_the_switch(how: str, kind: type[QLoRAConfig], tmp_path: Path) -> None:
    """Without a reference model: it is the base, or a copy of the adapter that was given. Both begin as the policy."""
    args = DPOConfig(str(tmp_path / "run"), **{**COMMON, "max_steps": 5})
    rows = [{"prompt": chat(i)[:1], "chosen": chat(i)[1:], "rejected": chat(i, WORDS[45:])[1:]} for i in range(4)]
    given = MODELS["a PEFT model" if "trained" in how else how](base(), config(kind))
    if "trained" in how:
        with torch.no_grad():
            for name, parameter in given["model"].named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1 * ("lora_A" not in name))
    dpo = DPOTrainer(args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **given)
    assert dpo.ref_model is None
    dpo.train()
    margins = [entry["rewards/margins"] for entry in dpo.state.log_history if "rewards/margins" in entry]
    # TRL rounds the policy to bfloat16, and the copy of a trained adapter not: 2**-9 of what that adds to sums of four
    # log-probabilities, some units, times β = 0.1
    assert margins[0] == pytest.approx(0, abs=2e-3 if "trained" in how else 1e-5)
    assert margins[-1] > 0.05
    assert_reloads(dpo, tmp_path / "adapter")
