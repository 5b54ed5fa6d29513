"""The options of `hybridsp convert`, and what it runs.

Every choice of how a layer computes has the name of its field in `HybridGLAConfig`, and reaches
the converter only if it was given, so that the defaults are the converter's own.
"""

from __future__ import annotations

import argparse

LINEAR_SWITCHES = {
    "linear-rope": "position embedding (RoPE) in linear layers",
    "softmax-rope": "position embedding (RoPE) in softmax layers",
    "linear-qk-norm": "RMSNorm on q and k of linear layers",
    "linear-output-norm": "RMSNorm on the output of linear layers",
}
LINEAR_OPTIONS = (
    "linear_decay",
    "linear_memory_range",
    "linear_feature_map",
    "linear_num_key_value_heads",
    *(name.replace("-", "_") for name in LINEAR_SWITCHES),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hybridsp convert`."""
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder with config.json and safetensors, or a GGUF file",
    )
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument(
        "--to",
        choices=("hybrid_gla", "fla"),
        default="hybrid_gla",
        help="family to write; fla, from a HybridGLA checkpoint; default %(default)s",
    )
    parser.add_argument(
        "--softmax-layers",
        default="0.25",
        metavar="WHICH",
        help="layers that keep softmax attention: a share, evenly spread (0.25), indices (3,7,11), "
        "a spacing (every:4), or the share hardest to replace (measured:0.25); default %(default)s",
    )
    parser.add_argument("--text", metavar="FILE", help="what to measure layers on (.txt, .jsonl)")
    add_linear_options(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "auto"),
        default="auto",
        help="of the weights written; auto is the source's (float32 for GGUF)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the new weights; default %(default)s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST")


def add_linear_options(parser: argparse.ArgumentParser) -> None:
    """How layers compute: fields of HybridGLAConfig by their names, left out where not given."""
    group = parser.add_argument_group("how layers compute", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--linear-decay",
        choices=("vector", "scalar", "key", "fixed"),
        default="vector",
        help="how linear layers forget: a gate per channel, a gate per head, the key as its own "
        "gate, or a constant per head; default %(default)s",
    )
    group.add_argument(
        "--linear-memory-range",
        type=float,
        nargs=2,
        metavar=("SHORTEST", "LONGEST"),
        help="tokens that fixed decays remember, and that vector and scalar gates start with",
    )
    group.add_argument(
        "--linear-feature-map",
        choices=("none", "relu", "elu", "softmax"),
        help="what q and k of linear layers pass",
    )
    group.add_argument(
        "--linear-output-gate",
        choices=("none", "silu", "sigmoid"),
        help="gate on the output of linear layers",
    )
    group.add_argument(
        "--linear-num-key-value-heads",
        type=int,
        metavar="HEADS",
        help="KV heads of linear layers: the source's, or a clone for every query head",
    )
    for name, what in LINEAR_SWITCHES.items():
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=what)


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp convert`."""
    from hybridsp.convert import convert, export_fla

    options = {name: getattr(args, name) for name in LINEAR_OPTIONS if hasattr(args, name)}
    gate = getattr(args, "linear_output_gate", None)
    if gate is not None:
        options["linear_output_gate"] = gate != "none"
        if gate != "none":
            options["linear_output_gate_act"] = gate
    if args.to == "fla":
        if len(options) > 1 or args.text or args.softmax_layers != "0.25":
            raise ValueError("--to fla writes a checkpoint as it is; leave other choices out")
        export_fla(args.src, args.dst, dtype=args.dtype, overwrite=args.overwrite)
        return
    convert(
        args.src,
        args.dst,
        softmax_layers=args.softmax_layers,
        text=args.text,
        dtype=args.dtype,
        seed=args.seed,
        overwrite=args.overwrite,
        **options,
    )


__all__ = ["add_arguments", "run"]
