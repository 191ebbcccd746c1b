"""What is planned and measured: families, shapes, batches and ways to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn

from hf_qlora.config import QLoRAConfig


TASKS = {"bert": "SEQ_CLS"}


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        family: llama, qwen2, gpt2 or bert; weights are random.
        optimizer: as `plan_memory` has it.
    """

    name: str
    family: str = "llama"
    layers: int = 3
    hidden: int = 768
    vocab: int = 16384
    batch_size: int = 4
    seq_len: int = 512
    rank: int = 16
    dora: bool = False
    dropout: float = 0.0
    checkpointing: bool = False
    chunked: bool = True
    dtype: str = "bfloat16"
    optimizer: str = "adamw_torch_fused"
    device: str = "cpu"

    def architecture(self) -> Any:
        """transformers' config."""
        heads = self.hidden // (64 if self.device == "cpu" else 128)
        if self.family == "gpt2":
            return transformers.GPT2Config(
                n_embd=self.hidden,
                n_layer=self.layers,
                n_head=heads,
                vocab_size=self.vocab,
                n_positions=self.seq_len,
                bos_token_id=0,
                eos_token_id=0,
                use_cache=False,
                architectures=["GPT2LMHeadModel"],
            )
        shared: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.seq_len,
        }
        if self.family == "bert":
            return transformers.BertConfig(
                **shared, intermediate_size=4 * self.hidden, architectures=["BertForSequenceClassification"]
            )
        cls, name = {
            "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
            "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
        }[self.family]
        return cls(
            **shared,
            intermediate_size=7 * self.hidden // 2,
            num_key_value_heads=max(heads // 4, 1),
            use_cache=False,
            architectures=[name],
        )

    def lora(self) -> LoraConfig:
        return QLoRAConfig(
            r=self.rank,
            target_modules="all-linear",
            task_type=TASKS.get(self.family, "CAUSAL_LM"),
            use_dora=self.dora,
            lora_dropout=self.dropout,
            chunked_loss=self.chunked,
        )

    def dense(self) -> nn.Module:
        """The base with random weights."""
        config = self.architecture()
        cls = getattr(transformers, config.architectures[0])
        with torch.device(self.device):
            made: nn.Module = cls._from_config(config, dtype=getattr(torch, self.dtype))
        return made.to(self.device)

    def batch(self) -> dict[str, Tensor]:
        ids = torch.randint(1, self.vocab, (self.batch_size, self.seq_len), device=self.device)
        labels = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device) if self.family == "bert" else ids
        return {"input_ids": ids, "labels": labels}


CPU = (
    Setting("plain"),
    Setting("batch 8", batch_size=8),
    Setting("batch 1, long", batch_size=1, seq_len=2048),
    Setting("rank 128", rank=128),
    Setting("6 layers", layers=6, batch_size=2),
    Setting("checkpointing", layers=6, batch_size=8, checkpointing=True),
    Setting("full logits", chunked=False),
    Setting("checkpointing, full logits", checkpointing=True, chunked=False),
    Setting("DoRA", dora=True),
    Setting("dropout", dropout=0.1),
    Setting("float32", dtype="float32"),
    Setting("float32, checkpointing", dtype="float32", checkpointing=True, layers=6, batch_size=8),
    Setting("AdamW, not fused", optimizer="adamw_torch", rank=128),
    Setting("large vocabulary", vocab=65536, layers=2),
    Setting("Qwen2", family="qwen2"),
    Setting("GPT-2", family="gpt2", layers=4),
    Setting("BERT, classifier", family="bert", layers=4),
)
_8B: dict[str, Any] = {
    "layers": 4,
    "hidden": 4096,
    "vocab": 128256,
    "batch_size": 2,
    "seq_len": 1024,
    "device": "cuda",
}
CUDA = (
    Setting("plain", **_8B),
    Setting("batch 4", **{**_8B, "batch_size": 4}),
    Setting("batch 1, long", **{**_8B, "batch_size": 1, "seq_len": 4096}),
    Setting("rank 256", **_8B, rank=256),
    Setting("2 layers", **{**_8B, "layers": 2}),
    Setting("checkpointing", **{**_8B, "batch_size": 4}, checkpointing=True),
    Setting("full logits", **_8B, chunked=False),
    Setting("checkpointing, full logits", **_8B, checkpointing=True, chunked=False),
    Setting("DoRA", **_8B, dora=True),
    Setting("dropout", **_8B, dropout=0.1),
    Setting("float32", **{**_8B, "vocab": 32000}, dtype="float32"),
    Setting("AdamW, not fused", **_8B, rank=256, optimizer="adamw_torch"),
    Setting("8-bit AdamW", **_8B, rank=256, optimizer="adamw_8bit"),
    Setting("Qwen2", **_8B, family="qwen2"),
    Setting("GPT-2", family="gpt2", layers=8, hidden=2048, vocab=50257, batch_size=8, seq_len=1024, device="cuda"),
    Setting("BERT, classifier", family="bert", layers=12, hidden=1024, batch_size=16, seq_len=512, device="cuda"),
)
QUICK = (
    Setting("plain", layers=2, hidden=256, vocab=2048, batch_size=2, seq_len=128),
    Setting("checkpointing", layers=2, hidden=256, vocab=2048, batch_size=2, seq_len=128, checkpointing=True),
)
