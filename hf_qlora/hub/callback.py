"""The card's other half: what a Trainer knows of a run, measured and not guessed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, constants
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.modelcard import extract_hyperparameters_from_trainer

from hf_qlora.hub import card, facts
from hf_qlora.validation import ConfigError


# What Trainer reports beside the metrics, and what it reports of a run's cost.
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
COSTS = {
    "train_runtime": "Training time, s",
    "train_samples_per_second": "Examples per second",
    "train_steps_per_second": "Steps per second",
    "train_tokens_per_second": "Tokens per second",
    "num_input_tokens_seen": "Tokens seen",
}


@dataclass(frozen=True)
class Metric:
    """One metric, as it was measured at a step."""

    name: str
    value: float
    step: int

    @property
    def shown(self) -> str:
        return f"{self.value:.4g}"


class ModelCardCallback(TrainerCallback):
    """Write the model card: hyperparameters, data, measured metrics, memory and speed, beside what the adapter is.

    The README.md of the Trainer's output folder is written when training ends and before every push. Text and
    metadata that are there stay; see `hub/card.py`. The Trainer's `create_model_card`, which would overwrite them, is
    replaced by one that adds to them.

    Metrics are those of the evaluations while the callback is there, with the step they were measured at. They go into
    the metadata (`model-index`) where `dataset` is known and they are of the adapter that is saved.

    Args:
        trainer: the Trainer of a model with an adapter of ours. Add with `trainer.add_callback(...)`.
        dataset: id of the data set on the Hub.
        dataset_name: what to call it; by default the id.
        dataset_split: the part that is evaluated on, as "test".
        license: the adapter's, as the Hub spells it ("apache-2.0"); by default the base's, if the Hub knows it.
        language: one or several codes, as "en".

    Raises:
        ConfigError: a Trainer without such a model, or a data set or licence that the Hub would not accept.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: str | None = None,
        dataset_name: str | None = None,
        dataset_split: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
    ) -> None:
        model = getattr(trainer, "model", None)
        if not isinstance(model, PeftModel) or not facts.is_ours(model):
            raise ConfigError(
                "ModelCardCallback needs a Trainer of a PeftModel with a QLoRAConfig; its model is "
                f"{type(model).__name__}."
            )
        if dataset is not None and card.hub_id(dataset) is None:
            raise ConfigError(
                f"dataset={dataset!r} is no id on the Hub, as 'user/name'. Pass dataset_name for another one."
            )
        if license is not None and card.identifier(license) is None:
            raise ConfigError(f"license={license!r} is not as the Hub spells licences, as 'apache-2.0' or 'other'.")
        self.trainer, self.dataset, self.dataset_split = trainer, dataset, dataset_split
        self.dataset_name = dataset_name or dataset
        self.license, self.language = license, language
        self.metrics: dict[str, dict[int, float]] = {}  # by name and step
        self.costs: dict[str, float] = {}
        self.ended = False
        self.made: ModelCard | None = None  # what create_model_card has made last
        self._original = trainer.create_model_card
        trainer.create_model_card = self.create_model_card

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = False

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for key, value in (metrics or {}).items():
            name = key.removeprefix("eval_")
            if isinstance(value, int | float) and name != "epoch" and not name.endswith(NO_METRICS):
                self.metrics.setdefault(name, {})[state.global_step] = float(value)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self.costs |= {name: logs[name] for name in COSTS if isinstance(logs.get(name), int | float)}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True
        self.write()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`: what the user asks of it is taken over, and nothing is overwritten."""
        if not self.trainer.is_world_process_zero():
            return
        folder = Path(self.trainer.args.output_dir)
        path = folder / constants.REPOCARD_NAME
        before = path.read_bytes() if path.is_file() else None
        try:
            self._original(*args, **kwargs)
            self.made = card.load(folder)
        finally:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        self.write()

    def write(self) -> None:
        """Write the card, with the metadata and citations of what `create_model_card` made."""
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir)
        found = card.load(folder) if trainer.is_world_process_zero() else None
        if found is None:
            return
        here = trainer.hub_model_id or trainer.args.hub_model_id
        name = card.one_line((here or folder.absolute().name).rpartition("/")[2])
        if not found.text.strip():
            found.text = f"# {card.code(name)}\n"
        if trainer.args.push_to_hub:
            facts.ask_for_license(trainer.model, trainer.args.hub_token)
        licence = self.license or self._made("license")
        facts.add_adapter(found, trainer.model, folder, here, picture=True, licence=licence)
        card.extend(found, "training", self._facts(), self._metadata(name))
        card.add_citations(found, self.made)
        card.write(folder, found)

    def _metadata(self, name: str) -> dict[str, Any]:
        results = self._results()
        languages = [self.language] if isinstance(self.language, str) else self.language or []
        return {
            "language": list(dict.fromkeys([*languages, *_listed(self._made("language"))])),
            "datasets": list(dict.fromkeys([*_listed(self.dataset), *_listed(self._made("datasets"))])),
            "tags": _listed(self._made("tags")),
            "metrics": sorted({result.metric_type for result in results}),
            "model_name": name if results else None,
            "eval_results": results,
        }

    def _made(self, field: str) -> Any:
        return self.made.data.get(field) if self.made is not None else None

    def _results(self) -> list[EvalResult]:
        """For the metadata: those of the adapter that is saved, on data that the Hub knows."""
        task, step = facts.task_of(self.trainer.model), self._step()
        if self.dataset is None or task is None:
            return []
        return [
            EvalResult(
                task_type=task,
                dataset_type=self.dataset,
                dataset_name=card.one_line(self.dataset_name),
                dataset_split=None if self.dataset_split is None else card.one_line(self.dataset_split),
                metric_type=metric_type,
                metric_name=card.one_line(metric.name),
                metric_value=metric.value,
            )
            for metric in self._measured()
            if metric.step == step and math.isfinite(metric.value)
            if (metric_type := _metric_type(metric.name)) is not None
        ]

    def _best(self) -> int | None:
        """The step of the adapter that Trainer has gone back to at the end, if it has."""
        args, state = self.trainer.args, self.trainer.state
        best: int | None = state.best_global_step
        return best if self.ended and args.load_best_model_at_end and best != state.global_step else None

    def _step(self) -> int:
        """The step of the adapter that is saved."""
        step: int = self._best() or self.trainer.state.global_step
        return step

    def _measured(self) -> list[Metric]:
        """Each metric of the adapter that is saved, or else the last one."""
        found = []
        for name, by_step in self.metrics.items():
            step = self._step() if self._step() in by_step else max(by_step)
            found.append(Metric(name, by_step[step], step))
        return found

    def _facts(self) -> dict[str, Any]:
        trainer, state = self.trainer, self.trainer.state
        evaluated = trainer.eval_dataset
        return {
            "data": self._data(),
            "training": {name: card.code(value) for name, value in self._hyperparameters().items()},
            "metrics": [
                {"name": card.code(metric.name), "shown": metric.shown, "step": metric.step}
                for metric in self._measured()
            ],
            "evaluated": len(evaluated) if isinstance(evaluated, Sized) and not isinstance(evaluated, dict) else None,
            "step": state.global_step,
            "ended": self.ended,
            "best": self._best(),
            "costs": self._costs(),
        }

    def _data(self) -> str:
        train = self.trainer.train_dataset
        parts = []
        if self.dataset_name:
            shown = card.code(self.dataset_name)
            parts.append(f"[{shown}](https://huggingface.co/datasets/{self.dataset})" if self.dataset else shown)
        if isinstance(train, Sized):
            parts.append(f"{len(train):,} examples")
        return ", ".join(parts)

    def _hyperparameters(self) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        values: dict[str, Any] = extract_hyperparameters_from_trainer(trainer)
        if trainer.optimizer is not None:  # it may be the user's own
            groups = trainer.optimizer.param_groups
            rates = sorted({group.get("initial_lr", group["lr"]) for group in groups})
            values["learning_rate"] = ", ".join(f"{float(rate):g}" for rate in rates)
            decays = sorted({group.get("weight_decay", 0.0) for group in groups})
            values["weight_decay"] = ", ".join(f"{float(decay):g}" for decay in decays)
            values["optimizer"] = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
        values |= {"max_grad_norm": args.max_grad_norm, "trained with": type(trainer).__name__}
        values |= {"steps done": trainer.state.global_step}
        if args.bf16:
            values["mixed_precision_training"] = "bf16"
        if type(trainer).__module__.startswith("trl.") and importlib.util.find_spec("trl"):
            values["trained with"] += f" of trl {version('trl')}"
        return values

    def _costs(self) -> dict[str, str]:
        device = self.trainer.args.device
        found = {
            COSTS[name]: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for name, value in self.costs.items()
        }
        if found:
            on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            found["Device"] = card.code(on)
        if device.type == "cuda" and self.ended:
            found["Most GPU memory allocated"] = f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB"
        return found


def _metric_type(name: str) -> str | None:
    """The name as an identifier, if it can be one."""
    return card.identifier(name.lower().replace(" ", "_"))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
