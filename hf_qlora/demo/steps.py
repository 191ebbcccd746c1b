"""The steps: quantize, train, save and reload, merge. Each reports what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_qlora.config import QLoRAConfig
from hf_qlora.demo.errors import explained
from hf_qlora.demo.examples import Example, collate
from hf_qlora.demo.models import difference, perplexity, take_probe, token_logits
from hf_qlora.demo.report import LossBar, Report
from hf_qlora.demo.settings import Settings
from hf_qlora.quant.footprint import footprint


def quantize(model: PreTrainedModel, settings: Settings, report: Report) -> PeftModel:
    """NF4 and a new LoRA adapter, with the memory before and after."""
    report("weights", f"{footprint(model)} in {str(model.dtype).removeprefix('torch.')}")
    set_seed(settings.seed)
    config = QLoRAConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq" if settings.loftq else True,
    )
    with explained(ValueError):  # a base that cannot be quantized
        peft_model = get_peft_model(model, config)
    adapter = sum(parameter.nbytes for parameter in peft_model.parameters() if parameter.requires_grad)
    report("  quantized", f"{footprint(peft_model)}; {adapter / 2**20:.1f} MiB of it are the adapter")
    return peft_model


def train(model: PeftModel, examples: Sequence[Example], settings: Settings, report: Report) -> None:
    """Train the adapter with transformers' Trainer."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(5, settings.steps // 2),
            logging_steps=max(1, settings.steps // 10),
            seed=settings.seed,
            use_cpu=model.device.type == "cpu",
            label_names=["labels"],
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        bar = LossBar(report)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples, callbacks=[bar])
        trainer.remove_callback(PrinterCallback)
        with bar.progress:
            trainer.train()


def save_and_reload(model: PeftModel, base: str, examples: Sequence[Example], output: Path, report: Report) -> float:
    """Save the adapter and the logits of `examples`, and have a fresh process compare."""
    with explained(OSError):
        model.save_pretrained(output)
    size = (output / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    report("adapter", f"{size / 2**20:.1f} MiB in {output}")
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        save_file(take_probe(model, examples), probe)
        # The thread count decides the last bit of NF4's nested scales.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "hf_qlora.demo.reload", base, str(output), str(probe)]
        # In a session of its own, so that Ctrl-C reaches this process alone, which ends the other.
        child = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True
        )
    found = json.loads(child.stdout.splitlines()[-1])
    report("  reloaded", f"in a fresh process; largest difference of logits {found['largest']:g}")
    # bfloat16 keeps 8 bits, so a product summed in another order differs by about this much.
    if found["relative"] > 2**-6:
        raise RuntimeError(
            f"The adapter in {output} does not compute what was trained: its logits differ by {found['largest']:g}. "
            "This is a bug in hf-qlora or in a package below it; please report it with the output above."
        )
    return float(found["relative"])


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    settings: Settings,
    report: Report,
) -> tuple[float, float]:
    """Merge into a dense model; its perplexity and the relative difference of its logits."""
    probe = take_probe(model, held_out[:2])
    logits = probe.pop("logits")
    merged = model.merge_and_unload()
    found, after = difference(token_logits(merged, probe), logits), perplexity(merged, held_out)
    close = f"logits within {found['relative']:.1%} of the largest of the unmerged"
    report("merged", f"{footprint(merged)}, perplexity {after:.3f}, {close}")
    if settings.save_merged:
        folder = settings.output / "merged"
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report("  saved", f"in {folder}")
    else:
        report("  not saved", "add --save-merged for a folder that AutoModelForCausalLM loads")
    return after, found["relative"]
