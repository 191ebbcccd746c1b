"""The demo: one QLoRA run from a dense chat model to a merged one.

    load in bfloat16 → NF4 + LoRA → train → save → reload in a fresh process → merge

Everything printed is measured in the run. Perplexity is exp of the mean negative log-likelihood over the answer tokens
of held-out examples, whose questions no training example has. The reload starts a new Python, loads the dense base and
the adapter's folder with `PeftModel.from_pretrained`, and compares its logits with those that this process wrote to a
file; the demo fails if they are not the same.

An example is a chat whose last message is the answer. Only the answer has labels; batches are padded to their longest
example. The model is on its device before `get_peft_model`: Trainer does not move 4-bit models.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from jinja2 import TemplateError
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from hf_qlora import assets
from hf_qlora.config import QLoRAConfig
from hf_qlora.quant.footprint import footprint


# Sentences of contracts that name somebody. The task's own instruction, 131 tokens long, asks for a chain of thought
# that its answers do not have.
TASK = "ner_finance.dev.v0"
QUESTION = "List the persons, organizations and locations in this sentence, in order, as [NAME - TYPE, ...]."
UNDERSTOOD = "messages; prompt and completion; or instruction and output"
MAX_ROWS = 20_000
ANSWER_TOKENS = 40
NO_LABEL = -100  # left out by the models' cross entropy

Messages = list[dict[str, str]]


class DemoError(ValueError):
    """Something given to the demo cannot be used; the message says what, why, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What to run; `hf-qlora demo --help` says what each one is."""

    model: str | None
    dataset: str | None
    output: Path
    steps: int
    batch_size: int
    rank: int
    loftq: bool
    learning_rate: float
    held_out: int
    max_length: int
    seed: int
    save_merged: bool


@dataclass(frozen=True)
class Example:
    """A chat as token ids; those from `start` on are the answer and the end of its turn."""

    question: str
    answer: str
    ids: list[int]
    start: int


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
    _quiet_libraries()
    _check_output(settings.output)
    chats = read_chats(settings.dataset, settings.seed)
    base = settings.model or _default_model()
    tokenizer, model = _load(base)
    train_set, held_out = choose(chats, tokenizer, settings)
    report("model", f"{Path(base).name} on {model.device.type}")
    report("data", f"{settings.dataset or TASK}: {len(train_set)} pairs to train on, {len(held_out)} held out")
    shown = _typical(held_out)
    dense, before = perplexity(model, held_out), answer(model, tokenizer, shown)
    peft_model = quantize(model, settings, report)
    quantized = perplexity(peft_model, held_out)
    report("perplexity", f"{dense:.3f} dense, {quantized:.3f} in NF4, on the held-out answers")
    train(peft_model, train_set, settings, report)
    trained = perplexity(peft_model, held_out)
    report("perplexity", f"{trained:.3f} after training")
    report("question", _short(shown.question))
    report("  reference", _short(shown.answer))
    report("  before", _short(before))
    report("  after", _short(answer(peft_model, tokenizer, shown)))
    reload_difference = save_and_reload(peft_model, base, held_out[:2], settings.output, report)
    merged, merge_difference = merge(peft_model, tokenizer, held_out, settings, report)
    report("time", f"{time.monotonic() - started:.0f} s")
    return Results(dense, quantized, trained, merged, reload_difference, merge_difference)


# --- the steps ---


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
    with _explained(ValueError):  # a base that cannot be quantized
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
    with _explained(OSError):
        model.save_pretrained(output)
    size = (output / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    report("adapter", f"{size / 2**20:.1f} MiB in {output}")
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        save_file(_probe(model, examples), probe)
        # The thread count decides the last bit of NF4's nested scales.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "hf_qlora.demo", base, str(output), str(probe)]
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


def reload_and_compare(base: str, adapter: str, probe: str) -> dict[str, float]:
    """What the fresh process does: the largest difference from the logits in the file `probe`."""
    saved = load_file(probe)
    logits = saved.pop("logits")
    model = PeftModel.from_pretrained(_load_model(base), adapter)
    return _difference(_logits(model, saved), logits)


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    settings: Settings,
    report: Report,
) -> tuple[float, float]:
    """Merge into a dense model; its perplexity and the relative difference of its logits."""
    probe = _probe(model, held_out[:2])
    logits = probe.pop("logits")
    merged = model.merge_and_unload()
    found, after = _difference(_logits(merged, probe), logits), perplexity(merged, held_out)
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


# --- examples ---


def read_chats(dataset: str | None, seed: int) -> list[Messages]:
    """The chats of a data set, or of the default task, in an order set by the seed."""
    if dataset is not None:
        chats = [as_messages(row) for row in read_rows(dataset, seed)]
    else:
        with _explained(OSError, ValueError):
            pairs = assets.instruction_pairs([TASK]) + assets.instruction_pairs([TASK], split="test")
        chats = [_exchange(f"{QUESTION}\n\n{p['prompt']}", p["answer"]) for p in pairs if p["answer"].startswith("[")]
    random.Random(seed).shuffle(chats)
    return chats


def choose(
    chats: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> tuple[list[Example], list[Example]]:
    """To train on, and held out: the first that are not too long, no question twice, as many as will be used."""
    examples: dict[str, Example] = {}
    wanted = settings.held_out + settings.steps * settings.batch_size
    for messages in chats:
        example = encode(tokenizer, messages)
        if len(example.ids) <= settings.max_length:
            examples.setdefault(example.question, example)
        if len(examples) == wanted:
            break
    if len(examples) < settings.held_out + settings.batch_size:
        raise DemoError(
            f"{settings.dataset or TASK} has {len(examples)} examples with distinct questions and at most "
            f"{settings.max_length} tokens, but {settings.held_out} to hold out and {settings.batch_size} to train on "
            "are needed. Raise --max-length, or lower --held-out or --batch-size."
        )
    found = list(examples.values())
    return found[settings.held_out :], found[: settings.held_out]


def read_rows(dataset: str, seed: int) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl file, of a folder's .jsonl files, or of what `datasets.load_dataset` finds.

    Raises:
        DemoError: nothing of that name, or not readable.
    """
    path = Path(dataset)
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if files:
        return [row for file in files for row in _json_lines(file)]
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DemoError(
            f"{dataset!r} is neither a .jsonl file nor a folder with one. For data sets of the Hub and other files: "
            "pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, split="train")
    except (OSError, ValueError) as error:
        raise DemoError(f"Cannot load the data set {dataset!r}: {_first_line(error)}{_offline()}") from error
    return list(rows.shuffle(seed=seed).select(range(min(len(rows), MAX_ROWS))))


def _json_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DemoError(f"{file}, line {number} is not JSON: {error.msg}.") from error
            if not isinstance(row, dict):
                raise DemoError(f"{file}, line {number} is no JSON object, but {_short(line)}")
            yield row


def as_messages(row: Mapping[str, Any]) -> Messages:
    """A row as a chat that ends with the assistant's answer.

    Raises:
        DemoError: columns that are not understood, or no such chat in them.
    """
    if "messages" in row:
        messages = row["messages"]
    elif {"prompt", "completion"} <= row.keys():
        messages = _exchange(row["prompt"], row["completion"])
    elif {"instruction", "output"} <= row.keys():
        question = [str(row[name]) for name in ("instruction", "input") if row.get(name)]
        messages = _exchange("\n\n".join(question), row["output"])
    else:
        raise DemoError(f"The data set has the columns {', '.join(row) or 'none'}; understood are {UNDERSTOOD}.")
    if not _is_chat(messages):
        raise DemoError(
            f"A row is no chat of 'role' and 'content' that ends with the assistant's answer: {_short(str(messages))}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _exchange(question: Any, answer: Any) -> Messages:
    """Two texts, or two lists of messages, as one chat."""
    said = (("user", question), ("assistant", answer))
    return [m for role, text in said for m in (text if isinstance(text, list) else [{"role": role, "content": text}])]


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in messages)
        and messages[-1]["role"] == "assistant"
    )


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Example:
    """Render a chat with the tokenizer's template; question and answer are tokenized apart, as in generation."""
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise DemoError(
            f"The model's chat template cannot render an example: {_first_line(error)} Choose a model made for chat."
        ) from error
    said = messages[-1]["content"]
    # Templates that open the answer otherwise when it is still to come (with a thought) are no prefix of the whole.
    end = whole.removeprefix(prompt) if whole.startswith(prompt) else said + (tokenizer.eos_token or "")
    start: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Example(
        messages[-2]["content"], said, start + tokenizer(end, add_special_tokens=False)["input_ids"], len(start)
    )


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch padded to its longest example, (examples, tokens); labels on the answers only."""
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [tokens.clone() for tokens in ids]
    for example, row in zip(examples, labels, strict=True):
        row[: example.start] = NO_LABEL
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
    }


# --- models ---


def _typical(examples: Sequence[Example]) -> Example:
    """The example whose answer is shown: the one of median length."""
    return sorted(examples, key=lambda example: len(example.ids) - example.start)[len(examples) // 2]


def perplexity(model: Any, examples: Sequence[Example], batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood of the answers' tokens."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.ids))
    total, tokens = 0.0, 0
    for first in range(0, len(by_length), batch_size):
        batch = collate(by_length[first : first + batch_size])
        count = int((batch["labels"] != NO_LABEL).sum())
        with torch.no_grad():
            mean = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss.item()
        total, tokens = total + mean * count, tokens + count
    return math.exp(total / tokens)


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The model's most likely answer, of at most `ANSWER_TOKENS` tokens."""
    prompt = torch.tensor([example.ids[: example.start]], device=model.device)
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        tokens = model.eval().generate(input_ids=prompt, attention_mask=mask, max_new_tokens=ANSWER_TOKENS)
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))


def _load(base: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(base), _load_model(base)
    except (ImportError, OSError, ValueError) as error:
        raise DemoError(f"Cannot load the model {base!r}: {_first_line(error)}{_offline()}") from error
    if tokenizer.chat_template is None:
        raise DemoError(
            f"The model {base!r} has no chat template; choose a model made for chat, often called -Instruct."
        )
    # Greedy, and without the sampling settings that transformers would then complain about.
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return tokenizer, model


def _load_model(base: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if narrow else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
    return model.eval()


def _default_model() -> str:
    with _explained(ImportError, OSError, ValueError):  # no gguf, no network, another file than the pinned one
        return str(assets.smollm2_135m_instruct())


@contextmanager
def _explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors whose messages are made for users into `DemoError`."""
    try:
        yield
    except errors as error:
        raise DemoError(str(error)) from error


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits at all tokens but padding, where they mean nothing: (tokens, vocabulary)."""
    with torch.no_grad():
        logits: Tensor = model.eval()(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
    return logits.float().cpu()[inputs["attention_mask"].bool()]


def _probe(model: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    inputs = collate(examples)
    del inputs["labels"]
    return {**inputs, "logits": _logits(model, inputs)}


def _difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    largest = (found - expected).abs().max().item()
    return {"largest": largest, "relative": largest / expected.abs().max().item()}


# --- what is printed ---


class Report:
    """Lines of a label and a finding."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, label: str, text: str) -> None:
        self.console.print(f"{label:<12} {text}", soft_wrap=True, markup=False, highlight=False)


class LossBar(TrainerCallback):
    """A progress bar with the loss on a terminal; in a log, a line at each tenth of the way."""

    def __init__(self, report: Report) -> None:
        self.report, self.drawn = report, report.console.is_terminal
        label, loss = TextColumn("training    "), TextColumn("loss {task.fields[loss]}")
        columns = (label, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        self.progress = Progress(*columns, console=report.console, disable=not self.drawn)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, loss="…")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        loss = f"{float(logs['loss']):.3f}"
        self.progress.update(self.task, loss=loss)
        if not self.drawn:
            self.report("training", f"step {state.global_step}/{state.max_steps}, loss {loss}")


def _quiet_libraries() -> None:
    transformers_logging.disable_progress_bar()  # "Loading weights", a second or two for a small model
    # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed; both know.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _check_output(folder: Path) -> None:
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise DemoError(f"--output: {part} is a file; name a folder.")
            break
    else:
        return
    if not os.access(part, os.W_OK):
        raise DemoError(f"--output: {part} cannot be written to; name another folder.")


def _short(text: str) -> str:
    return textwrap.shorten(text, 240, placeholder=" …") or "(nothing)"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _offline() -> str:
    return " (HF_HUB_OFFLINE is set, so the Hub is not asked.)" if constants.HF_HUB_OFFLINE else ""


if __name__ == "__main__":
    _quiet_libraries()
    print(json.dumps(reload_and_compare(*sys.argv[1:])))
