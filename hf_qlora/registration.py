"""The only writer to PEFT: how its public functions come to know our configs.

`peft_type` stays `LORA`, in memory and on disk, because PEFT, transformers, TRL, vLLM and llama.cpp all know that type
and refuse others. So two registry entries are replaced by supersets, and a dozen functions for which PEFT has no seam
are wrapped. For a stock `LoraConfig` each of them does what PEFT did.

| hook | why there is no other way |
| --- | --- |
| `PEFT_TYPE_TO_TUNER_MAPPING[LORA]` | the tuner quantizes and folds; `register_peft_method` refuses a taken name |
| `PEFT_TYPE_TO_CONFIG_MAPPING[LORA]` | a JSON with the `hf_qlora` key is a `QLoRAConfig` |
| `BaseTuner.inject_adapter` | a tuner of another class (`PeftMixedModel`, a bare `LoraModel`) must refuse our config |
| `PeftConfigMixin.from_json_file` | a broken JSON is named before PEFT stumbles over it |
| `load_peft_weights` in `peft_model`, `hotswap` | the file is checked; a checkpoint has exact tensors beside |
| `peft_model.set_peft_model_state_dict` | says in which form the tensors are; misfits are errors, not warnings |
| `PeftModel.__init__`, `from_pretrained` | what PEFT will refuse is refused before the base is quantized |
| `_BaseAutoPeftModel.from_pretrained` | the base is made with the classes of the adapter |
| `PeftModel.load_adapter` | an adapter whose file is refused does not stay, without its weights |
| `PreTrainedModel._set_gradient_checkpointing` | the keywords of checkpointing include ours |
| `PeftAdapterMixin.load_adapter` | transformers sets a file's tensors itself, so the adapter must be in their form |
| `lora.dora.dequantize_module_weight` | bitsandbytes reads wrong scales on some CPUs (`quant/linear4bit.py`) |
| `PeftModel.save_pretrained` | whole or not at all; hash and fold factors are written |
| `PeftModel.create_or_update_model_card` | a card that says what there is, without a template that says nothing |
| `PeftModel.push_to_hub`, `PeftConfigMixin.push_to_hub` | one commit, with the adapter's card; errors say what to do |
| `Trainer._save`, `init_hf_repo`, `push_to_hub` | the same; and Trainer saves its token |
| `Trainer._push_from_checkpoint`, `_finish_current_push` | Trainer drops the errors of pushes in the background |
| `Trainer.train`, `_load_optimizer_and_scheduler` | resumes whole checkpoints that fit (`trainer/resume.py`) |
| `Trainer._run_epoch` | resumed at its end in the middle of an epoch, a run is trained one step more |
| `Trainer._save_checkpoint` | a half-written checkpoint is known as one, and gone where the disk is full |
| `Trainer._get_num_items_in_batch` | a batch without labels has the loss 0/0 (`trainer/batches.py`) |
| `create_lorafa_optimizer`, by both its paths | pairs a gain with the next layer's A (`trainer/optimizers.py`) |
| `hotswap.check_hotswap_configs_compatible`, `hotswap_adapter_from_state_dict` | both sides in portable form |

Everything private of PEFT, transformers, bitsandbytes and torch that the package leans on is in `PRIVATE`, each with a
contract test.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import peft
import peft.config
import peft.optimizers.lorafa
import peft.peft_model
import peft.tuners.lora.dora
import peft.utils.hotswap
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType
from peft.auto import _BaseAutoPeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel, Trainer
from transformers.integrations.peft import PeftAdapterMixin

from hf_qlora.config import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.config.record import RECORD_KEY
from hf_qlora.hooks import loading, making
from hf_qlora.hub import facts, push
from hf_qlora.hub import trainer as trainer_hooks
from hf_qlora.layers.checkpointing import set_gradient_checkpointing
from hf_qlora.trainer import batches, optimizers, resume
from hf_qlora.tuner import QLoRAModel


PEFT_RANGE = ("0.21.0", "0.22")

# (module, attribute path): what is private, or public but replaced or subclassed here, and where it is used.
PRIVATE = {
    "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING": "registration",
    "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING": "registration",
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter": "registration, tuner",
    "peft.config:PeftConfigMixin.from_json_file": "registration",
    "peft.config:PeftConfigMixin._split_kwargs": "config.qlora",
    "peft.peft_model:load_peft_weights": "registration",
    "peft.peft_model:set_peft_model_state_dict": "registration",
    "peft.peft_model:PeftModel.__init__": "registration",
    "peft.peft_model:PeftModel.from_pretrained": "registration",
    "peft.peft_model:PeftModel.load_adapter": "registration",
    "peft.peft_model:PeftModel.save_pretrained": "registration",
    "peft.auto:_BaseAutoPeftModel.from_pretrained": "registration",
    "peft.peft_model:PeftModel.create_or_update_model_card": "registration",
    "peft.peft_model:PeftModel.push_to_hub": "registration",
    "peft.config:PeftConfigMixin.push_to_hub": "registration",
    "transformers:Trainer._save": "registration",
    "transformers:Trainer.init_hf_repo": "registration",
    "transformers:Trainer.push_to_hub": "registration",
    "transformers:Trainer._push_from_checkpoint": "registration",
    "transformers:Trainer._finish_current_push": "registration",
    "transformers:Trainer.train": "registration",
    "transformers:Trainer._run_epoch": "registration",
    "transformers:Trainer._load_optimizer_and_scheduler": "registration",
    "transformers:Trainer._save_checkpoint": "registration",
    "transformers:Trainer._get_output_dir": "trainer.resume",
    "transformers:Trainer._get_num_items_in_batch": "registration",
    "peft.optimizers:create_lorafa_optimizer": "registration",
    "peft.optimizers.lorafa:create_lorafa_optimizer": "registration",
    "bitsandbytes.optim.optimizer:Optimizer8bit": "trainer.resume",
    "huggingface_hub.errors:HTTPError": "hub.errors",
    "peft.tuners.lora.dora:dequantize_module_weight": "registration",
    "peft.utils.hotswap:load_peft_weights": "registration",
    "peft.utils.hotswap:check_hotswap_configs_compatible": "registration",
    "peft.utils.hotswap:hotswap_adapter_from_state_dict": "registration",
    "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge": "tuner",
    "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load": "tuner",
    "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict": "tuner",
    "peft.utils.other:AuxiliaryTrainingWrapper._get_available_adapters": "tuner",
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer": "rehearsal",
    "peft.tuners.lora.bnb:Linear4bit": "layers.linear",
    "peft.tuners.tuners_utils:check_adapters_to_merge": "layers.linear",
    "peft.tuners.lora.layer:LoraVariant": "layers.depth",
    "peft.tuners.lora.layer:LoraVariant.merge_safe": "layers.linear, layers.depth",
    "peft.utils.other:get_pattern_key": "layers.fold",
    "peft.utils.hotswap:_update_scaling": "layers.fold",
    "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse": "quant.packing",
    "bitsandbytes.functional:QuantState.from_dict": "quant.scales, quant.calibrate.kept",
    "bitsandbytes.functional:QuantState.as_dict": "quant.linear4bit, quant.calibrate.kept",
    "torch.nn:Module._load_from_state_dict": "quant.linear4bit",
    "torch:Tensor._version": (
        "layers.siblings, layers.logits, layers.forward, layers.offload, quant.fingerprint, quant.repacked, "
        "quant.calibrate.siblings"
    ),
    "transformers:PreTrainedConfig._attn_implementation": "quant.calibrate.kept",
    "bitsandbytes.functional:has_avx512bf16": "quant.repacked",
    "torch:ops.bitsandbytes.gemv_4bit.default": "quant.repacked",
    "torch:ops.mkldnn._is_mkldnn_bf16_supported": "kernels.emulated",
    "torch:ops.mkldnn._is_mkldnn_fp16_supported": "kernels.emulated",
    "transformers.quantizers.base:get_keys_to_not_convert": "quant.selection",
    "transformers.modeling_utils:AttentionInterface.get_interface": "layers.attention",
    "transformers.modeling_utils:PreTrainedModel._set_gradient_checkpointing": "registration, layers.checkpointing",
    "transformers.modeling_layers:GradientCheckpointingLayer": "layers.checkpointable",
    "transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules": "quant.selection",
    "transformers.integrations.peft:PeftAdapterMixin.load_adapter": "registration",
    "transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded": "quant.quantizer",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.get_state_dict_and_metadata": "quant.quantizer",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer._dequantize": "quant.quantizer",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.remove_quantization_config": "quant.quantizer",
    "transformers.integrations.bitsandbytes:Bnb4bitDeserialize": "quant.quantizer",
    "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer": "merge.attach",
    "transformers.modeling_utils:PreTrainedModel._from_config": "merge.load, merge.skeleton",
    "transformers:AutoModelForCausalLM._model_mapping": "merge.skeleton",
    "transformers.modeling_utils:PreTrainedModel._get_dtype_plan": "merge.skeleton",
    "transformers.conversion_mapping:get_model_conversion_mapping": "merge.skeleton",
    "transformers.core_model_loading:rename_source_key": "merge.skeleton",
    "torch:_foreach_norm": "train.gradients",
    "transformers.utils.import_utils:is_fake_tensor": "train.plan.step",
    "torch._subclasses.fake_tensor:FakeTensor": "kernels.loss, layers.rowwise, train.plan.trace, train.plan.layout",
    "torch._subclasses.fake_tensor:FakeTensorMode": "train.plan.laid_out",
    "torch.utils._python_dispatch:TorchDispatchMode": "train.plan.trace",
    "torch.utils._pytree:tree_leaves": "train.plan.trace",
    "torch:ops.aten._local_scalar_dense.default": "train.plan.trace",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default": "train.plan.attention",
    "torch:ops.aten._scaled_dot_product_flash_attention.default": "train.plan.attention",
    "torch:ops.aten._scaled_dot_product_efficient_attention.default": "train.plan.attention",
    "torch._C:_current_graph_task_id": "kernels.shared",
    "torch:Tensor._make_wrapper_subclass": "layers.logits",
    "torch.utils._pytree:tree_map_only": "layers.logits",
    "torch.utils._pytree:tree_iter": "layers.budget",
    "torch._C._autograd:_top_saved_tensors_default_hooks": "kernels.factors, layers.budget",
    "torch.autograd.graph:Node._input_metadata": "kernels.factors",
    "torch.multiprocessing.reductions:StorageWeakRef": "kernels.factors, layers.budget",
    "torch._C:_dispatch_tls_local_include_set": "layers.logits",
    "torch._C:DispatchKeySet.from_raw_repr": "layers.logits",
    "torch._C:_ForceDispatchKeyGuard": "layers.logits",
}


def register() -> None:
    """Let PEFT know our configs. Importing `hf_qlora` calls this; calling it again does nothing.

    Raises:
        ImportError: a PEFT outside the range this version knows how to extend; the versions are named.
    """
    found = version("peft")
    release = Version(Version(found).base_version)  # a pre-release of the upper bound has what that will have
    if Version(found) < Version(PEFT_RANGE[0]) or release >= Version(PEFT_RANGE[1]):
        raise ImportError(
            f"hf-qlora extends peft >= {PEFT_RANGE[0]}, < {PEFT_RANGE[1]}, but peft {found} is installed: "
            f"pip install 'peft>={PEFT_RANGE[0]},<{PEFT_RANGE[1]}', or upgrade hf-qlora."
        )
    for name in PRIVATE:
        resolve(name)
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is QLoRAModel:
        return
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QLoRAModel
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = _LoraConfig
    _wrap(BaseTuner, "inject_adapter", making.inject_adapter)
    _wrap(peft.config.PeftConfigMixin, "from_json_file", loading.from_json_file)
    _wrap(peft.peft_model, "load_peft_weights", loading.load_peft_weights)
    _wrap(peft.peft_model, "set_peft_model_state_dict", loading.set_peft_model_state_dict)
    _wrap(PeftModel, "__init__", making.init)
    _wrap(PeftModel, "from_pretrained", loading.from_pretrained)
    _wrap(PeftModel, "load_adapter", loading.load_adapter)
    _wrap(PeftModel, "save_pretrained", making.save_pretrained)
    _wrap(_BaseAutoPeftModel, "from_pretrained", loading.auto_from_pretrained)
    _wrap(PeftModel, "create_or_update_model_card", facts.create_or_update_model_card)
    _wrap(PeftModel, "push_to_hub", push.push_to_hub)
    _wrap(peft.config.PeftConfigMixin, "push_to_hub", push.push_to_hub)
    _wrap(PreTrainedModel, "_set_gradient_checkpointing", set_gradient_checkpointing)
    _wrap(Trainer, "_save", trainer_hooks.save)
    _wrap(Trainer, "init_hf_repo", trainer_hooks.init_hf_repo)
    _wrap(Trainer, "push_to_hub", trainer_hooks.push_to_hub)
    _wrap(Trainer, "_push_from_checkpoint", trainer_hooks.push_from_checkpoint)
    _wrap(Trainer, "_finish_current_push", trainer_hooks.finish_current_push)
    _wrap(Trainer, "train", resume.train)
    _wrap(Trainer, "_run_epoch", resume.run_epoch)
    _wrap(Trainer, "_load_optimizer_and_scheduler", resume.load_optimizer_and_scheduler)
    _wrap(Trainer, "_save_checkpoint", resume.save_checkpoint)
    _wrap(Trainer, "_get_num_items_in_batch", batches.num_items_in_batch)
    _wrap(peft.optimizers, "create_lorafa_optimizer", optimizers.create_lorafa_optimizer)
    _wrap(peft.optimizers.lorafa, "create_lorafa_optimizer", optimizers.create_lorafa_optimizer)
    _wrap(PeftAdapterMixin, "load_adapter", loading.load_into_transformers)
    _wrap(peft.tuners.lora.dora, "dequantize_module_weight", making.dequantize_module_weight)
    _wrap(peft.utils.hotswap, "load_peft_weights", loading.load_peft_weights)
    _wrap(peft.utils.hotswap, "check_hotswap_configs_compatible", loading.check_hotswap_configs_compatible)
    _wrap(peft.utils.hotswap, "hotswap_adapter_from_state_dict", loading.hotswap_adapter_from_state_dict)


def resolve(name: str) -> Any:
    """The object that a key of `PRIVATE` names.

    Raises:
        ImportError: it is gone; the installed version cannot be extended.
    """
    module, _, path = name.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"hf-qlora needs {name}, which {package} {version(package)} does not have; install a version in "
            "hf-qlora's range."
        ) from error


class _Dispatch(type):
    """Calling the class that PEFT knows as LORA's config makes ours of a JSON with our key, or of our `to_dict`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> LoraConfig:
        if kwargs.get(RECORD_KEY) is not None:
            return QLoRAConfig.from_portable_dict(kwargs)
        for ours in (AdaptiveDepthLoRAConfig, QLoRAConfig):
            if kwargs.keys() >= set(ours.own_fields()):
                return ours(*args, **kwargs)
        return LoraConfig(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, LoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, LoraConfig)


class _LoraConfig(LoraConfig, metaclass=_Dispatch):
    """`LoraConfig` as the registry has it; its instances are plain `LoraConfig`s or ours."""


_LoraConfig.__name__ = _LoraConfig.__qualname__ = "LoraConfig"  # PEFT's warnings name the class
_OWN = ("quantization", "portable", "on_base_mismatch")
# PEFT looks keyword arguments up there.
_LoraConfig.__annotations__ = LoraConfig.__annotations__ | dict.fromkeys(_OWN, Any)


def _wrap(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    original = inspect.getattr_static(owner, name)
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(function, *args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if isinstance(original, classmethod) else wrapper)
