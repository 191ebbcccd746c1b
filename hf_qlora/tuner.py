"""`QLoRAModel`, the tuner PEFT picks for LoRA adapters: quantize → wrap → route. A no-op for stock configs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.layers import fold
from hf_qlora.layers.linear import Linear4bit, adopt
from hf_qlora.layers.loftq import loftq_factors
from hf_qlora.quant.base import (
    BaseModelError,
    dequantize_layers,
    forget_quantization,
    is_interrupted,
    is_quantized,
    quantize_model,
    take_over,
)
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter's tensors do not fit the model; the message names the first of them and the likely cause."""


class QLoRAModel(LoraModel):
    """`peft.LoraModel`, which also quantizes the base where the config is a `QLoRAConfig`."""

    _lets_gradients_in = False  # whether the input embeddings' outputs require gradients because of us

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        # transformers' load_adapter and AutoModel.from_pretrained(adapter) pass a bare config and then set the file's
        # tensors past PEFT: what they read is folded, so the adapter must be.
        if isinstance(peft_config, QLoRAConfig) and peft_config.record is not None:
            peft_config.become_portable()
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, QLoRAConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        else:
            self._check_targets(config, model)
            factors = self._prepare_base(config, model)
            with _initialised_here(config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._start_from(factors, adapter_name)
            if config.quantization is not None and not config.inference_mode:
                self._let_gradients_in(model)
        if any(isinstance(other, QLoRAConfig) for other in self.peft_config.values()):
            adopt(model)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's. The result has stock scaling and no initialisation, whatever the first adapter has."""
        first = self.peft_config.get(adapters[0]) if adapters else None
        if not isinstance(first, QLoRAConfig):
            super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        stock: dict[str, Any] = {"use_rslora": False, "init_lora_weights": True, "loftq_config": {}, "record": None}
        plain = replace(first, **stock)
        self.peft_config[adapters[0]] = plain
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config[adapters[0]] = first

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names, safe_merge)
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
        if ours and merge:
            names = kwargs.get("adapter_names")
            self._check_mergeable(names, kwargs.get("safe_merge", False))
        elif ours:
            for module in self.model.modules():  # the packed base is what unloading returns
                if isinstance(module, Linear4bit):
                    module.unmerge()
        result: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if ours and merge:
            dequantize_layers(result)
            forget_quantization(result)
        if self._lets_gradients_in:
            result.disable_input_require_grads()  # type: ignore[operator]
        return result

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Find out what cannot be merged before the first layer is."""
        for name, module in self.model.named_modules():
            if isinstance(module, Linear4bit):
                module.check_mergeable(name, adapter_names, safe_merge)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
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
        return fold.unfold(tensors, fold.factors(model, config, adapter_name, from_file), adapter_name)

    def _check_targets(self, config: QLoRAConfig, model: nn.Module) -> None:
        """Find out that nothing matches before the base is touched."""
        if isinstance(model, PreTrainedModel):  # PEFT renames the targets of models that transformers has refactored
            convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        targets = config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return
        if any(check_target_module_exists(config, name) for name, _ in model.named_modules() if name):
            return
        parameters = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]
        wanted = config.target_parameters or ()
        if any(name == target or name.endswith(f".{target}") for target in wanted for name in parameters):
            return
        transformed = config.layers_to_transform
        raise NoMatchingPeftModuleError(
            f"target_modules={targets!r}"
            + (f", target_parameters={sorted(wanted)}" if wanted else "")
            + (f" with layers_to_transform={transformed}" if transformed is not None else "")
            + f" matches nothing in {type(model).__name__}. Its linear layers are called {_linear_names(model)}: name "
            "some of these, a regular expression for whole names, or 'all-linear'."
        )

    def _prepare_base(self, config: QLoRAConfig, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Quantize the base, or check one that is 4-bit; the LoftQ factors of its layers by name."""
        merged = [module for module in model.modules() if getattr(module, "merged", False) is True]
        if merged and not any(isinstance(module, BaseLinear4bit) for module in model.modules()):
            raise BaseModelError("Adapters are merged into the base; call unmerge_adapter() before adding another.")
        if config.quantization is None:
            if is_quantized(model):
                take_over(model, None)
            return {}
        assert isinstance(config.quantization, NF4Config)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        wants_loftq = config.init_lora_weights == "loftq"
        if wants_loftq and config.layer_replication:
            raise ConfigError("init_lora_weights='loftq' is not supported with layer_replication; use True.")
        if is_quantized(model) and not is_interrupted(model):
            if wants_loftq:
                raise ConfigError(
                    "init_lora_weights='loftq' needs the dense weights, but the base is already quantized. Load the "
                    "base dense and let get_peft_model quantize it, or use init_lora_weights=True."
                )
            take_over(model, config.quantization)
            return {}

        adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        if adapted:
            raise BaseModelError(
                f"The base is dense and {len(adapted)} of its layers have adapters already ({adapted[0]}, …); "
                "quantizing it would change what they compute. Add this adapter with quantization=None, or load the "
                "base anew and add it first."
            )

        def keep_factors(name: str, weight: Tensor, layer: Any) -> None:
            factors[name] = loftq_factors(weight, layer.dequantize(), config, name)

        before = footprint(model)
        quantize_model(
            model,
            config.quantization,
            skip=config.modules_to_save or (),
            on_layer=keep_factors if wants_loftq else None,
        )
        if config.record is not None:
            logger.warning(
                "The adapter was trained on an NF4 base: quantized the dense base in place, %s, was %s. For the dense "
                "base, set quantization=None on QLoRAConfig.from_pretrained(...) and pass it as config=.",
                footprint(model),
                before,
            )
        return factors

    def _let_gradients_in(self, model: nn.Module) -> None:
        """Make the first layers learn under reentrant checkpointing, as PEFT does for bases that are not quantized."""
        if isinstance(model, PreTrainedModel) and not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
            self._lets_gradients_in = True

    def _start_from(self, factors: dict[str, tuple[Tensor, Tensor]], adapter_name: str) -> None:
        for name, module in self.model.named_modules():
            if name in factors and isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                A, B = factors[name]
                if module.lora_A[adapter_name].weight.device.type != "meta":  # else a file's tensors follow
                    module.lora_A[adapter_name].weight.data = A
                    module.lora_B[adapter_name].weight.data = B
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
    everything = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    biases = {"none": (), "lora_only": (".base_layer.bias",), "all": (".bias",)}[config.bias]
    own = {
        name: tensor.shape
        for name, tensor in everything.items()
        if (
            (f".{adapter}." in name or name.endswith(f".{adapter}"))
            and any(kind in name for kind in (".lora_", ".modules_to_save."))
        )
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
