"""examples/text_classification.py, method by method: what each reaches on the test set, and what it costs.

    sweep   each method at its learning rates, one other seed: the accuracy on the validation split chooses. At least
            three; extended where the best lay at an edge, so that it lies between two that are worse
    runs    each method at its rate with each seed, by the example itself: accuracy and macro-F1 on 5,000 headlines
    cost    steps of all methods in turn in one process; the peak of each in a process of its own; bytes

The methods of a seed start from the same head and see the same examples in the same order, all in float32. Cost is of
batches as Trainer makes them, of texts of all lengths, and peaks are taken with the longest texts among them.
"""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from hf_qlora.bench.examples.rates import Sweep
from hf_qlora.bench.examples.runs import Origin, Study, example, imported, keep, lines_of, origin, perform
from hf_qlora.bench.measure import clock, memory, reset_peak
from hf_qlora.bench.processes import apart


SCRIPT = "text_classification.py"
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "adaptive-depth": "adaptive-depth LoRA"}
METHODS = tuple(NAMES)
COSTED = METHODS[:3]
RATES = {"full": ("1e-4", "2e-4", "4e-4")} | dict.fromkeys(METHODS[1:], ("1e-3", "1.7e-3", "3e-3"))
COST = "cost"
WARMUP, STEADY = 2, 3  # steps before anything is counted; steps whose peak is taken
ORDER_SEED = 0  # of the batches of the cost


def sweep_of(rates: Mapping[str, tuple[str, ...]] = RATES, arguments: tuple[str, ...] = ()) -> Sweep:
    return Sweep(
        rates, lambda found: -found["validation"]["accuracy"], lambda s: f"{-100 * s:.1f} %", "accuracy", arguments
    )


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    sweep: Sweep = field(default_factory=sweep_of)
    rounds: int = 15

    def study(self, results: Path, ours: Origin) -> Study:
        """The runs of the table, at the rates that were chosen; no arms before the whole sweep is done."""
        chosen = self.sweep.chosen(results, ours)
        whole = chosen.keys() == self.sweep.rates.keys()
        arms = {method: self.sweep.arm(method, rate) for method, rate in chosen.items()} if whole else {}
        return Study(arms, self.seeds, self.sweep.arguments)


QUICK = Plan((1, 2), sweep_of(dict.fromkeys(METHODS, ("1e-3",)), ("--rows", "200", "--steps", "2")), rounds=1)


def measure(plan: Plan, results: Path, device: str = "cpu", workers: int = 1, script: Path | None = None) -> None:
    """Do what is not in the file `results`, and append it there: the sweep, the seeds, and what a step costs.

    Raises:
        ExampleError: the example is not there, or failed. What ended before is kept.
    """
    script = script or example(SCRIPT)
    ours = origin(script, device)
    perform(script, plan.sweep.runs(), results, device, workers)
    perform(script, plan.study(results, ours).runs(), results, device, workers)
    if not any(row["rounds"] == plan.rounds for row in lines_of(results, ours, COST)):
        found = cost(script, device, plan.rounds, plan.sweep.chosen(results, ours))
        keep(results, COST, found, script, device)


class Step:
    """A method's model with its optimizer, as the example makes them; called with a number, it trains on a batch."""

    def __init__(self, script: Path, method: str, rate: str, device: str) -> None:
        module = imported(script)
        with tempfile.TemporaryDirectory() as scratch:
            options = module.parse(
                ["--method", method, "--learning-rate", rate, "--device", device, "--output", scratch]
            )
            texts = module.read(options)
            _, tokenizer, dense, head = module.load(options, texts.names)
            self.model, self.sizes = module.adapted(dense, head, options)
            data = dict.fromkeys(("train", "validation"), module.encoded(tokenizer, texts.rows))
            trainer, _ = module.make_trainer(self.model, tokenizer, data, options)
            trainer.create_optimizer()
        self.optimizer, self.collate, self.device = trainer.optimizer, trainer.data_collator, device
        self.take(data["train"], options.batch_size)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.train()

    def take(self, examples: list[Any], size: int) -> None:
        """Batches of examples that come with the shortest first."""
        self.size, self.longest, self.examples = size, examples[-size:], list(examples)
        random.Random(ORDER_SEED).shuffle(self.examples)  # as Trainer does

    def __call__(self, number: int) -> tuple[float, float]:
        """The loss, and the norm of the gradient."""
        first = number * self.size % len(self.examples)
        return self.train_on(self.examples[first : first + self.size])

    def train_on(self, examples: list[Any]) -> tuple[float, float]:
        batch = self.collate(examples).to(self.device)
        loss = self.model(**batch).loss
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), float(norm)


def cost(script: Path, device: str, rounds: int, rates: Mapping[str, str]) -> dict[str, Any]:
    """For each method its peak, then seconds, losses and gradient norms of its steps, the methods taking turns."""
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(COSTED) * (1 + rounds), desc="cost", unit="step") as bar:
        for method in COSTED:
            found[method] = {
                "memory": apart(peak, script, method, rates[method], device),
                "step_s": [],
                "loss": [],
                "gradient_norm": [],
            }
            bar.update()
        steps = {method: Step(script, method, rates[method], device) for method in COSTED}
        for number in range(WARMUP + rounds):
            first = number % len(COSTED)
            for method in (*COSTED[first:], *COSTED[:first]):
                step = steps[method]
                started = clock(device)
                loss, norm = step(number)
                seconds = clock(device) - started
                if number >= WARMUP:
                    for key, value in (("step_s", seconds), ("loss", loss), ("gradient_norm", norm)):
                        found[method][key].append(value)
                    bar.update()
    for method, step in steps.items():
        found[method] |= {key: value for key, value in step.sizes.items() if key != "head"}
    return {"rounds": rounds, "methods": found}


def peak(script: Path, method: str, rate: str, device: str) -> dict[str, int]:
    """Bytes above what the imports take: the model at rest with its optimizer; the peak, with the longest batch."""
    imported(script)
    before = memory(device).now
    step = Step(script, method, rate, device)
    del step.examples[(WARMUP + STEADY) * step.size :]  # 27,000 lists of tokens would hide what methods differ in
    gc.collect()
    for number in range(WARMUP):
        step(number)
    reset_peak(device)
    resting = memory(device).now
    for number in range(WARMUP, WARMUP + STEADY):
        step(number)
    step.train_on(step.longest)
    return {"imports": before, "resting": resting - before, "peak": memory(device).peak - before}
