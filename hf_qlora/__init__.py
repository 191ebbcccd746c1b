"""QLoRA for Hugging Face PEFT: one config, an ordinary adapter, nothing silent.

    import hf_qlora
    model = get_peft_model(model, hf_qlora.QLoRAConfig(r=64, lora_alpha=16, target_modules="all-linear"))

quantizes the loaded model to double-quantized NF4 in place, wraps its linear layers with LoRA and makes them
trainable; from there PEFT, Trainer and the Hub work as always. Importing the package registers it with PEFT; stock
configs behave as before.

Modules import downwards only (`[tool.importlinter]` in pyproject.toml has all of them):

    cli → commands → bench → demo → train → merge → registration → trainer → hooks | hub → saving → tuner
        → layers → quant → kernels → config
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_qlora.config import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.hub.callback import ModelCardCallback
from hf_qlora.layers.checkpointing import disable_checkpointing, enable_checkpointing
from hf_qlora.layers.head import disable_chunked_loss, enable_chunked_loss
from hf_qlora.merge import MergeReport, merge
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.calibrate.report import CalibrationReport
from hf_qlora.quant.calibrate.rows import CalibrationRows, calibration_rows
from hf_qlora.quant.calibrate.run import calibration_report
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.generation import fast_generation
from hf_qlora.quant.report import QuantizationReport
from hf_qlora.quant.survey import quantization_report
from hf_qlora.registration import register
from hf_qlora.train.depth import DepthScaleCallback
from hf_qlora.train.health import AdapterHealthCallback
from hf_qlora.train.memory import MemoryCallback
from hf_qlora.train.optimizer import create_optimizer
from hf_qlora.train.plan import MemoryPlan, plan_memory
from hf_qlora.tuner import QLoRAModel


if TYPE_CHECKING:
    from hf_qlora.bench.quantization.run import QuantizationBenchmark

__version__ = "0.1.0"
__all__ = [
    "AdapterHealthCallback",
    "AdaptiveDepthLoRAConfig",
    "Calibration",
    "CalibrationReport",
    "CalibrationRows",
    "DepthScaleCallback",
    "MemoryCallback",
    "MemoryPlan",
    "MergeReport",
    "ModelCardCallback",
    "NF4Config",
    "QLoRAConfig",
    "QLoRAModel",
    "QuantizationBenchmark",
    "QuantizationReport",
    "calibration_report",
    "calibration_rows",
    "create_optimizer",
    "disable_checkpointing",
    "disable_chunked_loss",
    "enable_checkpointing",
    "enable_chunked_loss",
    "fast_generation",
    "merge",
    "plan_memory",
    "quantization_report",
    "quantize_model",
]


def __getattr__(name: str) -> Any:
    """`QuantizationBenchmark`, which is imported where it is used: training needs nothing of the benches."""
    if name == "QuantizationBenchmark":
        from hf_qlora.bench.quantization.run import QuantizationBenchmark

        return QuantizationBenchmark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
