"""The experiment on depth: does a scale per layer help, at equal ranks?

    for each arm: learning rate by the validation split, one seed → fresh seeds at that rate → test split

Every run is one line of a JSON-lines file, appended when it ends; a run that is there is not done again, so that an
interrupted experiment goes on where it stopped. Within a seed all arms see the same examples in the same order and
start from the same `lora_A` (paired comparison). They train as many weights as LoRA, but for one number a module where
there are gains, and DoRA's magnitudes. `report.py` makes the table.
"""
