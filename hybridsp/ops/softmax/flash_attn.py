"""Block attention by the FlashAttention packages, where they are installed.

    flash_attn_2   flash-attn         flash_attn.flash_attn_interface   Ampere and later
    flash_attn_3   built from source  flash_attn_interface              Hopper
    flash_attn_4   flash-attn-4       flash_attn.cute.interface         Hopper, Blackwell

All take [B, L, H, D] as ours, take GQA as it is, and keep the lse as [B, H, L] fp32. For packed
blocks they take [T, H, D] and boundaries, named alike in all three, and the lse is [H, T].

The functions called here are the ones under the packages' autograd Functions, which alone give the
lse and take it back; their arguments have changed between releases. So a package counts as usable
only if its functions' signatures take what is passed here: a mismatch is a reason to use another
backend, named in the log, and no TypeError in the middle of a step.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hybridsp.ops.softmax.contract import (
    Backend,
    Packing,
    Varlen,
    capability,
    check_block,
    why_not_kernel,
    widen,
    with_batch,
    without_batch,
)


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where a package keeps its two functions, and what is passed to them by name.

    Attributes:
        name: one of BACKENDS.
        module: what is imported.
        forward, backward: the functions' names; q, k, v (forward) and six tensors (backward) are
            passed by position.
        forward_options, backward_options: window -> what else is passed by name, but for the
            scale.
        causal_names: what the two call `causal`.
        gradients_in_place: dq, dk, dv are passed and written to, not returned.
        dout_last: the backward wants q, k, v, out, dout, lse, not dout, q, k, v, out, lse.
        one_head_dim: values narrower than keys have to be padded.
        varlen: the functions' names for packed blocks; None if they are the same two.
        majors: compute capabilities that it has kernels for.
    """

    name: str
    module: str
    forward: str
    backward: str
    forward_options: Callable[[int | None], dict[str, Any]]
    backward_options: Callable[[int | None], dict[str, Any]]
    causal_names: tuple[str, str] = ("causal", "causal")
    gradients_in_place: bool
    dout_last: bool = False
    one_head_dim: bool = False
    varlen: tuple[str, str] | None = None
    majors: tuple[int, ...]

    def function(self, name: str) -> Callable[..., Any]:
        """One of the two functions; `why_not` has said that it is there."""
        return getattr(_imported(self.module), name)

    def run_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing | None = None,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`BlockForward` and `VarlenForward`; out comes in q's dtype."""
        check_block(q, k, causal, window, packing)
        wide_v = widen(v, q.shape[-1]) if self.one_head_dim else v
        name, _ = self._names(packing is not None)
        options = self.forward_options(window) | {self.causal_names[0]: causal} | _lengths(packing)
        out, lse, *_ = self.function(name)(
            *without_batch(packing, q, k, wide_v), softmax_scale=scale, **options
        )
        out, lse = with_batch(packing, out, lse)
        return out[..., : v.shape[-1]], lse.transpose(1, 2)

    def run_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing | None = None,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`BlockBackward` and `VarlenBackward`; the gradients come in q's dtype."""
        check_block(q, k, causal, window, packing)
        dout, out, wide_v = dout.to(q.dtype), out.to(q.dtype), v
        if self.one_head_dim:
            dout, out, wide_v = (widen(x, q.shape[-1]) for x in (dout, out, v))
        lse = lse.transpose(1, 2).contiguous()
        dout, q, k, wide_v, out, lse = without_batch(packing, dout, q, k, wide_v, out, lse)
        _, name = self._names(packing is not None)
        options = self.backward_options(window) | {self.causal_names[1]: causal} | _lengths(packing)
        gradients: tuple[Tensor, ...] = ()
        if self.gradients_in_place:
            gradients = tuple(
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, wide_v)
            )
            options |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        tensors = (
            (q, k, wide_v, out, dout, lse) if self.dout_last else (dout, q, k, wide_v, out, lse)
        )
        returned = self.function(name)(*tensors, softmax_scale=scale, **options)
        dq, dk, dv = with_batch(packing, *(gradients or returned[:3]))
        return dq, dk, dv[..., : v.shape[-1]]

    def _names(self, packed: bool) -> tuple[str, str]:
        return (packed and self.varlen) or (self.forward, self.backward)

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> str | None:
        """Why the package cannot do these."""
        reason = why_not_kernel(q, k, v) or self.why_not_installed(window)
        major = None if reason else capability(q.device)[0]
        if major is not None and major not in self.majors:
            return f"it has no kernels for compute capability {major}.x"
        return reason

    def why_not_installed(self, window: int | None, *, packed: bool = False) -> str | None:
        """Why the package's functions cannot be called as this file does."""
        module = _imported(self.module)
        if isinstance(module, str):
            return module
        in_place = {"dq", "dk", "dv"} if self.gradients_in_place else set()
        always = {"softmax_scale", *(_LENGTHS if packed else ())}
        forward, backward = self._names(packed)
        calls = (
            (forward, 3, {*self.forward_options(window), self.causal_names[0]}),
            (backward, 6, {*self.backward_options(window), self.causal_names[1], *in_place}),
        )
        for name, positional, names in calls:
            if not hasattr(module, name):
                return f"{self.module} has no {name}: another version of the package"
            mismatch = _mismatch(getattr(module, name), positional, frozenset(names | always))
            if mismatch:
                return f"{self.module}.{name} takes other arguments than expected ({mismatch})"
        return None

    def as_backend(self) -> Backend:
        """The package under the contract's names."""
        return Backend(
            name=self.name,
            forward=self.run_forward,
            backward=self.run_backward,
            why_not=self.why_not,
        )

    def as_varlen(self) -> Varlen:
        """Its passes for packed blocks."""
        return Varlen(
            self.run_forward,
            self.run_backward,
            lambda window: self.why_not_installed(window, packed=True),
        )


@cache
def _imported(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    # OSError: a library that the kernels need is missing or was built for another PyTorch.
    except (ImportError, OSError) as error:
        return f"{name} cannot be imported ({error})"


@cache
def _mismatch(function: Callable[..., Any], positional: int, names: frozenset[str]) -> str | None:
    """Why a call with these arguments would be a TypeError, None if it would not."""
    # torch.library.custom_op wraps what it decorates in a callable of (*args, **kwargs).
    signature = inspect.signature(getattr(function, "_init_fn", function))
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(names))
    except TypeError as error:
        return str(error)
    return None


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _lengths(packing: Packing | None) -> dict[str, Any]:
    """Boundaries and greatest lengths of packed blocks."""
    if packing is None:
        return {}
    values = packing.cu_q, packing.cu_k, packing.max_q, packing.max_k
    return dict(zip(_LENGTHS, values, strict=True))


def _sides(window: int | None) -> dict[str, int]:
    """How many keys a query sees to its left and right; -1 for all."""
    return {
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": -1 if window is None else 0,
    }


def _deterministic() -> dict[str, bool]:
    return {"deterministic": torch.are_deterministic_algorithms_enabled()}


_NO_EXTRAS = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}

FLASH_ATTN_2 = Package(
    name="flash_attn_2",
    module="flash_attn.flash_attn_interface",
    forward="_flash_attn_forward",
    backward="_flash_attn_backward",
    forward_options=lambda window: {**_sides(window), **_NO_EXTRAS, "return_softmax": False},
    backward_options=lambda window: {**_sides(window), **_NO_EXTRAS, **_deterministic()},
    gradients_in_place=True,
    one_head_dim=True,
    varlen=("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    majors=(8, 9, 10, 11, 12),
)
FLASH_ATTN_3 = Package(
    name="flash_attn_3",
    module="flash_attn_interface",
    forward="_flash_attn_forward",
    backward="_flash_attn_backward",
    forward_options=_sides,
    backward_options=lambda window: {**_sides(window), **_deterministic()},
    causal_names=("causal", "is_causal"),
    gradients_in_place=True,
    majors=(9,),
)


def _fa4_options(window: int | None) -> dict[str, Any]:
    """Only what is needed: the first releases' backward knew no windows."""
    return {} if window is None else _sides(window)


FLASH_ATTN_4 = Package(
    name="flash_attn_4",
    module="flash_attn.cute.interface",
    forward="_flash_attn_fwd",
    backward="_flash_attn_bwd",
    forward_options=lambda window: {**_fa4_options(window), "return_lse": True},
    backward_options=lambda window: {
        **_fa4_options(window),
        **(_deterministic() if torch.are_deterministic_algorithms_enabled() else {}),
    },
    gradients_in_place=False,
    dout_last=True,
    majors=(9, 10, 11),
)
