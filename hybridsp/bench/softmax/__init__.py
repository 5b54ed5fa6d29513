"""Softmax attention over many ranks against the kernel of one: `hybridsp bench softmax`.

`command` times the `cases`, which are `ops` that do `work`; `check` holds them against plain
attention, `model` says what they would do on other numbers of ranks, `report` shows it all.
"""
