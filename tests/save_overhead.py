"""What checkpoints cost: steps without saves, with saves at once, and with saves in the background.

    torchrun --nproc_per_node 1 tests/save_overhead.py --save-every 20 --output-dir /tmp/overhead
    torchrun --nproc_per_node 4 tests/save_overhead.py --ring 2 --ulysses 2 --save-every 6 ...

The shape of the model is SmolLM2-135M's (`make demo`), a quarter of its layers softmax. The three
ways take turns, so that what else the machine does hits all of them. A save's cost is what its
round takes longer than the rounds without one: in seconds, in percent of those, and as the time
between saves from which on it is 2%. A round ends when its save is complete. The first save of a
run gets the memory that the later ones use again; it is shown by itself and not in the medians.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import hybridsp
from hybridsp.checkpoint import CheckpointSaver
from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM

WAYS = ("none", "at once", "background")


def model_of(options):
    kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(1000)]
    config = HybridGLAConfig(
        vocab_size=options.vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        layer_types=kinds[: options.layers],
        linear_num_heads=9,
        linear_num_key_value_heads=3,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=options.length,
    )
    return HybridGLAForCausalLM(config).to(torch.bfloat16)


def start(options):
    mesh = hybridsp.SPMesh(ring=options.ring, ulysses=options.ulysses)
    torch.manual_seed(0)
    model = model_of(options)
    model.activation_checkpointing_enable()
    hybridsp.parallelize(model, mesh)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": options.zero},
        "bf16": {"enabled": True},
    }
    return hybridsp.initialize(model, mesh, config, self_check=False), mesh


def rounds_of(options):
    """Seconds of each round of `save_every` steps, and of its call of `save`, by way."""
    engine, mesh = start(options)
    tokens = torch.randint(options.vocabulary, (1, options.length))
    batch = hybridsp.shard_batch({"input_ids": tokens, "labels": tokens}, mesh)
    for _ in range(3):
        hybridsp.train_step(engine, [batch])
    seconds = {way: [] for way in WAYS}
    blocked = {way: [] for way in WAYS}
    savers = {
        way: CheckpointSaver(
            engine,
            mesh,
            Path(options.output_dir) / way.replace(" ", "-"),
            keep=1,
            background=way == "background",
        )
        for way in WAYS
    }
    total = (1 + options.rounds) * len(WAYS) * options.save_every
    bar = tqdm(total=total, unit="step", disable=mesh.rank > 0)
    for number in range(1 + options.rounds):
        for way, saver in savers.items():
            bar.set_description(f"round {number}, {way}")
            mesh.agree(None)
            begin = time.perf_counter()
            if way != "none":
                saver.save(number + 1, {})
            blocked[way].append(time.perf_counter() - begin)
            for _ in range(options.save_every):
                hybridsp.train_step(engine, [batch])
                saver.poll()
                bar.update()
            saver.wait()
            seconds[way].append(time.perf_counter() - begin)
        if mesh.rank == 0:
            took = [f"{way} {seconds[way][-1]:.2f} s ({blocked[way][-1]:.2f})" for way in WAYS]
            bar.write(f"round {number} (until save returned): {', '.join(took)}", file=sys.stderr)
    bar.close()
    return seconds, blocked, mesh


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", required=True)
    for name, value in {
        "save-every": 20,
        "rounds": 3,
        "length": 2048,
        "layers": 30,
        "vocabulary": 49152,
        "zero": 3,
        "ring": 1,
        "ulysses": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    seconds, blocked, mesh = rounds_of(options)
    if mesh.rank == 0:
        manifest = next(
            Path(options.output_dir).glob("background/checkpoints/step-*/manifest.json")
        )
        files = json.loads(manifest.read_text())["files"]
        size = sum(file["size"] for file in files.values()) / 2**30
        without = statistics.median(seconds["none"][1:])
        print(f"checkpoint {size:.2f} GiB, step {without / options.save_every:.3f} s on {mesh}")
        for way in WAYS:
            each, wait = statistics.median(seconds[way][1:]), statistics.median(blocked[way][1:])
            cost = each - without
            print(
                f"{way:<11} {each:8.2f} s per round, save returns after {wait:5.2f} s: "
                f"{cost:+.2f} s, {100 * cost / without:+.1f}%; 2% every {cost / 0.02:.0f} s; "
                f"first round {seconds[way][0]:.2f} s, returns after {blocked[way][0]:.2f} s"
            )
        shutil.rmtree(options.output_dir)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
