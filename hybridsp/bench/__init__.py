"""Benchmarks that a user runs on their own cluster: `hybridsp bench NAME`, under any launcher.

    all_scan    every All-Scan algorithm against the raw wire      hybridsp bench all-scan
    linear      the linear layer against its memory floor, FLA     hybridsp bench linear
                and every other way to parallelise it
    softmax     softmax attention against the kernel of one    hybridsp bench softmax
                device, every split in ring x Ulysses
    step        one training step of a whole model, beside     hybridsp bench step
                the planner's memory and time

A benchmark is a module with `add_arguments(parser)` and `run(args)`, named in `cli.BENCHES`. It
measures with `timing`, joins the job and speaks with one voice through `job`, and leaves a table, a
JSON file and a picture through `report`. Whatever cannot run is a row that says why, so that one
run answers for a whole cluster.
"""
