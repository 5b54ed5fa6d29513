"""Save at every mesh and ZeRO stage, resume at every other: the table of `docs/reliability.md`.

    python tests/resume_matrix.py [--dtype bfloat16]

Each row is where a run was saved, each column where it went on; a cell is the largest relative
difference of a loss from the run that was not stopped. Ends with exit code 1 if one exceeds the
tolerance.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from distributed import run_ranks
from resume_cases import CASES, MESHES, STAGES, resume_all, save_all, world_of

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
TIMEOUT = 1500


def quietly(fn, world, *args):
    """What rank 0 returns, without what DeepSpeed says on the way."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run_ranks(fn, world, *args, timeout=TIMEOUT)[0]


def differences(directory, dtype):
    """Largest relative difference of each pair (saved at, resumed at)."""
    undisturbed, found = {}, {}
    for world in (2, 4):
        cases = [case for case in CASES if world_of(case) == world]
        undisturbed |= quietly(save_all, world, directory, cases, dtype)
    for mesh in MESHES:
        targets = [(mesh, stage) for stage in STAGES]
        pairs = [(source, target) for source in CASES for target in targets]
        resumed = quietly(resume_all, world_of(targets[0]), directory, pairs, dtype)
        for (source, target), losses in resumed.items():
            wanted = undisturbed[source]
            found[source, target] = max(
                abs(here - there) / there for here, there in zip(losses, wanted, strict=True)
            )
        print(f"resumed at {mesh}: largest {max(found.values()):.1e}", file=sys.stderr, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = differences(Path(directory), getattr(torch, options.dtype))
    names = {case: f"{case[0]} Z{case[1]}" for case in CASES}
    print("| saved at | " + " | ".join(names[case] for case in CASES) + " |")
    print("|---" * (len(CASES) + 1) + "|")
    for source in CASES:
        cells = (f"{found[source, target]:.0e}" for target in CASES)
        print(f"| {names[source]} | " + " | ".join(cells) + " |")
    worst = max(found.values())
    passed = sum(value <= TOLERANCE[options.dtype] for value in found.values())
    print(
        f"{passed} of {len(found)} pairs within {TOLERANCE[options.dtype]:.0e}; worst {worst:.1e}"
    )
    return int(passed < len(found))


if __name__ == "__main__":
    sys.exit(main())
