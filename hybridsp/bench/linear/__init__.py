"""The linear layer against its memory floor, FLA and other parallelism: `hybridsp bench linear`.

`command` times the `ops`, `check` holds them against a naive recurrence, `kernels` takes them
apart, `report` shows it all.
"""
