"""Random input for whatever reads a user's: hypothesis, its profiles, and values nobody expects.

A test of this kind draws some input, hands it to the code and asks one of two things of it: a
result that a naive computation confirms, or an error of the documented kind that says what is
wrong. The cases are the same on every run. `--hypothesis-profile thorough` draws 10 times as many,
and others each time.
"""

import math
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

USUAL = 100


def register_profiles() -> None:
    """To be called before tests are collected."""
    common = {
        "deadline": None,
        "print_blob": True,
        "database": None,
        "suppress_health_check": list(HealthCheck),
    }
    settings.register_profile("usual", max_examples=USUAL, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=10 * USUAL, derandomize=False, **common)
    settings.load_profile("usual")


def cases(number: int) -> Callable:
    """Decorator: so many cases in the usual run, in proportion in others."""
    return settings(max_examples=max(1, number * settings.default.max_examples // USUAL))


def outcome(work: Callable, *args: Any, **options: Any) -> tuple[Any, Exception | None]:
    """What `work` returns, or the error by which it refuses its arguments.

    Anything but a plain ValueError or FileNotFoundError goes through: subclasses, as of a decoder
    that was not asked what it reads, name neither the value nor the remedy.
    """
    try:
        return work(*args, **options), None
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            raise
        message = str(error)
        assert len(message.split()) >= 3, f"the message says nothing: {message!r}"
        assert len(message) < 3000, f"the message is unreadable: {message[:300]!r}"
        return None, error


def refusal(work: Callable, *args: Any, **options: Any) -> str:
    """The message by which `work` refuses its arguments, as it must."""
    result, error = outcome(work, *args, **options)
    assert error is not None, f"accepted: {result!r}"
    return str(error)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, -(2**63) - 1, 10**30]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-300, 1e308, math.inf, -math.inf, math.nan]),
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "auto",
            "none",
            "null",
            "1",
            "1e3",
            "128K",
            "-1",
            "true",
            "../x",
            "/",
            "\x00",
            "a" * 300,
        ]
    ),
)
"""Values of every plain type, the usual suspects among them."""

wild = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Scalars, lists and mappings of them."""


@st.composite
def damaged(draw: Callable, text: str) -> str:
    """The text with up to four places cut out, repeated, or overwritten by something else."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(
            st.one_of(
                st.just(""),
                st.just(text[start:stop] * 2),
                st.sampled_from(list("{}[]:,-\"'&*#%@!|>?\n\t 0\\")),
                st.text(max_size=6),
            )
        )
        text = text[:start] + piece + text[stop:]
    return text


@st.composite
def damaged_bytes(draw: Callable, content: bytes) -> bytes:
    """The content cut short, or with up to four bytes changed."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, max(0, len(content) - 1)))]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)
