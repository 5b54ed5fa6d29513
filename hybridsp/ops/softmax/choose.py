"""Which backend computes block attention: the fastest that is there and right.

Softmax attention is most of a long-context step, and on one chip the kernels differ by 1.7x: on an
H200 cuDNN runs at 590 TFLOP/s forward, PyTorch's own FlashAttention-2 at 330. So each generation of
chips has its order, and the first backend that can do the tensors and passes its trial is taken.

Packed documents are another matter: their blocks are small, and what has varlen passes computes all
of them at once, which is worth more than the faster kernel. So there it goes first.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hybridsp.ops.softmax.contract import (
    BACKENDS,
    Backend,
    capability,
    check_window,
)
from hybridsp.ops.softmax.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4
from hybridsp.ops.softmax.plain import BACKEND as PLAIN
from hybridsp.ops.softmax.plain import VARLEN as PLAIN_VARLEN
from hybridsp.ops.softmax.torch_ops import CUDNN, FLASH, FLASH_VARLEN
from hybridsp.ops.softmax.trial import kind_of, why_it_fails, why_varlen_fails

logger = logging.getLogger(__name__)

_PACKAGES = (FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4)
_BY_NAME = {x.name: x for x in (PLAIN, CUDNN, FLASH, *(p.as_backend() for p in _PACKAGES))}
_VARLEN = {
    PLAIN.name: PLAIN_VARLEN,
    FLASH.name: FLASH_VARLEN,
    **{p.name: p.as_varlen() for p in _PACKAGES},
}

_AMPERE_ADA = ("flash_attn_2", "flash", "cudnn")
_HOPPER = ("flash_attn_3", "cudnn", "flash_attn_2", "flash")
_BLACKWELL = ("flash_attn_4", "cudnn", "flash_attn_2", "flash")


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    name: str | None = None,
    lengths_vary: bool = False,
) -> Backend:
    """The backend for blocks of such tensors, of whatever lengths.

    Args:
        q: [B, Lq, Hq, D]; of all three only heads, dims, dtypes and devices matter.
        k: [B, Lk, Hkv, D].
        v: [B, Lk, Hkv, Dv].
        window: how many keys a query sees, itself included; None for all, also where a window
            would hide nothing, because not every backend has windows.
        name: one of BACKENDS, or None for the fastest. On the CPU and in fp32 that is "plain".
        lengths_vary: there are many blocks, whose lengths will not recur, as with packed documents.
            Then what has varlen passes is preferred, and cuDNN, which takes up to a second for
            every new length, is used only if asked for by name.

    Returns:
        The backend, with varlen passes only if the lengths vary, and they have shown that they are
        right. What was chosen, and why not the faster ones, is logged once.

    Raises:
        ValueError: a window below 1, an unknown name, or a backend asked for by name that cannot
            do these tensors.
    """
    check_window(window)
    if name is None:
        name = _fastest(q, k, v, window, lengths_vary) if q.device.type == "cuda" else PLAIN.name
    else:
        _check_named(q, k, v, window, name)
    backend = _BY_NAME[name]
    if not lengths_vary:
        return backend
    reason = why_not_varlen(name, q, k, v, window)
    if reason is None:
        return replace(backend, varlen=_VARLEN[name])
    _log_loop(name, reason)
    return backend


def why_not(name: str, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> str | None:
    """Why a backend cannot do these tensors, None if it has shown that it can."""
    backend = _BY_NAME[name]
    reason = backend.why_not(q, k, v, window)
    if reason is None and backend is not PLAIN:
        reason = why_it_fails(backend, kind_of(q, k, v, window))
    return reason


def why_not_varlen(
    name: str, q: Tensor, k: Tensor, v: Tensor, window: int | None = None
) -> str | None:
    """Why a backend that can do these tensors computes packed blocks one by one; None if not so."""
    backend = _BY_NAME[name]
    if name not in _VARLEN:
        return "it has no varlen passes"
    if backend is PLAIN:
        return None
    return why_varlen_fails(backend, _VARLEN[name], kind_of(q, k, v, window))


def _check_named(q: Tensor, k: Tensor, v: Tensor, window: int | None, name: str) -> None:
    if name not in _BY_NAME:
        raise ValueError(f"backend = {name!r} is unknown; use one of {BACKENDS}, or None")
    reason = why_not(name, q, k, v, window)
    if reason is not None:
        raise ValueError(f"backend = {name!r} cannot do this: {reason}; use backend = None")


def _fastest(q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths_vary: bool) -> str:
    """Of those that can; where lengths vary, the first that has varlen passes, if any has."""
    reasons: list[str] = []
    without_varlen = PLAIN.name
    for candidate in _fastest_first(q.device):
        reason: str | None
        if lengths_vary and candidate == CUDNN.name:
            reason = "it plans every new length anew, and these lengths vary"
        else:
            reason = why_not(candidate, q, k, v, window)
        if reason is None and lengths_vary:
            reason = why_not_varlen(candidate, q, k, v, window)
            if reason is not None and without_varlen == PLAIN.name:
                without_varlen = candidate
        if reason is None:
            _log_choice(candidate, "; ".join(reasons))
            return candidate
        reasons.append(f"{candidate}: {reason}")
    _log_choice(without_varlen, "; ".join(reasons))
    return without_varlen


def _fastest_first(device: torch.device) -> tuple[str, ...]:
    major = capability(device)[0]
    if major < 8:
        return ()
    return {8: _AMPERE_ADA, 9: _HOPPER}.get(major, _BLACKWELL)


@cache
def _log_choice(name: str, reasons: str) -> None:
    """Once per choice and reasons, not once per layer and step."""
    level = logging.WARNING if name == "plain" else logging.INFO
    slow = ", which is slow on a GPU" if name == "plain" else ""
    not_faster = f" (not faster because of {reasons})" if reasons else ""
    logger.log(level, "softmax attention runs on %s%s%s", name, slow, not_faster)


@cache
def _log_loop(name: str, reason: str) -> None:
    logger.info("softmax attention on %s computes packed documents one by one: %s", name, reason)
