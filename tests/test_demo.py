"""The demo's parts against independent computations, then the whole: tiny and random, and (slow) as users run it."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_qlora import demo
from hf_qlora.demo import DemoError, Settings


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, a tokenizer of bytes, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} plus one?", "completion": f"It is {i + 1}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=str(tiny / "model"),
        dataset=str(tiny / "rows.jsonl"),
        output=tmp_path / "adapter",
        steps=20,
        batch_size=4,
        rank=4,
        loftq=False,
        learning_rate=1e-2,
        held_out=8,
        max_length=128,
        seed=0,
        save_merged=True,
    )


def tokenizer_of(settings: Settings) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(settings.model)


# --- rows ---

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "id": 3},
        {"prompt": "one?", "completion": "two."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": "one?", "output": "two."},
        {"instruction": "one?", "input": "", "output": "two."},
    ],
)
def test_all_layouts_mean_the_same_chat(row: dict) -> None:
    assert demo.as_messages(row) == CHAT


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert demo.as_messages(row)[0]["content"] == "Add.\n\n1 + 1"


def test_unknown_columns_are_named_with_those_understood() -> None:
    message = "has the columns text, label; understood are messages; prompt and completion; or instruction and output"
    with pytest.raises(DemoError, match=message):
        demo.as_messages({"text": "a", "label": 1})


@pytest.mark.parametrize(
    "messages", [[], CHAT[:1], CHAT[1:], "one?", [{"role": "user"}, CHAT[1]], [None, CHAT[1]], None]
)
def test_what_is_no_chat_is_refused(messages: object) -> None:
    with pytest.raises(DemoError, match="ends with the assistant's answer"):
        demo.as_messages({"messages": messages})


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "a.txt").write_text("no JSON")
    assert demo.read_rows(str(tmp_path), seed=0) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize(
    ("text", "says"), [('{"n": 1}\n{"n":', "line 2 is not JSON"), ("[1]", "line 1 is no JSON object")]
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DemoError, match=rf"rows\.jsonl, {says}"):
        demo.read_rows(str(tmp_path / "rows.jsonl"), seed=0)


class Rows(list):
    """What the demo uses of `datasets.Dataset`."""

    def shuffle(self, seed: int) -> Rows:
        return self

    def select(self, numbers: range) -> Rows:
        return Rows(self[number] for number in numbers)


def test_other_datasets_are_left_to_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> Rows:
        if (name, split) != ("somebody/rows", "train"):
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore about that.")
        return Rows({"n": n} for n in range(5))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(demo, "MAX_ROWS", 3)
    assert demo.read_rows("somebody/rows", seed=0) == [{"n": 0}, {"n": 1}, {"n": 2}]
    with pytest.raises(
        DemoError, match=r"^Cannot load the data set 'nobody/rows': Dataset 'nobody/rows' doesn't exist on"
    ):
        demo.read_rows("nobody/rows", seed=0)


# --- examples ---


def test_only_the_answer_and_its_end_have_labels(settings: Settings) -> None:
    tokenizer = tokenizer_of(settings)
    example = demo.encode(tokenizer, CHAT)
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    longer = demo.encode(
        tokenizer, [*CHAT, {"role": "user", "content": "three?"}, {"role": "assistant", "content": "four."}]
    )
    batch = demo.collate([example, longer])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(longer.ids))
    for row, answer in enumerate(["two.<|end|>", "four.<|end|>"]):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != demo.NO_LABEL]) == answer
        assert torch.equal(batch["input_ids"][row][labels != demo.NO_LABEL], labels[labels != demo.NO_LABEL])
    assert batch["attention_mask"].sum(1).tolist() == [len(example.ids), len(longer.ids)]


def test_a_template_that_opens_the_answer_otherwise_keeps_the_end(settings: Settings) -> None:
    tokenizer = tokenizer_of(settings)
    tokenizer.chat_template = TEMPLATE.replace("assistant: {% endif %}", "assistant: <think>{% endif %}")
    example = demo.encode(tokenizer, CHAT)
    assert tokenizer.decode(example.ids) == "user: one?<|end|>assistant: <think>two.<|end|>"


def test_a_template_that_refuses_is_an_error(settings: Settings) -> None:
    tokenizer = tokenizer_of(settings)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DemoError, match="cannot render an example: System role not supported"):
        demo.encode(tokenizer, CHAT)


def test_no_question_is_in_both_parts_or_too_long(settings: Settings) -> None:
    long = demo.as_messages({"prompt": "x" * settings.max_length, "completion": "y"})
    chats = [long, *demo.read_chats(settings.dataset, 0), *demo.read_chats(settings.dataset, 1)]
    train, held_out = demo.choose(chats, tokenizer_of(settings), settings)
    questions = [example.question for example in (*train, *held_out)]
    assert (len(train), len(held_out)) == (32, 8)
    assert len(set(questions)) == 40
    assert long[0]["content"] not in questions


def test_the_seed_sets_the_order(settings: Settings) -> None:
    first, again, other = (demo.read_chats(settings.dataset, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(map(str, first)) == sorted(map(str, other))


def test_too_few_examples_is_an_error_with_the_numbers(settings: Settings) -> None:
    chats = demo.read_chats(settings.dataset, 0)
    with pytest.raises(
        DemoError, match=r"has 40 examples .* at most 128 tokens, but 39 to hold out and 4 to train on"
    ):
        demo.choose(chats, tokenizer_of(settings), replace(settings, held_out=39))


# --- measures ---


def test_perplexity_is_that_of_every_answer_token_alone(settings: Settings) -> None:
    """Oracle: one example at a time, without padding, float64 log-probabilities summed token by token."""
    tokenizer = tokenizer_of(settings)
    examples = [demo.encode(tokenizer, chat) for chat in demo.read_chats(settings.dataset, 0)[:11]]
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    nats = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0].double()
        for position in range(example.start, len(example.ids)):
            nats.append(-logits[position - 1].log_softmax(-1)[example.ids[position]].item())
    expected = math.exp(sum(nats) / len(nats))
    for batch_size in (1, 4, 16):
        # The models' cross entropy is in float32, over batches of unlike lengths.
        assert demo.perplexity(model, examples, batch_size) == pytest.approx(expected, rel=1e-5)


def test_the_shown_answer_is_of_median_length() -> None:
    lengths = [(9, 1), (3, 99), (4, 50), (1, 2), (7, 3)]  # of the answer, and of what is before it
    examples = [demo.Example(str(length), "", [0] * (start + length), start) for length, start in lengths]
    assert demo._typical(examples).question == "4"


def test_a_model_without_a_chat_template_is_refused(settings: Settings, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(settings.model).save_pretrained(tmp_path)
    tokenizer = tokenizer_of(settings)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DemoError, match="has no chat template; choose a model made for chat"):
        demo._load(str(tmp_path))


# --- the whole ---


def test_the_whole_demo(settings: Settings) -> None:
    screen = io.StringIO()
    results = demo.run(settings, Console(file=screen, width=80))
    assert results.trained < 0.8 * results.quantized
    # Two bfloat16 computations of the same function: 8 bits, over two layers.
    assert results.merge_difference < 2**-5
    assert results.merged == pytest.approx(results.trained, rel=0.05)
    assert results.reload_difference == 0

    config = json.loads((settings.output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", settings.rank)
    merged = AutoModelForCausalLM.from_pretrained(settings.output / "merged")
    _, held_out = demo.choose(demo.read_chats(settings.dataset, 0), tokenizer_of(settings), settings)
    assert demo.perplexity(merged, held_out) == pytest.approx(results.merged, rel=1e-3)

    lines = screen.getvalue().splitlines()
    labels = [line.split()[0] for line in lines]
    steps = ["training"] * 10
    assert labels == [
        *("model", "data", "weights", "quantized", "perplexity", *steps, "perplexity"),
        *("question", "reference", "before", "after", "adapter", "reloaded", "merged", "saved", "time"),
    ]
    assert all(str(path) in screen.getvalue() for path in (settings.output, settings.output / "merged"))


def test_a_terminal_gets_a_bar(settings: Settings) -> None:
    screen = io.StringIO()
    bar = demo.LossBar(demo.Report(Console(file=screen, force_terminal=True, width=80)))
    state = types.SimpleNamespace(max_steps=3, global_step=2)
    with bar.progress:
        bar.on_train_begin(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 1.25})
        bar.on_step_end(None, state, None)
    last = screen.getvalue().rstrip().rpartition("\r")[2]
    assert "2/3" in last
    assert "loss 1.250" in last


def test_a_base_that_cannot_be_quantized_is_explained(settings: Settings, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(settings.model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tokenizer_of(settings).save_pretrained(tmp_path / "broken")
    with pytest.raises(DemoError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        demo.run(replace(settings, model=str(tmp_path / "broken")), Console(file=io.StringIO()))


def test_an_adapter_that_reloads_as_another_fails_the_demo(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = demo._logits
    monkeypatch.setattr(
        demo, "_logits", lambda *arguments: honest(*arguments) + 1
    )  # in this process, not in the other
    with pytest.raises(RuntimeError, match=r"does not compute what was trained: its logits differ by"):
        demo.run(replace(settings, steps=1), Console(file=io.StringIO()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_real_demo_learns(settings: Settings, smollm2: Path) -> None:
    real = replace(settings, model=None, dataset=None, steps=40, batch_size=8, rank=16, learning_rate=1e-3)
    results = demo.run(replace(real, held_out=24, max_length=160))
    assert results.trained < results.dense / 2
    assert results.merged == pytest.approx(results.trained, rel=0.05)
    assert results.reload_difference == 0
