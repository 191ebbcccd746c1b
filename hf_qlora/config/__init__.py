"""The configuration: what a user types, what is refused, and what an adapter's JSON says.

A config has two forms.

* In memory it is *native*: every field as the user set it, so that training continues as it began.
* On disk it is *portable*: the top-level keys are those of a plain `peft.LoraConfig` whose scaling is `lora_alpha / r`
  everywhere (`use_rslora: false`, `alpha_pattern: {}`, `init_lora_weights: true`), because llama.cpp ignores the first
  two and PEFT would re-run the third. What was taken out of the scaling is multiplied into `lora_B`
  (`layers/fold.py`), and the native values stand under the one extra key, `hf_qlora`.

Reading a JSON with that key gives the native config back. Everything is validated when a config is made
(`validation.py`); layers trust it.
"""

from hf_qlora.config.adaptive_depth import AdaptiveDepthLoRAConfig
from hf_qlora.config.nf4 import NF4Config
from hf_qlora.config.qlora import QLoRAConfig


__all__ = ["AdaptiveDepthLoRAConfig", "NF4Config", "QLoRAConfig"]
