"""`train-step`: a QLoRA step of ours, of stock PEFT with bitsandbytes, and the frozen base's own.

It is `hf_qlora/bench/train_step/`, with the given model for one of random weights, on the prose of `merge/probe.py`:
the arms take turns in one process, and each is alone in one for its peak. The learning rate is 0, so that steps take
what they take and weights stay where they are: the losses and gradient norms of one batch can then be compared. The
floor is a forward and a backward of the dense base without any adapter; its norm is that of the gradient at the input.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from hf_qlora.bench.quantization.case import Case as SuiteCase
from hf_qlora.bench.quantization.rows import Row, numbers, timings
from hf_qlora.bench.quantization.settings import Context
from hf_qlora.bench.train_step.arms import CHUNKED, DOCUMENTED, FLOOR, Case
from hf_qlora.bench.train_step.run import interleaved, peak_memory
from hf_qlora.data.tokenizer import tokenizer_in
from hf_qlora.merge.load import load_model
from hf_qlora.merge.probe import DEFAULT_TEXTS


@dataclass(frozen=True)
class OfModel(Case):
    """A case of the train-step bench on a model in a folder."""

    folder: str = ""
    dtype: str = "bfloat16"

    def architecture(self) -> LlamaConfig:
        """Its sizes alone, for the rate of a matrix product."""
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=inner,
            num_hidden_layers=config.num_hidden_layers,
        )

    def dense(self) -> Any:
        torch.manual_seed(self.seed)
        model = load_model(self.folder, self.dtype).to(self.device)
        model.config.use_cache = False
        return model.requires_grad_(False)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Pieces of the built-in prose, which goes round; random tokens where there is no tokenizer."""
        generator = torch.Generator().manual_seed(self.seed + number)
        size = (self.batch_size, self.sequence_length)
        prose = _prose(self.folder)
        if prose is None:
            ids = torch.randint(0, self.architecture().vocab_size, size, generator=generator)
        else:
            starts = torch.randint(0, len(prose), (self.batch_size, 1), generator=generator)
            ids = prose[(starts + torch.arange(self.sequence_length)) % len(prose)]
        return {"input_ids": ids.to(self.device), "labels": ids.to(self.device)}


def positions(folder: str) -> int:
    """How long a sequence the model takes."""
    return (
        getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None) or sys.maxsize
    )


def size_of(folder: str, smoke: bool) -> tuple[int, int, int]:
    """Batch size, tokens of a sequence, and rank."""
    batch_size, length, rank = (2, 16, 4) if smoke else (2, 256, 16)
    return batch_size, min(length, positions(folder)), rank


@functools.cache
def _prose(folder: str) -> Tensor | None:
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        return None
    return torch.tensor(tokenizer("\n\n".join(DEFAULT_TEXTS))["input_ids"])


def run(context: Context) -> list[Row]:
    settings = context.settings
    case = OfModel(
        "",
        *size_of(str(context.folder), settings.smoke),
        device=settings.device,
        learning_rate=0.0,
        seed=settings.seed,
        folder=str(context.folder),
        dtype=settings.dtype,
    )
    rows: list[Row] = []
    setting = f"{case.batch_size} × {case.sequence_length} tokens, rank {case.rank}"
    peaks = {}
    for arm in ARMS:
        context.at(f"{arm}, memory")
        peaks[arm] = context.alone(peak_memory, arm, case)["peak"]
    seconds, _, ends = interleaved(case, settings.rounds, ARMS, context.at)
    rows += timings({arm: found["step_s"] for arm, found in seconds.items()}, setting, case.tokens)
    for arm, end in ends.items():
        found = {"loss": end["loss"], "gradient_norm": end["gradient_norm"], "peak_bytes": max(peaks[arm], 0)}
        rows += numbers(arm, found, setting)
    return rows


ARMS = (DOCUMENTED, CHUNKED, FLOOR)
CASE = SuiteCase(
    "train-step",
    "Training step",
    "Seconds of a whole step with its optimizer, beside the frozen base's own forward and backward. The learning rate "
    "is 0: loss and gradient norm of ours and stock must agree to about a percent, or one of them is not training.",
    run,
    # All arms at once, and what layers keep for backward.
    lambda sizes: 2 * sizes.dense + 2 * sizes.nf4 + 2**30,
    reference=FLOOR,
)
