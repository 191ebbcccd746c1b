"""What the package leans on in PEFT, transformers, bitsandbytes and accelerate beyond their documented interfaces.

One check for each entry of `registration.PRIVATE`: that it is there, and does what we need of it. When an upgrade
breaks one, its name says which module of ours to look at. A scan of the source finds private names not listed.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import importlib
import inspect
import pickle
import pkgutil
import platform
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.hooks
import bitsandbytes as bnb
import huggingface_hub.errors
import peft.auto
import peft.config
import peft.mapping
import peft.mapping_func
import peft.optimizers
import peft.peft_model
import peft.tuners.lora.bnb
import peft.tuners.lora.layer
import peft.tuners.lora.model
import peft.tuners.trainable_tokens.layer
import peft.tuners.tuners_utils
import peft.utils.hotswap
import peft.utils.other
import peft.utils.save_and_load
import pytest
import torch
import transformers
import transformers.core_model_loading
import transformers.loss.loss_utils
from architectures import llama
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, get_peft_model
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.quantization_config import BitsAndBytesConfig

import hf_qlora
from hf_qlora import QLoRAConfig, registration, saving
from hf_qlora.hub import push
from hf_qlora.hub import trainer as trainer_hooks
from hf_qlora.layers.budget import layer_of
from hf_qlora.layers.depth import SUPPORTED
from hf_qlora.merge.skeleton import CLASSES
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.registration import PRIVATE, resolve


FOREIGN = ("accelerate", "bitsandbytes", "peft", "transformers")

CHECKS: dict[str, Callable[[], None]] = {}


def contract(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = check
        return check

    return add


def stock(function: Any) -> Any:
    """A function of a library without our wrapper."""
    return inspect.unwrap(getattr(function, "__func__", function))


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(stock(function)).parameters)


def calls_global(function: Any, name: str) -> bool:
    """Whether a function looks `name` up in its module when it runs, so that replacing it there has an effect."""
    function = stock(function)
    return any(
        instruction.opname == "LOAD_GLOBAL" and instruction.argval == name
        for instruction in dis.get_instructions(function)
    )


def calls_method(function: Any, name: str) -> bool:
    return name in stock(function).__code__.co_names


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def qlora(**options: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


# merging from files


@contract("peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer")
def _() -> None:
    """What moves loaded adapters to the meta device, and is looked up on the layer."""
    source = inspect.getsource(peft.utils.save_and_load)
    assert "module._move_adapter_to_device_of_base_layer(adapter_name)" in source


@contract("transformers.modeling_utils:PreTrainedModel._from_config")
def _() -> None:
    """A concrete class makes a model in a dtype, without weights, as the Auto classes' public from_config."""
    with torch.device("meta"):
        model = type(llama())._from_config(llama().config, dtype=torch.bfloat16)
    assert {(p.dtype, p.is_meta) for p in model.parameters()} == {(torch.bfloat16, True)}


@contract("transformers:AutoModelForCausalLM._model_mapping")
def _() -> None:
    """Every auto class of a task has one, and it knows configs by their class."""
    for name in CLASSES.values():
        config = transformers.T5Config if "Seq2Seq" in name else transformers.BertConfig
        assert config in getattr(transformers, name)._model_mapping, name
    assert transformers.LlavaConfig not in transformers.AutoModelForCausalLM._model_mapping


@contract("transformers.modeling_utils:PreTrainedModel._get_dtype_plan")
def _() -> None:
    """Names, as patterns, of what stays in float32."""
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=8)
    assert transformers.T5ForConditionalGeneration(config)._get_dtype_plan(torch.float16) == {"wo": torch.float32}
    assert llama()._get_dtype_plan(torch.float16) == {}


@contract("transformers.conversion_mapping:get_model_conversion_mapping")
def _() -> None:
    """The renamings and conversions of a model's checkpoint; those of old names apart."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    mapping = get_model_conversion_mapping
    kinds = {type(item).__name__ for item in mapping(model)}
    assert {"WeightRenaming", "WeightConverter"} <= kinds
    assert len(mapping(llama(), add_legacy=False)) < len(mapping(llama()))


@contract("transformers.core_model_loading:rename_source_key")
def _() -> None:
    """A file's name to a parameter's, with the base model's prefix where that makes it one; and what converts it."""
    rename = transformers.core_model_loading.rename_source_key
    mapping = get_model_conversion_mapping(llama())
    renamings = [item for item in mapping if isinstance(item, transformers.core_model_loading.WeightRenaming)]
    names = llama().state_dict()
    assert rename("norm.weight", renamings, [], "model", names) == ("model.norm.weight", None)
    assert rename("model.norm.weight", renamings, [], "model", names) == ("model.norm.weight", None)
    assert rename("layers.0.LayerNorm.gamma", renamings, [])[0] == "layers.0.LayerNorm.weight"


# torch


@contract("transformers.utils.import_utils:is_fake_tensor")
def _() -> None:
    """Tensors without data count as an export; that is what this function decides."""
    names = transformers.utils.import_utils
    with FakeTensorMode():
        x = torch.ones(1)
    assert names.is_tracing(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "is_fake_tensor", lambda tensor: False)
        assert not names.is_tracing(x)


@contract("torch._subclasses.fake_tensor:FakeTensor")
@contract("torch._subclasses.fake_tensor:FakeTensorMode")
@contract("torch.utils._python_dispatch:TorchDispatchMode")
@contract("torch.utils._pytree:tree_leaves")
def _() -> None:
    """A mode above sees each operation; storages have a size and an address, and say when they go."""
    seen: list[str] = []

    class Above(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((result,)) if isinstance(t, torch.Tensor)]
            seen.extend(f"{func}: {t.untyped_storage().nbytes()}" for t in tensors)
            return result

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = FakeTensor(mode, torch.empty(3, device="meta"), torch.device("cpu"))
    gone: list[Any] = []
    with mode, Above():
        y = x + x
        assert y.untyped_storage()._cdata != x.untyped_storage()._cdata
        reference = weakref.ref(y.untyped_storage(), gone.append)
        view = y[1:]
        del y
        assert not gone
        del view
    assert gone == [reference]
    assert (x.device.type, seen[0]) == ("cpu", "aten.add.Tensor: 12")


@contract("torch:ops.aten._local_scalar_dense.default")
def _() -> None:
    """What every question for a value comes down to."""
    seen: list[Any] = []

    class Above(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1)
    for ask in (float, bool, torch.Tensor.item, torch.Tensor.tolist):
        with Above():
            ask(x)
    assert seen.count(torch.ops.aten._local_scalar_dense.default) >= 3  # `tolist` of real tensors needs no operation


@contract("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
@contract("torch:ops.aten._scaled_dot_product_flash_attention.default")
@contract("torch:ops.aten._scaled_dot_product_efficient_attention.default")
def _() -> None:
    """They have shapes for tensors without data, and a gradient."""
    x = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    aten = torch.ops.aten
    for result in (
        aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, True)[0],
        aten._scaled_dot_product_flash_attention(x, x, x, 0.0, True)[0],
        aten._scaled_dot_product_efficient_attention(x, x, x, None, True, 0.0, True)[0],
    ):
        assert result.shape == x.shape
        assert torch.autograd.grad(result.sum(), x)[0].shape == x.shape


@contract("bitsandbytes.functional:QuantState.from_dict")
@contract("bitsandbytes.functional:QuantState.as_dict")
def _() -> None:
    """What is written is read; names without a known one are refused, and so is a state that lacks one."""
    _, state = quantize_4bit(torch.randn(64, 64), blocksize=64, quant_type="nf4", compress_statistics=True)
    written = state.as_dict(packed=True)
    names = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"}
    assert written.keys() == names
    read = bnb.functional.QuantState.from_dict(dict(written), device=torch.device("cpu"))
    assert torch.equal(read.absmax, state.absmax)
    assert torch.equal(read.state2.absmax, state.state2.absmax)
    assert read.offset == state.offset
    for name in names - {"nested_absmax"}:  # without that it is a state that is not nested
        rest = {k: value for k, value in written.items() if k != name}
        with pytest.raises((KeyError, ValueError)):
            bnb.functional.QuantState.from_dict(rest, device=torch.device("cpu"))
    with pytest.raises(AssertionError):
        bnb.functional.QuantState.from_dict({**written, "other": torch.ones(1)}, device=torch.device("cpu"))


@contract("torch.nn:Module._load_from_state_dict")
def _() -> None:
    """It is called by position, told of `assign` in the metadata, and takes missing keys and errors in lists."""
    given: list[Any] = []

    class Recorded(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            given.append((prefix, metadata.get("assign_to_params_buffers", False)))
            missing, _, errors = rest[-3:]
            missing.append(f"{prefix}ours")
            errors.append("ours said")

    names = ["state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"]
    assert parameters(nn.Module._load_from_state_dict) == ["self", *names]
    model = nn.Sequential(Recorded(2, 2))
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"(?s)ours said.*0\.ours|0\.ours.*ours said"):
            model.load_state_dict(model.state_dict(), assign=assign)
    assert given == [("0.", False), ("0.", True)]


@contract("torch:Tensor._version")
def _() -> None:
    """It goes up with each write, also through a view or what is detached; inference tensors have none."""
    x = torch.zeros(4)
    seen = [x._version]
    for write in (x.add_, x[:2].mul_, x.detach().sub_):
        write(1)
        seen.append(x._version)
    assert seen == sorted(set(seen))
    before = x._version
    assert (x + 1).sum() is not None
    assert x._version == before
    with torch.inference_mode():
        made = torch.zeros(4)
    assert made.is_inference()
    with pytest.raises(RuntimeError, match="version counter"):
        assert made._version


@contract("transformers:PreTrainedConfig._attn_implementation")
def _() -> None:
    """How a model computes attention, which `to_dict` leaves out."""
    model = llama()
    model.set_attn_implementation("eager")
    said = model.config.to_dict()
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == said


@contract("torch._C:_current_graph_task_id")
def _() -> None:
    """A number of its own for each backward pass, -1 outside."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    for _ in range(2):
        (x * 2).sum().backward()
    assert torch._C._current_graph_task_id() == -1 not in seen
    assert len(set(seen)) == 2


@contract("torch:Tensor._make_wrapper_subclass")
def _() -> None:
    class Empty(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> None:
            pytest.fail("nothing was to be computed")

    made = torch.Tensor._make_wrapper_subclass(Empty, (1000, 2**40), dtype=torch.float16, device=torch.device("cpu"))
    assert (type(made), made.shape, made.dtype) == (Empty, (1000, 2**40), torch.float16)


@contract("torch.utils._pytree:tree_map_only")
def _() -> None:
    assert torch.utils._pytree.tree_map_only(int, lambda i: i + 1, ([1, "a"], {"b": (2,)})) == ([2, "a"], {"b": (3,)})


@contract("torch._C._autograd:_top_saved_tensors_default_hooks")
def _() -> None:
    """The pair that is in force, which hooks of ours within it stand before."""
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(False) is None
    outer, inner = (lambda tensor: tensor, lambda tensor: tensor), (lambda tensor: tensor, lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(*outer):
        assert top(False) == outer
        with torch.autograd.graph.saved_tensors_hooks(*inner):
            assert top(False) == inner
        assert top(False) == outer


@contract("torch.autograd.graph:Node._input_metadata")
def _() -> None:
    """Of what flows back into a node: shapes and dtypes of what it put out, also of leaves."""
    narrow, row = torch.ones(2, 3).bfloat16().requires_grad_(), torch.ones(3).requires_grad_()
    product = narrow.exp() * row
    found = [node._input_metadata[i] for node, i in product.grad_fn.next_functions]
    assert [(tuple(one.shape), one.dtype) for one in found] == [((2, 3), torch.bfloat16), ((3,), torch.float32)]
    assert (product * 2.0).grad_fn.next_functions[1][0] is None


@contract("torch.multiprocessing.reductions:StorageWeakRef")
def _() -> None:
    """The same for views of a storage, another for each storage, and the storage goes all the same."""
    reference = torch.multiprocessing.reductions.StorageWeakRef
    first = torch.ones(1000)
    seen = {reference(first.untyped_storage()), reference(first[3:].untyped_storage())}
    assert len(seen) == 1
    del first
    assert next(iter(seen)).expired()
    for _ in range(20):
        seen.add(reference(torch.ones(1000).untyped_storage()))
    assert len(seen) == 21


@contract("torch.utils._pytree:tree_iter")
def _() -> None:
    assert list(torch.utils._pytree.tree_iter(([1, "a"], {"b": (2, None)}))) == [1, "a", 2, None]


@contract("transformers.modeling_utils:PreTrainedModel._set_gradient_checkpointing")
def _() -> None:
    """Where transformers hands the keywords of checkpointing on, as those of a partial of torch's function."""
    set_it = transformers.PreTrainedModel._set_gradient_checkpointing
    assert parameters(set_it) == ["self", "enable", "gradient_checkpointing_func", "every_n_layers"]
    model, given = llama(), []

    def record(enable: bool, gradient_checkpointing_func: Any = None, every_n_layers: int = 1) -> None:
        given.append((enable, gradient_checkpointing_func))

    model._set_gradient_checkpointing = record
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False, "ours": 1})
        model.gradient_checkpointing_disable()
    (on, function), (off, _) = given
    assert (on, off) == (True, False)
    assert function.func is torch.utils.checkpoint.checkpoint
    assert function.keywords == {"use_reentrant": False, "ours": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"ours": 1}, offload=True)
    (*_, (_, function)) = given
    assert function.func.__module__ == transformers.PreTrainedModel.__module__  # known by where it is from
    assert function.keywords == {"ours": 1}


@contract("transformers.modeling_layers:GradientCheckpointingLayer")
def _() -> None:
    """A layer that is trained hands its own forward, from which the layer can be had, and the hidden states."""
    model, given = llama(), []
    model._set_gradient_checkpointing(True, lambda function, *args: given.append((function, args)) or function(*args))
    layers = list(model.model.layers)
    assert all(isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer) for layer in layers)
    model.eval()(torch.ones(1, 3, dtype=torch.long))
    assert not given
    model.train()(torch.ones(1, 3, dtype=torch.long))
    assert [layer_of(function) for function, _ in given] == layers
    assert all(args[0].shape == (1, 3, 128) for _, args in given)


@contract("torch._C:_dispatch_tls_local_include_set")
@contract("torch._C:DispatchKeySet.from_raw_repr")
@contract("torch._C:_ForceDispatchKeyGuard")
def _() -> None:
    """Below autograd, where dispatched readers are, operations are recorded again within the guard."""
    x = torch.ones(1, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert (x * 2).grad_fn is None
        included = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(included, torch._C.DispatchKeySet.from_raw_repr(0)):
            assert (x * 2).grad_fn is not None


# PEFT: registries and hooks


@contract("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING")
def _() -> None:
    """One dict, read when a model is made, saved and loaded."""
    mapping = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    for module in (peft.peft_model, peft.utils.save_and_load):
        assert module.PEFT_TYPE_TO_TUNER_MAPPING is mapping
    assert calls_global(PeftModel.__init__, "PEFT_TYPE_TO_TUNER_MAPPING")
    assert calls_global(peft.utils.save_and_load.get_peft_model_state_dict, "PEFT_TYPE_TO_TUNER_MAPPING")
    assert calls_global(peft.utils.save_and_load.set_peft_model_state_dict, "PEFT_TYPE_TO_TUNER_MAPPING")
    assert calls_global(peft.mapping.inject_adapter_in_model, "PEFT_TYPE_TO_TUNER_MAPPING")
    assert isinstance(get_peft_model(llama(), lora()).base_model, mapping[peft.PeftType.LORA])


@contract("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING")
def _() -> None:
    """One dict, whose entry is called with the JSON's keys."""
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for module in (peft.peft_model, peft.utils.hotswap):
        assert module.PEFT_TYPE_TO_CONFIG_MAPPING is mapping
    assert calls_method(PeftConfig.from_peft_type, "PEFT_TYPE_TO_CONFIG_MAPPING")
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is mapping[peft.PeftType.LORA]
    values = qlora().to_portable_dict()
    assert type(PeftConfig.from_peft_type(**values)) is QLoRAConfig
    assert type(PeftConfig.from_peft_type(peft_type="LORA", r=3)) is LoraConfig


@contract("peft.tuners.tuners_utils:BaseTuner.inject_adapter")
def _() -> None:
    """Every way to put an adapter on a model comes through it, and no tuner of PEFT's that takes LoRA overrides it."""
    assert parameters(BaseTuner.inject_adapter)[:3] == ["self", "model", "adapter_name"]
    assert calls_method(BaseTuner.__init__, "inject_adapter")
    assert calls_method(PeftModel.add_adapter, "inject_adapter")
    assert "inject_adapter" not in vars(LoraModel)
    assert "inject_adapter" not in vars(MixedModel)


@contract("peft.config:PeftConfigMixin.from_json_file")
def _() -> None:
    assert isinstance(vars(peft.config.PeftConfigMixin)["from_json_file"], classmethod)
    assert parameters(PeftConfig.from_json_file) == ["cls", "path_json_file", "kwargs"]
    for caller in (PeftConfig.from_pretrained, PeftConfig._get_peft_type):
        assert calls_method(caller, "from_json_file")
    assert "from_json_file" not in vars(LoraConfig)


@contract("peft.config:PeftConfigMixin._split_kwargs")
def _() -> None:
    """`from_pretrained` takes the second of three dicts for settings, and it lacks what a class inherits."""
    assert calls_method(PeftConfig.from_pretrained, "_split_kwargs")
    given = {"revision": "main", "use_rslora": True, "r": 3, "nonsense": 1}
    hub, settings, others = LoraConfig._split_kwargs(given)
    assert (hub, settings, others) == ({"revision": "main"}, {"use_rslora": True, "r": 3}, {"nonsense": 1})


@contract("peft.peft_model:load_peft_weights")
def _() -> None:
    """`PeftModel.load_adapter` calls it by its module's name, with the folder first and Hub options by keyword."""
    assert parameters(peft.peft_model.load_peft_weights)[:2] == ["model_id", "device"]
    assert calls_global(PeftModel.load_adapter, "load_peft_weights")
    assert calls_method(PeftModel.from_pretrained, "load_adapter")


@contract("peft.peft_model:set_peft_model_state_dict")
def _() -> None:
    assert parameters(peft.peft_model.set_peft_model_state_dict) == [
        "model",
        "peft_model_state_dict",
        "adapter_name",
        "ignore_mismatched_sizes",
        "low_cpu_mem_usage",
    ]
    assert calls_global(PeftModel.load_adapter, "set_peft_model_state_dict")


@contract("peft.peft_model:PeftModel.__init__")
def _() -> None:
    """Its subclasses, one for each task, call it, and take the same arguments."""
    assert parameters(PeftModel.__init__)[:4] == ["self", "model", "peft_config", "adapter_name"]
    for cls in peft.mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values():
        assert parameters(cls.__init__)[:4] == ["self", "model", "peft_config", "adapter_name"]
        assert "__init__" in stock(cls.__init__).__code__.co_names


@contract("peft.tuners.lora.dora:dequantize_module_weight")
def _() -> None:
    """DoRA reads the base's weight with it, and with nothing else."""
    layer = peft.tuners.lora.dora.DoraLinearLayer
    for method in (layer.update_layer, layer.forward):
        assert calls_global(method, "dequantize_module_weight")


@contract("peft.utils.other:AuxiliaryTrainingWrapper._get_available_adapters")
def _() -> None:
    """Empty after the last one is deleted; the module is under `original_module`."""
    for settings in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}):
        model = get_peft_model(llama(), lora(**settings))
        wrappers = [m for m in model.modules() if isinstance(m, peft.utils.other.AuxiliaryTrainingWrapper)]
        assert wrappers
        peft.tuners.tuners_utils.delete_adapter(model, "default", "lora_")
        for wrapper in wrappers:
            assert not wrapper._get_available_adapters()
            assert isinstance(wrapper.original_module, nn.Module)


@contract("transformers.integrations.peft:PeftAdapterMixin.load_adapter")
def _() -> None:
    """It injects a bare config, and then sets the file's tensors itself."""
    method = transformers.PreTrainedModel.load_adapter
    assert parameters(method)[:3] == ["self", "peft_model_id", "adapter_name"]
    assert {"adapter_kwargs", "hotswap"} <= set(parameters(method))
    assert "inject_adapter_in_model" in stock(method).__code__.co_names


@contract("transformers.modeling_utils:AttentionInterface.get_interface")
def _() -> None:
    """Attention modules ask it in every forward, and pass themselves, the query, the key, the value and the mask."""
    seen = []
    interface = transformers.modeling_utils.AttentionInterface

    original = stock(interface.get_interface)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        attend = original(self, *args, **kwargs)
        return lambda module, query, key, value, mask, **options: (
            seen.append((type(module).__name__, query.shape, key.shape)),
            attend(module, query, key, value, mask, **options),
        )[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "get_interface", watched)
        llama()(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert seen == [("LlamaAttention", (2, 4, 5, 32), (2, 2, 5, 32))] * 2


@contract("peft.peft_model:PeftModel.from_pretrained")
def _() -> None:
    """Its arguments are bound by name; the last ones go on to `load_adapter` and to the Hub's client."""
    names = parameters(PeftModel.from_pretrained)
    assert names[:6] == ["cls", "model", "model_id", "adapter_name", "is_trainable", "config"]
    assert "low_cpu_mem_usage" in names
    assert names[-1] == "kwargs"


@contract("peft.peft_model:PeftModel.load_adapter")
def _() -> None:
    """It takes the device to read to, adds an adapter that is not there, and then reads its weights."""
    assert parameters(PeftModel.load_adapter)[:3] == ["self", "model_id", "adapter_name"]
    assert "torch_device" in parameters(PeftModel.load_adapter)
    assert calls_method(PeftModel.load_adapter, "add_adapter")
    assert calls_method(PeftModel.from_pretrained, "load_adapter")


@contract("peft.peft_model:PeftModel.save_pretrained")
def _() -> None:
    """`saving.save` binds its arguments by name and calls it on a folder of its own."""
    assert parameters(PeftModel.save_pretrained) == [
        "self",
        "save_directory",
        "safe_serialization",
        "selected_adapters",
        "save_embedding_layers",
        "is_main_process",
        "path_initial_model_for_weight_conversion",
        "kwargs",
    ]
    assert calls_global(PeftModel.save_pretrained, "get_peft_model_state_dict")
    names = stock(PeftModel.save_pretrained).__code__.co_names
    assert "save_pretrained" in names  # of the config
    assert "create_or_update_model_card" in names
    assert not issubclass(PeftModel, transformers.PreTrainedModel)


@contract("peft.auto:_BaseAutoPeftModel.from_pretrained")
def _() -> None:
    """The classes for users inherit it, and it passes on what it does not know to the base's config."""
    base = peft.auto._BaseAutoPeftModel
    assert parameters(base.from_pretrained)[:2] == ["cls", "pretrained_model_name_or_path"]
    assert {"revision", "kwargs"} <= set(parameters(base.from_pretrained))
    assert "from_pretrained" not in vars(peft.AutoPeftModelForSequenceClassification)
    assert issubclass(peft.AutoPeftModelForSequenceClassification, base)


@contract("peft.peft_model:PeftModel.create_or_update_model_card")
def _() -> None:
    """Every save calls it, with the folder to write README.md in."""
    assert parameters(PeftModel.create_or_update_model_card) == ["self", "output_dir"]
    assert calls_method(PeftModel.save_pretrained, "create_or_update_model_card")


@contract("peft.peft_model:PeftModel.push_to_hub")
def _() -> None:
    """The one that models of transformers have; ours takes the same, so that it can stand in for it."""
    assert stock(PeftModel.push_to_hub) is transformers.utils.PushToHubMixin.push_to_hub
    theirs, ours = (inspect.signature(f).parameters for f in (stock(PeftModel.push_to_hub), push.push_to_hub))
    asked = {name: (one.kind, one.default) for name, one in theirs.items() if name != "self"}
    assert asked == {name: (one.kind, one.default) for name, one in ours.items() if name not in ("original", "pushed")}


@contract("peft.config:PeftConfigMixin.push_to_hub")
def _() -> None:
    assert stock(peft.config.PeftConfigMixin.push_to_hub) is transformers.utils.PushToHubMixin.push_to_hub


@contract("transformers:Trainer._save")
def _() -> None:
    """It pickles the arguments, `hub_token` among them; the pushes pickle them after it has been called."""
    assert {"args", "save"} <= set(stock(Trainer._save).__code__.co_names)
    assert "hub_token" not in stock(Trainer._save).__code__.co_names
    arguments = transformers.TrainingArguments("unused", hub_token="hf_secret", use_cpu=True, report_to="none")
    assert b"hf_secret" in pickle.dumps(arguments)  # else `Unsaved` has nothing left to do
    arguments.hub_token = trainer_hooks.Unsaved("hf_secret")
    assert b"hf_secret" not in pickle.dumps(arguments)


@contract("transformers:Trainer.init_hf_repo")
def _() -> None:
    assert parameters(Trainer.init_hf_repo)[0] == "self"
    assert calls_method(Trainer.__init__, "init_hf_repo")


@contract("transformers:Trainer.train")
def _() -> None:
    """It takes the checkpoint's folder, or True for the last one, and goes by its name alone."""
    assert parameters(Trainer.train)[:2] == ["self", "resume_from_checkpoint"]
    assert {"get_last_checkpoint", "_load_from_checkpoint"} <= set(stock(Trainer.train).__code__.co_names)


@contract("transformers:Trainer._run_epoch")
def _() -> None:
    """It trains before it looks at what the callbacks want; whoever calls it looks after it."""
    assert parameters(Trainer._run_epoch)[:3] == ["self", "model", "epoch"]
    source = inspect.getsource(stock(Trainer._run_epoch))
    assert source.index("self.training_step(") < source.index("should_training_stop")
    assert calls_method(Trainer._inner_training_loop, "_run_epoch")
    assert "should_training_stop" in stock(Trainer._inner_training_loop).__code__.co_names


@contract("transformers:Trainer._load_optimizer_and_scheduler")
def _() -> None:
    """It is called before the first step, and leaves it to torch whether the state fits."""
    assert parameters(Trainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert calls_method(Trainer._prepare_for_training, "_load_optimizer_and_scheduler")
    names = stock(Trainer._load_optimizer_and_scheduler).__code__.co_names
    assert "load_state_dict" in names
    assert "shape" not in names


@contract("transformers:Trainer._save_checkpoint")
def _() -> None:
    """trainer_state.json is written after all else that resuming reads, and older checkpoints are removed after it."""
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    names = stock(Trainer._save_checkpoint).__code__.co_names
    order = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "save_to_json", "rotate_checkpoints"]
    assert [name for name in names if name in order] == order


@contract("transformers:Trainer._get_output_dir")
def _() -> None:
    assert parameters(Trainer._get_output_dir) == ["self", "trial"]
    assert calls_method(Trainer._save_checkpoint, "_get_output_dir")


@contract("transformers:Trainer._get_num_items_in_batch")
def _() -> None:
    """What losses are divided by, in training and in evaluation; it may be 0."""
    assert parameters(Trainer._get_num_items_in_batch) == ["self", "batch_samples", "device"]
    assert calls_method(Trainer.get_batch_samples, "_get_num_items_in_batch")
    assert calls_method(Trainer.prediction_step, "_get_num_items_in_batch")
    labels = torch.full((1, 3), -100)
    loss = transformers.loss.loss_utils.fixed_cross_entropy(torch.zeros(3, 5), labels[0], torch.tensor(0))
    assert loss.isnan()  # else there is nothing to do


@contract("peft.optimizers.lorafa:create_lorafa_optimizer")
def _() -> None:
    """The model comes first; the optimizer takes what has "lora" in its name in pairs, in the order of the names."""
    assert parameters(peft.optimizers.lorafa.create_lorafa_optimizer)[0] == "model"
    source = inspect.getsource(LoraFAOptimizer.step)
    assert 'if "lora" in n:' in source
    assert "len(param_list) == 2" in source
    (group,) = peft.optimizers.create_lorafa_optimizer(get_peft_model(llama(), lora()), 4, 8, 1e-3).param_groups
    lists = {name for name, value in group.items() if isinstance(value, list)}
    assert lists == {"params", "names", "scaling_factors"}
    assert len({len(group[name]) for name in lists}) == 1


@contract("peft.optimizers:create_lorafa_optimizer")
def _() -> None:
    """The same function, by another name."""
    functions = (peft.optimizers.create_lorafa_optimizer, peft.optimizers.lorafa.create_lorafa_optimizer)
    assert len({inspect.unwrap(function) for function in functions}) == 1


@contract("bitsandbytes.optim.optimizer:Optimizer8bit")
def _() -> None:
    """The base of its optimizers, whose state goes by a name that torch's does not have, and by another on disk."""
    assert issubclass(bnb.optim.PagedAdamW8bit, bnb.optim.optimizer.Optimizer8bit)
    parameter = nn.Parameter(torch.ones(8))
    parameter.grad = torch.ones(8)
    optimizer = bnb.optim.AdamW8bit([parameter])
    optimizer.step()
    assert "state1" in optimizer.state[parameter]
    assert "exp_avg" not in optimizer.state[parameter]
    (saved,) = optimizer.state_dict()["state"].values()
    assert "state1" in saved["__bnb_optimizer_quant_state__"]


@contract("torch:_foreach_norm")
def _() -> None:
    """The norm of each tensor, NaN and infinity included, whatever their dtypes."""
    tensors = [torch.ones(4), torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor([float("nan")])]
    assert [float(norm) for norm in torch._foreach_norm(tensors)][:2] == [2.0, 0.0]
    assert torch._foreach_norm(tensors)[2].isnan()


@contract("transformers:Trainer.push_to_hub")
def _() -> None:
    """It writes a card over the one that is there, by a method that an instance can replace, after the callbacks."""
    names = stock(Trainer.push_to_hub).__code__.co_names
    assert {"on_push_begin", "save_model", "create_model_card", "upload_folder"} <= set(names)
    assert names.index("on_push_begin") < names.index("create_model_card") < names.index("upload_folder")
    assert "on_push_begin" in stock(Trainer._push_from_checkpoint).__code__.co_names


@contract("transformers:Trainer._push_from_checkpoint")
def _() -> None:
    """It puts new jobs in the place of those that are done, asks for no errors, and pickles the arguments."""
    names = stock(Trainer._push_from_checkpoint).__code__.co_names
    assert {"push_in_progress", "is_done", "PushInProgress", "save"} <= set(names)
    assert "exception" not in names


@contract("transformers:Trainer._finish_current_push")
def _() -> None:
    """Jobs that it waits for, and whose errors nobody asks for."""
    assert parameters(Trainer._finish_current_push) == ["self"]
    assert "push_in_progress" in stock(Trainer._finish_current_push).__code__.co_names
    assert "exception" not in stock(Trainer._finish_current_push).__code__.co_names
    assert hasattr(transformers.utils.PushInProgress([]), "jobs")


@contract("huggingface_hub.errors:HTTPError")
def _() -> None:
    """The base of all errors of the HTTP client that huggingface_hub has: httpx, or another one later."""
    found = huggingface_hub.errors.HTTPError
    assert issubclass(huggingface_hub.errors.HfHubHTTPError, found)
    client = importlib.import_module(found.__module__.partition(".")[0])
    for name in ("ConnectError", "RemoteProtocolError", "ReadTimeout"):
        assert issubclass(getattr(client, name), found)


@contract("peft.utils.hotswap:load_peft_weights")
def _() -> None:
    assert calls_global(peft.utils.hotswap.hotswap_adapter, "load_peft_weights")
    assert parameters(peft.utils.hotswap.load_peft_weights)[:2] == ["model_id", "device"]


@contract("peft.utils.hotswap:check_hotswap_configs_compatible")
def _() -> None:
    """It compares what folding takes out of the config, so both sides must be in one form."""
    assert calls_global(peft.utils.hotswap.hotswap_adapter, "check_hotswap_configs_compatible")
    assert parameters(peft.utils.hotswap.check_hotswap_configs_compatible) == ["config0", "config1"]
    compared = peft.utils.hotswap.CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA]
    assert {"use_rslora", "alpha_pattern"} <= set(compared)


@contract("peft.utils.hotswap:hotswap_adapter_from_state_dict")
def _() -> None:
    assert calls_global(peft.utils.hotswap.hotswap_adapter, "hotswap_adapter_from_state_dict")
    assert parameters(peft.utils.hotswap.hotswap_adapter_from_state_dict) == [
        "model",
        "state_dict",
        "adapter_name",
        "config",
        "parameter_prefix",
    ]


# PEFT: what the tuner overrides or calls


@contract("peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge")
def _() -> None:
    assert parameters(BaseTuner._unload_and_optionally_merge)[:2] == ["self", "merge"]
    assert "_unload_and_optionally_merge" not in vars(LoraModel)
    calls: list[bool] = []

    class Watched(LoraModel):
        def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
            calls.append(merge)
            return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    Watched(llama(), lora(), "default").unload()
    Watched(llama(), lora(), "default").merge_and_unload()
    assert calls == [False, True]


@contract("peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load")
def _() -> None:
    """Called on the class, by keywords, with the file's keys; it returns the model's."""
    assert parameters(BaseTuner._remap_adapter_state_dict_for_load) == [
        "cls",
        "model",
        "config",
        "adapter_name",
        "state_dict",
    ]
    model = get_peft_model(llama(), lora())
    saved = peft.get_peft_model_state_dict(model)
    loaded = LoraModel._remap_adapter_state_dict_for_load(
        model=model, config=model.peft_config["default"], adapter_name="default", state_dict=saved
    )
    assert loaded.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@contract("peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict")
def _() -> None:
    """It returns the model's keys, with the adapter's name in them."""
    assert parameters(BaseTuner._get_adapter_state_dict) == [
        "cls",
        "model",
        "config",
        "adapter_name",
        "state_dict",
        "unwanted_adapter_names",
    ]
    model = get_peft_model(llama(), lora())
    tensors = LoraModel._get_adapter_state_dict(
        model=model,
        config=model.peft_config["default"],
        adapter_name="default",
        state_dict=model.state_dict(),
        unwanted_adapter_names=[],
    )
    assert tensors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@contract("peft.tuners.trainable_tokens.layer:TrainableTokensLayer")
def _() -> None:
    """It knows its indices by adapter, and its embedding."""
    model = get_peft_model(llama(), lora(trainable_token_indices=[3, 5]))
    layers = [
        module
        for module in model.modules()
        if isinstance(module, peft.tuners.trainable_tokens.layer.TrainableTokensLayer)
    ]
    assert layers
    for layer in layers:
        assert layer.token_indices["default"] == [3, 5]
        assert layer.get_base_layer().weight.shape[0] == model.config.vocab_size


# PEFT: layers


@contract("peft.tuners.lora.bnb:Linear4bit")
def _() -> None:
    """Made for any subclass of bitsandbytes' layer, by exactly this type, without attributes that ours must set."""
    layer = peft.tuners.lora.bnb.Linear4bit
    assert vars(layer).keys() >= {"merge", "unmerge", "get_delta_weight", "forward"}
    assert parameters(layer.merge) == ["self", "safe_merge", "adapter_names"]
    assert parameters(layer.unmerge) == ["self"]
    assert parameters(layer.get_delta_weight) == ["self", "adapter"]
    assert "__slots__" not in vars(layer)
    hooked = get_peft_model(llama(), qlora(quantization=None))
    assert not [m for m in hooked.modules() if isinstance(m, layer)]
    base = hf_qlora.quantize_model(llama())
    found = [m for m in get_peft_model(base, lora()).modules() if isinstance(m, layer)]
    assert {type(m) for m in found} == {layer}
    assert {type(m.base_layer) for m in found} == {Linear4bit}
    # forward: a merged layer is its base layer, and disabling unmerges first
    assert {"base_layer", "merged", "disable_adapters", "unmerge"} <= set(layer.forward.__code__.co_names)


@contract("peft.tuners.tuners_utils:check_adapters_to_merge")
def _() -> None:
    """The active adapters by default, without those merged already."""
    check = peft.tuners.tuners_utils.check_adapters_to_merge
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert check(layer) == ["default"]
    assert check(layer, ["other", "default"]) == ["other", "default"]
    layer.merge()
    with pytest.warns(UserWarning, match="nothing to do"):
        assert check(layer) == []
    with pytest.warns(UserWarning, match="additionally merging other"):
        assert check(layer, ["default", "other"]) == ["other"]


@contract("peft.tuners.lora.layer:LoraVariant")
def _() -> None:
    """Set on a layer after it was made, it is asked in every path of the layers that depth supports."""
    variant = peft.tuners.lora.layer.LoraVariant
    assert {"init", "forward", "merge_safe", "merge_unsafe", "unmerge"} <= vars(variant).keys()
    assert parameters(variant.forward) == ["module", "active_adapter", "x", "result", "kwargs"]
    for layer in SUPPORTED:
        for method in ("forward", "merge", "unmerge", "_mixed_batch_forward"):
            code = stock(getattr(layer, method)).__code__
            assert "lora_variant" in code.co_names, (layer, method)
    model = get_peft_model(llama(), lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_variant == {}
    assert "lora_magnitude_vector" in layer.adapter_layer_names
    assert not layer.lora_magnitude_vector


@contract("peft.tuners.lora.layer:LoraVariant.merge_safe")
def _() -> None:
    """Given (layer, adapter, dense weight) it returns a new weight and does not read the packed one."""
    assert parameters(peft.tuners.lora.layer.LoraVariant.merge_safe) == ["module", "active_adapter", "orig_weight"]
    model = get_peft_model(llama(), qlora(use_dora=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert "default" in layer.lora_variant
    nn.init.normal_(layer.lora_B["default"].weight)
    weight = layer.base_layer.dequantize(torch.float32)
    before = weight.clone()
    merged = layer.lora_variant["default"].merge_safe(layer, "default", weight)
    assert torch.equal(weight, before)
    V = weight + layer.get_delta_weight("default")
    m = layer.lora_magnitude_vector["default"].weight
    expected = m[:, None] * V / V.norm(dim=1, keepdim=True)  # DoRA (arXiv 2402.09353), equation 5
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@contract("peft.utils.other:get_pattern_key")
def _() -> None:
    """The first pattern that matches the end of a name at a dot; the name itself where none does."""
    get = peft.utils.other.get_pattern_key
    assert get(["k_proj", "q_proj", r".*proj"], "layers.0.q_proj") == "q_proj"
    assert get(["proj"], "layers.0.q_proj") == "layers.0.q_proj"
    assert get([r"layers\.0\..*"], "model.layers.0.q_proj") == r"layers\.0\..*"
    assert get([], "q_proj") == "q_proj"


# bitsandbytes


@contract("bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse")
def _() -> None:
    """It gives the codes back to the bit, and scales that went through bfloat16: within 2^-8."""
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    expected = dequantize_4bit(packed, state)
    repacked, repacked_state = _convert_weight_packed_for_cpu(packed.clone(), state)
    assert repacked_state.packing_format_for_cpu
    codes, found = bnb.functional._convert_weight_packed_for_cpu_inverse(repacked, repacked_state)
    assert torch.equal(codes.view(-1), packed.view(-1))
    assert not getattr(found, "packing_format_for_cpu", False)
    # bfloat16's half step, and the 8-bit scales' own, of the largest scale
    torch.testing.assert_close(dequantize_4bit(codes, found), expected, rtol=2**-7, atol=0.02)


@contract("bitsandbytes.functional:has_avx512bf16")
@contract("torch:ops.mkldnn._is_mkldnn_bf16_supported")
def _() -> None:
    """Where the processor has AVX512-BF16, and not where x86 has AVX2 at most, but for its late VNNI."""
    found = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(found, bool)
    assert found or not torch.cpu._is_avx512_bf16_supported()
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        assert not found


@contract("torch:ops.mkldnn._is_mkldnn_fp16_supported")
def _() -> None:
    assert isinstance(torch.ops.mkldnn._is_mkldnn_fp16_supported(), bool)


@contract("torch:ops.bitsandbytes.gemv_4bit.default")
def _() -> None:
    """Where it says yes, the operation reads the repacked form, whose rows of scales are the blocks, in bfloat16."""
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    x = torch.randn(2, 128).to(torch.bfloat16)
    expected = x.double() @ dequantize_4bit(packed, state).double().t()
    if not bnb.functional.has_avx512bf16():
        return
    codes, repacked = _convert_weight_packed_for_cpu(packed.clone(), state)
    found = torch.ops.bitsandbytes.gemv_4bit.default(
        x, codes, repacked.shape, repacked.absmax, repacked.code, repacked.blocksize
    )
    # bfloat16 scales, levels and result: 2^-9 each
    assert float((found.double() - expected).norm() / expected.norm()) < 0.005


# transformers


@contract("transformers.quantizers.base:get_keys_to_not_convert")
def _() -> None:
    assert get_keys_to_not_convert(llama()) == ["lm_head"]
    assert {"lm_head", "model.embed_tokens"} <= set(get_keys_to_not_convert(llama(tie_word_embeddings=True)))


@contract("transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.get_state_dict_and_metadata")
def _() -> None:
    """`save_pretrained` asks the quantizer first, and saves the model's own state dict where it gets None."""
    assert calls_method(transformers.PreTrainedModel.save_pretrained, "get_state_dict_and_metadata")
    assert Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True)).get_state_dict_and_metadata(None) == (None, {})


@contract("transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer._dequantize")
def _() -> None:
    """`model.dequantize()` comes through it."""
    assert parameters(Bnb4BitHfQuantizer._dequantize) == ["self", "model", "dtype"]
    calls: list[nn.Module] = []

    class Watched(Bnb4BitHfQuantizer):
        def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
            calls.append(model)
            return model

    model = hf_qlora.quantize_model(llama())
    model.hf_quantizer.__class__ = Watched
    model.dequantize()
    assert calls == [model]


@contract("transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.remove_quantization_config")
def _() -> None:
    model = hf_qlora.quantize_model(llama())
    assert model.is_quantized
    assert model.config.quantization_config
    model.hf_quantizer.remove_quantization_config(model)
    assert not model.is_quantized
    for gone in ("hf_quantizer", "quantization_method"):
        assert not hasattr(model, gone)
    assert not hasattr(model.config, "quantization_config")


@contract("transformers.integrations.bitsandbytes:Bnb4bitDeserialize")
def _() -> None:
    """A model read from a 4-bit checkpoint remembers that it was read so, and saving it would undo that."""
    with tempfile.TemporaryDirectory() as folder:
        hf_qlora.quantize_model(llama()).save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    operations = [operation for conversion in loaded._weight_conversions for operation in conversion.operations]
    assert {type(operation) for operation in operations} == {Bnb4bitDeserialize}


@contract("peft.utils.hotswap:_update_scaling")
def _() -> None:
    """It sets a layer's scaling for one adapter, and only that."""
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    peft.utils.hotswap._update_scaling(layer, adapter_name="default", scaling=0.25)
    assert layer.scaling == {"default": 0.25}


@contract("transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules")
def _() -> None:
    """Names of modules that transformers keeps in fp32, so that its own 4-bit loading leaves them dense."""
    assert transformers.PreTrainedModel._keep_in_fp32_modules is None
    assert "wo" in transformers.T5ForConditionalGeneration._keep_in_fp32_modules


@contract("transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded")
def _() -> None:
    """True where transformers itself has put an adapter on; saving then saves the adapter."""
    model = llama()
    assert model._hf_peft_config_loaded is False
    model.add_adapter(lora())
    assert model._hf_peft_config_loaded is True
    assert "_hf_peft_config_loaded" in transformers.PreTrainedModel.save_pretrained.__code__.co_consts


@pytest.mark.parametrize("name", list(PRIVATE))
def test_every_private_name_does_what_we_lean_on(name: str) -> None:
    resolve(name)
    assert name in CHECKS, f"write a contract for {name}, which {PRIVATE[name]} uses"
    CHECKS[name]()


def test_every_contract_is_of_a_private_name() -> None:
    assert CHECKS.keys() - PRIVATE.keys() == set()


@pytest.mark.parametrize("users", sorted(set(PRIVATE.values())))
def test_the_named_users_exist(users: str) -> None:
    for user in users.split(", "):
        importlib.import_module(f"hf_qlora.{user}")


# Names that instances get at run time, and so cannot be resolved; by what sets them.


def test_accelerate_keeps_its_hook_on_the_module_under_this_name() -> None:
    module = nn.Linear(2, 2)
    hook = accelerate.hooks.ModelHook()
    accelerate.hooks.add_hook_to_module(module, hook)
    assert module._hf_hook is hook
    assert "forward" in module.__dict__  # which calibration puts aside, and back
    accelerate.hooks.remove_hook_from_module(module)
    assert not hasattr(module, "_hf_hook")


def test_a_module_keeps_its_parameters_and_buffers_under_these_names() -> None:
    """What is put there is a parameter, whatever patches or refuses setting attributes; and is called and saved."""
    module = nn.Linear(2, 2)
    module.register_buffer("own", torch.zeros(1))
    assert set(module._parameters) == {"weight", "bias"}
    assert set(module._buffers) == {"own"}
    weight = nn.Parameter(torch.eye(2), requires_grad=False)
    module._parameters["weight"], module._parameters["bias"] = weight, None
    assert module.weight is weight
    assert module.bias is None
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert set(module.state_dict()) == {"weight", "own"}
    x = torch.randn(3, 2)
    assert torch.equal(module(x), x)


def test_transformers_keeps_its_gradient_hooks_under_this_name() -> None:
    model = llama()
    assert not getattr(model, "_require_grads_hooks", None)
    model.enable_input_require_grads()
    assert model._require_grads_hooks


def test_a_checkpointed_layer_is_called_through_this_name() -> None:
    """With the layer's own call and its positional inputs, where the flag is set and it trains."""
    model = llama().train()
    called: list[Any] = []

    def call(function: Callable[..., Any], *args: Any) -> Any:
        called.append(args[0].shape)
        return function(*args)

    first, second = model.model.layers
    first.gradient_checkpointing, first._gradient_checkpointing_func = True, call
    assert not second.gradient_checkpointing
    model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert called == [(1, 4, 128)]


def test_a_config_remembers_that_it_was_quantized_under_this_name(tmp_path: Path) -> None:
    """`forget_quantization` removes it where transformers leaves it."""
    model = hf_qlora.quantize_model(llama())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    names = vars(loaded.config).keys() | vars(model.config).keys()
    assert "_is_quantized" in names


def test_a_loaded_model_remembers_its_conversions_under_this_name(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert "_weight_conversions" in vars(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert "_weight_conversions" not in vars(llama())
    saving = transformers.core_model_loading.revert_weight_conversion
    assert "_weight_conversions" in saving.__code__.co_consts


AT_RUN_TIME = {
    "_commit_hash",
    "_gradient_checkpointing_func",
    "_hf_hook",
    "_is_quantized",
    "_raw_saved_other",
    "_raw_saved_self",
    "_require_grads_hooks",
    "_saved_other",
    "_saved_self",
    "_weight_conversions",
}


# What no entry says: how the libraries' public functions reach us.


def test_a_product_tells_of_the_factors_that_it_has_saved() -> None:
    """Whether they are there as they were, without unpacking what hooks have packed."""
    gate, up = torch.ones(3, requires_grad=True).exp(), torch.ones(3, requires_grad=True).sin()
    node = (gate * up).grad_fn
    assert node.name() == "MulBackward0"
    assert node._saved_self.data_ptr() == gate.data_ptr()
    assert node._saved_other.data_ptr() == up.data_ptr()
    assert node._raw_saved_self.unpack_hook is None
    assert node._raw_saved_self.data.data_ptr() == gate.data_ptr()
    assert (gate * up.detach()).grad_fn._saved_self is None
    unpacked: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked.append):
        hooked = (gate * up).grad_fn
    assert hooked._raw_saved_self.unpack_hook is not None
    assert not unpacked
    with torch.no_grad():
        up.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        _ = node._saved_other
    other = gate * gate.cos()
    other.sum().backward()
    assert other.grad_fn._raw_saved_self.data is None


def test_bitsandbytes_repacks_only_where_we_switch_it_off() -> None:
    """In eval, on the CPU, for an input without gradient, with the flag, which is the processor's by default."""
    torch.manual_seed(0)

    def layer(flag: bool) -> bnb.nn.Linear4bit:
        made = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
        made.support_avx512bf16_for_cpu = flag
        return made

    def repacks(layer: nn.Module, x: torch.Tensor) -> bool:
        before = layer.weight.data.clone()
        # the packed product is not there on every processor; the weight is repacked before it
        with contextlib.suppress(RuntimeError, NotImplementedError):
            layer(x)
        changed = layer.weight.data.shape != before.shape or not torch.equal(layer.weight.data, before)
        return changed or bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))

    x = torch.randn(2, 64)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu is bnb.functional.has_avx512bf16()
    assert repacks(layer(True).eval(), x)
    assert not repacks(layer(False).eval(), x)
    assert not repacks(layer(True).train(), x)
    assert not repacks(layer(True).eval(), x.clone().requires_grad_())
    ours = hf_qlora.quantize_model(nn.Sequential(nn.Linear(64, 64))).eval()
    ours[0].support_avx512bf16_for_cpu = True
    assert not repacks(ours[0], x)


def test_saving_an_adapter_saves_its_config_and_its_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order and with these arguments: `saving.save` completes what they leave in the folder."""
    calls: list[tuple[str, Any]] = []
    get, save = peft.peft_model.get_peft_model_state_dict, LoraConfig.save_pretrained
    monkeypatch.setattr(
        peft.peft_model,
        "get_peft_model_state_dict",
        lambda model, **options: calls.append(("tensors", sorted(options))) or get(model, **options),
    )
    monkeypatch.setattr(
        LoraConfig,
        "save_pretrained",
        lambda self, folder, **options: calls.append(("config", sorted(options))) or save(self, folder, **options),
    )
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    once = [("tensors", ["adapter_name", "save_embedding_layers", "state_dict"]), ("config", ["auto_mapping_dict"])]
    assert calls == once + once
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    }


def test_trainer_names_its_checkpoints_and_loads_adapters_as_we_expect() -> None:
    assert saving._TRAINER_CHECKPOINT.fullmatch(f"{PREFIX_CHECKPOINT_DIR}-10")
    for loader in (transformers.Trainer._load_from_checkpoint, transformers.Trainer._load_best_model):
        assert calls_method(loader, "load_adapter")
    assert calls_method(transformers.Trainer._save, "save_pretrained")


def test_a_fresh_dequantize_equals_what_the_forward_multiplies_by() -> None:
    """bitsandbytes' product with the identity is the weight that `dequantize_4bit` gives, which our layer uses."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32).train()
    layer.weight = bnb.nn.Params4bit(torch.randn(48, 64), requires_grad=False, quant_type="nf4").to("cpu")
    expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(layer(torch.eye(64)).t(), expected)


def test_a_lora_layer_says_what_its_scaling_is_made_of() -> None:
    """Folding computes the factor from these, never from `scaling` itself."""
    config = lora(
        use_rslora=True, alpha_pattern={"q_proj": 6}, rank_pattern={"layers.1.self_attn.q_proj": 9}, lora_alpha=4
    )
    model = get_peft_model(llama(), config).base_model.model.model
    for index, r in ((0, 2), (1, 9)):
        layer = model.layers[index].self_attn.q_proj
        assert isinstance(layer, peft.tuners.lora.layer.LoraLayer)
        assert (layer.r["default"], layer.lora_alpha["default"], layer.use_rslora["default"]) == (r, 6, True)
        assert layer.scaling["default"] == pytest.approx(6 / r**0.5)


# The scan


def modules() -> Iterator[tuple[str, ast.Module]]:
    folder = Path(hf_qlora.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder.parent).as_posix(), ast.parse(path.read_text())


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Everything that the package itself defines or assigns: functions, classes, variables, attributes of self."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return found


def used_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(where from, private name) of every import, attribute, and name in quotes that an attribute may be got by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOREIGN:
            for part in node.module.split("."):
                if private(part):
                    yield node.module, part
            yield from ((node.module, alias.name) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, part) for alias in node.names for part in alias.name.split(".") if private(part))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            yield "", node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
            "pop",
            "get",
        ):
            yield from (
                ("", argument.value)
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and private(argument.value)
            )


def test_no_private_name_is_used_that_is_not_listed() -> None:
    trees = dict(modules())
    own = own_names(trees)
    torch_names = set(dir(nn.Module())) | set(dir(nn.Linear(1, 1))) | set(dir(torch.Tensor)) | set(dir(torch._C))
    torch_names |= {"_C", "_is_replica"}  # the latter is on what nn.DataParallel makes
    torch_names.add("_exit")  # of os, which documents it
    listed = {part for name in PRIVATE for part in name.replace(":", ".").split(".")}
    unlisted = [
        f"{path}: {source or '…'}.{name}"
        for path, tree in trees.items()
        for source, name in used_names(tree)
        if name not in listed | AT_RUN_TIME and (source or name not in own | torch_names)
    ]
    assert unlisted == []


def test_no_private_method_is_overridden_that_is_not_listed() -> None:
    """A class of ours that redefines a private name of a library's class leans on how the library calls it."""
    listed = {name.rpartition(".")[2] for name in PRIVATE}
    unlisted = []
    for info in pkgutil.walk_packages(hf_qlora.__path__, "hf_qlora."):
        module = importlib.import_module(info.name)
        for cls in (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == info.name):
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in FOREIGN]
            unlisted += [
                f"{info.name}.{cls.__name__}.{name}"
                for name in vars(cls)
                if private(name) and not name.startswith("_abc_") and name not in listed
                if any(name in vars(base) for base in bases) and not hasattr(nn.Module, name)
            ]
    assert unlisted == []


def test_the_scan_finds_what_it_looks_for() -> None:
    """On a source that uses a private name in each way."""
    source = """
from peft.utils._secret import thing
from peft.utils.other import _helper
import accelerate._inner
model._foreign
getattr(model, "_quoted", None)
config.__dict__.pop("_popped", None)
from torch.nn import _torch_is_not_scanned
"""
    found = {name for _, name in used_names(ast.parse(source))}
    assert found == {"_secret", "_helper", "_inner", "_foreign", "_quoted", "_popped"}


def test_a_name_that_is_gone_is_refused_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft.utils.other, "get_pattern_key")
    with pytest.raises(ImportError, match=rf"peft\.utils\.other:get_pattern_key, which peft {peft.__version__}"):
        registration.register()
