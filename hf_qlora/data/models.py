"""A model that is named to be trained: refused before anything is loaded where it is none, and told from others.

check_model(name)                       a path that is not there, a folder of no model, an adapter
tokenizer = readable_tokenizer(name)    transformers makes an empty one where there is none
with loading(name): …                   what a library says of a file that is cut off, in one sentence
folder_sha256(name)                     whether a folder's weights are those of before
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from hf_qlora.data.documents import is_path
from hf_qlora.data.errors import DataError, first_line, offline


# What a model is loaded from: not its card, which anybody edits.
LOADED = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".gguf")
PIECES, PIECE_BYTES = 64, 2**16  # read of a larger file


def check_model(name: str) -> None:
    """Refuse what lies there, or on the Hub, but is no model of its own.

    Raises:
        DataError: a path that is not there, a file, a folder of no model, or an adapter.
    """
    folder = Path(name)
    if not folder.exists() and (is_path(name) or not _may_be_on_hub(name)):
        raise DataError(f"--model {name} is not there.")
    if folder.is_file():
        raise DataError(f"--model {name} is a file; name the folder that it lies in.")
    try:
        adapter = find_adapter_config_file(name)
    except OSError:  # nothing of that name on the Hub: loading says so
        return
    if adapter is not None:
        base = _base_of(Path(adapter))
        raise DataError(
            f"--model {name} is an adapter of {base}, whose training would be thrown away here: go on with it by "
            f"PeftModel.from_pretrained(base, {name!r}, is_trainable=True), or merge it first (hf-qlora merge) and "
            "name the merged model."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(f"--model {name} has no config.json: it is no folder of a model.")


def readable_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        DataError: there is none. Transformers makes one of a few special tokens then, to which all words are unknown.
    """
    none = DataError(
        f"--model {name} has no tokenizer: put its files (tokenizer.json and the like) beside the weights."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        raise none from error
    words = {word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens}
    if len(words) < 2:  # T5's empty one has the mark of a space
        raise none
    return tokenizer


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Say what could not be loaded, and why.

    Raises:
        DataError: nothing of that name, or files that are damaged or not understood.
    """
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        damaged = " (a file of weights is cut off or damaged)" if isinstance(error, SafetensorError) else ""
        raise DataError(f"Cannot load the model {name!r}: {first_line(error)}{damaged}{offline()}") from error


def folder_sha256(name: str | None) -> str | None:
    """Of the names, sizes and `sampled_sha256` of what a model is loaded from; None of what is no folder."""
    if name is None or not Path(name).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(name).iterdir() if path.suffix in LOADED and path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} {sampled_sha256(path)}\n".encode())
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """Of 64 pieces that are spread evenly over a file, the first and the last among them; of less than 4 MiB, of all.

    Training changes all of a model's weights.
    """
    last = path.stat().st_size - PIECE_BYTES
    with path.open("rb") as file:
        if last < (PIECES - 1) * PIECE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        found = hashlib.sha256()
        for number in range(PIECES):
            file.seek(last * number // (PIECES - 1))
            found.update(file.read(PIECE_BYTES))
    return found.hexdigest()


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_of(adapter: Path) -> str:
    try:
        return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"
