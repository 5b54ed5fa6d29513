"""What a decoder layer keeps for its backward pass, and what that pass needs besides.

Bytes of one rank for one sequence, counted from the code of this project and of transformers'
Llama layers, tensor by tensor; docs/planner.md has the table. A layer's backward is widest in one
of two places: in the MLP, while everything the layer kept is still there, or in the token mixer,
when the MLP's part is gone.

Symbols: L tokens of a rank, D hidden size, I width of the MLP, e bytes of a number (2 or 4),
H heads, Hkv KV heads, K and V dims of a linear head, d of a softmax head, U and R degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridsp.planner.model import LINEAR, SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting

# hybridsp/ops/gla/triton/plan.py; importing it would need Triton. Columns of a state that a walk
# takes at a time follow from the launch, BLOCK_V is the usual one.
CHUNK, LONGEST_STRETCH, BLOCK_V = 64, 64, 64
WORKSPACE_BYTES = 2**30 * 2 // 3
# hybridsp/ops/softmax: queries of plain attention are walked in tiles of so many, and at most four
# fp32 matrices [tile, keys] are there at once (probabilities, their gradient and two temporaries).
QUERY_TILE, SCORE_MATRICES = 512, 4


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes of one layer.

    Attributes:
        before: kept by the first norm and by the mixer up to its core, the core's inputs included.
        after: kept by the rest of the mixer and the second norm.
        mlp: kept by the MLP.
        mixer_work, mlp_work: what the backward of the mixer's core, or of the MLP, needs besides.
    """

    before: float
    after: float
    mlp: float
    mixer_work: float
    mlp_work: float

    @property
    def kept(self) -> float:
        """All that is kept between the layer's forward and backward."""
        return self.before + self.after + self.mlp

    @property
    def phases(self) -> dict[str, float]:
        """The two widest moments of the layer's backward."""
        return {"MLP": self.kept + self.mlp_work, "mixer": self.before + self.mixer_work}


def layer_bytes(model: ModelShape, setting: Setting, kind: str, length: int) -> LayerBytes:
    """What one layer of a kind keeps and needs, on one rank.

    Args:
        model: its shape.
        setting: degrees, dtype, and what is computed in tiles.
        kind: SOFTMAX or LINEAR.
        length: T, tokens of the whole sequence.
    """
    tokens, e = setting.local_tokens(length), setting.dtype_bytes
    hidden, width = model.config.hidden_size * tokens, model.config.intermediate_size * tokens
    norm = norm_kept(tokens, model.config.hidden_size, e) + e * hidden
    # The gradient that arrives, and the residual's.
    stream = 2 * e * hidden
    if kind == SOFTMAX:
        before, after, work = _softmax_mixer(model, setting, length)
    else:
        before, after, work = _linear_mixer(model, tokens, e)
    # gate, silu(gate), up and their product; in the backward two of its gradients stand beside
    # them.
    mlp, mlp_work = 4 * e * width, 2 * e * width
    if tile := setting.tile(length):
        # Its input only, which the norm's output is. In the backward the gradients of weights are
        # there in fp32, summed, and in the weights' dtype, those of this tile and the last one.
        sums = (4 + 2 * e) * model.mlp_parameters
        mlp, mlp_work = 0, 6 * e * tile * model.config.intermediate_size + sums
    return LayerBytes(
        before=norm + before,
        after=after + norm,
        mlp=mlp,
        mixer_work=work + stream,
        mlp_work=mlp_work + stream,
    )


def norm_kept(rows: float, dim: int, e: int) -> float:
    """RMSNorm's input and root mean square in fp32, its output before the weight.

    The output counts elsewhere.
    """
    return rows * (4 + (4 + e) * dim)


def _softmax_mixer(model: ModelShape, setting: Setting, length: int) -> tuple[float, float, float]:
    c, tokens, e = model.config, setting.local_tokens(length), setting.dtype_bytes
    ulysses, ring = setting.ulysses, setting.ring
    q = tokens * c.num_attention_heads * c.head_dim
    # Behind the all-to-all a rank has U times the tokens, and at least one KV head.
    kv = tokens * ulysses * -(-c.num_key_value_heads // ulysses) * c.head_dim
    lse = 4 * tokens * c.num_attention_heads
    normed = tokens * (c.num_attention_heads + c.num_key_value_heads) * bool(c.qk_norm)
    norms = norm_kept(normed, c.head_dim, e)
    before = norms + e * (2 * q + 2 * kv) + lse  # q, k, v, out
    after = e * q  # the input of o_proj, back in the tokens' order
    travelling = 2 * kv * (e + 4) if ring > 1 else 0  # k, v of the next step; dk, dv behind them
    # dout, dq in fp32 and a block's share of it; dk, dv in fp32 and a block's share.
    work = (2 * e + 4) * q + 2 * kv * (4 + e) + travelling
    if not setting.fused_attention:
        keys = tokens * ulysses if ring == 1 else tokens * ulysses // 2
        heads = -(-c.num_attention_heads // ulysses)
        tile = min(QUERY_TILE, keys)
        scores = SCORE_MATRICES * 4 * tile * keys * heads
        work += scores + 12 * q + 8 * kv  # fp32 copies of q, dout, out, k, v
    return before, after, work


def _linear_mixer(model: ModelShape, tokens: int, e: int) -> tuple[float, float, float]:
    c = model.config
    heads, key_dim, value_dim = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim
    keys, values = tokens * heads * key_dim, tokens * heads * value_dim
    gates = tokens * model.gates
    query_width, key_width, value_width = model.linear_widths
    before = e * (2 * keys + values) + 4 * gates  # q, k, v, g as the kernels take them
    if c.linear_decay != "fixed":
        before += 4 * gates  # logits in fp32
    if model.projects_gates:
        before += e * tokens * c.linear_gate_low_rank_dim
    if c.linear_feature_map != "none":
        before += e * tokens * (query_width + key_width)  # what its backward reads
    if c.linear_conv_kernel_dim:
        # The input, the same behind what precedes it, and the output before silu.
        before += 3 * e * tokens * (query_width + key_width + value_width)
    if c.linear_qk_norm:
        rows = tokens * (heads + c.linear_num_key_value_heads)
        before += norm_kept(rows, key_dim, e)

    after = e * values  # the input of o_proj
    if c.linear_output_norm:
        after += norm_kept(tokens * heads, value_dim, e)
    if c.linear_output_gate:
        after += 3 * e * values  # the gate before and behind silu, the output that it multiplies
    # dout and dv; q and k as the chunks' edges see them, then dq and dk; dg.
    core = e * (2 * values + 2 * keys) + 4 * gates + _chunks_work(model, tokens, e)
    # Behind the core: dq, dk, dv, dg, and dg on its way through logsigmoid.
    behind = e * (values + 2 * keys) + 12 * gates
    return before, after, max(core, behind)


def _chunks_work(model: ModelShape, tokens: int, e: int) -> float:
    """What the kernels' backward holds of chunks (`ops/gla/triton/passes.py`)."""
    c = model.config
    heads, key_dim, value_dim = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim
    chunks = -(-tokens // CHUNK)
    pairs = 4 * CHUNK * CHUNK * chunks * heads
    decays = 4 * chunks * model.gates
    # States at the ends of stretches, and their gradients, in fp32.
    stretches = 2 * 4 * -(-chunks // LONGEST_STRETCH) * heads * key_dim * value_dim
    # Of each chunk of a part: its state; its gradient, in bf16 with eight bits more; S x D.
    tails = 0 if e == 4 else 1
    crossed = 4 * key_dim * -(-value_dim // BLOCK_V)
    of_a_chunk = (2 * e + tails) * key_dim * value_dim + crossed
    return pairs + decays + stretches + min(WORKSPACE_BYTES, heads * chunks * of_a_chunk)


__all__ = ["LINEAR", "SOFTMAX", "LayerBytes", "layer_bytes", "norm_kept"]
