"""A saved adapter on a base, as PEFT attaches it; one that does not fit is refused.

PEFT leaves weights that it finds no place for out, and those that a file does not have as they begin, which is no
adapter at all: it warns of these, or says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.linear import adopt
from hf_qlora.merge.names import first_sentence
from hf_qlora.tuner import AdapterError


ADAPTER = "default"
RESIZED = (
    "If the base was changed before training, as by resize_token_embeddings, change it again, load the adapter on it, "
    "and merge in Python: merge(model)."
)
_MOVE = "_move_adapter_to_device_of_base_layer"  # a method of PEFT's layers


def attach(model: PreTrainedModel, adapter: Path, config: LoraConfig, low_cpu_mem_usage: bool = False) -> PeftModel:
    """An adapter on a base.

    Raises:
        MergeError: it does not fit.
    """
    taken = copy.deepcopy(config)
    taken.inference_mode = True
    device = "cpu" if low_cpu_mem_usage else str(model.device)
    try:
        peft_model: PeftModel = get_peft_model(model, taken, ADAPTER, low_cpu_mem_usage=low_cpu_mem_usage)
        with _adapters_stay(peft_model) if low_cpu_mem_usage else nullcontext():
            found = peft_model.load_adapter(
                str(adapter), ADAPTER, torch_device=device, low_cpu_mem_usage=low_cpu_mem_usage
            )
    except AdapterError as error:
        raise MergeError(f"{error} {RESIZED}") from error
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except KeyError as error:  # of a trained module whose weights are not in the file
        raise _unfit(adapter, f"it has no weights for {_short(str(error.args[0]))}.") from error
    except (OSError, RuntimeError, NoMatchingPeftModuleError) as error:
        raise _unfit(adapter, first_sentence(error)) from error
    # PEFT writes biases of trained modules under names that it does not read, too.
    left_over = [name for name in found.unexpected_keys if ".modules_to_save." not in name]
    for names, what in ((found.missing_keys, "has no weights for"), (left_over, "has weights for what is not there:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise _unfit(adapter, f"it {what} {_short(names[0])}{more}.")
    return peft_model


def attach_without_weights(model: PreTrainedModel, adapter: Path, config: LoraConfig) -> PeftModel:
    """An adapter, which has its weights, on a base on the meta device.

    Raises:
        MergeError: it does not fit, or is not finite.
    """
    peft_model = attach(model, adapter, config, low_cpu_mem_usage=True)
    adopt(peft_model)
    for name, parameter in peft_model.named_parameters():
        own = f".{ADAPTER}." in f".{name}."
        if own and parameter.is_meta:
            raise MergeError(f"The adapter {adapter} has no weights for {name.removeprefix('base_model.model.')}.")
        if own and not parameter.isfinite().all():
            raise MergeError(f"The adapter {adapter} has NaN or infinite values in {name}; its training diverged.")
    return peft_model


def _unfit(adapter: Path, why: str) -> MergeError:
    return MergeError(f"The adapter {adapter} does not fit the base: {why} {RESIZED}")


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(f".{ADAPTER}.", ".")


@contextmanager
def _adapters_stay(model: nn.Module) -> Iterator[None]:
    """Keep PEFT from moving loaded adapters to where their base layers are: the meta device."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.__dict__[_MOVE] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__[_MOVE]
