"""The runner: which cases are to be done, whether they can be, and doing them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hf_qlora.bench.measure import environment
from hf_qlora.bench.quantization import double_quant, latency, load, memory, merging, precision, train_step
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.result import FILE, Found, QuantizationResult, check_folder
from hf_qlora.bench.quantization.settings import (
    DEFAULT_ROUNDS,
    SMOKE_ROUNDS,
    Context,
    Settings,
    Sizes,
    check_fits,
    described,
    opened,
    quiet,
    settled,
    texts_of,
)
from hf_qlora.data.tokenizer import reads_text, tokenizer_in
from hf_qlora.validation import ConfigError


CASES: dict[str, Case] = {
    module.CASE.name: module.CASE for module in (memory, latency, precision, double_quant, train_step, load, merging)
}


class CaseError(RuntimeError):
    """A case that failed while it measured; its cause is what failed. Cases that were done are kept."""


class CaseMemoryError(CaseError):
    """A case for which there was too little memory on the GPU; the message says what to do."""


class QuantizationBenchmark:
    """What quantizing a model saves, costs and loses, measured.

        result = QuantizationBenchmark("me/model", cases=["memory", "latency"]).run()
        print(result.table())
        result.save("results/me")

    Args:
        model: a folder or a Hub id of a dense model; by default SmolLM2-135M-Instruct (`hf_qlora.assets`).
        cases: some of memory, latency, precision, double-quant, train-step, load and merge; all by default.
        device: "cpu" or "cuda".
        dtype: of the dense weights, and of what is computed.
        rounds: of each timing.
        seed: of prompts, batches and adapters.
        texts: what `precision` reads: a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a data
            set on the Hub; by default two paragraphs of prose.
        smoke: a little of everything in one process, by default on a tiny random Llama: to see that it works.
        output: a folder in which each case is kept as soon as it is done, and found again by the next run.

    Raises:
        ConfigError: an unknown case or setting, or no GPU for "cuda".
    """

    def __init__(
        self,
        model: str | None = None,
        cases: Iterable[str] | None = None,
        *,
        device: str = "cpu",
        dtype: str = "bfloat16",
        rounds: int | None = None,
        seed: int = 0,
        texts: str | None = None,
        smoke: bool = False,
        output: str | Path | None = None,
    ) -> None:
        wanted = list(CASES) if cases is None else [cases] if isinstance(cases, str) else list(cases)
        self.cases = chosen(wanted)
        counted = rounds if rounds is not None else SMOKE_ROUNDS if smoke else DEFAULT_ROUNDS
        self.settings = Settings(model, device, dtype, counted, seed, texts, smoke)
        self.output = None if output is None else Path(output)

    def run(self) -> QuantizationResult:
        """Measure what is not in `output` yet.

        Raises:
            MergeError, LoadError, ConfigError: no such model, one that is quantized, one that a case cannot use, or
                that does not fit; found before anything is measured.
            DataError: no such texts.
            CaseError: what went wrong in a case, once it measured.
            ValueError: the results in `output` were changed by hand.
        """
        if self.output is not None:
            check_folder(self.output)
        with quiet(), settled(), opened(self.settings) as (folder, scratch):
            model, sizes, identity = described(folder, self.settings)
            result = self._begun(identity)
            now = environment(self.settings.device)
            todo = [case for case in self.cases if not _is_done(result, case, now)]
            self._check(todo, model, sizes, folder)
            with tqdm(self.cases, desc="quantization", unit="case") as bar:
                bar.update(len(self.cases) - len(todo))
                for case in todo:
                    context = Context(self.settings, folder, scratch, functools.partial(_say, bar, case.name))
                    self._do(case, context, result, now)
                    bar.update()
        return result

    def _begun(self, identity: dict[str, Any]) -> QuantizationResult:
        """What is in `output` already, of the same model with the same settings."""
        fresh = QuantizationResult(identity, self.settings.named())
        if self.output is None or not (self.output / FILE).is_file():
            return fresh
        found = QuantizationResult.load(self.output)
        for ours, theirs in ((fresh.model, found.model), (fresh.settings, found.settings)):
            other = next((key for key in ours if ours[key] != theirs.get(key)), None)
            if other is not None:
                raise ConfigError(
                    f"{self.output / FILE} was measured with {other}={theirs.get(other)!r}, not {ours[other]!r}; name "
                    "another output, or remove it."
                )
        return found

    def _check(self, todo: list[Case], model: nn.Module, sizes: Sizes, folder: Path) -> None:
        """Refuse what cannot be measured, before anything is."""
        if not todo:
            return
        name = type(model).__name__
        if not reads_text(model):
            raise ConfigError(f"{name} reads no token ids; the suite measures models that read text.")
        language = [case.name for case in todo if case.language]
        if language and not _is_language_model(model):
            rest = sorted(set(CASES) - {case.name for case in CASES.values() if case.language})
            raise ConfigError(f"{name} is no causal language model, which {language} need; choose from {rest}.")
        if self.settings.texts is not None and precision.CASE in todo:
            texts_of(self.settings)
            if tokenizer_in(folder) is None:
                raise ConfigError(f"There is no tokenizer beside {name} to read texts with; leave texts out.")
        for case in todo:
            check_fits(case.need(sizes), self.settings, case.name)

    def _do(self, case: Case, context: Context, result: QuantizationResult, now: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            rows = tuple(case.run(context))
        except torch.OutOfMemoryError as error:
            raise CaseMemoryError(
                f"{case.name} ran out of memory on {self.settings.device}; free some of it, choose a smaller model, "
                "or leave the case out. What was done is kept, and the same command goes on."
            ) from error
        except (ImportError, OSError, ValueError) as error:
            raise CaseError(f"{case.name} failed: {error}") from error
        seconds = round(time.monotonic() - started, 1)
        done = {**result.cases, case.name: Found(rows, seconds, now, tuple(context.notes))}
        result.cases = {name: done[name] for name in CASES if name in done}
        if self.output is not None:
            result.keep(self.output)


def chosen(names: Iterable[str]) -> list[Case]:
    """The cases of these names, in the suite's order.

    Raises:
        ConfigError: an unknown one.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(CASES))
    if unknown:
        raise ConfigError(f"{unknown} is no case of the suite; choose from {list(CASES)}.")
    return [case for name, case in CASES.items() if name in wanted]


def _is_done(result: QuantizationResult, case: Case, now: dict[str, Any]) -> bool:
    return case.name in result.cases and result.cases[case.name].is_of(now)


def _is_language_model(model: Any) -> bool:
    generates = bool(getattr(model, "can_generate", bool)())
    return generates and not getattr(model.config, "is_encoder_decoder", False)


def _say(bar: Any, case: str, at: str) -> None:
    bar.set_postfix_str(f"{case}: {at}")
