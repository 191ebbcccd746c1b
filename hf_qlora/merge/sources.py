"""Where an adapter and its base are, a folder or a Hub id whose files are fetched, and what its file says of both."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import PreTrainedConfig
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hf_qlora import files
from hf_qlora.config import QLoRAConfig
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.folder import BESIDE, TOKENIZER_FILES
from hf_qlora.merge.names import first_sentence


TOKENIZER = "tokenizer_config.json"
TEMPLATES = f"{CHAT_TEMPLATE_DIR}/*.jinja"


def adapter_source(adapter: str) -> tuple[Path, LoraConfig]:
    """The folder and the config of a LoRA adapter.

    Raises:
        MergeError: not there, no LoRA adapter, or without weights.
        AdapterFileError: an adapter of ours that is not whole.
    """
    files_of_it = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, constants.REPOCARD_NAME, *TOKENIZER_FILES, TEMPLATES)
    folder = _folder(adapter, None, files_of_it, "The adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise MergeError(f"{adapter} is no adapter: it has no {ADAPTER_CONFIG}.")
    ours = files.adapter_folder(folder)
    if ours is not None:
        ours.check()
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MergeError(f"{adapter} has no {ADAPTER_WEIGHTS}; other files of weights are not read.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise MergeError(f"{folder / ADAPTER_CONFIG} cannot be read: {first_sentence(error)}") from error
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:  # AdaLoRA's is a LoraConfig
        raise MergeError(f"{adapter} is an adapter of kind {PeftType(config.peft_type).value}; LORA alone is merged.")
    return folder, config


def record_of(config: LoraConfig) -> dict[str, Any]:
    """What the adapter's file says of its training; empty for an adapter of stock PEFT."""
    return (config.record or {}) if isinstance(config, QLoRAConfig) else {}


def trained_base(config: LoraConfig) -> dict[str, Any]:
    """The id, commit, class and dtype of the base that was trained on, as far as they are known."""
    found: dict[str, Any] = record_of(config).get("base", {})
    return found


def base_source(base: str, revision: str | None) -> Path:
    """The folder of a base.

    Raises:
        MergeError: not there, or no model.
    """
    files_of_it = ("*.safetensors", CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, constants.REPOCARD_NAME, *BESIDE)
    folder = _folder(base, revision, files_of_it, "The base")
    if not (folder / CONFIG_NAME).is_file():
        raise MergeError(f"{base} is no model: it has no {CONFIG_NAME}.")
    return folder


def stored_quantization(base: Path) -> dict[str, Any]:
    """How a base's config says that it is stored quantized; empty where it is dense, or its config cannot be read."""
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(base)[0]
    except OSError:  # said where the model is made
        return {}
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))  # of models of text and images
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), {})


def check_stored(base: str, folder: Path, onto: str) -> None:
    """Refuse a base that is stored quantized otherwise than to NF4, or at all where the dense one is needed."""
    stored = stored_quantization(folder)
    kind = str(stored.get("quant_method", "another method"))
    if stored.get("load_in_8bit"):
        kind = "8 bits"
    if stored.get("load_in_4bit"):
        kind = str(stored.get("bnb_4bit_quant_type", "fp4")).upper()
    if stored and onto == "original":
        raise MergeError(f"The base {base} is stored in {kind}; onto='original' needs the dense one.")
    if stored and kind != "NF4":
        raise MergeError(
            f"The base {base} is stored in {kind}; from files, bases are merged that are dense or in bitsandbytes' "
            "NF4. In Python, merge(model) takes others that PEFT can merge into. A dense base is another one than the "
            "adapter was trained on."
        )


def copy_beside(base: Path, adapter: Path, output: Path) -> bool:
    """Copy what a model's folder has beside config and weights; whether the tokenizer is the adapter's."""
    for pattern in BESIDE:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, output / path.name)
    own = (adapter / TOKENIZER).is_file()
    if own:
        for pattern in (*TOKENIZER_FILES, TEMPLATES):
            for path in adapter.glob(pattern):
                (output / path.relative_to(adapter)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, output / path.relative_to(adapter))
    return own


def _folder(name: str, revision: str | None, patterns: tuple[str, ...], what: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if os.path.isabs(name) or name.startswith("."):
        raise MergeError(f"{what} {name} is not there.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        raise MergeError(
            f"{what} {name!r} is no folder and not in the Hub's cache, and the Hub cannot be asked."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise MergeError(
            f"{what} {name!r} is no folder, and not to be had from the Hub: {first_sentence(error)}"
        ) from error
