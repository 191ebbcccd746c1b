"""`hf-qlora plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qlora.commands.outcome import make_place, refused
from hf_qlora.console import misused


def plan(
    model: Annotated[str, typer.Argument(help="A folder, or a Hub id; only its config is read.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Give it again for each; all linear layers by default.")
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="DoRA.")] = False,
    task: Annotated[str, typer.Option(help="PEFT's task type, such as CAUSAL_LM or SEQ_CLS.")] = "CAUSAL_LM",
    full_logits: Annotated[bool, typer.Option("--full-logits", help="Without the loss in chunks.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="LoRA on the base as it is, without NF4.")] = False,
    optimizer: Annotated[str, typer.Option(help="As TrainingArguments(optim=...) has it.")] = "adamw_torch",
    checkpointing: Annotated[
        str | None, typer.Option(help="full, offload, or budget:2GiB, the bytes that layers may keep.")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Tokens of an MLP at a time.")] = None,
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16, as Trainer's bf16 and fp16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base; by default what its config says.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one.")] = None,
    budget: Annotated[str | None, typer.Option(help="What it should fit in, such as 24GiB.")] = None,
    largest: Annotated[
        str | None, typer.Option(help="batch_size, seq_len or rank: find the largest that fits the budget.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also plan the other modes of checkpointing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the plan into this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the parts of the peak into this .png file.")] = None,
) -> None:
    """How much memory a training run would take, before it: from shapes alone, in seconds."""
    from hf_qlora import QLoRAConfig, plots
    from hf_qlora.config.record import write_json
    from hf_qlora.train.plan import plan_memory, report

    mode, _, kept = (checkpointing or "").partition(":")
    if (mode == "budget") != bool(kept):
        raise misused(
            f"--checkpointing {checkpointing}: a budget, and nothing else, has its bytes behind it: budget:2GiB."
        )
    if budget is not None and budget.isdigit():
        raise misused(f"--budget {budget} has no unit; write {budget}GiB, or {budget}B if bytes are meant.")
    wanted = {"mode": mode or None, "budget_bytes": kept or None, "chunk_size": chunk_size}
    try:
        for file in filter(None, (json, plot)):
            make_place(file)
        if plot is not None:
            plots.pyplot()
            plots.check_path(plot)
        options: dict[str, Any] = {"quantization": None} if dense else {}
        config = QLoRAConfig(
            r=rank,
            target_modules=target_modules or "all-linear",
            task_type=task,
            use_dora=dora,
            chunked_loss=not full_logits,
            **options,
        )
        found = plan_memory(
            model,
            config,
            batch_size,
            seq_len,
            optimizer=optimizer,
            checkpointing=wanted,
            autocast=autocast,
            dtype=dtype,
            device=device,
            budget=budget,
            largest=largest,
            compare=compare,
        )
        report.print_plan(found)
        if json is not None:
            write_json(json, found.to_dict())
        if plot is not None:
            found.plot(plot)
    except (ImportError, OSError, ValueError) as error:
        raise refused(error) from None
    if not found.fits:
        raise typer.Exit(1)
