"""One training step of a model without data: forward, backward and the optimizer's step, traced.

CUDA's allocator gives multiples of 512 bytes; what else the device decides is in `attention.py` and `optimizers.py`.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import import_utils

from hf_qlora.kernels.planned import planned_device
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.train.plan.attention import AttentionOf
from hf_qlora.train.plan.checkpointing import Stages
from hf_qlora.train.plan.trace import Block, Peak, Trace
from hf_qlora.validation import ConfigError


GRANULE = {"cpu": 1, "cuda": 512}
_FORWARD, _BACKWARD, _OPTIMIZER = "forward", "backward", "optimizer step"


@dataclass(frozen=True)
class Traced:
    """What a step took.

    Attributes:
        peak: its highest moment.
        kept: the blocks that are there between forward and backward and were not before.
        inputs: the blocks of the layers' inputs, in order.
        outputs: those of their results, of which all but the last of a list are another's inputs.
        host_bytes: on the host between forward and backward.
    """

    peak: Peak
    kept: tuple[Block, ...]
    inputs: tuple[Block, ...]
    outputs: tuple[Block, ...]
    host_bytes: int

    def kept_by_layer(self) -> list[int]:
        """Bytes that each layer keeps for backward, its input included, but not its result."""
        inputs: dict[int, int | None] = dict.fromkeys(map(id, self.outputs))
        inputs.update({id(block): i for i, block in enumerate(self.inputs)})
        found = [0] * len(self.inputs)
        for block in self.kept:
            layer = inputs.get(id(block), _number(block.stage))
            if layer is not None:
                found[layer] += block.size
        return found


def _number(stage: str) -> int | None:
    name, _, number = stage.partition(" ")
    return int(number) if name == "layer" else None


def run(
    model: PeftModel,
    inputs: Mapping[str, Tensor],
    mode: FakeTensorMode,
    *,
    device: str,
    optimizer: torch.optim.Optimizer | None,
    autocast: torch.dtype | None = None,
    offload: bool = False,
    accumulate: bool = False,
    resident: Mapping[str, int] | None = None,
) -> Traced:
    """Trace a step that is not the first: the optimizer has its state, and gradients are gone.

    Args:
        inputs: of the model's forward, fake.
        optimizer: torch's over the trained parameters; None: its step is not run.
        accumulate: whether gradients are there from a step before.
        resident: bytes that are there all the time and are in no tensor of these, by what they are.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(_as_in_a_real_run(device))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # that a tensor has no data
        if optimizer is not None:
            with Trace():
                _take_first_step(trained, optimizer)
        trace = stack.enter_context(Trace(GRANULE[device]))
        note_model(trace, model, optimizer)
        trace.note_all(inputs.values(), "inputs")
        for kind, size in (resident or {}).items():
            trace.hold(size, kind)
        stages = Stages(model, trace, offload)
        stack.callback(stages.close)
        for parameter in trained:
            handle = parameter.register_post_accumulate_grad_hook(partial(_note_gradient, trace))
            stack.callback(handle.remove)
        for _ in range(1 + accumulate):
            stages.begin()
            before = set(map(id, trace.alive()))
            trace.stage = _FORWARD
            loss = _forward(model, inputs, device, autocast)
            kept = tuple(block for block in trace.alive() if id(block) not in before)
            host = sum(block.size for block in stages.inputs if block.away)
            kept += tuple(block for block in stages.inputs if block.away)
            trace.stage, stages.in_backward = _BACKWARD, True
            loss.backward()
            del loss
        trace.stage = _OPTIMIZER
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        found = Traced(trace.peak(), kept, tuple(stages.inputs), tuple(stages.outputs), host)
        model.zero_grad()
    return found


@contextmanager
def _as_in_a_real_run(device: str) -> Iterator[None]:
    """Let our loss take this thread's tensors for those of a run on the device, and transformers for a real run's.

    It would take them for an export's, in which it makes masks that a run has no need of.
    """
    found, token = import_utils.is_fake_tensor, planned_device.set(device)
    torchs = logging.getLogger("torch._subclasses.fake_tensor")  # logs each error, which is raised as well
    was_disabled, torchs.disabled = torchs.disabled, True
    # what its `is_tracing` asks, in any thread
    import_utils.is_fake_tensor = lambda tensor: planned_device.get() is None and found(tensor)
    try:
        yield
    finally:
        import_utils.is_fake_tensor = found
        torchs.disabled = was_disabled
        planned_device.reset(token)


def note_model(trace: Trace, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Tell a trace what is there before the step."""
    for parameter in model.parameters():
        trace.note_all([parameter], "adapters" if parameter.requires_grad else "base")
    trace.note_all(model.buffers(), "base")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            for state in filter(None, (module.quant_state, module.quant_state.state2)):
                trace.note_all((state.absmax, state.code), "base")
    for state in optimizer.state.values() if optimizer is not None else ():
        trace.note_all(state.values(), "optimizer")


def _take_first_step(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _note_gradient(trace: Trace, parameter: Tensor) -> None:
    if parameter.grad is not None:
        trace.note(parameter.grad).kind = "gradients"


def _forward(model: nn.Module, inputs: Mapping[str, Tensor], device: str, autocast: torch.dtype | None) -> Tensor:
    with AttentionOf(device), torch.autocast("cpu", autocast) if autocast else nullcontext():
        outputs = model(**inputs)
    loss = getattr(outputs, "loss", None)
    if loss is None:  # a model without a head: what is trained by somebody's own loss
        loss = outputs[0].float().mean()
    result: Tensor = loss
    return result


def inputs_of(model: nn.Module, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Fake inputs for a model's forward, with labels; sequences are whole. Call within the mode.

    Raises:
        ConfigError: a model of something else than text or images.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    main, name = getattr(base, "main_input_name", None), type(base).__name__
    config: Any = getattr(base, "config", None)
    ids = partial(torch.zeros, dtype=torch.int64)
    if main == "input_ids":
        found = {"input_ids": ids(batch_size, seq_len)}
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = ids(batch_size, seq_len)
    elif main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        dtype: Any = base.dtype
        found = {"pixel_values": torch.zeros(batch_size, channels, size, size, dtype=dtype)}
    else:
        raise ConfigError(
            f"{name} takes {main or 'something unknown'}; memory is planned for models of text (input_ids) and of "
            "square images (pixel_values) alone."
        )
    if "QuestionAnswering" in name:
        return {**found, "start_positions": ids(batch_size), "end_positions": ids(batch_size)}
    if "Classification" in name and "Token" not in name:
        return {**found, "labels": ids(batch_size)}
    if "labels" in inspect.signature(base.forward).parameters:
        return {**found, "labels": ids(batch_size, seq_len)}
    return found
