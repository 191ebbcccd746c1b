"""Plans are held against real bytes: of quantized models, of torch's allocator in a real step, of bitsandbytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import ARCHITECTURES, gpt2, llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

from hf_qlora import AdaptiveDepthLoRAConfig, MemoryPlan, NF4Config, QLoRAConfig, plan_memory, quantize_model
from hf_qlora.cli import app
from hf_qlora.kernels import loss
from hf_qlora.layers import attention
from hf_qlora.train.plan.optimizers import ALIASES, OPTIMIZERS
from hf_qlora.train.plan.solve import largest_that_fits
from hf_qlora.train.plan.trace import Trace
from hf_qlora.validation import ConfigError


BATCH, LENGTH = 2, 128

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def plan(model: Any = None, given: LoraConfig | None = None, **settings: Any) -> MemoryPlan:
    sizes = {"batch_size": BATCH, "seq_len": LENGTH, "device": "cpu"}
    return plan_memory(llama() if model is None else model, given or config(), **{**sizes, **settings})


def bytes_of_tensors(model: nn.Module) -> int:
    """Of everything that a model holds, each storage once."""
    found: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        parts = [tensor] if state is None else [tensor, state.absmax, state.code, state.offset]
        parts += [] if state is None else [state.state2.absmax, state.state2.code]
        found.update({part.data_ptr(): part.nbytes for part in parts if part.numel()})
    return sum(found.values())


def allocated_in_a_step(model: Any, inputs: dict[str, Tensor]) -> int:
    """The highest sum of what torch's CPU allocator gives and gets back in a second step, by torch's profiler."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    now = highest = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


# --- what is there all the time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [f for f in ARCHITECTURES if f.name in ("llama", "gpt2", "bert")], ids=lambda f: f.name
)
def test_base_and_adapters_are_the_bytes_of_the_real_model(family: Any) -> None:
    given = config(task_type=family.task_type, **family.options)
    found = plan(family.make(), given)
    real = get_peft_model(family.make(), given)
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert found.adapter_bytes == found.gradient_bytes == trained
    assert found.packed_bytes + found.dense_bytes + found.adapter_bytes == bytes_of_tensors(real)
    assert found.optimizer_bytes == 2 * trained


def test_a_model_in_memory_stays_as_it_is_and_plans_as_its_config_does(tmp_path: Path) -> None:
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = plan(model).to_dict()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)  # and nothing else: no weights are read
    from_folder = plan(tmp_path, dtype="float32").to_dict()
    assert from_folder.pop("model") == str(tmp_path)
    assert {name: value for name, value in found.items() if name != "model"} == from_folder


def test_quantized_and_adapted_models_plan_alike() -> None:
    def without_conversion(found: MemoryPlan) -> dict[str, Any]:
        return {**found.to_dict(), "conversion_peak_bytes": 0, "peak_bytes": 0, "model": ""}

    expected = without_conversion(plan())
    assert without_conversion(plan(quantize_model(llama(), NF4Config()))) == expected
    adapted = get_peft_model(llama(), config())
    found = plan_memory(adapted, None, BATCH, LENGTH, device="cpu")
    assert without_conversion(found) == expected
    assert found.conversion_peak_bytes == 0


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_state_of_bitsandbytes_optimizers_is_theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, large and pageable tensors, on the meta device: on the CPU bitsandbytes pages none."""
    sizes = (100, 4096, 5000, 120_000)
    cls = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
    optimizer = cls.get(name, bnb.optim.PagedAdamW32bit)(
        [nn.Parameter(torch.zeros(size, device="meta")) for size in sizes]
    )
    paged: list[Tensor] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: Any = None) -> Tensor:
        paged.append(torch.zeros(*shape, dtype=dtype, device="meta"))
        return paged[-1]

    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda *_: None)
    group = optimizer.param_groups[0]
    for i, parameter in enumerate(group["params"]):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(group, parameter, 0, i)
    tensors = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    on_host = sum(tensor.nbytes for tensor in paged)
    assert OPTIMIZERS[name].state_bytes(sizes) == (sum(tensors.values()) - on_host, on_host)


def test_every_name_of_an_optimizer_that_can_be_planned_is_known(tmp_path: Path) -> None:
    """transformers gives some optimizers several names: the same class with the same settings."""

    def made(name: str) -> Any:
        arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
        try:
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
        except (ImportError, ValueError):  # of other libraries
            return name
        return cls, str(sorted(settings.items()))

    known = {str(made(name)): name for name in OPTIMIZERS}
    assert len(known) == len(OPTIMIZERS)
    others = [name for name in OptimizerNames if name.value not in OPTIMIZERS]
    aliases = {name.value: known[str(made(name.value))] for name in others if str(made(name.value)) in known}
    assert aliases == ALIASES
    for alias, name in aliases.items():
        assert plan(optimizer=alias).to_dict() == plan(optimizer=name).to_dict()
    assert plan(optimizer=OptimizerNames.ADAMW_BNB).optimizer == "adamw_8bit"


# --- a step ----------------------------------------------------------------------------------------------------------


def test_a_trace_counts_what_is_alive_at_once() -> None:
    """Views are no bytes of their own, nor is what is on the meta device, nor what is away."""
    with FakeTensorMode(), Trace(granule=512) as trace:
        a = torch.zeros(1000)  # 4,000 bytes, of which the allocator makes 4,096
        b = a + a
        view = b[1:]
        del b
        c = torch.empty(10**9, device="meta")
        trace.move(trace.note(a), away=True)
        d = torch.zeros(1000)
        del view
        e = torch.zeros(100)
        trace.move(trace.note(a), away=False)
    peak = trace.peak()
    assert (peak.size, len(peak.blocks)) == (2 * 4096 + 512, 3)
    assert [block.size for block in trace.alive()] == [4096, 4096, 512]
    assert (c.numel(), len(d), len(e)) == (10**9, 1000, 100)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many chunks": {"chunk_bytes": 2**16},
    "full logits": {"chunked_loss": False},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "checkpointing": {"checkpointing": "full"},
    "dense base": {"quantization": None},
}


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_takes_what_the_allocator_gave(
    way: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What operations take and give back within themselves is not in the plan: so up to 5 % are let pass."""
    settings = dict(WAYS[way])
    checkpointing = settings.pop("checkpointing", None)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", settings.pop("chunk_bytes", loss.CHUNK_BYTES["cpu"]))
    sizes = {"n_positions": LENGTH} if make is gpt2 else {}
    real: Any = get_peft_model(make(**sizes), config(**settings)).train()
    real.config.use_cache = False
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 500, (BATCH, LENGTH))
    measured = allocated_in_a_step(real, {"input_ids": ids, "labels": ids})
    model = make(**sizes)
    model.config.use_cache = False
    found = plan(model, config(**settings), checkpointing=checkpointing)
    there = ("base", "adapters", "optimizer", "inputs")
    assert sum(size for part, size in found.at_peak.items() if part not in there) == pytest.approx(measured, rel=0.05)
    assert sum(found.at_peak.values()) == found.step_peak_bytes


def test_layers_keep_what_autograd_saves_in_them() -> None:
    """Each layer's saved storages in a real forward, parameters apart, and MLPs' products, which hooks alone save."""
    real: Any = get_peft_model(llama(), config()).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())}
    saved: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.setdefault(storage.data_ptr(), (tensor.detach(), storage.nbytes()))
        return tensor

    ids = torch.randint(1, 500, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real(input_ids=ids, labels=ids, use_cache=False).loss
    model = llama()
    model.config.use_cache = False
    found = plan(model)
    kept = sum(found.layer_bytes) + found.other_kept_bytes
    # Saved by operations that need no gradient of it, or by nobody and yet there: tensors of a row, and of a token.
    products = 2 * BATCH * LENGTH * model.config.intermediate_size * 4
    assert kept == pytest.approx(sum(size for _, size in saved.values()) - products, rel=0.04)
    assert len(found.layer_bytes) == 2
    assert loss.requires_grad


def test_checkpointing_keeps_a_layer_s_input_alone() -> None:
    hidden = BATCH * LENGTH * 128 * 4
    full = plan(checkpointing="full")
    assert full.layer_bytes == (hidden, hidden)
    assert full.step_peak_bytes < plan().step_peak_bytes
    compared = plan(compare=True).modes
    assert compared["full"]["peak"] == full.step_peak_bytes
    assert compared["none"] == {"layers": sum(plan().layer_bytes), "peak": plan().step_peak_bytes}


def test_a_budget_checkpoints_no_more_layers_than_it_must() -> None:
    hidden = BATCH * LENGTH * 128 * 4
    free = plan().layer_bytes
    allowed = hidden + free[1]
    found = plan(checkpointing={"mode": "budget", "budget_bytes": allowed})
    assert found.layer_bytes == (hidden, free[1])
    assert plan(checkpointing={"mode": "budget", "budget_bytes": allowed - 1}).layer_bytes == (hidden, hidden)
    assert plan(checkpointing={"mode": "budget", "budget_bytes": "1GiB"}).layer_bytes == free
    with pytest.raises(ConfigError, match=rf"inputs take {2 * hidden:,} bytes"):
        plan(checkpointing={"mode": "budget", "budget_bytes": 2 * hidden - 1})
    assert plan(checkpointing={"mode": "budget", "budget_bytes": 2 * hidden}).layer_bytes == (hidden, hidden)


def test_a_configs_checkpointing_is_planned_unless_another_is_asked_for() -> None:
    config = QLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", checkpointing="full")
    found = plan_memory(llama(), config, BATCH, LENGTH, device="cpu")
    assert found.checkpointing == "full"
    hidden = BATCH * LENGTH * 128 * 4
    assert found.layer_bytes == (hidden, hidden)
    other = plan_memory(llama(), config, BATCH, LENGTH, device="cpu", checkpointing="offload")
    assert other.checkpointing == "offload"


def test_offloaded_inputs_are_on_the_host() -> None:
    deep = llama(num_hidden_layers=8)
    full, offloaded = (plan(deep, device="cuda", checkpointing=mode) for mode in ("full", "offload"))
    hidden = BATCH * LENGTH * 128 * 4
    assert offloaded.host_bytes == 6 * hidden  # of eight, two are still being copied
    assert full.host_bytes == 0
    assert full.step_peak_bytes - offloaded.step_peak_bytes >= 4 * hidden
    assert plan(deep, checkpointing="offload").step_peak_bytes == plan(deep, checkpointing="full").step_peak_bytes


def test_chunks_of_an_mlp_take_less() -> None:
    wide = llama(intermediate_size=4096)
    whole, chunked = (
        plan(wide, checkpointing={"mode": "full", "chunk_size": size}).step_peak_bytes for size in (None, 16)
    )
    assert chunked < 0.7 * whole


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_every_family_is_planned_on_both_devices(family: Any) -> None:
    given = config(task_type=family.task_type, **family.options)
    for device in ("cpu", "cuda"):
        found = plan(family.make().bfloat16(), given, seq_len=16, device=device)
        assert found.step_peak_bytes > found.packed_bytes + found.dense_bytes + found.adapter_bytes
        assert found.conversion_peak_bytes > found.packed_bytes + found.dense_bytes


def test_accumulated_gradients_are_there_in_the_next_forward() -> None:
    rank = config(r=128)
    apart, together = plan(given=rank), plan(given=rank, accumulate=True)
    assert together.at_peak["gradients"] == together.gradient_bytes
    assert together.step_peak_bytes > apart.step_peak_bytes


# --- the largest that fits -------------------------------------------------------------------------------------------

GROWTHS: dict[str, Callable[[int], int]] = {
    "linear": lambda n: 1000 + 37 * n,
    "quadratic": lambda n: 500 + 3 * n * n,
    "steps": lambda n: 1000 * (1 + n // 7),
    "flat, then steep": lambda n: 2000 if n < 90 else 2000 + 50 * (n - 90),
    "flat": lambda n: 2000,
}


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_largest_is_that_of_a_search_through_all(growth: str) -> None:
    peak, limit = GROWTHS[growth], 200
    for budget in range(2000, 12000, 97):
        expected = max((n for n in range(1, limit + 1) if peak(n) <= budget), default=0)
        asked: list[int] = []

        def counted(number: int, asked: list[int] = asked) -> int:
            asked.append(number)
            return peak(number)

        assert largest_that_fits(counted, budget, "n", limit) == expected
        assert len(asked) <= 25
        assert growth != "linear" or len(asked) <= 5


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "rank"])
def test_the_largest_fits_and_the_next_does_not(name: str) -> None:
    allowed = plan(**({} if name != "rank" else {"given": config(r=40)})).peak_bytes + 200_000
    found = plan(budget=allowed, largest=name)
    number = getattr(found, name)
    assert found.fits
    assert found.peak_bytes <= allowed
    larger = plan(given=config(r=number + 1)) if name == "rank" else plan(**{name: number + 1})
    assert larger.peak_bytes > allowed


def test_a_budget_that_is_too_small_names_the_smallest_that_works() -> None:
    with pytest.raises(ConfigError, match="smallest") as caught:
        plan(budget="1MiB", largest="batch_size")
    smallest = int(str(caught.value).split("peak is ")[1].split(" bytes")[0].replace(",", ""))
    assert smallest == plan(batch_size=1).peak_bytes
    found = plan(budget=smallest, largest="batch_size").batch_size  # converting may take more than some rows do
    assert plan(batch_size=found).peak_bytes <= smallest < plan(batch_size=found + 1).peak_bytes
    with pytest.raises(ConfigError):
        plan(budget=smallest - 1, largest="batch_size")


# --- what is refused, shown and kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 1.5}, "seq_len=1.5"),
        ({"device": "tpu"}, "'tpu'.*cuda"),
        ({"optimizer": "adam"}, "'adam'.*adamw_8bit"),
        ({"checkpointing": "half"}, "'half'.*offload"),
        ({"checkpointing": "budget"}, "budget_bytes"),
        ({"checkpointing": {"mode": "full", "chunk": 3}}, "chunk_size"),
        ({"checkpointing": {"chunk_size": 0}}, "chunk_size=0"),
        ({"autocast": "int8"}, "autocast='int8'"),
        ({"dtype": "bfloat16"}, "dtype="),
        ({"budget": "much"}, "'much'"),
        ({"largest": "batch_size"}, "needs a budget"),
        ({"largest": "layers", "budget": "1GiB"}, "'layers'.*seq_len"),
        ({"model": "/not/there"}, "/not/there.*not there"),
        ({"model": 7}, "model=7"),
        ({"given": "r=4"}, "r=4"),
    ],
)
def test_misuse_is_explained(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(**settings)


def test_a_model_without_layers_to_checkpoint_says_so() -> None:
    (albert,) = [family for family in ARCHITECTURES if family.name == "albert"]
    with pytest.raises(ConfigError, match="no layers"):
        plan(albert.make(), config(task_type="SEQ_CLS"), checkpointing="full")


def test_a_plan_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    found = plan(compare=True, budget="1GiB")
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert found.save(tmp_path) == tmp_path / "memory_plan.json"
    assert MemoryPlan.load(tmp_path) == found
    assert {path.name for path in tmp_path.iterdir()} == names | {"memory_plan.json"}
    (tmp_path / "memory_plan.json").write_text('{"model": "half"')
    with pytest.raises(ConfigError, match="no memory plan"):
        MemoryPlan.load(tmp_path)


def test_the_command_says_and_draws_what_python_finds(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "model")
    options = ["--batch-size", "2", "--seq-len", "16", "--rank", "4", "--dtype", "float32", "--device", "cpu"]
    files = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "new" / "p.png"), "--budget", "1GiB"]
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), *options, *files])
    assert done.exit_code == 0, done.output
    found = MemoryPlan.from_dict(json.loads((tmp_path / "p.json").read_text()))
    expected = plan_memory(tmp_path / "model", config(), 2, 16, dtype="float32", device="cpu", budget="1GiB")
    assert found == expected
    assert str(expected) in done.output
    assert struct.unpack(">4s", (tmp_path / "new" / "p.png").read_bytes()[:4]) == (b"\x89PNG",)
    tight = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), *options, "--budget", "1MiB"])
    assert tight.exit_code == 1
    assert "does not fit" in tight.output
    wrong = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--checkpointing", "half"])
    assert wrong.exit_code == 2
    assert wrong.output.startswith("Error: mode='half' of checkpointing")


def test_a_largest_batch_is_found_where_larger_ones_leave_a_budget_of_checkpointing_no_room() -> None:
    settings = {"seq_len": LENGTH, "checkpointing": {"mode": "budget", "budget_bytes": 2**20}, "device": "cpu"}
    found = plan_memory(llama(), config(), largest="batch_size", budget="1GiB", **settings)
    plan_memory(llama(), config(), found.batch_size, **settings)
    with pytest.raises(ConfigError, match="budget_bytes=1,048,576 is too small"):
        plan_memory(llama(), config(), found.batch_size + 1, **settings)


def test_a_plan_leaves_the_losses_of_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, W = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16)
    target = torch.arange(8)
    expected = torch.nn.functional.cross_entropy(hidden @ W.t(), target)
    found: list[float] = []
    original = loss._frozen_chunks

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(loss, "_frozen_chunks", original)
        thread = Thread(
            target=lambda: found.append(float(loss.linear_cross_entropy(hidden.detach(), lambda: W, None, target)))
        )
        thread.start()
        thread.join()
        return original(*args)

    monkeypatch.setattr(loss, "_frozen_chunks", meanwhile)
    plan(device="cuda")
    assert found == [pytest.approx(float(expected), rel=1e-5)]


def test_no_code_of_a_folder_is_run_and_quantized_ones_are_refused(tmp_path: Path) -> None:
    saved = llama().config
    for name, more in (
        ("evil", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
        ("packed", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**saved.to_dict(), **more}))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        plan_memory(tmp_path / "evil", config(), device="cpu")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match=r"stored quantized \(gptq\)"):
        plan_memory(tmp_path / "packed", config(), device="cpu")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("full", "full"),
        ("offload", "offload"),
        ({"mode": "budget", "budget_bytes": 2**21}, "budget (0.00 GiB)"),
        ({"mode": None, "chunk_size": 4}, "none, MLP in chunks of 4"),
    ],
    ids=str,
)
def test_what_is_set_in_a_model_is_planned(wanted: Any, said: str) -> None:
    given = config(checkpointing=wanted)
    expected = plan_memory(llama(), given, BATCH, LENGTH, device="cpu")
    found = plan_memory(get_peft_model(llama(), given), None, BATCH, LENGTH, device="cpu")
    assert found.checkpointing == expected.checkpointing == said
    assert found.step_peak_bytes == pytest.approx(expected.step_peak_bytes, rel=0.01)  # a hook on the embeddings
    assert found.layer_bytes == expected.layer_bytes


def test_the_dtype_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "in float32 on cpu" in str(plan())
    assert "in bfloat16 on cpu" in str(plan(llama().bfloat16()))
    assert plan(autocast="bfloat16").dtype == "float32, autocast to bfloat16"


@pytest.mark.parametrize("budget", [0, "5%", "0GiB"])
def test_a_budget_is_an_amount(budget: Any) -> None:
    with pytest.raises(ConfigError, match="must be a positive number of bytes"):
        plan(budget=budget)


def test_experts_are_planned_in_bfloat16_and_refused_quietly_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    mixtral = next(family for family in ARCHITECTURES if family.name == "mixtral")
    given = config()
    assert plan_memory(mixtral.make().bfloat16(), given, BATCH, LENGTH, device="cpu").step_peak_bytes > 0
    with pytest.raises(ConfigError, match=r"in bfloat16 \(dtype=\)"):
        plan_memory(mixtral.make(), given, BATCH, LENGTH, device="cpu")
    assert "fake_tensor" not in {record.name.rpartition(".")[2] for record in caplog.records}


def test_more_tokens_than_positions_are_said(caplog: pytest.LogCaptureFixture) -> None:
    plan(seq_len=LENGTH)
    assert "positions" not in caplog.text
    plan(llama(max_position_embeddings=8), seq_len=16)
    assert "has 8 positions, and is planned with 16" in caplog.text


def test_attention_without_values_is_not_observed(caplog: pytest.LogCaptureFixture) -> None:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "attention": "concentration"}
    attention._say_once.cache_clear()
    plan(given=AdaptiveDepthLoRAConfig(**options))
    assert "cannot be observed" not in caplog.text
