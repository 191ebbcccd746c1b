"""A watch over training that costs next to nothing until something is wrong.

| what | when | how |
| --- | --- | --- |
| gradients: NaN, infinite, zero, absent | every step, before the optimizer's | a norm a tensor (`gradients.py`) |
| the loss | every step | what the model returned |
| the first layer with NaN | when there is one | the batches of the step run again (`origin.py`) |
| the frozen base | a few MiB in every step, all at the end | checksums (`frozen.py`) |
| scales of depth, dtypes | at the start and with the logs | as they are |

With `logging_nan_inf_filter=False` Trainer waits for the device with the logs alone, and so does this: NaN is found
when steps have been taken with it, with the step where it began, and no layer. DeepSpeed keeps gradients to itself;
they are not watched there.

lora_A's gradient is exactly zero as long as lora_B is, which is in the first step, and with a warm-up from 0 in the
second; LayerDrop and experts that no token reached leave gradients out now and then. So only many steps in a row
count, and for experts they are said and stop nothing.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_qlora.train import findings
from hf_qlora.train.frozen import FrozenBase, is_whole
from hf_qlora.train.gradients import Found, Gradients
from hf_qlora.train.origin import Call, find_origin
from hf_qlora.train.report import AdapterHealthError, Problem
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

IDLE_STEPS = 20
ON_PROBLEM = ("stop", "warn", "error")


class AdapterHealthCallback(TrainerCallback):
    """Stop training that does no good, with a report: which tensor, which step, what it means, what to do.

    Found are: a trained tensor without gradient, or with a zero one, for many steps in a row; NaN or infinity in
    gradients or loss, with the layer where they arose, before the optimizer's step takes them up (with
    `logging_nan_inf_filter=False` only at the next log, and without the layer); a frozen base whose bytes change;
    scales that are not finite or at their bound; dtypes that are not what they should be.

    Args:
        on_problem: "stop" ends training after the step, without the optimizer's step if gradients are not finite, and
            logs the report as an error; with several processes it raises, as they would wait for each other. "error"
            raises `AdapterHealthError`; "warn" logs, and training goes on.
        idle_steps: how many optimizer steps in a row a gradient may be zero or absent.
        check_base: whether to watch the frozen base's bytes.

    Attributes:
        problems: what was found, in the last or the running training.

    Raises:
        ConfigError: an argument that is none of these.
    """

    def __init__(
        self,
        on_problem: Literal["stop", "warn", "error"] = "stop",
        idle_steps: int = IDLE_STEPS,
        check_base: bool = True,
    ) -> None:
        if on_problem not in ON_PROBLEM:
            raise ConfigError(f"on_problem={on_problem!r:.100} is not known; choose one of {ON_PROBLEM}.")
        if not isinstance(idle_steps, int) or idle_steps < 3:
            raise ConfigError(
                f"idle_steps={idle_steps!r:.100} must be a whole number from 3: lora_A has no gradient in the first "
                "step."
            )
        if not isinstance(check_base, bool):
            raise ConfigError(f"check_base={check_base!r:.100} must be True or False.")
        self.on_problem, self.idle_steps, self.check_base = on_problem, idle_steps, check_base
        self.problems: list[Problem] = []
        self._handles: list[Any] = []
        self._calls: list[Call] = []
        self._is_training = False
        self._dtypes: dict[str, torch.dtype] = {}
        self._gradients = Gradients({}, idle_steps)
        self._base: FrozenBase | None = None
        self._not_finite_in_a_row = 0
        self._of_scales: list[str] = []  # what was found of them last, which is not said again
        self._reads_each_step = True
        self._is_searching = False  # a step's batches are run again, which is no part of training

    # ── What Trainer calls ───────────────────────────────────────────────────────────────────────────────────────────

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.problems, self._calls = [], []
        self._unhook()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and is_whole(p)}
        self._dtypes = {name: p.dtype for name, p in trained.items()}
        has_gradients = getattr(args, "deepspeed_plugin", None) is None
        if not has_gradients:
            logger.warning("AdapterHealthCallback does not see gradients under DeepSpeed: they are not checked.")
        self._gradients = Gradients(trained if has_gradients else {}, self.idle_steps)
        self._not_finite_in_a_row, self._of_scales = 0, []
        self._reads_each_step = args.logging_nan_inf_filter  # Trainer waits for the device then, in each step
        self._base = FrozenBase(model) if self.check_base else None
        if not args.torch_compile:  # a hook would be compiled into the model
            self._handles = [model.register_forward_hook(self._returned)]
            if self._reads_each_step:  # else what was called is of another step when it is read
                self._handles.append(model.register_forward_pre_hook(self._called, with_kwargs=True))
        found = [
            *findings.low_precision(trained),
            *findings.upcast(model),
            *self._scales(model, 0),
            *findings.absmax_not_finite(model),
        ]
        self._is_training = True
        self._tell(found, args, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._calls = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self._gradients.take(step)
        if self._base is not None:
            self._base.take()
        if self._reads_each_step:
            self._tell(self._read(model, optimizer, step), args, control)

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self._is_training:  # an evaluation by itself
            return
        found = [] if self._reads_each_step else self._read(model, None, state.global_step)
        found += [*self._changed_dtypes(model, state.global_step), *self._scales(model, state.global_step)]
        self._tell(found, args, control)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._unhook()
        if self._base is not None:
            self._base.take_all()
        self._tell(self._read(model, None, state.global_step), args, control)

    # ── What it does then ────────────────────────────────────────────────────────────────────────────────────────────

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_of_training(model):
            self._calls.append((args, kwargs))

    def _returned(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if self._is_of_training(model) and isinstance(loss, Tensor):
            self._gradients.losses.append(loss.detach().reshape(()))

    def _is_of_training(self, model: nn.Module) -> bool:
        return model.training and torch.is_grad_enabled() and not self._is_searching

    def _origin(self, model: nn.Module) -> str:
        self._is_searching = True
        try:
            return find_origin(model, self._calls)
        finally:
            self._is_searching = False

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_training = [], False

    def _read(self, model: nn.Module, optimizer: Any, step: int) -> list[Problem]:
        problems = []
        for found in self._gradients.read():
            problems += self._of_gradients(found, model, optimizer)
        if self._base is None:
            return problems
        if changed := self._base.read():
            problems.append(findings.base_changed(changed, step))
        if repacked := self._base.repacked():
            problems.append(findings.base_repacked(repacked, len(self._base.layers), step))
        return problems

    def _of_gradients(self, found: Found, model: nn.Module, optimizer: Any) -> list[Problem]:
        problems = []
        scaler = getattr(optimizer, "scaler", None)
        self._not_finite_in_a_row = self._not_finite_in_a_row + 1 if found.not_finite else 0
        expected = scaler is not None and self._not_finite_in_a_row < self.idle_steps  # it tries too large a scale
        if (found.not_finite or found.losses_not_finite) and not expected:
            where = self._origin(model) if self._calls else ""
            of = len(self._gradients.names)
            problems.append(findings.not_finite(found, of, where, is_late=not self._reads_each_step))
            if self.on_problem != "warn" and self._reads_each_step:
                self._drop_gradients(optimizer)
        if found.idle:
            problems += findings.idle(found, len(self._gradients.names), self.idle_steps)
        return problems

    def _drop_gradients(self, optimizer: Any) -> None:
        """Leave the optimizer nothing to step by."""
        needs_all = isinstance(getattr(optimizer, "optimizer", optimizer), LoraFAOptimizer)
        for parameter in self._gradients.parameters:
            if needs_all and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def _changed_dtypes(self, model: nn.Module, step: int) -> list[Problem]:
        now = {name: p.dtype for name, p in model.named_parameters() if name in self._dtypes}
        before, self._dtypes = self._dtypes, now
        return findings.changed_dtypes(before, now, step)

    def _scales(self, model: nn.Module, step: int) -> list[Problem]:
        """What is new of scales in disorder: they stay so from log to log."""
        found = findings.scales_in_disorder(model, step)
        before, self._of_scales = self._of_scales, [problem.what for problem in found]
        return [problem for problem in found if problem.what not in before]

    def _tell(self, problems: list[Problem], args: Any, control: Any) -> None:
        self.problems += problems
        fatal = [problem for problem in problems if problem.fatal and self.on_problem != "warn"]
        for problem in problems:
            if problem not in fatal:
                logger.warning("AdapterHealthCallback, %s", problem)
        if not fatal:
            return
        report = "\n".join(["AdapterHealthCallback stops training.", *map(str, fatal)])
        if self.on_problem == "error" or args.world_size > 1:
            self._unhook()
            raise AdapterHealthError(report)
        logger.error("%s", report)
        control.should_training_stop = True
