"""Backends of block attention: what they pass to their kernels, what is tried, who is chosen."""

import itertools
import logging
import sys
from dataclasses import replace

import pytest
import softmax_kernels
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hybridsp.ops.softmax import (
    BACKENDS,
    block_attention,
    block_attention_backward,
    choose,
    choose_backend,
    flash_attn,
    plain,
    torch_ops,
    trial,
    why_not,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KERNELS = [name for name in BACKENDS if name != "plain"]


def attention_inputs(queries, keys, heads=(6, 2), dims=(5, 3)):
    q = torch.randn(2, queries, heads[0], dims[0])
    return q, torch.randn(2, keys, heads[1], dims[0]), torch.randn(2, keys, heads[1], dims[1])


def test_masks_that_do_not_fit_a_block_are_refused():
    q, k, v = attention_inputs(4, 6)
    refused = [
        (q, True, None, "4 queries and 6 keys"),
        (k.repeat(1, 1, 3, 1), True, 0, "window = 0"),
        (q, False, 3, "window = 3 needs causal"),
    ]
    for queries, causal, window, reason in refused:
        options = {"scale": 1.0, "causal": causal, "window": window}
        for backend in choose._BY_NAME.values():
            with pytest.raises(ValueError, match=reason):
                backend.forward(queries, k, v, **options)
            lse = torch.zeros(queries.shape[:3])
            with pytest.raises(ValueError, match=reason):
                backend.backward(queries, queries, k, v, queries, lse, **options)


# --- what the others pass to their kernels ---


@pytest.fixture
def operators():
    library = torch.library.Library("aten", "IMPL")
    softmax_kernels.register_operators(library)
    yield
    library._destroy()


@pytest.fixture
def packages(monkeypatch):
    """Install stand-ins under the packages' names; None uninstalls."""

    def install(name, module):
        package = {p.name: p for p in choose._PACKAGES}[name]
        monkeypatch.setitem(sys.modules, package.module, module)
        flash_attn._imported.cache_clear()

    for name in softmax_kernels.PACKAGES:
        install(name, None)
    yield install
    flash_attn._imported.cache_clear()


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name", KERNELS)
def test_every_backend_calls_its_kernel_rightly(name, packages):
    if name in softmax_kernels.PACKAGES:
        packages(name, softmax_kernels.PACKAGES[name]())
    backend = choose._BY_NAME[name]
    for dims in ((16, 16), (24, 16)):
        q, k, v = attention_inputs(30, 70, dims=dims)
        douts = torch.randn(2, 30, 6, dims[1]), torch.ones(()).expand(2, 30, 6, dims[1])
        for window in (None, 7) if name != "cudnn" else (None,):
            for dout in douts:
                got = trial.attend_in_two_steps(backend, q, k, v, dout, window=window)
                right = trial.attend_in_two_steps(plain.BACKEND, q, k, v, dout, window=window)
                torch.testing.assert_close(got, right, **CLOSE)
    out, _ = backend.forward(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=1.0, causal=False)
    assert out.dtype == torch.bfloat16
    assert trial.why_it_fails.__wrapped__(backend, softmax_kernels.KIND) is None


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name", sorted(choose._VARLEN))
def test_every_backend_calls_its_varlen_kernel_rightly(name, packages):
    if name in softmax_kernels.PACKAGES:
        packages(name, softmax_kernels.PACKAGES[name]())
    varlen = choose._VARLEN[name]
    backend = replace(choose._BY_NAME[name], varlen=varlen)
    for dims, window in itertools.product(((16, 16), (24, 16)), (None, 7)):
        q, k, v = (x[:1] for x in attention_inputs(64, 128, dims=dims))
        for dout in (torch.randn(1, 64, 6, dims[1]), torch.ones(()).expand(1, 64, 6, dims[1])):
            got, right = (
                trial.attend_in_blocks(x, trial.documents(), q, k, v, dout, window=window)
                for x in (backend, plain.BACKEND)
            )
            torch.testing.assert_close(got, right, **CLOSE)
    for changes in ({}, {"windowed": True}, {"value_dim": 8}):
        kind = replace(softmax_kernels.KIND, **changes)
        assert trial.why_varlen_fails.__wrapped__(choose._BY_NAME[name], varlen, kind) is None


@pytest.mark.usefixtures("operators")
def test_cudnn_leaves_single_queries_and_keys_to_plain():
    for queries, keys in ((1, 1), (1, 5), (5, 1)):
        q, k, v = attention_inputs(queries, keys)
        block = {"scale": 1.0, "causal": queries == keys}
        right = block_attention(q, k, v, **block)
        torch.testing.assert_close(torch_ops.cudnn_forward(q, k, v, **block), right)
        arguments = (torch.randn(right[0].shape), q, k, v, *right)
        right = block_attention_backward(*arguments, **block)
        torch.testing.assert_close(torch_ops.cudnn_backward(*arguments, **block), right)


def test_cudnn_refuses_a_window():
    q, k, v = attention_inputs(5, 5)
    with pytest.raises(ValueError, match="has no window"):
        torch_ops.cudnn_forward(q, k, v, scale=1.0, causal=True, window=4)


# --- the choice ---


@pytest.fixture
def chip(monkeypatch):
    """Pretend that CUDA tensors lie on a chip where every kernel keeps what it promises."""

    def pretend(
        *version,
        fails=lambda backend, kind: None,
        packed_fails=lambda backend, varlen, kind: varlen.why_not(100 if kind.windowed else None),
    ):
        for module in (choose, torch_ops, flash_attn):
            monkeypatch.setattr(module, "capability", lambda device: version)
        monkeypatch.setattr(choose, "why_it_fails", fails)
        monkeypatch.setattr(choose, "why_varlen_fails", packed_fails)

    choose._log_choice.cache_clear()
    choose._log_loop.cache_clear()
    return pretend


def tensors(device="cuda", dtype=torch.bfloat16, dims=(64, 64), heads=(8, 2), length=256):
    with FakeTensorMode():
        q = torch.empty(1, length, heads[0], dims[0], device=device, dtype=dtype)
        k = torch.empty(1, length, heads[1], dims[0], device=device, dtype=dtype)
        return q, k, torch.empty(1, length, heads[1], dims[1], device=device, dtype=dtype)


CHOICES = [
    # chip, installed, tensors, window, chosen
    ((9, 0), (2, 3, 4), {}, None, "flash_attn_3"),
    ((9, 0), (2,), {}, None, "cudnn"),
    ((9, 0), (2,), {}, 100, "flash_attn_2"),
    ((9, 0), (), {}, 100, "flash"),
    ((9, 0), (), {}, 256, "flash"),  # the lengths of these tensors say nothing
    ((9, 0), (), {"dims": (192, 128)}, None, "cudnn"),
    ((9, 0), (), {"dims": (256, 256)}, None, "cudnn"),
    ((9, 0), (), {"dims": (160, 160)}, None, "flash"),
    ((9, 0), (2, 3), {"dims": (64, 128)}, None, "plain"),
    ((9, 0), (2, 3), {"dims": (60, 60)}, None, "plain"),
    ((9, 0), (2, 3), {"dtype": torch.float32}, None, "plain"),
    ((9, 0), (2, 3), {"dtype": torch.float16}, None, "flash_attn_3"),
    ((9, 0), (2, 3), {"device": "cpu"}, None, "plain"),
    ((10, 0), (2, 3, 4), {}, None, "flash_attn_4"),
    ((10, 0), (2, 3), {}, None, "cudnn"),
    ((12, 0), (2, 3, 4), {}, None, "cudnn"),
    ((12, 0), (), {"dims": (192, 128)}, None, "flash"),
    ((8, 0), (2, 3, 4), {}, None, "flash_attn_2"),
    ((8, 9), (), {}, None, "flash"),
    ((7, 5), (2,), {"dtype": torch.float16}, None, "plain"),
]


@pytest.mark.parametrize(("version", "installed", "options", "window", "chosen"), CHOICES)
def test_choice(version, installed, options, window, chosen, chip, packages):
    chip(*version)
    for number in installed:
        name = f"flash_attn_{number}"
        packages(name, softmax_kernels.PACKAGES[name]())
    inputs = tensors(**options)
    assert choose_backend(*inputs, window=window).name == chosen
    assert choose_backend(*inputs, window=window, name=chosen).name == chosen


def test_what_fails_its_trial_is_passed_over_and_the_choice_is_logged_once(chip, packages, caplog):
    chip(9, 0, fails=lambda backend, kind: "too old" if backend.name == "cudnn" else None)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose_backend(*tensors()).name == "flash"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "runs on flash (not faster because of flash_attn_3: " in record.message
    assert "; cudnn: too old; flash_attn_2: " in record.message
    caplog.clear()
    assert choose_backend(*tensors(dtype=torch.float32)).name == "plain"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "slow on a GPU" in record.message


def test_deterministic_algorithms_exclude_cudnn(chip, packages):
    chip(9, 0)
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in why_not("cudnn", *tensors())
        assert choose_backend(*tensors()).name == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnn_is_not_chosen_for_lengths_that_vary(chip, packages):
    """It would plan anew in every step."""
    chip(9, 0)
    inputs = tensors()
    assert choose_backend(*inputs, lengths_vary=True).name == "flash"
    assert choose_backend(*inputs, lengths_vary=True, name="cudnn").name == "cudnn"
    packages("flash_attn_3", softmax_kernels.flash_attn_3())
    assert choose_backend(*inputs, lengths_vary=True).name == "flash_attn_3"


def test_varlen_passes_are_for_lengths_that_vary_and_go_first(chip, packages, caplog):
    def slow(backend, varlen, kind):
        return "a trial's dq was off by 7%" if backend.name in failing else None

    failing = []
    chip(9, 0, packed_fails=slow)
    packages("flash_attn_2", softmax_kernels.flash_attn_2())
    inputs = tensors()
    assert choose_backend(*inputs, name="flash").varlen is None
    with caplog.at_level(logging.INFO):
        assert choose_backend(*inputs, lengths_vary=True).varlen is not None
        failing.append("flash_attn_2")
        chosen = choose_backend(*inputs, lengths_vary=True)
        assert (chosen.name, chosen.varlen) == ("flash", choose._VARLEN["flash"])
        assert "flash_attn_2: a trial's dq was off by 7%)" in caplog.records[-1].message
        failing.append("flash")
        for _ in range(2):  # the faster of two that loop
            chosen = choose_backend(*inputs, lengths_vary=True)
            assert (chosen.name, chosen.varlen) == ("flash_attn_2", None)
        assert choose_backend(*inputs, lengths_vary=True, name="cudnn").varlen is None
    loops = [r.message.partition(" on ")[2] for r in caplog.records if "one by one" in r.message]
    assert loops == [
        "flash_attn_2 computes packed documents one by one: a trial's dq was off by 7%",
        "cudnn computes packed documents one by one: it has no varlen passes",
    ]
    on_cpu = choose_backend(*tensors(device="cpu"), lengths_vary=True)
    assert on_cpu == replace(plain.BACKEND, varlen=plain.VARLEN)


REASONS = [
    # chip, tensors, window, who refuses, with what reason
    ((9, 0), {"device": "cpu"}, None, KERNELS, "on cpu, not on a CUDA device"),
    ((9, 0), {"dtype": torch.float32}, None, KERNELS, "float32, not bfloat16 or float16"),
    ((9, 0), {"dims": (60, 64)}, None, KERNELS, "not multiples of 8 up to 256"),
    ((9, 0), {"dims": (264, 264)}, None, KERNELS, "not multiples of 8 up to 256"),
    ((9, 0), {"dims": (64, 128)}, None, KERNELS, "values are wider than keys"),
    ((9, 0), {}, 100, ["cudnn"], "has no window .100."),
    ((9, 0), {"dims": (160, 160)}, None, ["cudnn"], "have no backward on this chip"),
    ((8, 0), {"dims": (192, 128)}, None, ["cudnn"], "have no backward on this chip"),
    ((7, 0), {}, None, ["cudnn", "flash"], "needs compute capability 8.0"),
    ((7, 0), {}, None, ["flash_attn_2", "flash_attn_3", "flash_attn_4"], "no kernels for .* 7.x"),
    ((10, 0), {}, None, ["flash_attn_3"], "no kernels for .* 10.x"),
]


@pytest.mark.parametrize(("version", "options", "window", "names", "reason"), REASONS)
def test_a_forced_backend_that_cannot_says_why(
    version, options, window, names, reason, chip, packages
):
    chip(*version)
    for name, made in softmax_kernels.PACKAGES.items():
        packages(name, made())
    for name in names:
        message = f"backend = '{name}' cannot do this: .*{reason}.*; use backend = None"
        with pytest.raises(ValueError, match=message):
            choose_backend(*tensors(**options), window=window, name=name)


def test_names_windows_and_mixed_dtypes_are_checked(chip, packages):
    chip(9, 0)
    q, k, v = tensors()
    with pytest.raises(ValueError, match="'cutlass' is unknown; use one of"):
        choose_backend(q, k, v, name="cutlass")
    with pytest.raises(ValueError, match="window = 0: give 1"):
        choose_backend(q, k, v, window=0)
    with pytest.raises(ValueError, match="not one"):
        choose_backend(q, k, tensors(dtype=torch.float16)[2], name="cudnn")


@pytest.mark.parametrize("name", sorted(softmax_kernels.PACKAGES))
def test_packages_of_another_version_are_not_called(name, chip, packages):
    chip(9, 0)
    inputs = tensors()
    assert "cannot be imported" in why_not(name, *inputs)
    packages(name, softmax_kernels.module("older"))
    assert "another version of the package" in why_not(name, *inputs)
    made = softmax_kernels.PACKAGES[name]()
    forward = next(f for f in vars(made) if f.startswith("_flash"))

    def renamed(q, k, v, softmax_scale, is_causal_now):
        raise AssertionError("called")

    setattr(made, forward, renamed)
    packages(name, made)
    assert "takes other arguments than expected (" in why_not(name, *inputs)


def test_flash_attn_4_before_it_knew_windows(chip, packages):
    chip(10, 0)
    packages("flash_attn_4", softmax_kernels.early_flash_attn_4())
    assert why_not("flash_attn_4", *tensors()) is None
    assert "window_size" in why_not("flash_attn_4", *tensors(), window=100)
    chosen = choose_backend(*tensors(), lengths_vary=True, name="flash_attn_4")
    assert chosen.varlen is None
    reason = choose.why_not_varlen("flash_attn_4", *tensors())
    assert "takes other arguments than expected (" in reason
    assert "_seqlen" in reason


def test_arguments_are_read_through_custom_operators():
    """FlashAttention-2 and -3 wrap their functions in them, and the wrapper takes anything."""

    @torch.library.custom_op("hybridsp_tests::attend", mutates_args=())
    def attend(q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        return q * softmax_scale

    assert flash_attn._mismatch(attend, 1, frozenset({"softmax_scale"})) is None
    assert "'scale'" in flash_attn._mismatch(attend, 1, frozenset({"scale", "softmax_scale"}))


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_kernels_against_plain_fp32(dims, dtype, capsys):
    lines = []
    for heads, window in (((6, 6), None), ((9, 3), None), ((8, 1), None), ((8, 2), 100)):
        inputs = attention_inputs(300, 700, heads, dims)
        dout = torch.randn(2, 300, heads[0], dims[1])
        q, k, v, dout = (x.to("cuda", dtype) for x in (*inputs, dout))
        wide = [x.float() for x in (q, k, v, dout)]
        right = trial.attend_in_two_steps(plain.BACKEND, *wide, window=window)
        for name in KERNELS:
            reason = why_not(name, q, k, v, window)
            if reason is None:
                backend = choose_backend(q, k, v, window=window, name=name)
                got = trial.attend_in_two_steps(backend, q, k, v, dout, window=window)
                off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, right, strict=True)]
                assert max(off) < 1e-2, (name, heads, window, off)
                reason = f"ran, off by at most {max(off):.1e}"
            lines.append(f"{dims} {dtype} heads {heads} window {window} {name}: {reason}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert any("ran" in line for line in lines)
