"""Merging with a choice, and with its error measured.

An adapter was trained on a base, most often NF4: the function that was trained is Q(W) + ΔW. There are three weights
to write it into:

| onto | weight M | what is lost |
| --- | --- | --- |
| "dequantized" | Q(W) + ΔW | one rounding to the base's dtype |
| "original" | W + ΔW | the quantization error comes back, and the adapter has learned with the other base |
| "nf4" | Q(Q(W) + ΔW) | ΔW where it is below a step of NF4, which is nearly everywhere |

Calibrated on rows of text (`quant/calibrate/`), rounding to NF4 keeps most of ΔW. Each merge is compared with the
model as it was trained: layer by layer as weights, and on text as logits; a calibrated one on its calibration's
held-out rows. The layers' own merge (`layers/linear.py`) does the arithmetic. `merge` works on a model in memory and
leaves it as it is; `stream.merge_files` works from files to files, one layer at a time.

    measure.py   one layer: ‖M − (Q(W) + ΔW)‖, and ΔW in steps of NF4
    probe.py     the whole model: KL between logits, with and without the adapter
    held_out.py  the whole model on a calibration's held-out rows: loss and outputs
    report.py    what `merge` returns
    record.py    what lies beside a merged model: its card, and the record of a calibration
    twin.py      a model's second self, which may share its weights
    original.py  the dense model that a base was made of
    in_memory.py merge
    folder.py    an output folder that is there whole or not at all
    tensors.py   safetensors files, one tensor at a time
    attach.py    an adapter on a base that it fits
    skeleton.py  base and adapter without the base's weights
    layerwise.py the same merge, from tensors to tensors
    seen.py      the base that is read, against the one trained on
    sources.py   folders and Hub ids of adapters and bases
    load.py      a model of the class that its config names
    stream.py    merge_files
"""

from hf_qlora.merge.in_memory import merge
from hf_qlora.merge.report import MergeReport


__all__ = ["MergeReport", "merge"]
