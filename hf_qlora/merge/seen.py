"""The base that a merge reads, compared with the one that the adapter was trained on.

Layers come one at a time, and each is sampled as `quant/fingerprint.py` samples it in a whole model. A part may be
sampled more densely than the whole was, from the same beginning: what the adapter's file does not have is cut off.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from peft import LoraConfig
from torch import Tensor, nn

from hf_qlora.config import QLoRAConfig
from hf_qlora.config.fingerprint import DensePrint, Fingerprint, LayerPrint
from hf_qlora.merge.report import MergeRefused, MergeReport
from hf_qlora.merge.sources import record_of
from hf_qlora.quant.comparison import compare
from hf_qlora.quant.fingerprint import take_fingerprint


logger = logging.getLogger(__name__)

NOT_SAID = "The base was not compared with the one trained on, of which the adapter has no fingerprint."
SAME = "The base is the one that the adapter was trained on, by its fingerprint."
ROUNDED = "The base is the one that the adapter was trained on, quantized with other roundings."


class SeenBase:
    """What has been read of a base.

    Args:
        config: the adapter's, whose record has the fingerprint to compare with, if any.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        record = record_of(config)
        self.expected = Fingerprint.from_dict(record["fingerprint"]) if "fingerprint" in record else None
        self.layers: dict[str, LayerPrint] = {}
        self.dense: dict[str, DensePrint] = {}
        self.formats: set[str] = set()

    def add(self, name: str, module: nn.Module) -> None:
        """Sample a module, with its weights as they were while training."""
        if self.expected is None:
            return
        part = take_fingerprint(module)
        if part is None:  # an empty tensor
            return
        for key, layer in part.layers.items():
            self.layers[_joined(name, key)] = self._cut_layer(_joined(name, key), layer)
        for key, tensor in part.dense.items():
            self.dense[_joined(name, key)] = self._cut_tensor(_joined(name, key), tensor)
        self.formats |= {part.format} - {""}

    def add_tensor(self, name: str, value: Tensor) -> None:
        """Sample a parameter."""
        module, _, key = name.rpartition(".")
        alone = nn.Module()
        alone.register_parameter(key, nn.Parameter(value, requires_grad=False))
        self.add(module, alone)

    def judge(self, report: MergeReport, force: bool) -> None:
        """Note in the report which base it was; warn of another one.

        Raises:
            MergeRefused: it is another one, the adapter asks for an error, and it is not forced.
        """
        if self.expected is None:
            report.notes.append(NOT_SAID)
            return
        found = Fingerprint("", " and ".join(sorted(self.formats))[:100], False, self.layers, self.dense)
        result = compare(self.expected, found)
        if result.verdict != "differs":
            report.notes.append(SAME if result.verdict == "same" else ROUNDED)
            return
        said = (
            f"{report.base} is another base than the adapter was trained on: {result.found}. The likely cause is "
            f"{result.cause}."
        )
        report.notes.append(said)
        report.another_base = True
        asked = self.config.on_base_mismatch if isinstance(self.config, QLoRAConfig) else "ignore"
        if asked == "error" and not force:
            raise MergeRefused(f"{said} Name the one that it was trained on; force merges all the same.", report)
        if asked != "ignore":
            logger.warning("%s", said)

    def _cut_layer(self, name: str, layer: LayerPrint) -> LayerPrint:
        known = self.expected.layers.get(name) if self.expected is not None else None
        return layer if known is None else replace(layer, codes=layer.codes[: len(known.codes)])

    def _cut_tensor(self, name: str, tensor: DensePrint) -> DensePrint:
        known = self.expected.dense.get(name) if self.expected is not None else None
        return tensor if known is None else replace(tensor, values=tensor.values[: len(known.values)])


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name and key else name or key
