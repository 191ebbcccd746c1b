"""What is compared: how each arm's model is made, and what one step of it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from hf_qlora.config import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.layers.head import enable_chunked_loss
from hf_qlora.quant.base import quantize_model


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Case:
    """What is trained, and on how much.

    Attributes:
        shape: of `SHAPES`; `layers` overrides its number of layers.
        adapters: how many are active at once (ours only).
        dtype: of the base.
    """

    shape: str = "smollm2"
    batch_size: int = 4
    sequence_length: int = 256
    rank: int = 16
    adapters: int = 1
    layers: int | None = None
    checkpointing: bool = False
    device: str = "cpu"
    learning_rate: float = 1e-4
    seed: int = 0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def architecture(self) -> LlamaConfig:
        sizes = SHAPES[self.shape] | ({} if self.layers is None else {"num_hidden_layers": self.layers})
        return LlamaConfig(**sizes, max_position_embeddings=max(self.sequence_length, 2048), use_cache=False)

    def dense(self) -> Any:
        """The base, with the same random weights each time."""
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(self.architecture(), dtype=COMPUTE_DTYPES[self.dtype])
        return model.to(self.device).requires_grad_(False)

    def batch(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + number)
        size = (self.batch_size, self.sequence_length)
        ids = torch.randint(0, SHAPES[self.shape]["vocab_size"], size, generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def lora(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }


def stock_base(case: Case) -> Any:
    """The base as `from_pretrained` with a `BitsAndBytesConfig` gives it: bitsandbytes' own layers."""
    return with_stock_layers(quantize_model(case.dense(), NF4Config()))


def with_stock_layers(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = bnb.nn.Linear4bit
    return model


def _documented(case: Case) -> Any:
    model = prepare_model_for_kbit_training(stock_base(case), use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(**case.lora()))


def _tuned(case: Case) -> Any:
    model = get_peft_model(stock_base(case), LoraConfig(**case.lora()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _ours(case: Case, config: type[QLoRAConfig] = QLoRAConfig, **settings: Any) -> Any:
    """Chunked loss included, unless the settings say otherwise."""
    model = get_peft_model(case.dense(), config(**case.lora(), **settings))
    names = ["default", *(f"extra_{i}" for i in range(1, case.adapters))]
    for name in names[1:]:
        model.add_adapter(name, config(**case.lora(), **settings))
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model


def _with_trls_head(case: Case) -> Any:
    """Ours with the fused output head of TRL's trainers, which wants a keyword in every forward.

    Raises:
        ImportError: without TRL.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise ImportError(f"The arm {TRL!r} needs TRL 1.16 or newer: pip install trl") from error
    model = _ours(case, chunked_loss=False)
    add_fused_lm_head(model.get_base_model())
    return model


def _with_ligers_kernels(case: Case, build: Callable[..., Any]) -> Any:
    """With Liger's fused norms and MLP in the base, as Trainer's `use_liger_kernel=True` puts them there.

    Raises:
        ImportError: without Liger.
    """
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise ImportError("The arms with Liger's kernels need them: pip install liger-kernel") from error
    model = build(case)
    # Its rotary embedding is for all models of a process; the loss is ours or transformers'.
    no = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    with _names_kept(modeling_llama):
        apply_liger_kernel_to_llama(model=model.get_base_model(), rms_norm=True, swiglu=True, **no)
    return model


@contextmanager
def _names_kept(module: ModuleType) -> Iterator[None]:
    """Afterwards a module's names stand for what they did: Liger gives them to its classes, in later models too."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _compiled(case: Case) -> Any:
    """Ours, each decoder layer compiled: the layers are alike, so one is compiled for all."""
    model = _ours(case)
    for layer in model.get_base_model().model.layers:
        layer.compile()
    return model


def _floor(case: Case) -> Any:
    model = case.dense()
    enable_chunked_loss(model)
    return model


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        build: makes the model; `settings` are passed to it.
        options: of the model's forward.
        autocast: whether the forward runs under autocast to bfloat16, as Trainer's does with `bf16=True`.
        device: the only kind it is for.
    """

    name: str
    build: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False
    device: str = ""

    def start(self, case: Case) -> Step:
        model = self.build(case, **self.settings)
        if case.checkpointing:
            model.gradient_checkpointing_enable()
        return Step(model.train(), case, self.options, self.autocast)


class Step:
    """A model with its optimizer; called with a batch, it is trained on it.

    Attributes:
        loss, gradient_norm: of the last step. Without adapters the norm is that of the gradient at the input.
    """

    loss: float
    gradient_norm: float

    def __init__(self, model: Any, case: Case, options: dict[str, Any], autocast: bool = False) -> None:
        self.model, self.case, self.options, self.autocast = model, case, options, autocast
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=case.learning_rate, fused=True) if self.trained else None

    def __call__(self, batch: dict[str, Tensor]) -> None:
        if self.optimizer is None:
            inputs = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            loss = self._loss(inputs_embeds=inputs, labels=batch["labels"])
            loss.backward()
            gradients = [inputs.grad]
        else:
            loss = self._loss(**batch)
            loss.backward()
            gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss = loss.item()
        self.gradient_norm = float(nn.utils.get_total_norm([g for g in gradients if g is not None]))

    def _loss(self, **inputs: Any) -> Tensor:
        kind = torch.device(self.case.device).type
        with torch.autocast(kind, torch.bfloat16) if self.autocast else nullcontext():
            loss: Tensor = self.model(**inputs, **self.options).loss
        return loss


DOCUMENTED, TUNED, FLOOR = "stock, as documented", "stock, all bfloat16", "floor"
OURS, CHUNKED, TRL = "ours, full logits", "ours", "ours, TRL's head"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(DOCUMENTED, _documented),
        Arm("stock, autocast", _documented, autocast=True),
        Arm(TUNED, _tuned),
        Arm(OURS, _ours, {"chunked_loss": False}),
        Arm(CHUNKED, _ours),
        Arm("ours, autocast", _ours, autocast=True),
        Arm("stock, all bfloat16, Liger's kernels", _with_ligers_kernels, {"build": _tuned}, device="cuda"),
        Arm("ours, Liger's kernels", _with_ligers_kernels, {"build": _ours}, device="cuda"),
        Arm("ours, compiled", _compiled, device="cuda"),
        Arm(TRL, _with_trls_head, options={"fused_lm_head": True}),
        Arm("ours, gain", _ours, {"config": AdaptiveDepthLoRAConfig}),
        Arm("ours, gain and concentration", _ours, {"config": AdaptiveDepthLoRAConfig, "attention": "concentration"}),
        Arm(FLOOR, _floor),
    )
}


def arms_for(device: str) -> tuple[str, ...]:
    """The names of all arms that are for the device."""
    return tuple(name for name, arm in ARMS.items() if arm.device in ("", torch.device(device).type))
