"""The same training in one process and in two: what the tests of this folder run in either.

`in_processes` starts processes that meet over gloo on the CPU, as `torchrun` would, and collects what each returned.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from architectures import VOCAB, llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from hf_qlora import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers.logits import LazyLogits


STEPS, LENGTH = 3, 8  # attention is observed on all tokens of so short a row
ROWS = 4  # of a step, over all processes
CONFIGS: dict[str, Callable[..., QLoRAConfig]] = {
    "nf4": QLoRAConfig,
    "depth": lambda **options: AdaptiveDepthLoRAConfig(attention="concentration", **options),
}


def in_processes(work: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(folder, *arguments)` returns in each of `count` processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (count, port, work, folder, arguments), nprocs=count)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(count)]


def _process(
    rank: int, count: int, port: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in meeting.items()})
    dist.init_process_group("gloo")
    result = work(folder, *arguments)
    torch.save(result, folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This process' rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return llama().to(dtype)


def adapted(kind: str, model: nn.Module | None = None) -> PeftModel:
    """A tiny llama with an adapter that matters from the first step on, the same in every process."""
    config = CONFIGS[kind](r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return randomized(get_peft_model(base() if model is None else model, config))


def randomized(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.device)
    return model


def rows() -> list[dict[str, Tensor]]:
    """Rows whose labels begin at another place in each: a mean of means is far from the mean."""
    made = []
    tokens = torch.randint(1, VOCAB, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
    for number, ids in enumerate(tokens):
        labels = ids.clone()
        labels[: 1 + 5 * number % (LENGTH - 1)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def averages(model: PeftModel) -> dict[str, Tensor]:
    """What the depth scales have observed of attention."""
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(".observed")}


def outside(logits: Tensor, inputs: dict[str, Tensor], total: int) -> Tensor:
    """The loss that the model computes, computed of its logits."""
    targets = inputs["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).float(), targets, reduction="sum") / total


def steps_of_sgd(model: nn.Module, parameters: list[nn.Parameter], own_loss: bool = False) -> list[float]:
    """A token-weighted loss over all processes, written out; its value at each step."""
    rank, count = world()
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    data = rows()
    for step in range(STEPS):
        batch = data[step * ROWS : (step + 1) * ROWS]
        total = sum(int((row["labels"][1:] != -100).sum()) for row in batch)
        own = batch[rank * ROWS // count : (rank + 1) * ROWS // count]
        inputs = {name: torch.stack([row[name] for row in own]) for name in own[0]}
        outputs = model(**inputs, num_items_in_batch=total)
        assert isinstance(outputs.logits, LazyLogits)
        assert outputs.logits.made is None  # nobody reads them
        loss = (outside(outputs.logits, inputs, total) if own_loss else outputs.loss) * count  # gradients are averaged
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() / count)
    summed = torch.stack(losses)
    if count > 1:
        dist.all_reduce(summed)
    return list(summed.tolist())


def plain_loop(kind: str, own_loss: bool = False, **ddp: Any) -> dict[str, Any]:
    """A loop of one's own; in several processes under DistributedDataParallel."""
    model = adapted(kind).train()
    started = adapters(model)
    wrapped = DistributedDataParallel(model, **ddp) if world()[1] > 1 else model
    losses = steps_of_sgd(wrapped, [p for p in model.parameters() if p.requires_grad], own_loss)
    return {"started": started, "adapters": adapters(model), "averages": averages(model), "losses": losses}


def trained(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Trainer's training; it saves checkpoints and at the end."""
    rank, count = world()
    own_folder = folder / f"{kind}-{count}-{rank}"  # of each process, so that it is seen who writes
    model = adapted(kind)
    started = adapters(model)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // count,
        "optim": "sgd",
        "learning_rate": 0.5,
        "logging_steps": 1,
        "save_steps": STEPS,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(model, TrainingArguments(str(own_folder), **{**settings, **options}), train_dataset=rows())
    trainer.train()
    trainer.save_model(str(own_folder / "adapter"))
    return {
        "started": started,
        "adapters": adapters(model),
        "averages": averages(model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "folder": own_folder,
    }
