"""The options of `hybridsp bench step`, and those that `hybridsp bench alst` shares with it.

What can be told from the options alone is refused here, before a model is read.
"""

from __future__ import annotations

import argparse

from hybridsp.bench.options import add_out, names, size, sizes
from hybridsp.bench.step.data import ONE, OWN
from hybridsp.planner import GPUS
from hybridsp.planner.presets import PRESETS
from hybridsp.planner.search import DTYPE_BYTES

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_TOKENS = {"cuda": (2**15, 2**17), "cpu": (2**8,)}
WHOLE = "whole"
DENSE, DEFAULT_SHARE = "dense", "0.25"
SWITCHES = ("off", "on")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench step`."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--model",
        type=_words,
        metavar="NAME,...",
        help="random weights in the shape of these: "
        f"{', '.join(PRESETS)}, or folders with config.json; default {DEFAULT_MODEL}",
    )
    models.add_argument(
        "--checkpoint",
        type=_words,
        metavar="FOLDER,...",
        help="real weights: hybrid or dense checkpoints, as they are",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="what to train on, documents as train/prepare_corpus.py writes them: their first "
        "tokens by the tokenizer of each --checkpoint; default random tokens",
    )
    parser.add_argument(
        "--documents",
        type=_documents,
        metavar=f"{OWN}|{ONE}|TOKENS",
        help=f"which tokens see each other: those of one document of the text ({OWN}), all ({ONE}) "
        f"or TOKENS in a row; default {OWN} with --text, else {ONE}",
    )
    parser.add_argument(
        "--softmax-layers",
        type=_words,
        metavar="SHARE,...",
        help="what becomes of a dense model: a hybrid with this share of softmax layers (0.25), or "
        f"`{DENSE}` for the model itself; default 0.25. A hybrid is taken as it is",
    )
    parser.add_argument(
        "--sp",
        type=sizes,
        metavar="N,...",
        help="ranks that share a sequence, the others train on one of their own; default all. "
        "`2,1` on two GPUs holds sequence parallelism against data parallelism",
    )
    parser.add_argument(
        "--stage", type=_stages, default=(1,), metavar="N,...", help="of ZeRO, 1 to 3; default 1"
    )
    add_switch(parser, "--checkpointing", "on", "compute layers again in the backward")
    add_switch(parser, "--keep-attention", "on", "of softmax attention keep the output")
    add_switch(parser, "--offload-activations", "off", "keep what is kept in host memory")
    add_switch(parser, "--offload-optimizer", "off", "AdamW on the host")
    parser.add_argument(
        "--tiled-mlp",
        type=_tiles,
        default=(None,),
        metavar="TOKENS,...",
        help=f"that an MLP computes at a time, or `{WHOLE}`; default {WHOLE}",
    )
    parser.add_argument(
        "--longest",
        type=size,
        metavar="TRIES",
        help="then make sequences longer, by a third or a half each time, until memory runs out",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="a step more of each row, and what its time goes into (some 100K tokens at the most: "
        "a trace has an event for every kernel)",
    )
    add_step(parser, name="step")


def add_step(parser: argparse.ArgumentParser, *, name: str) -> None:
    """Options of every benchmark of whole steps.

    Args:
        parser: gets the options.
        name: the benchmark's.
    """
    parser.add_argument(
        "--tokens-per-rank",
        type=sizes,
        metavar="L,...",
        help="default 32K,128K on GPUs, 256 on CPUs",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bf16", help="default bf16")
    parser.add_argument(
        "--steps",
        type=size,
        default=2,
        metavar="N",
        help="timed, behind one that warms up; default %(default)s",
    )
    parser.add_argument(
        "--warmup-tokens",
        type=size,
        metavar="L",
        help="per rank in the step that warms up, where one as long as those timed costs too much",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens; default 0")
    parser.add_argument(
        "--gpu",
        choices=tuple(GPUS),
        help="the planner's name of this GPU; default: by the name the driver tells",
    )
    add_out(parser, name)


def add_switch(parser: argparse.ArgumentParser, name: str, default: str, what: str) -> None:
    """An option that is on or off, or both: a row for each."""
    parser.add_argument(
        name,
        type=names(SWITCHES),
        default=(default,),
        metavar="on|off",
        help=f"{what}; `off,on` for both; default {default}",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: such options.
    """
    if args.checkpoint and args.softmax_layers:
        raise ValueError(
            "--softmax-layers makes a hybrid of a shape, but a --checkpoint is taken as it is: "
            "leave it out, or convert the checkpoint first (hybridsp convert)"
        )
    if args.text and not args.checkpoint:
        raise ValueError("--text needs the tokenizer of a --checkpoint: name one, or leave it out")
    if args.documents == OWN and not args.text:
        raise ValueError(
            f"--documents {OWN} are those of a text: name it with --text, or say {ONE} or TOKENS"
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _documents(text: str) -> str | int:
    return text if text in (ONE, OWN) else size(text)


def _stages(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in names(("1", "2", "3"))(text))


def _tiles(text: str) -> tuple[int | None, ...]:
    return tuple(None if word == WHOLE else size(word) for word in _words(text))
