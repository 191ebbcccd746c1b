"""A try before the real thing: what PEFT would refuse half-way, it refuses on a copy of the model without weights.

Quantizing a base cannot be undone, and PEFT finds most mistakes of a config only while it wraps one layer after the
other, and those of a file only afterwards. The copy has the modules, names and shapes of the model on the meta device,
so that trying costs milliseconds and no memory.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable

from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

_WITHOUT_WEIGHTS = "_hf_qlora_without_weights"  # on a copy made here


def is_rehearsal(model: nn.Module) -> bool:
    """Whether the model is a copy on which something is tried."""
    return bool(getattr(model, _WITHOUT_WEIGHTS, False))


def rehearse(model: nn.Module, step: Callable[[nn.Module], object]) -> nn.Module | None:
    """Run `step` on a copy of `model` without weights.

    Returns:
        the copy as `step` left it; None if it could not be made, or if `step` needs weights.

    Raises:
        Exception: what `step` raises, other than errors that come from the missing weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return None
    without_data = {id(tensor): _on_meta(tensor) for tensor in tensors}
    try:
        shadow = copy.deepcopy(model, without_data)
    except Exception:
        logger.debug("%s cannot be copied; nothing is tried beforehand.", type(model).__name__, exc_info=True)
        return None
    setattr(shadow, _WITHOUT_WEIGHTS, True)
    try:
        with warnings.catch_warnings():  # the real step gives them again
            warnings.simplefilter("ignore")
            step(shadow)
    except RuntimeError:  # torch's, also for what meta tensors cannot do; the real step raises it again if it must
        logger.debug("Trying on a copy without weights failed.", exc_info=True)
        return None
    return shadow


def check_tokens(shadow: nn.Module, adapter_name: str) -> None:
    """Refuse `trainable_token_indices` outside an embedding, which PEFT finds out in the first forward.

    Raises:
        ConfigError: negative, or not below the number of rows.
    """
    for name, module in shadow.named_modules():
        if isinstance(module, TrainableTokensLayer) and adapter_name in module.token_indices:
            rows = module.get_base_layer().weight.shape[0]
            outside = [i for i in module.token_indices[adapter_name] if not 0 <= i < rows]
            if outside:
                layer = name.removesuffix(".token_adapter")
                raise ConfigError(
                    f"trainable_token_indices: {outside[:5]} are no rows of {layer}, which has rows 0 to {rows - 1}. "
                    "Resize the embeddings first (model.resize_token_embeddings) if tokens were added."
                )


def _on_meta(tensor: object) -> object:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
    return tensor.to("meta")  # type: ignore[attr-defined]
