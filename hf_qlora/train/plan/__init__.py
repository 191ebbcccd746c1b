"""Peak memory of a training run, known before it: `plan_memory`.

A step is run on the meta device (`layout.py` makes the model, `step.py` runs it, `trace.py` counts), so that a plan
takes seconds, no weights, and no formula for any family of models. It counts every tensor that is alive at once, which
is what torch's allocator counts on CUDA. On the CPU a process takes more: what the libraries take, and what the heap
has not given back.
"""

from hf_qlora.train.plan.memory_plan import MemoryPlan
from hf_qlora.train.plan.planner import plan_memory


__all__ = ["MemoryPlan", "plan_memory"]
