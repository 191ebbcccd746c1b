"""Whether a dense model is the one that a base was made of.

What is dense in both is the same, and what is packed in the base is what the model's layer becomes when it is
quantized so. Layers are compared one by one, and loosely: the model may be in another dtype than was quantized.
"""

from __future__ import annotations

from dataclasses import replace

from peft.utils import ModulesToSaveWrapper
from torch import nn

from hf_qlora.config import NF4Config
from hf_qlora.merge.names import is_of_adapter, wrapped_name
from hf_qlora.quant.comparison import compare
from hf_qlora.quant.fingerprint import take_fingerprint
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit, dense_weight, quantize_weight


def other_weights(dense: nn.Module, base: nn.Module) -> str:
    """What tells the original from the base that an adapter was put on, which has its architecture; "" if nothing."""
    expected, found = take_fingerprint(base, hashed=False), take_fingerprint(dense, hashed=False)
    if expected is None or found is None:  # not all there
        return ""
    saved = tuple(  # with the adapter, which replaces the original's; a classifier's head is new at every load
        f"{wrapped_name(name)}." for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)
    )
    dense_prints = {name: tensor for name, tensor in expected.dense.items() if not name.startswith(saved)}
    result = compare(replace(expected, dense=dense_prints), found, only_dense=True)
    if result.verdict == "differs":
        return result.found
    packed = {
        wrapped_name(name): module
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit) and not is_of_adapter(name) and module.state.quant_type == "nf4"
    }
    for name, layer in packed.items():
        trained = take_fingerprint(layer, hashed=False)
        made = take_fingerprint(_quantized(dense.get_submodule(name), layer), hashed=False)
        if trained is None or made is None:
            continue
        result = compare(trained, made)
        if result.verdict == "differs":
            return f"{name}, quantized as the base is, has other codes: {result.found}"
    return ""


def _quantized(layer: nn.Module, like: Linear4bit) -> nn.Module:
    """The layer's weight in a layer of its own, quantized as another is."""
    state = like.state
    config = NF4Config(double_quant=state.nested, block_size=state.blocksize)
    weight = dense_weight(layer).to(like.weight.device, state.dtype)
    alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    become_linear4bit(alone, *quantize_weight(weight, config), config.compute_dtype)
    return alone
