"""The benchmark suite: what quantizing a given model saves, costs and loses. `hf-qlora bench quantization`.

    memory, latency, precision, double_quant, train_step, load, merging   a case each: what is measured, and how
    case.py      what a case is
    rows.py      what it returns: rows of raw numbers, and how each kind of number is read
    settings.py  what is measured, on which model, and whether it fits
    run.py       the runner, and `QuantizationBenchmark`, its Python face
    result.py    what comes of it: saved, read back, resumed
    tables.py    rows as tables, for the terminal and the page
    pictures.py  plots
    page.py      one HTML page with all of it

The arms of a timing take turns, round after round and another first in each, so that what disturbs one disturbs all;
rounds before the count are for caches, allocators and repacking; every reading of the clock waits for the device.
There are as many rounds as were asked for, of merging three at most. Peaks of memory are of a process for each arm, of
merging's of one for all; on CUDA, which counts tensors, of this one. Raw rounds are kept, and results are sealed
(`bench/results.py`).
"""
