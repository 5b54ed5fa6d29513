"""What the guards of a run cost, each by itself.

    torchrun --nproc_per_node 2 tests/guard_overhead.py --layers 32

Prints per guard: microseconds per optimizer step, or per start where it is asked once.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

import hybridsp
from hybridsp.faults import Position, StopSignals, Watchdog, batch_facts, check_in_step, follow

ROUNDS, REPEATS = 7, 50


def microseconds(mesh, work, repeats=REPEATS):
    """Median over rounds of the mean time of a call; ranks begin a round together."""
    times = []
    for _ in range(ROUNDS):
        dist.barrier(group=mesh.data_group)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times) * 1e6


def passes(layers, hidden):
    for layer in layers:
        hidden = layer(hidden)
    hidden.sum().backward()


def following(count):
    """Processor time of forward and backward through layers that do nothing, followed less not."""
    layers = [nn.Identity() for _ in range(count)]
    hidden = torch.ones(1, requires_grad=True)

    def processor_time():
        before = time.process_time()
        for _ in range(REPEATS):
            passes(layers, hidden)
        return (time.process_time() - before) / REPEATS * 1e6

    plain = min(processor_time() for _ in range(ROUNDS))
    with follow(layers, Position()):
        return min(processor_time() for _ in range(ROUNDS)) - plain


def watching(mesh, folder):
    """Processor time of one look of the watching thread, of which there is one per second."""
    with Watchdog(mesh, folder, hang_timeout=900, tick=1000) as watchdog:
        watchdog.look()
        before = time.thread_time()
        for _ in range(REPEATS):
            watchdog.look()
        return (time.thread_time() - before) / REPEATS * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=131072, help="of the batch that is compared")
    options = parser.parse_args()
    mesh = hybridsp.SPMesh()
    batch = {"input_ids": torch.zeros(1, options.tokens, dtype=torch.int64)}
    facts = {f"fact {i}": "a value of some length" for i in range(60)}
    with StopSignals() as signals, tempfile.TemporaryDirectory() as folder:
        found = {
            "ranks": mesh.world_size,
            "device": mesh.device.type,
            "signals, us per step": microseconds(mesh, lambda: signals.agreed(mesh)),
            f"following {options.layers} layers, us per step": following(options.layers),
            "watching, us per second": watching(mesh, folder),
            f"batch of {options.tokens} tokens, us per stage": microseconds(
                mesh, lambda: batch_facts([batch]), 5
            ),
            "comparing 60 facts, us per stage": microseconds(
                mesh, lambda: check_in_step(mesh, facts, facts), 5
            ),
        }
    if mesh.rank == 0:
        print(json.dumps({k: v if isinstance(v, str) else round(v, 1) for k, v in found.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
