"""The cost of a training step: ours, stock PEFT's, and the frozen base's own.

    time      all arms in one process, in turn, round after round: what disturbs one disturbs all. Ratios of medians.
    memory    each arm in a process of its own: the peak of steady steps, less what the imports alone take
    saved     bytes that the adapted layers keep for backward, each storage once, parameters left out
    rate      the step's arithmetic over its time, beside a matrix product's rate in the same rounds

Weights are random, of a real model's shape; all arms start from the same ones and see the same batches. Every arm's
loss and gradient norm are kept: a fast step that learns nothing would show.
"""
