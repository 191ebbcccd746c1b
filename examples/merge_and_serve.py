"""Train SmolLM2 briefly, share the adapter, merge it, and serve both with llama.cpp: the same answer each way.

    python examples/merge_and_serve.py                       # minutes on two cores; nothing leaves the machine
    python examples/merge_and_serve.py --repo me/adapter     # pushed to your Hub (private) and pulled from there
    python examples/merge_and_serve.py --gguf q8_0           # served in 8 bits
    python examples/merge_and_serve.py --resume              # after Ctrl-C

The model and the sentences come from PyPI wheels. Needs 'hf-qlora[serve]'; without xllamacpp it stops after merging.
All is float32 here, so that what differs between the ways is llama.cpp's arithmetic alone, and --gguf if it rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_qlora import ModelCardCallback, QLoRAConfig, assets, quantize_model
from hf_qlora.data.models import loading
from hf_qlora.demo.chats import Messages, read_chats
from hf_qlora.demo.examples import Example, collate, encode
from hf_qlora.hub.card import hub_id
from hf_qlora.train import interrupt
from hf_qlora.train.arguments import INTERRUPTED, Parser, in_one_sentence, positive, stop
from hf_qlora.trainer.checkpoint import checkpoints


ANSWER_TOKENS = 40
TOP = 20  # tokens whose log-probabilities are compared, at each place of the answer
HELD_OUT = 8
MAX_TOKENS = 112  # of an example


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=positive, default=16, help="of 4 sentences each")
    parser.add_argument("--repo", help="push the adapter to this repository of the Hub, and pull it from there")
    parser.add_argument("--gguf", choices=["f32", "f16", "bf16", "q8_0"], default="f32", help="dtype of GGUF weights")
    parser.add_argument("--output", type=Path, default=Path("merge-and-serve"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    options = parser.parse_args()
    if options.repo and hub_id(options.repo) is None:
        parser.error(f"--repo {options.repo} is no name of a repository, as me/adapter.")
    with in_one_sentence(options.output / "adapter"):
        run(options)


def run(options: argparse.Namespace) -> None:
    settings, folder = {"script": "merge_and_serve", "steps": options.steps}, options.output / "adapter"
    checkpoint = interrupt.check_run(folder, settings, options.resume, kind=("script",))
    set_seed(0)
    with loading("SmolLM2-135M-Instruct, with the sentences"):
        base = assets.smollm2_135m_instruct()
        tokenizer = AutoTokenizer.from_pretrained(base)
        chats = read_chats(None, seed=0)
    interrupt.begin_run(folder, settings)
    chat = min(chats[:HELD_OUT], key=lambda messages: len(messages[0]["content"]))
    examples = [encode(tokenizer, messages) for messages in chats[HELD_OUT:]]
    model = train(base, [example for example in examples if len(example.ids) <= MAX_TOKENS], options, checkpoint)
    adapter = share(model, tokenizer, options)
    del model
    for path in checkpoints(folder):  # there is nothing left to resume
        shutil.rmtree(path)

    pulled = PeftModel.from_pretrained(dense(base), str(adapter)).eval()  # quantizes the base as in training
    reference = ask(pulled, tokenizer, chat)
    print(f"question              {one_line(chat[0]['content'])}")
    print(f"reference             {one_line(chat[1]['content'])}")
    print(f"transformers          {one_line(tokenizer.decode(reference.answer, skip_special_tokens=True))}")

    merged = pulled.merge_and_unload()  # the base as it was quantized, made dense, plus the adapter
    difference = (log_probabilities(merged, reference.prompt + reference.answer) - reference.expected).abs().max()
    print(f"merged                log-probabilities within {float(difference):.1e} of the unmerged model's")
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    if importlib.util.find_spec("xllamacpp") is None:
        print("not served            llama.cpp is not installed: pip install 'hf-qlora[serve]'")
        return
    serve(base, adapter, reference, options)


@dataclass(frozen=True)
class Reference:
    """What the unmerged model answers to a chat.

    Attributes:
        chat: the question, and the answer it should have.
        prompt: token ids.
        answer: token ids.
        expected (`torch.Tensor`, (prompt and answer, vocabulary)): log-probabilities of what follows each token.
    """

    chat: Messages
    prompt: list[int]
    answer: list[int]
    expected: torch.Tensor


def train(base: Path, examples: list[Example], options: argparse.Namespace, checkpoint: str | None) -> PeftModel:
    config = QLoRAConfig(r=16, lora_alpha=16, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")
    model = get_peft_model(dense(base), config)
    arguments = TrainingArguments(
        str(options.output / "adapter"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=max(1, options.steps // 5),
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples)
    trainer.add_callback(ModelCardCallback(trainer, dataset_name="ner_finance.dev.v0"))
    trainer.add_callback(stopper := interrupt.StopOnCtrlC())
    interrupt.train(trainer, checkpoint)
    if stopper.asked:
        stop(interrupt.way_on(options.output / "adapter"), INTERRUPTED)
    return model


def share(model: PeftModel, tokenizer: Any, options: argparse.Namespace) -> Path:
    """Push the adapter and pull it again, or save it; the folder it is then in."""
    if options.repo:
        model.push_to_hub(options.repo, private=True)
        tokenizer.push_to_hub(options.repo)
        return Path(snapshot_download(options.repo))
    folder = options.output / "adapter"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return Path(folder)


def ask(model: PeftModel, tokenizer: Any, chat: Messages) -> Reference:
    example = encode(tokenizer, chat)
    prompt = example.ids[: example.start]
    ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    return Reference(chat, prompt, ids[len(prompt) :], log_probabilities(model, ids))


def serve(base: Path, adapter: Path, reference: Reference, options: argparse.Namespace) -> None:
    """Answer with llama.cpp: the merged model, and the base with the adapter beside it, which may be one of many."""
    from llamacpp import Server, convert_adapters, convert_model

    print("converting to GGUF    base, adapter and merged model")
    # An adapter was trained on the quantized base: what it is served on is that base, made dense.
    quantized = dense(base)
    quantize_model(quantized)
    quantized.dequantize().save_pretrained(options.output / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(options.output / "base")
    base_file = convert_model(options.output / "base", options.output / "base.gguf", options.gguf)
    merged_file = convert_model(options.output / "merged", options.output / "merged.gguf", options.gguf)
    adapter_file = options.output / "adapter.gguf"
    convert_adapters(base, {adapter: adapter_file})

    question = reference.chat[:-1]
    threads = torch.get_num_threads()
    beside = Server(base_file, [adapter_file], threads)
    for way, server, index in (
        ("merged", Server(merged_file, threads=threads), None),
        ("base and adapter", beside, 0),
    ):
        print(f"  {way:<20}{one_line(server.answer(question, index, ANSWER_TOKENS))}")
        found = server.log_probabilities(reference.prompt, index, len(reference.answer), TOP)
        largest, places = compare(reference, *found)
        print(f"  {'':<20}log-probabilities within {largest:.1e} of ours, over {places} tokens")
    print(f"  {'base alone':<20}{one_line(beside.answer(question, None, ANSWER_TOKENS))}")


def compare(reference: Reference, ids: list[int], places: list[dict[int, float]]) -> tuple[float, int]:
    """The largest difference from the expected log-probabilities, and over how many places of the answer."""
    parted = next((i for i, (a, b) in enumerate(zip(ids, reference.answer, strict=True)) if a != b), len(ids))
    same = places[: parted + 1]  # where two answers part, they still follow the same tokens
    expected = reference.expected[len(reference.prompt) - 1 :]
    differences = [abs(value - float(expected[i, t])) for i, place in enumerate(same) for t, value in place.items()]
    return max(differences), len(same)


def dense(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """Of what follows each token: (tokens, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
