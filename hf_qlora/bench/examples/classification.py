"""examples/text_classification.py, method by method: what each reaches on the test set, and what it costs.

    runs    each method with each seed, by the example itself: accuracy and macro-F1 on 5,000 headlines
    sweep   each method at three learning rates, one other seed: the accuracy on the validation split chooses
    cost    steps of all methods in turn in one process; the peak of each in a process of its own; bytes

The methods of a seed start from the same head and see the same examples in the same order, all in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from hf_qlora.bench.examples.runs import Run, Study, example, imported, keep, perform, perform_runs
from hf_qlora.bench.measure import clock, memory, reset_peak
from hf_qlora.bench.processes import apart
from hf_qlora.bench.results import read_lines


SCRIPT = "text_classification.py"
METHODS = ("full", "lora", "qlora", "adaptive-depth")
COSTED = METHODS[:3]
SEEDS = tuple(range(1, 11))
SWEEP_SEED = 100
RATES = {"full": (1e-4, 2e-4, 4e-4)} | dict.fromkeys(METHODS[1:], (1e-3, 1.7e-3, 3e-3))
SMALL = ("--rows", "200", "--steps", "2")  # of --quick
WARMUP, STEADY = 2, 3  # steps before anything is counted; steps whose peak is taken


def study(quick: bool = False, script: Path | None = None) -> Study:
    """The runs of the table."""
    arms = {method: ("--method", method) for method in METHODS}
    small = SMALL if quick else ()
    return Study(script or example(SCRIPT), arms, SEEDS[:2] if quick else SEEDS, small)


def measure(results: Path, quick: bool = False, device: str = "cpu", workers: int = 1, rounds: int = 15) -> None:
    """The runs that are not in the file, and what a step costs if that is not there.

    Raises:
        ExampleError: the example is not there, or failed.
    """
    ours = study(quick)
    perform(ours, results, device, workers)
    if not any(row["part"] == "cost" for row in read_lines(results)):
        keep(results, "cost", cost(ours.script, device, 1 if quick else rounds), device)


def sweep(results: Path, device: str = "cpu", workers: int = 1) -> None:
    """Each method at each rate, with a seed that the table does not have."""
    runs = [
        Run(method, SWEEP_SEED, ("--method", method, "--learning-rate", f"{rate:g}"), "sweep")
        for method in METHODS
        for rate in RATES[method]
    ]
    perform_runs(example(SCRIPT), runs, results, device, workers)


class Step:
    """A method's model with its optimizer, as the example makes them; called with a batch, it is trained on it."""

    def __init__(self, script: Path, method: str, device: str) -> None:
        module = imported(script)
        with tempfile.TemporaryDirectory() as scratch:
            options = module.parse(["--method", method, "--device", device, "--output", scratch])
            texts = module.read(options)
            _, tokenizer, dense = module.load(options, texts.names)
            self.model, self.sizes, _ = module.adapted(dense, options)
            data = dict.fromkeys(
                ("train", "validation"), module.encoded(tokenizer, texts.rows[: options.batch_size * 8])
            )
            trainer, _ = module.make_trainer(self.model, tokenizer, data, options)
            trainer.create_optimizer()
        self.optimizer, self.collate, self.size = trainer.optimizer, trainer.data_collator, options.batch_size
        self.examples, self.device = data["train"], device
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.train()

    def __call__(self, number: int) -> tuple[float, float]:
        """The loss, and the norm of the gradient."""
        first = number * self.size % len(self.examples)
        batch = self.collate(self.examples[first : first + self.size]).to(self.device)
        loss = self.model(**batch).loss
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), float(norm)


def cost(script: Path, device: str, rounds: int) -> dict[str, Any]:
    """For each method its peak, then seconds, losses and gradient norms of its steps, the methods taking turns."""
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(COSTED) * (1 + rounds), desc="cost", unit="step") as bar:
        for method in COSTED:
            found[method] = {
                "memory": apart(peak, script, method, device),
                "step_s": [],
                "loss": [],
                "gradient_norm": [],
            }
            bar.update()
        steps = {method: Step(script, method, device) for method in COSTED}
        for number in range(WARMUP + rounds):
            for method, step in steps.items():
                started = clock(device)
                loss, norm = step(number)
                seconds = clock(device) - started
                if number >= WARMUP:
                    for key, value in (("step_s", seconds), ("loss", loss), ("gradient_norm", norm)):
                        found[method][key].append(value)
                    bar.update()
    for method, step in steps.items():
        found[method] |= step.sizes
    return {"rounds": rounds, "methods": found}


def peak(script: Path, method: str, device: str) -> dict[str, int]:
    """Bytes above what the imports take: the model at rest with its optimizer, and the peak of steady steps."""
    imported(script)
    before = memory(device).now
    step = Step(script, method, device)
    for number in range(WARMUP):
        step(number)
    reset_peak(device)
    resting = memory(device).now
    for number in range(WARMUP, WARMUP + STEADY):
        step(number)
    return {"imports": before, "resting": resting - before, "peak": memory(device).peak - before}
