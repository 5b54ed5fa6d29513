"""Sizes as people say them: `48`, `64K`, `4M`, `1G`, in binary units.

Tokens and bytes come in powers of two, and nobody counts the digits of 1048576. The command line
and recipes read the same spelling, and say the same of one that they cannot read.
"""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(text: str) -> int:
    """The number that a size stands for.

    Args:
        text: a positive whole number with an optional binary unit, in any case: `64K`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,18})([KMG]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(
            f"{shown!r} is no size: write a positive whole number, with K, M or G if you like (64K)"
        )
    return int(match[1]) * UNITS[match[2]]


__all__ = ["UNITS", "parse_size"]
