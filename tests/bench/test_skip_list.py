"""The random lists that a suggested one is compared with: as many bytes, other layers; and the table."""

from __future__ import annotations

from architectures import llama

from hf_qlora import quantization_report
from hf_qlora.bench.skip_list import draw, markdown


def test_a_draw_takes_the_bytes_of_the_suggested_layers_but_for_less_than_a_layer() -> None:
    report = quantization_report(llama(num_hidden_layers=6), quant_types=("nf4",), budget="20%")
    costs = {layer.name: layer.cost("nf4-64-dq") for layer in report.layers}
    drawn = [draw(report, seed) for seed in range(3)]
    for names in drawn:
        left = report.extra_bytes - sum(costs[name] for name in names)
        assert 0 <= left < min(cost for name, cost in costs.items() if name not in names)
        assert len(set(names)) == len(names)
    assert drawn[0] != drawn[1] != drawn[2]
    assert draw(report, 0) == drawn[0]


def test_the_table_has_a_row_for_each_arm() -> None:
    arm = {"layers": ["a", "b"], "bytes": 2**20, "error": 0.09, "perplexity": 8.5}
    text = markdown({"answers": 4, "dense": 7.5, "arms": {"suggested": arm}})
    assert text.splitlines()[-1] == "| suggested | 2 | 1.0 | 0.0900 | 8.500 |"
    assert text.startswith("4 answers; dense: 7.500.")
