"""Documents at random: cut over the ranks as a naive computation says, or refused by name.

Documents of no tokens, a document per token, and boundaries that fall, overflow, start anywhere or
are no integers are all among what is drawn.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
from fuzzing import cases, outcome, refusal
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from hybridsp.layout import attention_blocks, head_shares, relayout, ring_layout
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.sharding import shard_batch
from hybridsp.trainer.batches import whole_batch

IGNORED = -100
CPU = torch.device("cpu")


@st.composite
def boundaries(draw, total):
    """Rising from 0 to `total`; a document may have no tokens."""
    inner = draw(st.lists(st.integers(0, total), max_size=8))
    return [0, *sorted(inner), total]


@st.composite
def packed(draw, longest=40):
    """(rows, length, boundaries): packed rows, with a boundary at each row's end."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    ends = [row * length for row in range(1, rows)]
    inner = draw(boundaries(rows * length))[1:-1]
    return rows, length, [0, *sorted(inner + ends), rows * length]


def cut(batch, sp):
    return [
        shard_batch(batch, SimpleNamespace(sp=sp, sp_rank=rank, device=CPU)) for rank in range(sp)
    ]


@cases(250)
@given(packed(), st.integers(1, 8), st.sampled_from([torch.int32, torch.int64]), st.data())
def test_ranks_hold_what_a_loop_over_the_tokens_says(sample, sp, dtype, data):
    rows, length, bounds = sample
    total = rows * length
    tokens = torch.arange(1, total + 1)
    labels = torch.tensor(
        data.draw(st.lists(st.sampled_from([IGNORED, 7, 8]), min_size=total, max_size=total))
    )
    batch = {
        "input_ids": tokens.view(rows, length),
        "labels": labels.view(rows, length),
        "cu_seqlens": torch.tensor(bounds, dtype=dtype),
    }
    parts = cut(batch, sp)
    whole = {
        name: torch.cat([part[name] for part in parts], dim=1)[0].tolist()
        for name in ("input_ids", "shift_labels", "position_ids")
    }
    padded = len(whole["input_ids"])
    assert padded % sp == 0
    assert 0 <= padded - total < sp
    document = [sum(edge <= token for edge in bounds) for token in range(total)]
    for token in range(total):
        start = max(edge for edge in bounds if edge <= token)
        assert whole["input_ids"][token] == token + 1
        assert whole["position_ids"][token] == token - start
        successor = token + 1 < total and document[token + 1] == document[token]
        expected = labels[token + 1].item() if successor else IGNORED
        assert whole["shift_labels"][token] == expected
    assert whole["shift_labels"][total:] == [IGNORED] * (padded - total)
    edges = parts[0]["cu_seq_lens_q"].tolist()
    assert edges == (bounds if padded == total else [*bounds, padded])
    assert parts[0]["max_length_q"] == max(b - a for a, b in pairwise(edges))


@cases(150)
@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_a_ring_computes_every_pair_once(data, ring, ulysses):
    total = ring * ulysses * data.draw(st.integers(1, 6))
    bounds = tuple(data.draw(boundaries(total)))
    layout = ring_layout(bounds, ring)
    owners = [
        rank
        for rank in range(ring)
        for start, stop in layout.spans[rank]
        for _ in range(start, stop)
    ]
    assert len(owners) == total
    rows = [[t for start, stop in spans for t in range(start, stop)] for spans in layout.spans]
    assert sorted(t for of_rank in rows for t in of_rank) == list(range(total))
    seen = set()
    for q_rank in range(ring):
        for k_rank in range(ring):
            for block in attention_blocks(
                layout.spans[q_rank], layout.spans[k_rank], bounds, causal=True
            ):
                queries, keys = rows[q_rank][block.q], rows[k_rank][block.k]
                pairs = [
                    (query, key)
                    for i, query in enumerate(queries)
                    for j, key in enumerate(keys)
                    if not block.causal or j <= i
                ]
                assert not seen & set(pairs)
                seen.update(pairs)
    start = [max(edge for edge in bounds if edge <= token) for token in range(total)]
    assert seen == {
        (query, key) for query in range(total) for key in range(start[query], query + 1)
    }


@cases(150)
@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_tokens_that_are_sent_come_home(data, ring, ulysses):
    total = ring * ulysses * data.draw(st.integers(1, 8))
    bounds = tuple(data.draw(boundaries(total)))
    made = relayout(total, ring, ulysses, 4, 2, bounds)
    length = total // made.sp
    for target in range(made.sp):
        got = [
            source * length + row
            for source in range(made.sp)
            for part in made.sent(source, target)
            for row in range(part.start, part.stop)
        ]
        assert got == [t for a, b in made.spans(target) for t in range(a, b)]
    for source in range(made.sp):
        sent = sum(made.num_sent(source, target) for target in range(made.sp))
        assert sent == length * ulysses, "every token goes to one ring rank, of each Ulysses rank"


@cases(150)
@given(st.integers(-2, 40), st.integers(-2, 12), st.integers(-2, 12))
def test_heads_are_computed_once(heads, kv_heads, ulysses):
    shares, error = outcome(head_shares, heads, kv_heads, ulysses)
    fits = min(heads, kv_heads, ulysses) >= 1 and heads % kv_heads == 0 and ulysses <= heads
    assert (error is None) == fits
    if error is not None:
        return
    assert [head for share in shares for head in share.q] == list(range(heads))
    for share in shares:
        group = len(share.q) // len(share.kv)
        for number, head in enumerate(share.q):
            assert share.kv[number // group] == head // (heads // kv_heads)


odd_boundaries = st.one_of(
    st.lists(st.integers(-5, 45), max_size=6).map(lambda x: torch.tensor(x, dtype=torch.int64)),
    st.lists(st.sampled_from([0, 2**31 - 1, -(2**31), 2**62, 24]), max_size=4).map(
        lambda x: torch.tensor(x, dtype=torch.int64)
    ),
    st.lists(st.floats(0, 24), max_size=5).map(lambda x: torch.tensor([0.0, *sorted(x), 24.0])),
    st.lists(st.booleans(), max_size=3).map(lambda x: torch.tensor(x, dtype=torch.bool)),
    st.just(torch.tensor([[0, 12], [12, 24]])),
    st.just(torch.tensor(24)),
    st.just(torch.tensor([0, 24], dtype=torch.uint8)),
    st.just(torch.tensor([0, float("nan"), 24])),
    st.sampled_from([[0, 24], (0, 24), 24, "0,24", None]),
)


@cases(200)
@given(odd_boundaries, st.integers(1, 4))
def test_boundaries_of_nothing_are_refused(bounds, sp):
    tokens = torch.arange(24)[None]
    _, error = outcome(cut, {"input_ids": tokens, "cu_seqlens": bounds}, sp)
    valid = bounds is None
    if isinstance(bounds, torch.Tensor) and bounds.dim() == 1:
        listed = bounds.tolist()
        integer = bounds.dtype in (torch.int32, torch.int64)
        valid = (
            integer
            and len(listed) > 1
            and listed == sorted(listed)
            and (listed[0], listed[-1]) == (0, 24)
        )
    assert (error is None) == valid
    if error is not None:
        assert "cu_seqlens" in str(error)
    if isinstance(bounds, torch.Tensor):
        _, error = outcome(require_one_packed_row, tokens, bounds)
        assert (error is None) == valid


odd_tensors = st.one_of(
    st.none(),
    st.sampled_from([[1, 2], "text", 3, {"a": 1}]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(
            [torch.int64, torch.int32, torch.float32, torch.bool, torch.bfloat16, torch.complex64]
        ),
    ),
)
odd_batches = st.dictionaries(
    st.sampled_from(
        [
            "input_ids",
            "labels",
            "cu_seqlens",
            "attention_mask",
            "position_ids",
            "seq_idx",
            "cu_seq_lens_q",
            "x",
        ]
    ),
    odd_tensors,
    max_size=4,
)


@cases(250)
@given(odd_batches, st.integers(1, 3))
def test_batches_of_nothing_are_refused(batch, sp):
    parts, error = outcome(cut, dict(batch), sp)
    if error is None:
        assert all(part["input_ids"].dtype == torch.int64 for part in parts)
        assert all(part["shift_labels"].dtype == torch.int64 for part in parts)


@cases(250)
@given(odd_batches)
def test_what_a_collator_brings_is_understood_or_refused(batch):
    outcome(whole_batch, batch)


@cases(200)
@given(packed(longest=12), st.sampled_from(["position_ids", "seq_idx", "cu_seq_lens_q"]), st.data())
def test_documents_are_told_in_three_ways(sample, way, data):
    rows, length, bounds = sample
    bounds = sorted(set(bounds))
    total = rows * length
    starts = torch.tensor([max(edge for edge in bounds if edge <= t) for t in range(total)])
    told = {
        "position_ids": (torch.arange(total) - starts).view(rows, length),
        "seq_idx": torch.tensor([bounds.index(s) for s in starts.tolist()]).view(rows, length),
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
    }
    tokens = torch.arange(total).view(rows, length)
    made = whole_batch({"input_ids": tokens, "labels": tokens, way: told[way]})
    one_each = bounds == list(range(0, total + 1, length))
    assert made.get("cu_seqlens", torch.tensor(bounds)).tolist() == bounds
    assert ("cu_seqlens" in made) != one_each
    wrong = told["position_ids"].clone()
    place = data.draw(st.integers(0, total - 1))
    wrong.view(-1)[place] += data.draw(st.integers(1, 5))
    # Wrong where a number neither starts a document nor counts on.
    assume(((wrong != 0) & (wrong != F.pad(wrong + 1, (1, -1), value=0))).any())
    assert "position_ids" in refusal(
        whole_batch, {"input_ids": tokens, "labels": tokens, "position_ids": wrong}
    )
