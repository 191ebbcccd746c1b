"""What is measured: the settings of a run, the model they name, and whether it fits."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import CONFIG_NAME, logging

from hf_qlora import assets
from hf_qlora.bench.processes import apart
from hf_qlora.bench.train_step.arms import SHAPES
from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.data.documents import read_documents
from hf_qlora.data.models import sampled_sha256
from hf_qlora.merge.load import checked_device, load_model, without_weights
from hf_qlora.merge.sources import base_source
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.scheme import Scheme
from hf_qlora.quant.selection import quantizable_layers
from hf_qlora.validation import ConfigError


DEFAULT_ROUNDS = 10  # from 8 on, `bench compare` can tell a difference in any of some forty timings
SMOKE_ROUNDS = 2
DEFAULT_NAME, TINY_NAME = "SmolLM2-135M-Instruct", "a tiny random Llama"


@dataclass(frozen=True)
class Settings:
    """What a result depends on beside the machine and the code.

    Attributes:
        model: a folder or a Hub id; None: SmolLM2-135M-Instruct, or with `smoke` a tiny random Llama.
        texts: a source of documents (`hf_qlora/data/documents.py`) for `precision`; None: the built-in prose.
        smoke: little of everything, in one process, to see that it works; the numbers mean nothing.
    """

    model: str | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    rounds: int = DEFAULT_ROUNDS
    seed: int = 0
    texts: str | None = None
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not known; choose one of {tuple(COMPUTE_DTYPES)}.")
        if type(self.rounds) is not int or self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds!r} must be an integer from 1 on.")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} must be an integer from 0 on.")
        checked_device(self.device)

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.smoke else (1, 8, 32)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return (64, 128) if self.smoke else (64, 128, 256)

    @property
    def model_name(self) -> str:
        """Without the folders of this machine."""
        return Path(self.model).name if self.model else TINY_NAME if self.smoke else DEFAULT_NAME

    def named(self) -> dict[str, Any]:
        """As JSON types, without the folders of this machine; texts by the sha256 of what they say.

        Raises:
            ConfigError, DataError: no such texts.
        """
        texts = texts_of(self)
        digest = None if texts is None else "sha256 " + _digest(json.dumps(texts).encode())
        return asdict(self) | {"model": self.model_name, "texts": digest}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights, dense in the dtype asked for, and in NF4; counted on the meta device."""

    dense: int
    nf4: int


@dataclass(frozen=True)
class Context:
    """What a case is given.

    Attributes:
        folder: of the dense model.
        scratch: a folder for what it has to write, which goes with the run.
        at: called with what is being done, for the progress bar.
        notes: for what a reader must know of what was not measured as the case says; added to by it.
    """

    settings: Settings
    folder: Path
    scratch: Path
    at: Callable[[str], None] = lambda _: None
    notes: list[str] = field(default_factory=list)

    def dense(self) -> Any:
        """The model as its files have it, in the dtype and on the device."""
        return load_model(str(self.folder), self.settings.dtype).to(self.settings.device)

    def nf4(self) -> Any:
        return quantize_model(self.dense(), NF4Config())

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a module's function in a process of its own; here for smoke, and on CUDA, which counts tensors."""
        if self.settings.smoke or torch.device(self.settings.device).type == "cuda":
            return function(*args)
        return apart(_quietly, function, *args)

    def saved_nf4(self) -> Path:
        """The folder of the model as an NF4 checkpoint, which is written by the first who asks."""
        target = self.scratch / "nf4"
        if not target.exists():
            self.nf4().save_pretrained(target)
        return target


@contextmanager
def settled() -> Iterator[None]:
    """What the imports made is left out of collections of garbage, in which it takes half a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would cut through the suite's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    with quiet(), settled():
        return function(*args)


def lora(settings: Settings, config: type[LoraConfig] = QLoRAConfig, **options: Any) -> LoraConfig:
    """The adapter of all cases: rank 16, or 4 for smoke, on all linear layers."""
    rank = 4 if settings.smoke else 16
    return config(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[Path, Path]]:
    """The folder of the model, and one for what is written meanwhile.

    Raises:
        MergeError: no such model.
        ImportError, OSError: the built-in model cannot be had.
    """
    with TemporaryDirectory(prefix="hf-qlora-bench-") as place:
        scratch = Path(place)
        if settings.model is not None:
            yield base_source(settings.model, None), scratch
        elif settings.smoke:
            yield _tiny(scratch / "tiny"), scratch
        else:
            yield assets.smollm2_135m_instruct(), scratch


def _tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"])).save_pretrained(folder)
    return folder


def described(folder: Path, settings: Settings) -> tuple[nn.Module, Sizes, dict[str, Any]]:
    """The model without its weights, what it takes, and what identifies it.

    Raises:
        LoadError, MergeError: no model, or one that is quantized.
    """
    model = without_weights(str(folder))
    model.to(COMPUTE_DTYPES[settings.dtype])
    layers, _ = quantizable_layers(model, NF4Config(), ())
    dense = footprint(model).total_bytes
    weights = {id(layer.weight): layer.weight for layer in layers.values()}.values()
    saved = sum(weight.nbytes - Scheme().packed_bytes(weight.numel()) for weight in weights)
    identity = {
        "name": settings.model_name,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantizable": sum(weight.numel() for weight in weights),
        "files": _fingerprint(folder),
    }
    return model, Sizes(dense, dense - saved), identity


def _fingerprint(folder: Path) -> str:
    """Of the config, and of the files of weights by name, size and pieces: a model that was trained on has another."""
    files = [
        (path.name, path.stat().st_size, sampled_sha256(path)[:12]) for path in sorted(folder.glob("*.safetensors"))
    ]
    return _digest(((folder / CONFIG_NAME).read_text(encoding="utf-8") + json.dumps(files)).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def texts_of(settings: Settings) -> list[str] | None:
    """The documents of the texts; None for the built-in prose.

    Raises:
        DataError: nothing of that name, or no texts in it.
    """
    if settings.texts is None:
        return None
    documents, name = read_documents(settings.texts, settings.seed)
    found = [document for document in documents if isinstance(document, str) and document.strip()]
    if not found:
        raise ConfigError(f"{name} has no texts; give a .txt file, or rows with a column 'text'.")
    return found


def check_fits(need: int, settings: Settings, case: str) -> None:
    """Raise ConfigError where a case takes more memory than there is."""
    if torch.device(settings.device).type == "cuda":
        free = torch.cuda.mem_get_info(torch.device(settings.device))[0]
    else:
        free = psutil.virtual_memory().available
    if need > free:
        raise ConfigError(
            f"{case} on {settings.model_name} takes about {need / 2**30:.1f} GiB on {settings.device}, and "
            f"{free / 2**30:.1f} GiB are free; choose a smaller model, or leave the case out."
        )
