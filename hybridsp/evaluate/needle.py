"""Needle in a haystack: is one sentence found again among a million tokens?

Real text is the haystack. Sentences of the form "The secret number of the amber falcon is 493021."
are put into it at random places, and the sequence ends with the beginning of one of them, so that a
model that was never taught to answer questions can be asked, too. With one sentence this is the
single needle; with several it is multi-key retrieval, where copying the last number seen is wrong.

The answer is not generated but scored: every answer token is predicted with the true ones before
it. All of them being first choices is the same thing as greedy decoding finding the answer, at the
price of one forward pass and without a cache, so it works on a sequence that is cut over many
ranks. The log-probability tells two models apart that both fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridsp.evaluate.scores import label_scores
from hybridsp.evaluate.statistics import wilson_interval
from hybridsp.evaluate.subject import Subject
from hybridsp.evaluate.text import HeldOut
from hybridsp.ops.cross_entropy import IGNORED_LABEL

COLOURS = ("amber", "azure", "black", "bronze", "brown", "coral", "crimson", "golden", "green")
ANIMALS = ("badger", "beaver", "bison", "crane", "falcon", "heron", "lynx", "otter", "raven")
QUESTION = "The secret number of the {key} is"
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class NeedleSettings:
    """What is asked, and how often.

    Attributes:
        keys: sentences in the haystack; one of them is asked for.
        depths: places of that one, evenly from the start (0) to the end (1) of the haystack.
        samples: questions at each depth, each with a haystack and numbers of its own.
        seed: of all that is random.

    Raises:
        ValueError: a number is below 1, or there are more keys than names for them.
    """

    keys: int = 1
    depths: int = 5
    samples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("keys", "depths", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        names = len(COLOURS) * len(ANIMALS)
        if self.keys > names:
            raise ValueError(f"keys = {self.keys}, but there are names for {names}: ask for fewer")


@dataclass(frozen=True)
class NeedleScores:
    """What became of each question.

    Attributes:
        depths: float [n], where the sentence stood, 0 to 1.
        found: bool [n], every answer token was the first choice.
        log_probability: float64 [n], mean over the answer's tokens, in nats.
    """

    depths: Tensor
    found: Tensor
    log_probability: Tensor

    def summary(self) -> dict[str, Any]:
        """Share found with its 95% interval, over all depths and at each."""
        by_depth = []
        for depth in self.depths.unique().tolist():
            there = self.found[self.depths == depth]
            by_depth.append({"depth": depth, "found": int(there.sum()), "asked": len(there)})
        found, asked = int(self.found.sum()), len(self.found)
        low, high = wilson_interval(found, asked)
        return {
            "found": found,
            "asked": asked,
            "share": found / asked,
            "low": low,
            "high": high,
            "log_probability": self.log_probability.mean().item(),
            "by_depth": by_depth,
        }


@dataclass(frozen=True)
class _Question:
    depth: float
    tokens: Tensor  # int64 [T]
    answer: int  # tokens of the answer, which are the last ones


def find_needles(
    subject: Subject,
    text: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    settings: NeedleSettings,
) -> NeedleScores:
    """Ask a model for numbers hidden in `length` tokens of text. Collective.

    Args:
        subject: the model.
        text: what the haystacks are cut from; a short one is repeated.
        tokenizer: the model's.
        length: tokens of each sequence, question and answer included.
        settings: what is asked.

    Raises:
        ValueError: sentences and question do not fit into `length` tokens.
    """
    questions = list(_questions(text, tokenizer, length, settings))
    step = subject.rows_per_batch(length)
    scores = []
    for first in range(0, len(questions), step):
        some = questions[first : first + step]
        tokens = torch.stack([question.tokens for question in some])
        labels = torch.full_like(tokens, IGNORED_LABEL)
        for row, question in enumerate(some):
            labels[row, -question.answer :] = question.tokens[-question.answer :]
        hidden, shifted, _ = subject.hidden({"input_ids": tokens, "labels": labels})
        losses, hits = label_scores(hidden, subject.head, shifted)
        scores.append(torch.stack([losses, hits]).double().sum(dim=2))
    losses, hits = subject.total(torch.cat(scores, dim=1))
    answers = torch.tensor([question.answer for question in questions])
    depths = torch.tensor([question.depth for question in questions])
    return NeedleScores(depths, hits.round().long() == answers, -losses / answers)


def _questions(
    text: HeldOut, tokenizer: PreTrainedTokenizerBase, length: int, settings: NeedleSettings
) -> Iterator[_Question]:
    """Every question, the same on every rank: each has a random generator of its own."""
    for at in range(settings.depths):
        depth = at / (settings.depths - 1) if settings.depths > 1 else 0.5
        for sample in range(settings.samples):
            rng = random.Random(f"{settings.seed} {settings.keys} {length} {at} {sample}")
            yield _question(text, tokenizer, length, settings.keys, depth, rng)


def _question(
    text: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    keys: int,
    depth: float,
    rng: random.Random,
) -> _Question:
    pairs = [(colour, animal) for colour in COLOURS for animal in ANIMALS]
    asked, *others = (" ".join(pair) for pair in rng.sample(pairs, keys))
    # No two alike: a number found under the wrong key must not count.
    numbers = rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), keys)
    needles = [
        (place, _encode(tokenizer, f"\n\n{QUESTION.format(key=key)} {number}.\n\n"))
        for place, key, number in zip(
            [depth, *(rng.random() for _ in others)], [asked, *others], numbers, strict=True
        )
    ]
    start, ending, answer = _opening(tokenizer), *_ending(tokenizer, asked, numbers[0])
    room = length - len(start) - len(ending) - sum(len(needle) for _, needle in needles)
    if room < 1:
        raise ValueError(
            f"length = {length} tokens have no room for {keys} sentences and the question, which "
            f"take {length - room}: ask at greater lengths or for fewer keys"
        )
    haystack = text.stream(rng.randrange(text.num_tokens), room)
    pieces, done = [start], 0
    for place, needle in sorted(needles, key=lambda pair: pair[0]):
        stop = round(place * room)
        pieces += [haystack[done:stop], needle]
        done = stop
    return _Question(depth, torch.cat([*pieces, haystack[done:], ending]), answer)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _opening(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token that the tokenizer begins every sequence with, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return torch.tensor(first if begins else [], dtype=torch.int64)


def _ending(tokenizer: PreTrainedTokenizerBase, key: str, number: int) -> tuple[Tensor, int]:
    """Question and answer as tokens, and how many of the last belong to the answer."""
    question = f"\n\n{QUESTION.format(key=key)}"
    without, both = _encode(tokenizer, question), _encode(tokenizer, f"{question} {number}")
    # A tokenizer may join the question's last letters with the answer's first.
    shared = 0
    while shared < len(without) and without[shared] == both[shared]:
        shared += 1
    return both, len(both) - shared


__all__ = ["NeedleScores", "NeedleSettings", "find_needles"]
