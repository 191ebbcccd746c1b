"""Train SmolLM2 briefly, share the adapter, merge it, and serve both with llama.cpp: the same answer each way.

    python examples/merge_and_serve.py                       # minutes on two cores; nothing leaves the machine
    python examples/merge_and_serve.py --repo me/adapter     # pushed to your Hub (private) and pulled from there
    python examples/merge_and_serve.py --gguf q8_0           # served in 8 bits

The model and the sentences come from PyPI wheels. Needs 'hf-qlora[serve]'; without xllamacpp it stops after merging.
All is float32 here, so that what differs between the ways is llama.cpp's arithmetic alone, and --gguf if it rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_qlora import QLoRAConfig, assets, quantize_model
from hf_qlora.demo.chats import Messages, read_chats
from hf_qlora.demo.examples import Example, collate, encode


ANSWER_TOKENS = 40
TOP = 20  # tokens whose log-probabilities are compared, at each place of the answer
HELD_OUT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of 4 sentences each")
    parser.add_argument("--repo", help="push the adapter to this repository of the Hub, and pull it from there")
    parser.add_argument("--gguf", choices=["f32", "f16", "bf16", "q8_0"], default="f32", help="dtype of GGUF weights")
    parser.add_argument("--output", type=Path, default=Path("merge-and-serve"))
    options = parser.parse_args()

    set_seed(0)
    base = assets.smollm2_135m_instruct()
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = read_chats(None, seed=0)
    chat = min(chats[:HELD_OUT], key=lambda messages: len(messages[0]["content"]))
    model = train(base, [encode(tokenizer, messages) for messages in chats[HELD_OUT:]], options)
    adapter = share(model, tokenizer, options)
    del model

    pulled = PeftModel.from_pretrained(dense(base), str(adapter)).eval()  # quantizes the base as in training
    asked = encode(tokenizer, chat)
    prompt = asked.ids[: asked.start]
    answered = pulled.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    expected = log_probabilities(pulled, answered)
    print(f"question              {chat[0]['content']}")
    print(f"reference             {chat[1]['content']}")
    print(f"transformers          {tokenizer.decode(answered[len(prompt) :], skip_special_tokens=True)}")

    merged = pulled.merge_and_unload()  # the base as it was quantized, made dense, plus the adapter
    difference = float((log_probabilities(merged, answered) - expected).abs().max())
    print(f"merged                log-probabilities within {difference:.1e} of the unmerged model's")
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    if importlib.util.find_spec("xllamacpp") is None:
        print("not served            llama.cpp is not installed: pip install 'hf-qlora[serve]'")
        return
    serve(base, adapter, chat, prompt, answered, expected, options)


def train(base: Path, examples: list[Example], options: argparse.Namespace) -> PeftModel:
    config = QLoRAConfig(r=16, lora_alpha=16, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")
    model = get_peft_model(dense(base), config)
    arguments = TrainingArguments(
        str(options.output / "run"),
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
    Trainer(model, arguments, data_collator=collate, train_dataset=examples).train()
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


def serve(
    base: Path,
    adapter: Path,
    chat: Messages,
    prompt: list[int],
    answered: list[int],
    expected: torch.Tensor,
    options: argparse.Namespace,
) -> None:
    """Answer with llama.cpp: the merged model, and the base with the adapter beside it, which may be one of many."""
    from llamacpp import Server, convert_adapters, convert_model

    print("converting to GGUF    three files")
    # An adapter was trained on the quantized base: what it is served on is that base, made dense.
    quantized = dense(base)
    quantize_model(quantized)
    quantized.dequantize().save_pretrained(options.output / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(options.output / "base")
    base_file = convert_model(options.output / "base", options.output / "base.gguf", options.gguf)
    merged_file = convert_model(options.output / "merged", options.output / "merged.gguf", options.gguf)
    adapter_file = options.output / "adapter.gguf"
    convert_adapters(base, {adapter: adapter_file})

    with_adapter = Server(base_file, [adapter_file])
    ways = {"merged": (Server(merged_file), None), "base and adapter": (with_adapter, 0)}
    for way, (server, index) in ways.items():
        print(f"  {way:<20}{server.answer(chat[:-1], index, ANSWER_TOKENS)}")
        ids, places = server.log_probabilities(prompt, index, len(answered) - len(prompt), TOP)
        expected_ids = answered[len(prompt) :]
        # The place where two ways part is still after the same tokens; where they agree, all places are.
        compared = places[: 1 + next((i for i in range(len(ids)) if ids[i] != expected_ids[i]), len(ids))]
        largest = max(
            abs(value - float(expected[len(prompt) - 1 + at, token]))
            for at, place in enumerate(compared)
            for token, value in place.items()
        )
        print(f"  {'':<20}log-probabilities within {largest:.1e} of ours, over {len(compared)} tokens")
    print(f"  {'base alone':<20}{with_adapter.answer(chat[:-1], None, ANSWER_TOKENS)}")


def dense(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """Of what follows each token: (tokens, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


if __name__ == "__main__":
    main()
