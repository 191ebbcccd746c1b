"""`QLoRAModel`, the tuner PEFT picks for LoRA adapters: quantize → wrap → route. A no-op for stock configs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, delete_adapter
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_qlora import identity
from hf_qlora.config import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.config.checkpointing import Checkpointing
from hf_qlora.layers import attention, depth, fold, head
from hf_qlora.layers.checkpointing import apply_checkpointing, disable_checkpointing
from hf_qlora.layers.embeddings import let_gradients_in
from hf_qlora.layers.linear import Linear4bit, adopt
from hf_qlora.prepare import Factors, prepare_base
from hf_qlora.quant.base import forget_quantization, refuse_interrupted
from hf_qlora.quant.quantizer import dequantize_layers
from hf_qlora.rehearsal import is_real_step, is_rehearsal, tried, try_config


logger = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter's tensors do not fit the model; the message names the first of them and the likely cause."""


class QLoRAModel(LoraModel):
    """`peft.LoraModel`, which also quantizes the base where the config is a `QLoRAConfig`."""

    _gradient_hooks: tuple[RemovableHandle, ...] = ()  # on the input embeddings

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        # transformers' load_adapter and AutoModel.from_pretrained(adapter) set the file's tensors past PEFT: what they
        # read is folded, so the adapter must be.
        if isinstance(peft_config, QLoRAConfig) and fold.current_exchange().past_peft:
            peft_config = peft_config.with_portable_scaling()
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            head.refuse_fused(self.model)
        return super().forward(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        with head.set_aside(model):
            self._inject_adapter(model, adapter_name, *args, **kwargs)
        ours = isinstance(config, QLoRAConfig) and config.chunked_loss and not config.inference_mode
        if ours and not is_rehearsal(model):
            head.try_chunked_loss(model)

    def _inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        refuse_interrupted(model)
        if not isinstance(config, QLoRAConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        else:
            factors: Factors = {}
            if not is_rehearsal(model):
                factors = prepare_base(config, model, self._try(config, model, adapter_name))
                identity.note(model, adapter_name)
                if fold.current_exchange().past_peft:  # else when the file's tensors are set
                    identity.check(model, config, adapter_name, config.record, f"Adapter {adapter_name!r}")
            with undone_on_error(model, adapter_name), _linear_layers_named(model), _initialised_here(config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                if isinstance(config, AdaptiveDepthLoRAConfig):
                    depth.attach(model, config, adapter_name)
                    if config.attention == "concentration":
                        attention.watch(model, adapter_name, config.layers_pattern)
                if config.checkpointing is not None and not config.inference_mode:
                    apply_checkpointing(model, Checkpointing.of(config.checkpointing))
            self._start_from(factors, adapter_name)
            if config.quantization is not None and not config.inference_mode:
                self._let_gradients_in(model)
        if any(isinstance(other, QLoRAConfig) for other in self.peft_config.values()):
            adopt(model)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's. The result has stock scaling and no initialisation, whatever the first adapter has."""
        first = self.peft_config.get(adapters[0]) if adapters else None
        if not isinstance(first, QLoRAConfig):
            with depth.in_scaling(self.model, adapters):
                super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        stock: dict[str, Any] = {"use_rslora": False, "init_lora_weights": True, "loftq_config": {}, "record": None}
        self.peft_config[adapters[0]] = replace(first.without_depth(), **stock)
        try:
            with depth.in_scaling(self.model, adapters):
                super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config[adapters[0]] = first

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        dense = [module.dense_bytes for module in self.model.modules() if isinstance(module, Linear4bit)]
        if sum(dense):
            logger.warning(
                "While merged, %d layers hold dense weights beside the packed ones: %.0f MiB until unmerge_adapter().",
                sum(map(bool, dense)),
                sum(dense) / 2**20,
            )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        ours = any(isinstance(config, QLoRAConfig) for config in self.peft_config.values())
        head.disable_chunked_loss(self.model)
        if ours and merge:
            names = kwargs.get("adapter_names")
            self.check_mergeable(names, kwargs.get("safe_merge", False))
        elif ours:
            for module in self.model.modules():  # the packed base is what unloading returns
                if isinstance(module, Linear4bit):
                    module.unmerge()
        result: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if ours and merge:
            dequantize_layers(result)
            forget_quantization(result)
        attention.unwatch(result)
        if any(isinstance(config, QLoRAConfig) and config.checkpointing for config in self.peft_config.values()):
            disable_checkpointing(result)
        for hook in self._gradient_hooks:
            hook.remove()
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        attention.unwatch(self.model, adapter_name)
        identity.forget(self.model, adapter_name)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Find out what cannot be merged before the first layer is."""
        for name, module in self.model.named_modules():
            if isinstance(module, Linear4bit):
                module.check_mergeable(name, adapter_names, safe_merge)
            elif isinstance(module, LoraLayer):
                for adapter in module.active_adapters if adapter_names is None else adapter_names:
                    if adapter in module.lora_bias:
                        depth.refuse_scaled_bias(module, adapter)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        depth.warn_of_unobserved(model, adapter_name)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return fold.fold(tensors, fold.factors(model, config, adapter_name), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        from_file = bool(fold.current_exchange().source)
        if from_file:
            _check_fits(model, config, tensors, adapter_name)
        tensors = {**depth.state_tensors(model, adapter_name), **tensors}  # else PEFT says that they are missing
        return fold.unfold(tensors, fold.factors(model, config, adapter_name, from_file), adapter_name)

    def _try(self, config: QLoRAConfig, model: nn.Module, adapter_name: str) -> nn.Module | None:
        if is_real_step():
            return tried()
        return try_config(
            model, config, adapter_name, lambda copied, trial, name: QLoRAModel(copied, {name: trial}, name)
        )

    def _let_gradients_in(self, model: nn.Module) -> None:
        """Make the first layers learn under reentrant checkpointing, as PEFT does for bases that are not quantized."""
        if self._gradient_hooks or getattr(model, "_require_grads_hooks", None):
            return
        self._gradient_hooks = let_gradients_in(model)

    def _start_from(self, factors: Factors, adapter_name: str) -> None:
        for name, module in self.model.named_modules():
            if name in factors and isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                A, B = factors[name]
                if module.lora_A[adapter_name].weight.device.type != "meta":  # else a file's tensors follow
                    module.lora_A[adapter_name].weight.data = A
                    scale = depth.scale_of(module, adapter_name)
                    module.lora_B[adapter_name].weight.data = B if scale is None else B / scale.value
                    if scale is None:
                        _renew_magnitude(module, adapter_name)


def _renew_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """Let a DoRA adapter start from the adapter's new weights as it would have from its first ones."""
    if adapter_name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[adapter_name].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[adapter_name].weight,
            lora_B=layer.lora_B[adapter_name].weight,
            scaling=layer.scaling[adapter_name],
        )


def _linear_names(model: nn.Module) -> list[str]:
    """The last components of the names of a model's linear layers, adapted ones among them."""
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer):
            names.add(name.rpartition(".")[2])
    return sorted(names)


@contextmanager
def _linear_layers_named(model: nn.Module) -> Iterator[None]:
    """Where nothing matches a config, say what there is to match."""
    try:
        yield
    except NoMatchingPeftModuleError as error:
        raise NoMatchingPeftModuleError(
            f"{error} The linear layers of {type(model).__name__} are called {_linear_names(model)}: name some of "
            "these, a regular expression for whole names, or 'all-linear'."
        ) from error


@contextmanager
def undone_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Leave nothing of an adapter in a model whose addition failed half-way."""
    try:
        yield
    except Exception:  # whatever it is, it is raised again
        delete_adapter(model, adapter_name, QLoRAModel.prefix)
        attention.unwatch(model, adapter_name)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoraLayer) and not child.r:
                    setattr(parent, name, child.get_base_layer())
                elif isinstance(child, AuxiliaryTrainingWrapper) and not child._get_available_adapters():
                    setattr(parent, name, child.original_module)
        raise


@contextmanager
def _initialised_here(config: QLoRAConfig) -> Iterator[None]:
    """Keep PEFT from its own LoftQ, which rewrites the base."""
    init = config.init_lora_weights
    if init == "loftq" and config.quantization is not None:
        config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = init


def _check_fits(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], adapter: str) -> None:
    """Refuse a file with tensors missing, left over or of another shape, before any is set."""
    exchange = fold.current_exchange()
    scales = tuple(f"{name}.{depth.SLOT}.{adapter}." for name in depth.scales(model, adapter))  # in no file
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    everything = {name: tensor for name, tensor in named.items() if not name.startswith(scales) or not scales}
    biases = {"none": (), "lora_only": (".base_layer.bias",), "all": (".bias",)}[config.bias]
    of_adapter = re.compile(rf"\.(lora_\w+|modules_to_save)\.{re.escape(adapter)}(\.|$)")
    own = {
        name: tensor.shape
        for name, tensor in everything.items()
        if of_adapter.search(name)
        or (name.endswith(biases) and not any(kind in name for kind in (".lora_", ".modules_to_save.")))
    }
    missing = sorted(own.keys() - tensors.keys())
    # With bias="all" PEFT also writes the biases of modules_to_save under names that it does not read.
    left_over = sorted(name for name in tensors.keys() - everything.keys() if ".modules_to_save." not in name)
    misshapen = [name for name in own.keys() & tensors.keys() if own[name] != tensors[name].shape]
    found = []
    if missing:
        found.append(f"{len(missing)} of {len(own)} tensors are missing ({missing[0]})")
    if left_over:
        found.append(f"{len(left_over)} belong to no adapted layer ({left_over[0]})")
    if misshapen and not exchange.any_shape:
        name = min(misshapen)
        found.append(
            f"{len(misshapen)} have another shape ({name}: {tuple(tensors[name].shape)}, not {tuple(own[name])})"
        )
    if found:
        raise AdapterError(
            f"{exchange.source} does not fit the model: {'; '.join(found)}. It was trained on another architecture "
            "or with another config, or the file is incomplete."
        )
