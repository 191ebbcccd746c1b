"""How much memory a run takes, and how many tokens it trains on in a second, beside its loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from hf_qlora.train.plan.memory_plan import MemoryPlan
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

MIB = 2**20


class MemoryCallback(TrainerCallback):
    """Log memory and speed with every loss, and show them in the progress bar.

    `memory/rss_mib`, and on a GPU `memory/allocated_mib`, `memory/peak_mib` and `memory/reserved_mib` of this
    process's device (the peak since the process began, or since somebody reset it); `memory/share_of_plan`; and
    `tokens_per_second`, over the time since the last log less that of evaluations and saves.

    Tokens are those that Trainer counts, if it does (`include_num_input_tokens_seen`), over all processes. Otherwise
    they are counted here: what the attention mask lets through, or all where there is none, times the number of
    processes.

    Args:
        trainer: whose logs these are added to, before other callbacks read them. Add with `trainer.add_callback(...)`.
        plan: what was expected, whose `step_peak_bytes` is compared: on a GPU with the peak of what is allocated, on
            the CPU with the most that the process had in use at the end of a step, less what it had when this was
            made beside the model.

    Raises:
        ConfigError: not a trainer, or not a plan.
    """

    def __init__(self, trainer: Trainer, plan: MemoryPlan | None = None) -> None:
        model = getattr(trainer, "model", None)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"trainer={trainer!r:.100} has no model. Pass the Trainer that the callback is added to."
            )
        if plan is not None and not isinstance(plan, MemoryPlan):
            raise ConfigError(f"plan={plan!r:.100} is no MemoryPlan. Pass what plan_memory returns.")
        self.trainer, self.plan_peak = trainer, None if plan is None else plan.step_peak_bytes
        self._process = psutil.Process()
        self._before = max(self._process.memory_info().rss - _size(model), 0)
        self._highest_rss = 0
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._tokens: list[Tensor | int] = []
        self._seen, self._seconds, self._mark = state.num_input_tokens_seen, 0.0, time.perf_counter()
        self._unhook()
        self._read_before_others()
        if args.include_num_input_tokens_seen == "no" and not args.torch_compile:
            self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        if self.plan_peak is not None:
            self._highest_rss = max(self._highest_rss, self._process.memory_info().rss)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs or "memory/rss_mib" in logs:  # an evaluation's, the summary, or done already
            return
        measured = self._memory(args.device) | self._speed(args, state)
        self._mark = time.perf_counter()
        if state.is_world_process_zero:
            self._show(measured)
            logs.update(measured)
            for entry in state.log_history[-1:]:  # a copy of the logs that Trainer has kept
                entry.update(measured)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unhook()

    def _read_before_others(self) -> None:
        """What reports logs is often called before callbacks that were added, and would not see what they add."""
        handler = self.trainer.callback_handler
        others = [callback for callback in handler.callbacks if getattr(callback, "then", None) is not self]
        handler.callbacks = [_First(self), *others]  # another list: Trainer is going through the old one

    def _unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._tokens.append(mask.sum())  # stays on the device
        elif isinstance(ids, Tensor) and not ids.is_floating_point():
            self._tokens.append(ids.numel())
        elif isinstance(embeds, Tensor):
            self._tokens.append(embeds.shape[:-1].numel())

    def _speed(self, args: Any, state: Any) -> dict[str, float]:
        if args.include_num_input_tokens_seen != "no":
            tokens = state.num_input_tokens_seen - self._seen
            self._seen = state.num_input_tokens_seen
        else:
            tokens = sum(map(int, self._tokens)) * args.world_size
            self._tokens = []
        seconds, self._seconds = self._seconds, 0.0
        return {"tokens_per_second": tokens / seconds} if tokens and seconds else {}

    def _memory(self, device: torch.device) -> dict[str, float]:
        rss = self._process.memory_info().rss
        found = {"memory/rss_mib": rss / MIB}
        used = max(rss, self._highest_rss) - self._before
        if device.type == "cuda":
            used = torch.cuda.max_memory_allocated(device)
            found |= {
                "memory/allocated_mib": torch.cuda.memory_allocated(device) / MIB,
                "memory/peak_mib": used / MIB,
                "memory/reserved_mib": torch.cuda.memory_reserved(device) / MIB,
            }
        if self.plan_peak is not None:
            found["memory/share_of_plan"] = used / self.plan_peak
        return found

    def _show(self, measured: Mapping[str, float]) -> None:
        """In the bar that Trainer draws, if it draws one."""
        used = measured.get("memory/peak_mib", measured["memory/rss_mib"])
        words = {"memory": f"{used:,.0f} MiB"}
        if "memory/share_of_plan" in measured:
            words["of plan"] = f"{measured['memory/share_of_plan']:.0%}"
        if "tokens_per_second" in measured:
            words["tokens/s"] = f"{measured['tokens_per_second']:,.0f}"
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
            if bar is not None:
                bar.set_postfix(words)


class _First(TrainerCallback):
    """Stands before the other callbacks, and has one of them read logs before they do."""

    def __init__(self, then: MemoryCallback) -> None:
        self.then = then

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.then.on_log(args, state, control, **kwargs)


def _size(model: nn.Module) -> int:
    """Bytes of a model in this process's memory, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type == "cpu"
    }
    return sum(storages.values())
