"""A merge from tensors to tensors, layer by layer.

Each adapted layer is filled with its weights, quantized as it was for training, merged by its own code, measured,
written, and let go. So the bits are those of the merge in memory, and the memory is a few float32 copies of the
largest layer, beside the adapter.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm import tqdm

from hf_qlora.config import NF4Config
from hf_qlora.config.nf4 import bitsandbytes_config
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge import measure
from hf_qlora.merge.attach import ADAPTER
from hf_qlora.merge.in_memory import Onto
from hf_qlora.merge.measure import LayerMerge
from hf_qlora.merge.report import MergeReport
from hf_qlora.merge.seen import SeenBase
from hf_qlora.merge.skeleton import Skeleton, read_state
from hf_qlora.merge.tensors import ShardWriter, TensorFiles
from hf_qlora.merge.twin import copied_sharing
from hf_qlora.quant.base import PROGRESS_DELAY_S
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit
from hf_qlora.quant.linear4bit import become_linear4bit, dense_weight, set_packed
from hf_qlora.quant.packing import quantize_weight


# What a packed weight is stored as, beside itself.
NF4_PARTS = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    "quant_state.bitsandbytes__nf4",
)
NOT_RUN = "not compared: files are merged layer by layer, and the model is not run; merge in Python runs it"


class Stream:
    """A merge, layer by layer.

    Attributes:
        repacked: names of the layers that are written in NF4, with `nf4` for settings.
        seen: samples of what was read of the base.
        split: whether weights that were tied are written apart.
    """

    def __init__(self, skeleton: Skeleton, files: TensorFiles, onto: Onto, repacked: set[str]) -> None:
        self.skeleton, self.files, self.onto, self.repacked = skeleton, files, onto, repacked
        self.nf4 = skeleton.nf4 or NF4Config()
        self.seen = SeenBase(skeleton.model.peft_config[ADAPTER])
        skeleton.model.base_model.check_mergeable([ADAPTER], safe_merge=False)
        self.changed = [group for group in skeleton.tied if any(skeleton.owner(name)[1] for name in group)]
        self.split = bool(self.changed)
        self.first = {name: group[0] for group in skeleton.tied for name in group}
        self.layers: list[LayerMerge] = []
        self.done: set[str] = set()
        self.writer: ShardWriter

    def run(self, stage: Path, max_shard_bytes: int, base: str, adapter: str) -> MergeReport:
        parts = [f"{name}.weight.{part}" for name in self.repacked for part in NF4_PARTS]
        names = [*self.skeleton.tensors, *(self.skeleton.parameters.keys() - self.skeleton.tensors.keys())]
        written = [max(name, self.skeleton.output_names.get(name, ""), key=len) for name in names]
        self.writer = ShardWriter(stage, written + parts, max_shard_bytes)
        try:
            for name in tqdm(names, desc="Merging", unit="tensor", delay=PROGRESS_DELAY_S, leave=False):
                if name not in self.done and (self.split or self.first.get(name, name) == name):
                    self._write_with_its_layer(name)
            self.writer.close()
        finally:
            self.writer.abandon()
        config = self._write_config(stage)
        notes = [
            f"{' and '.join(group)} were tied and are not any more: not all of them were trained alike."
            for group in self.changed
        ]
        return MergeReport(
            onto=self.onto,
            base=base,
            original=base if self.onto == "original" else None,
            adapters=[adapter],
            dtype=str(config.dtype).removeprefix("torch."),
            layers=self.layers,
            text=NOT_RUN,
            quantized=bool(self.skeleton.packed),
            notes=notes,
        )

    def _write_with_its_layer(self, name: str) -> None:
        layer, owner = self.skeleton.owner(name)
        if isinstance(owner, ModulesToSaveWrapper):
            saved = owner.modules_to_save[ADAPTER].state_dict()[name.removeprefix(f"{layer}.")]
            self._write(name, self._cast(name, saved))
        elif isinstance(owner, LoraLayer):
            self._write_layer(layer, self._merged(layer, owner))
        elif layer in self.skeleton.packed | self.repacked:
            self._write_layer(layer, self._converted(layer))
        else:
            value = self._value(name)
            if value is not None:
                if isinstance(self.skeleton.parameters[name], nn.Parameter):
                    self.seen.add_tensor(name, value)
                self._write(name, value)

    def _merged(self, name: str, owner: LoraLayer) -> nn.Module:
        layer: Any = copied_sharing(owner)
        base = layer.get_base_layer()
        dense = self._fill(name, base)
        trained = measure.trained_weights(layer, [ADAPTER])
        without = None
        if self.onto == "original" and isinstance(base, BaseLinear4bit):
            layer.merge(adapter_names=[ADAPTER], onto=dense)
            without = dense.float() if dense is not None else None
        else:
            layer.merge(adapter_names=[ADAPTER])
        result: nn.Module = layer.get_base_layer()
        if name in self.repacked:
            self._pack(result)
        self.layers.append(measure.compare(name, base, trained, result, without))
        return result

    def _converted(self, name: str) -> nn.Module:
        """A layer without adapter that is, or is to be, in NF4."""
        layer: Any = copied_sharing(self.skeleton.base.get_submodule(name))
        dense = self._fill(name, layer)
        if name in self.repacked:
            if not isinstance(layer, BaseLinear4bit):
                self._pack(layer)
        elif isinstance(layer, BaseLinear4bit):
            layer.become_dense(dense if self.onto == "original" and dense is not None else layer.dequantize())
        return layer  # type: ignore[no-any-return]

    def _fill(self, name: str, layer: Any) -> Tensor | None:
        """Give a layer its weight and bias; the dense weight, (out_features, in_features), of one that is packed."""
        dense = None
        weight = f"{name}.weight"
        if not isinstance(layer, BaseLinear4bit):
            layer._parameters["weight"] = nn.Parameter(self._needed(weight).clone(), requires_grad=False)
        elif weight in self.skeleton.packed_parts:
            state = read_state(self.files, self.skeleton.packed_parts[weight])
            set_packed(layer, self.files.read(self.skeleton.tensors[weight]).clone(), state)
        else:
            dense = self._needed(weight)
            dense = dense if issubclass(layer.source_cls, nn.Linear) else dense.t()
            set_packed(layer, *quantize_weight(dense, self.nf4))
        self.seen.add(name, layer)
        if getattr(layer, "bias", None) is not None and layer.bias.is_meta:  # else the adapter's
            layer._parameters["bias"] = nn.Parameter(self._needed(f"{name}.bias").clone(), requires_grad=False)
        return dense

    def _pack(self, layer: Any) -> None:
        become_linear4bit(layer, *quantize_weight(dense_weight(layer), self.nf4), self.nf4.compute_dtype)

    def _needed(self, name: str) -> Tensor:
        value = self._value(name)
        if value is None:
            raise MergeError(f"The base has no weights for {name}.")
        return value

    def _value(self, name: str) -> Tensor | None:
        """A parameter or buffer: the adapter's where it was trained, else the base's; None for a buffer in no file."""
        _, owner = self.skeleton.owner(name)
        if owner is None and not (own := _find(self.skeleton.base, name)).is_meta:
            return self._cast(name, own.detach())
        group = next((group for group in self.skeleton.tied if name in group), [name])
        key = next((self.skeleton.tensors[other] for other in [name, *group] if other in self.skeleton.tensors), None)
        expected = self.skeleton.parameters[name]
        if key is None:
            if not isinstance(expected, nn.Parameter):
                return None
            raise MergeError(f"Neither the base nor the adapter has weights for {name}.")
        value = self.files.read(key)
        if value.shape != expected.shape:
            raise MergeError(f"The base's {key} is {tuple(value.shape)}, and the model's {tuple(expected.shape)}.")
        return self._cast(name, value)

    def _cast(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        kept = self.skeleton.kept_dtypes
        found = (dtype for pattern, dtype in kept.items() if re.search(pattern.replace("*", ".*"), name))
        return value.to(next(found, self.skeleton.parameters[name].dtype))

    def _write_layer(self, name: str, layer: nn.Module) -> None:
        packed = isinstance(layer, BaseLinear4bit)
        for key, value in layer.state_dict().items():
            of_nf4 = packed and key.startswith("weight")
            self._write(f"{name}.{key}", value if of_nf4 else self._cast(f"{name}.{key}", value))

    def _write(self, name: str, value: Tensor) -> None:
        whole, part, rest = name.partition(".weight.") if name not in self.skeleton.parameters else (name, "", "")
        parameter = f"{whole}.weight" if part else name
        output = self.skeleton.output_names.get(parameter, parameter)
        self.writer.add(f"{output}.{rest}" if part else output, value)
        self.done.add(name)

    def _write_config(self, stage: Path) -> Any:
        base = self.skeleton.base
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.dtype = str(self.skeleton.dtype).removeprefix("torch.")
        if self.split:
            config.tie_word_embeddings = False
        if self.repacked:
            dense = sorted(self.skeleton.linear - self.repacked)
            named = replace(self.nf4, compute_dtype=self.nf4.compute_dtype or self.skeleton.dtype)
            config.quantization_config = bitsandbytes_config(named, dense)
        config.save_pretrained(stage)
        return config


def _find(model: nn.Module, name: str) -> Tensor:
    module, _, key = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), key)
    return found
