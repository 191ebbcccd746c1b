"""A base and an adapter without the base's weights: what there is to merge, and where its tensors are.

The model is built on the meta device and PEFT attaches the adapter to it, so that its patterns, ranks, scalings and
variants are decided where they always are. Layers that the adapter was trained on in NF4 are packed ones here, too,
without bytes. The tensors of a file have other names than the parameters where transformers renames them on loading.
Where it builds a parameter out of several tensors, or PEFT out of several layers, a layer cannot be merged alone:
`NotStreamable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import QuantState
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Conv2d, Embedding, LoraLayer
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.linear import Linear4bit
from hf_qlora.merge.attach import attach_without_weights
from hf_qlora.merge.names import first_sentence
from hf_qlora.merge.sources import record_of, stored_quantization
from hf_qlora.merge.tensors import TensorFiles
from hf_qlora.merge.twin import tied_groups
from hf_qlora.quant.base import take_over
from hf_qlora.quant.selection import is_named, quantizable_layers
from hf_qlora.quant.without_bytes import WithoutBytes


CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
STREAMED = (LoraLinear, Linear4bit, Embedding, Conv2d)
_PACKED_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")


class NotStreamable(Exception):
    """The merge must see the whole model; the message says why."""


@dataclass
class Skeleton:
    """See the module.

    Attributes:
        model: PEFT's, without the base's weights.
        base_class: of the base.
        parameters: the base's own parameters and persistent buffers, on the meta device, by name.
        tied: names of parameters that are one.
        packed: names of the layers that are in NF4.
        linear: names of all linear layers.
        tensors: the name in the files of each parameter that is there.
        packed_parts: for a base that is stored in NF4, the names in the files of a weight's other tensors.
        output_names: the name to write each parameter by.
        nf4: how they are packed; None where none is.
        dtype: of the base.
        kept_dtypes: of parameters that transformers keeps in another one, by a pattern of their names.
    """

    model: PeftModel
    base_class: type[PreTrainedModel]
    parameters: dict[str, Tensor]
    tied: list[list[str]]
    packed: set[str]
    linear: set[str]
    tensors: dict[str, str]
    packed_parts: dict[str, list[str]]
    output_names: dict[str, str]
    nf4: NF4Config | None
    dtype: torch.dtype
    kept_dtypes: dict[str, torch.dtype]

    @property
    def base(self) -> PreTrainedModel:
        base: PreTrainedModel = self.model.get_base_model()
        return base

    def owner(self, parameter: str) -> tuple[str, nn.Module | None]:
        """The adapted or wrapped module that a parameter belongs to, or its own module and None."""
        parts = parameter.split(".")
        module: nn.Module = self.base
        for i, part in enumerate(parts[:-1], start=1):
            module = getattr(module, part)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                return ".".join(parts[:i]), module
        return ".".join(parts[:-1]), None


def build(
    base: Path, adapter: Path, config: LoraConfig, nf4: NF4Config | None, dtype: torch.dtype | None, files: TensorFiles
) -> Skeleton:
    """Lay out base and adapter.

    Args:
        nf4: how the base was quantized when the adapter was trained; None if it was dense, or is stored packed.

    Raises:
        NotStreamable: see the module.
        MergeError: files that do not fit the model, or the adapter.
    """
    model = make_base(base, config, dtype)
    parameters: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tied = tied_groups(model)
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    tensors, packed_parts, output_names = _match(model, files, parameters)
    if packed_parts:
        packed = {name.rpartition(".")[0] for name in packed_parts}
        nf4 = _stored_settings(base, files, packed_parts, config)
    else:
        packed = set(quantizable_layers(model, nf4, modules_to_save(model, config))[0]) if nf4 else set()
    own_dtype, kept_dtypes = model.dtype, model._get_dtype_plan(model.dtype)
    packer = WithoutBytes(nf4 or NF4Config())
    for name in packed:
        packer.pack(model.get_submodule(name))
    if packed:
        take_over(model, None)
    found = Skeleton(
        model=attach_without_weights(model, adapter, config),
        base_class=type(model),
        parameters=parameters,
        tied=tied,
        packed=packed,
        linear=linear,
        tensors=tensors,
        packed_parts=packed_parts,
        output_names=output_names,
        nf4=nf4 if packed else None,
        dtype=own_dtype,
        kept_dtypes=kept_dtypes,
    )
    _check_streamable(found)
    return found


def make_base(base: Path, config: LoraConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The base's model without weights, of the class that the adapter's task needs."""
    try:
        base_config = AutoConfig.from_pretrained(base, **labels(config))
        cls = model_class(config, base_config)
        base_config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            make = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
            model: PreTrainedModel = make(base_config, dtype=dtype or base_config.dtype or torch.float32)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise MergeError(f"The base {base} cannot be made into a model: {first_sentence(error)}") from error
    return model.eval()


def labels(config: LoraConfig) -> dict[str, Any]:
    """The classes that a classifier was trained on, which its base need not know: settings of the base's config."""
    names = record_of(config).get("labels") or []
    if not names:
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def model_class(config: LoraConfig, base_config: Any) -> Any:
    """The class of transformers that the adapter was trained with."""
    stored = base_config.architectures or ()
    if config.task_type is not None:
        task: Any = getattr(transformers, CLASSES[str(getattr(config.task_type, "value", config.task_type))])
        # CAUSAL_LM is also said of models of text and images, which have an auto class of their own.
        return task if type(base_config) in task._model_mapping else class_named(stored) or task
    found = class_named(((config.auto_mapping or {}).get("base_model_class"), *stored))
    if found is None:
        raise MergeError("Neither the adapter's task_type nor the base's config names a model class of transformers.")
    return found


def class_named(names: Iterable[Any]) -> type[PreTrainedModel] | None:
    """The first of transformers' model classes among names from a file."""
    for name in names:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """Those of the config's that are in the model; they stay dense."""
    names = [name for name, _ in model.named_modules()]
    return [part for part in config.modules_to_save or () if any(is_named(name, [part]) for name in names)]


def _match(
    model: PreTrainedModel, files: TensorFiles, parameters: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, str]]:
    """Which tensor of the files is which parameter."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    lasting = [item for item in get_model_conversion_mapping(model, add_legacy=False) if item in renamings]
    tensors: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    output_names: dict[str, str] = {}
    for key in files.files:
        part = _PACKED_PART.fullmatch(key)
        whole = part[1] if part else key
        name, converted = rename_source_key(whole, renamings, converters, model.base_model_prefix, parameters)
        if converted is not None:
            raise NotStreamable(f"transformers builds {name} out of several tensors of the files")
        if name not in parameters:
            continue  # as on loading
        if part:
            parts.setdefault(name, []).append(key)
        else:
            tensors[name] = key
            kept = rename_source_key(whole, lasting, [])[0]
            output_names[name] = key if kept != whole else name
    return tensors, parts, output_names


def _stored_settings(base: Path, files: TensorFiles, parts: dict[str, list[str]], config: LoraConfig) -> NF4Config:
    """The settings of a base that is stored in NF4, checked against the adapter's."""
    state = read_state(files, next(iter(parts.values())))
    if state.quant_type != "nf4":  # and its config says otherwise
        raise MergeError(f"The base is stored in {state.quant_type}; only NF4 and dense bases are merged.")
    stored = NF4Config(double_quant=state.nested, block_size=state.blocksize)
    asked: Any = config.quantization if isinstance(config, QLoRAConfig) else None
    if asked is not None and (asked.double_quant, asked.block_size) != (stored.double_quant, stored.block_size):
        raise MergeError(f"The base is stored as {stored}, but the adapter was trained on {asked}.")
    # As transformers reads it: float32 where the base's config names none.
    said = stored_quantization(base).get("bnb_4bit_compute_dtype")
    computes = (asked and asked.compute_dtype) or said or "float32"
    return replace(stored, compute_dtype=computes)


def read_state(files: TensorFiles, keys: list[str]) -> QuantState:
    """How a stored NF4 weight is packed."""
    prefix = _PACKED_PART.fullmatch(keys[0])
    assert prefix is not None
    found = {key.removeprefix(f"{prefix[1]}."): files.read(key).clone() for key in keys}
    try:
        return QuantState.from_dict(found, torch.device("cpu"))
    except (ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise MergeError(f"{prefix[1]} has no whole NF4 weight in the base's files ({error}).") from error


def _check_streamable(skeleton: Skeleton) -> None:
    for name, module in skeleton.base.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, STREAMED):
            raise NotStreamable(f"{name} is adapted as {type(module).__name__}, which is merged with its neighbours")
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, BaseTunerLayer):
            raise NotStreamable(f"{name} is adapted twice")
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise NotStreamable(f"single tokens of {name} are trained")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
