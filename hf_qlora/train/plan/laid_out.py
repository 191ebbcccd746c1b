"""A model without weights that is ready to be run, and what its weights would take."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.layers import attention
from hf_qlora.quant.base import is_quantized
from hf_qlora.quant.footprint import footprint
from hf_qlora.train.plan import layout
from hf_qlora.train.plan.convert import conversion_peak


@dataclass
class LaidOut:
    """See the module.

    Attributes:
        mode: that the model's tensors are of.
        bytes: by the names of `MemoryPlan`.
        conversion_peak: bytes in use at most while the base is quantized; 0 where it is not.
    """

    model: PeftModel
    mode: FakeTensorMode
    rank: int
    bytes: dict[str, int]
    conversion_peak: int

    @classmethod
    def of(cls, make_base: layout.Base, config: LoraConfig | None, device: str) -> LaidOut:
        base = make_base()
        peak = 0
        quantization = config.quantization if isinstance(config, QLoRAConfig) else None
        if isinstance(quantization, NF4Config) and not is_quantized(base) and isinstance(config, QLoRAConfig):
            dense = footprint(base).total_bytes
            shapes, dtype = layout.pack(base, config)
            peak = conversion_peak(dense, shapes, dtype, quantization, device)
        model = layout.adapted(base, config).train()
        attention.unwatch(model)  # it has no attention to observe
        counted = footprint(model)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        layout.make_fake(model, mode)
        sizes = {
            "packed_bytes": counted.total_bytes - counted.dense_bytes,
            "dense_bytes": counted.dense_bytes - trained,
            "adapter_bytes": trained,
            "gradient_bytes": trained,
        }
        return cls(model, mode, int(next(iter(model.peft_config.values())).r), sizes, peak)
