"""Benchmarks that a user runs on their own cluster: `hybridsp bench NAME`, under any launcher.

    all_scan    every All-Scan algorithm against the raw wire      hybridsp bench all-scan
    linear      the linear layer against its memory floor, FLA     hybridsp bench linear
                and every other way to parallelise it
    softmax     softmax attention against the kernel of one        hybridsp bench softmax
                device, every split in ring x Ulysses
    step        one training step of a whole model, beside         hybridsp bench step
                the planner's memory and time
    alst        the rival's step: DeepSpeed's own ALST             hybridsp bench alst
    tune        the kernels' launches for a new chip               hybridsp bench tune

Each folder begins at `command`, a module with `add_arguments(parser)` and `run(args)` that is named
in `cli.BENCHES`. What they share lies beside them: `job` starts the ranks, lets them meet and speak
with one voice, `timing` measures a call, `trace` shows what hides behind what, `record` keeps what
is found on disk, and `report` shows it in tables and pictures. Whatever cannot run is a row that
says why, so that one run answers for a whole cluster.
"""
