"""What a base must be to be quantized, or to be taken over where it is 4-bit: checked before anything is changed."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.quant.packing import chunk_of


class BaseModelError(ValueError):
    """The base model cannot be used as asked; the message names what was found, what is allowed and the way out."""


def check_layers(model: nn.Module, layers: dict[str, nn.Linear | Conv1D], config: NF4Config) -> None:
    """Raise BaseModelError where the layers of a dense model cannot be quantized."""
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise BaseModelError(
            f"No linear layer to quantize: the model's layers are {kinds[:10]}, and nn.Linear or Conv1D that are "
            "neither tied, nor heads, nor in skip_modules or modules_to_save are needed. Set quantization=None for "
            "plain LoRA."
        )
    finite: dict[str, list[Tensor]] = {}  # read at the end: each answer of a GPU is waited for
    for name, layer in layers.items():
        weight = layer.weight
        _refuse_sharded(name, weight)
        if weight.device.type == "meta":
            raise BaseModelError(
                f"{name}.weight is on the meta device, without data. Load the model's weights before quantizing it "
                "(from_pretrained without init_empty_weights, and without offloading to CPU or disk)."
            )
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BaseModelError(
                f"{name}.weight has dtype {weight.dtype}; only float32, bfloat16 and float16 can be quantized. "
                "Load the model with dtype=torch.bfloat16."
            )
        if not weight.numel():
            raise BaseModelError(f"{name}.weight has no values: its shape is {tuple(weight.shape)}.")
        finite[name] = [piece.isfinite().all() for piece in weight.detach().reshape(-1).split(chunk_of(weight.device))]
    for name, pieces in finite.items():
        if not all(pieces):
            raise BaseModelError(
                f"{name}.weight has NaN or infinite values; the checkpoint is damaged or was cast to a narrow dtype."
            )
    check_compute_dtype(config, next(iter(layers.values())).weight.device)


def _refuse_sharded(name: str, weight: Tensor) -> None:
    by = "FSDP" if hasattr(weight, "device_mesh") else "DeepSpeed ZeRO-3" if hasattr(weight, "ds_id") else ""
    if by:
        raise BaseModelError(
            f"{name}.weight is sharded over processes by {by}, so that no process has all of it to quantize. Quantize "
            "the model before it is sharded: load it without ZeRO-3, call get_peft_model, and use DDP or FSDP2."
        )


def check_compute_dtype(config: NF4Config, device: torch.device) -> None:
    dtype = config.compute_dtype
    if not isinstance(dtype, torch.dtype):
        return
    if device.type == "cuda" and dtype is torch.bfloat16:
        with torch.cuda.device(device):  # which the question is about
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            name = torch.cuda.get_device_name(device)
            raise BaseModelError(
                f"compute_dtype={dtype} is not supported by {name}; use torch.float16 or torch.float32."
            )
    try:
        probe = torch.ones(2, 2, dtype=dtype, device=device)
        probe @ probe
    except RuntimeError as error:
        raise BaseModelError(
            f"compute_dtype={dtype} is not supported on {device}: {error}. Use torch.float32."
        ) from error


def check_settings(model: nn.Module, config: NF4Config) -> None:
    """Raise BaseModelError where a base is not in NF4 as `config` says."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not layers:
        eight = any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules())
        method = getattr(model, "quantization_method", "none")
        found = "bitsandbytes, 8 bits" if eight else getattr(method, "value", method)
        raise BaseModelError(
            f"The base is quantized by another method ({found}), not to 4 bits by bitsandbytes; the config asks for "
            f"{config}. Load the base dense or in NF4, or set quantization=None."
        )
    for name, module in layers:
        _check_same_settings(name, module, config)


def _check_same_settings(name: str, module: bnb.nn.Linear4bit, config: NF4Config) -> None:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise BaseModelError(f"{name} is a Linear4bit without quantized data; move the model to its device first.")
    nested = state.nested or getattr(state, "original_nested", False)
    base = {"quant_type": state.quant_type, "double_quant": bool(nested), "block_size": state.blocksize}
    wanted = {"quant_type": config.quant_type, "double_quant": config.double_quant, "block_size": config.block_size}
    if base != wanted:
        raise BaseModelError(
            f"The base is already quantized with {base} ({name}), but the config asks for {wanted}. Load the base "
            "dense or with NF4Config(...).to_bitsandbytes(), change the config to match, or set quantization=None to "
            "take it as it is."
        )
