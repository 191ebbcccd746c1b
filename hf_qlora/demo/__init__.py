"""The demo: one QLoRA run from a dense chat model to a merged one.

    load in bfloat16 → NF4 + LoRA → train → save → reload in a fresh process → merge

Everything printed is measured in the run. Perplexity is exp of the mean negative log-likelihood over the answer tokens
of held-out examples, whose questions no training example has. The reload starts a new Python, loads the dense base and
the adapter's folder with `PeftModel.from_pretrained`, and compares its logits with those that this process wrote to a
file; the demo fails if they are not the same.

The model is on its device before `get_peft_model`: Trainer does not move 4-bit models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hf_qlora.data.errors import short
from hf_qlora.demo.chats import TASK, read_chats
from hf_qlora.demo.errors import DemoError
from hf_qlora.demo.examples import choose, typical
from hf_qlora.demo.models import answer, default_model, load_chat_model, perplexity
from hf_qlora.demo.report import Report, quiet_libraries
from hf_qlora.demo.settings import Settings, check_output
from hf_qlora.demo.steps import merge, quantize, save_and_reload, train


__all__ = ["DemoError", "Results", "Settings", "run"]


@dataclass(frozen=True)
class Results:
    """Perplexities on the held-out examples, and largest differences of logits relative to the largest logit."""

    dense: float
    quantized: float
    trained: float
    merged: float
    reload_difference: float
    merge_difference: float


def run(settings: Settings, console: Console | None = None) -> Results:
    """Run the demo and report to `console`, the terminal by default.

    Raises:
        DemoError: a model, data set or output folder that cannot be used.
        RuntimeError: the adapter computes something else after reloading.
    """
    started = time.monotonic()
    report = Report(console or Console())
    quiet_libraries()
    check_output(settings.output)
    chats = read_chats(settings.dataset, settings.seed)
    base = settings.model or default_model()
    tokenizer, model = load_chat_model(base)
    train_set, held_out = choose(chats, tokenizer, settings)
    report("model", f"{Path(base).name} on {model.device.type}")
    report("data", f"{settings.dataset or TASK}: {len(train_set)} pairs to train on, {len(held_out)} held out")
    shown = typical(held_out)
    dense, before = perplexity(model, held_out), answer(model, tokenizer, shown)
    peft_model = quantize(model, settings, report)
    quantized = perplexity(peft_model, held_out)
    report("perplexity", f"{dense:.3f} dense, {quantized:.3f} in NF4, on the held-out answers")
    train(peft_model, train_set, settings, report)
    trained = perplexity(peft_model, held_out)
    report("perplexity", f"{trained:.3f} after training")
    report("question", short(shown.question))
    report("  reference", short(shown.answer))
    report("  before", short(before))
    report("  after", short(answer(peft_model, tokenizer, shown)))
    reload_difference = save_and_reload(peft_model, base, held_out[:2], settings.output, report)
    merged, merge_difference = merge(peft_model, tokenizer, held_out, settings, report)
    report("time", f"{time.monotonic() - started:.0f} s")
    return Results(dense, quantized, trained, merged, reload_difference, merge_difference)
