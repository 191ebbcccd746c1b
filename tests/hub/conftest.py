"""A Hub on this machine, a base and a tokenizer on it, and an adapter to push."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import llama
from hub.server import Hub, served
from huggingface_hub import constants, hf_api, utils
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import hub as transformers_hub

from hf_qlora import QLoRAConfig


Model = Any
BASE = "alice/base"
WORDS = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(62))])}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def hub(_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that huggingface_hub talks to as Alice, with nothing cached.

    The address is read from the environment when huggingface_hub is imported, and kept by its clients: it is set where
    they look, so that one process does for all tests.
    """
    _server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", _server.url)
    template = _server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", _server.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    no_waiting = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(utils._http, "time", no_waiting)  # between retries
    monkeypatch.setenv("HF_TOKEN", "hf_alice_write")
    yield _server
    transformers_hub._hf_api = None


@pytest.fixture(scope="session")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny Llama and a tokenizer of numbers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    llama(hidden_size=64, intermediate_size=64, vocab_size=len(WORDS)).save_pretrained(folder)
    tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    if folder is not None:
        made.save_pretrained(folder)
    return made


@pytest.fixture
def base(hub: Hub, base_files: dict[str, bytes]) -> Model:
    """The base, loaded from the Hub."""
    hub.put(BASE, base_files)
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture
def model(base: Model) -> Model:
    """An adapter on the base that changes what it computes."""
    return adapted(base)


def adapted(base: Model, seed: int = 1, **settings: Any) -> Model:
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(base, QLoRAConfig(**given, use_rslora=True, init_lora_weights=False)).eval()


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 34).view(2, 16)).logits
