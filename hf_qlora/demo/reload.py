"""The fresh process that reloads the adapter: `python -m hf_qlora.demo.reload BASE ADAPTER PROBE`.

Prints how far its logits are from those in the file PROBE, as JSON. Imported by nothing: it is a program.
"""

from __future__ import annotations

import json
import sys

from peft import PeftModel
from safetensors.torch import load_file

from hf_qlora.demo.models import difference, load_dense_model, token_logits
from hf_qlora.demo.report import quiet_libraries


def reload_and_compare(base: str, adapter: str, probe: str) -> dict[str, float]:
    """The largest difference from the logits in the file `probe`."""
    saved = load_file(probe)
    logits = saved.pop("logits")
    model = PeftModel.from_pretrained(load_dense_model(base), adapter)
    return difference(token_logits(model, saved), logits)


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(reload_and_compare(*sys.argv[1:])))
