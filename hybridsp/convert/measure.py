"""Which layers linear attention can replace, by trying each alone.

Some softmax layers are hard to do without: they look up what was said once, long ago, and a state
of fixed size forgets it. So each layer in turn becomes linear while all others stay, is fitted to
the layer it replaces (align.py), and the model is asked two things: how well it predicts a text
that it was not fitted on, and how well it repeats a passage that it has just read. The layers whose
absence costs most on the second are the ones to keep, as in HALO (arXiv:2601.22156, section 3.2),
which keeps those whose absence costs recall.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridsp.convert.align import FitOptions, fit_layer, record_attention, relative_error
from hybridsp.convert.layer_choice import choose_softmax_layers
from hybridsp.convert.mapping import HybridOptions, convert_model
from hybridsp.data import load_documents, pack_documents

MEASURED = "measured:"
RANKING_FILE = "layer_ranking.json"
HELD_OUT_SHARE = 4


@dataclass(frozen=True)
class LayerCost:
    """What it costs to make one layer linear.

    Attributes:
        layer: its index.
        recall: rise of the loss, in nats a token, on a passage read once before.
        text: rise of the loss on held-out text.
        error: relative squared error of the fitted layer's output on held-out text.
    """

    layer: int
    recall: float
    text: float
    error: float


def measured_share(spec: object) -> float | None:
    """The share of a choice "measured:0.25", or None for a choice of another kind.

    Raises:
        ValueError: what follows "measured:" is no share.
    """
    if not isinstance(spec, str) or not spec.strip().startswith(MEASURED):
        return None
    share = spec.strip().removeprefix(MEASURED)
    try:
        value = float(share) if "." in share else math.nan
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"softmax_layers = {spec!r}: behind {MEASURED} goes the share of softmax layers with a "
            "dot, as in measured:0.25"
        )
    return value


def read_windows(
    text: str | Path, tokenizer: PreTrainedTokenizerBase, count: int = 32, length: int = 512
) -> Tensor:
    """The first `count` windows of a text, int64 [count, length].

    Args:
        text: a .txt or .jsonl file, or whatever `load_documents` reads.
        tokenizer: the source's.
        count, length: windows, and tokens of each.

    Raises:
        ValueError: the text has not enough tokens.
    """
    samples = pack_documents(load_documents(text), tokenizer, length)
    if len(samples) < count:
        raise ValueError(
            f"text = {text} has {len(samples)} windows of {length} tokens, and {count} are needed; "
            "give a longer text"
        )
    return torch.tensor(samples[:count]["input_ids"])


def measure_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    fit: FitOptions | None = None,
    seed: int = 0,
    **options: Unpack[HybridOptions],
) -> list[LayerCost]:
    """Make each layer linear alone, fit it, and measure what is lost.

    Args:
        model: a softmax model that `convert_model` takes; left as it is.
        tokens: int [N, L], N >= 4. Three quarters of the windows are for fitting, the last quarter
            for measuring. A window's first half, twice, is the passage to repeat.
        fit: how each layer is fitted.
        seed, options: as of `convert_model`.

    Returns:
        One entry per layer, in the order of the layers.
    """
    if tokens.ndim != 2 or len(tokens) < HELD_OUT_SHARE or tokens.shape[1] < 4:
        raise ValueError(
            f"tokens have shape {list(tokens.shape)}, but [N, L] with at least {HELD_OUT_SHARE} "
            "windows of at least 4 tokens are needed"
        )
    tokens = tokens.to(model.device)
    held_out = len(tokens) // HELD_OUT_SHARE
    fitted_on, text = tokens[:-held_out], tokens[-held_out:]
    passage = text[:, : text.shape[1] // 2].repeat(1, 2)
    num_layers = model.config.num_hidden_layers
    text_before, recall_before = _loss(model, text), _loss(model, passage, repeated=True)
    costs = []
    for layer in range(num_layers):
        hybrid = convert_model(
            model,
            [i for i in range(num_layers) if i != layer],
            seed=seed,
            share_weights=True,
            **options,
        )
        hybrid.requires_grad_(False)
        # Shared weights are the source's: only a copy may learn.
        decoder_layer = hybrid.model.layers[layer]
        decoder_layer.linear_attn = copy.deepcopy(decoder_layer.linear_attn).requires_grad_(True)
        record = record_attention(model, tokens, [layer])[layer]
        fit_layer(hybrid.model, layer, record[: len(fitted_on)], fit)
        with torch.no_grad():
            error = float(relative_error(hybrid.model, layer, record[len(fitted_on) :]))
        costs.append(
            LayerCost(
                layer,
                recall=_loss(hybrid, passage, repeated=True) - recall_before,
                text=_loss(hybrid, text) - text_before,
                error=error,
            )
        )
    return costs


def keep_costliest(costs: Sequence[LayerCost], share: float) -> list[int]:
    """The layers to keep softmax: those dearest in recall, and in text where recall is equal."""
    count = len(choose_softmax_layers(share, len(costs)))
    ranking = sorted(costs, key=lambda cost: (cost.recall, cost.text), reverse=True)
    return sorted(cost.layer for cost in ranking[:count])


def write_ranking(costs: Sequence[LayerCost], kept: Sequence[int], folder: Path) -> None:
    """Write what was measured beside the weights, the costliest layer first."""
    ranking = sorted(costs, key=lambda cost: (cost.recall, cost.text), reverse=True)
    content = {"softmax_layers": list(kept), "ranking": [asdict(cost) for cost in ranking]}
    (folder / RANKING_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _loss(model: PreTrainedModel, tokens: Tensor, *, repeated: bool = False) -> float:
    """Mean loss per token; where the second half repeats the first, of what repetition foretells.

    That is all of the second half but its first token, before which nothing has been repeated yet.
    """
    total = 0.0
    for window in tokens:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits.float(), window[1:], reduction="none")
        total += float(losses[len(window) // 2 :].mean() if repeated else losses.mean())
    return total / len(tokens)


__all__ = [
    "LayerCost",
    "keep_costliest",
    "measure_layers",
    "measured_share",
    "read_windows",
    "write_ranking",
]
