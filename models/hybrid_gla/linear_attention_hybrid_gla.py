"""The linear layers of HybridGLA: gated linear attention (GLA, arXiv:2312.06635).

In place of a KV cache, a head keeps a state S [K, V] that each token decays and adds to:

    S_t = diag(a_t) S_{t-1} + k_t^T v_t        o_t = K^-0.5 q_t S_t        a_t in (0, 1)

Memory does not grow with the sequence, and a rank can hand the past to the next rank as one state.
How the recurrence and the convolution are computed is looked up in `hybridsp.ops`' registries.

Shapes: B batch, L tokens, H heads, K key dim, V value dim, D hidden size, W convolution taps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hybridsp.ops import LINEAR_ATTENTION_FUNCTIONS, SHORT_CONVOLUTION_FUNCTIONS

from .configuration_hybrid_gla import HybridGLAConfig

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "softmax": lambda x: x.softmax(dim=-1),
}
OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": F.sigmoid}


class HybridGLAShortConvolution(nn.Module):
    """A depthwise causal convolution and silu in front of q, k or v; weight [D, W].

    A module of its own, so that whatever shards parameters (ZeRO-3) sees its weight being used.
    """

    def __init__(self, num_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, kernel_size))

    def forward(self, mixer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        """[B, L, D] -> [B, L, D], by the implementation selected on `mixer`."""
        convolve = SHORT_CONVOLUTION_FUNCTIONS[mixer.implementation]
        return convolve(mixer, x, self.weight, None, activation="silu", **kwargs)


class HybridGLAGates(nn.Linear):
    """Logits of the gates, [..., rank] -> [..., H * gates per head], with a bias of its own kind.

    A class, because transformers initialises the weights of a module by the module's class.
    """

    def __init__(self, config: HybridGLAConfig):
        self.num_heads = config.linear_num_heads
        gates_per_head = config.linear_key_head_dim if config.linear_decay == "vector" else 1
        super().__init__(config.linear_gate_low_rank_dim, self.num_heads * gates_per_head)
        self.config = config

    def initial_bias(self) -> Tensor:
        """Bias with which gates remember as long as `linear_memory_range` says.

        Spread over the gates of each head, or over the heads where each has one gate. It solves
        logsigmoid(bias) / normalizer = -1 / memory.
        """
        gates_per_head = self.out_features // self.num_heads
        spread = gates_per_head if gates_per_head > 1 else self.num_heads
        memory = memory_lengths(self.config, spread, self.bias.device)
        x = self.config.linear_gate_logit_normalizer / memory
        return (-x - torch.log1p(-torch.exp(-x))).repeat(self.out_features // spread)


class HybridGLALinearAttention(nn.Module):
    """Gated linear attention with a choice of decay.

        q, k, v = silu(conv(x W))                           convolution optional
        log a = logsigmoid(x W_down W_up + b) / normalizer   per key channel or per head, or
        log a = logsigmoid(k) / normalizer                   the key as its own gate (Liger), or
        log a = log(1 - 1 / memory)                          a constant per head (RetNet)
        q, k = rope(feature_map(norm(q, k)))                 each of the three optional
        output = o_proj(norm(attention(q, k, v, a)) * act(x W_gate))

    `implementation` names the function of `hybridsp.ops` that does the attention; "local" is one
    device.
    """

    def __init__(self, config: HybridGLAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.implementation = "local"
        self.num_heads = config.linear_num_heads
        self.num_key_value_groups = self.num_heads // config.linear_num_key_value_heads
        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.scaling = self.key_head_dim**-0.5

        hidden, bias = config.hidden_size, config.attention_bias
        key_width = config.linear_num_key_value_heads * self.key_head_dim
        value_width = config.linear_num_key_value_heads * self.value_head_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * self.key_head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, value_width, bias=bias)
        output_width = self.num_heads * self.value_head_dim
        self.o_proj = nn.Linear(output_width, hidden, bias=config.attention_output_bias)

        if config.linear_decay in ("vector", "scalar"):
            self.decay_down = nn.Linear(hidden, config.linear_gate_low_rank_dim, bias=False)
            self.decay_up = HybridGLAGates(config)
        if config.linear_conv_kernel_dim:
            taps = config.linear_conv_kernel_dim
            self.q_conv = HybridGLAShortConvolution(self.q_proj.out_features, taps)
            self.k_conv = HybridGLAShortConvolution(key_width, taps)
            self.v_conv = HybridGLAShortConvolution(value_width, taps)
        if config.linear_qk_norm:
            self.q_norm = LlamaRMSNorm(self.key_head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.key_head_dim, eps=config.rms_norm_eps)
        if config.linear_output_gate:
            self.output_gate = nn.Linear(hidden, output_width, bias=False)
        if config.linear_output_norm:
            self.output_norm = LlamaRMSNorm(self.value_head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; `attention_mask` [B, L] is 0 at padding, or None."""
        padding = None if attention_mask is None else (attention_mask == 0)[..., None]
        initial_state = None
        if past_key_values is not None:
            initial_state = past_key_values.get_recurrent_state(self.layer_idx)

        q, k, v = self._project(hidden_states, padding, past_key_values, cu_seq_lens_q)
        g = self.log_decay(hidden_states, k)
        q, k = self._map_features(q, k, position_embeddings)
        if self.num_key_value_groups > 1:
            k, v = (x.repeat_interleave(self.num_key_value_groups, dim=2) for x in (k, v))
        if padding is not None:
            g = g.masked_fill(padding[..., None], 0.0)

        attend = LINEAR_ATTENTION_FUNCTIONS[self.implementation]
        output, state = attend(
            self,
            q,
            k,
            v,
            g,
            scale=self.scaling,
            cu_seqlens=cu_seq_lens_q,
            initial_state=initial_state,
            output_final_state=past_key_values is not None,
        )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
            # The cache itself notes this only when a convolution state is stored.
            past_key_values.layers[self.layer_idx].has_previous_state[0] = True

        if self.config.linear_output_norm:
            output = self.output_norm(output)
        output = output.flatten(2)
        if self.config.linear_output_gate:
            activate = OUTPUT_GATES[self.config.linear_output_gate_act]
            output = output * activate(self.output_gate(hidden_states))
        return self.o_proj(output)

    def log_decay(self, hidden_states: Tensor, key: Tensor | None = None) -> Tensor:
        """Log of the decays, <= 0, in fp32.

        Args:
            hidden_states: [B, L, D].
            key: [B, L, Hkv, K] as projected; needed where the key is the gate's logit.

        Returns:
            [B, L, H, K] where each channel has a gate (vector and key), else [B, L, H, 1].
        """
        config = self.config
        if config.linear_decay == "fixed":
            memory = memory_lengths(config, self.num_heads, hidden_states.device)
            log_decay = torch.log1p(-1 / memory)
            return log_decay[:, None].expand(*hidden_states.shape[:2], -1, -1)
        if config.linear_decay == "key":
            assert key is not None
            logits = key.repeat_interleave(self.num_key_value_groups, dim=2)
        else:
            logits = self.decay_up(self.decay_down(hidden_states))
            logits = logits.unflatten(-1, (self.num_heads, -1))
        log_decay = F.logsigmoid(logits.float()) / config.linear_gate_logit_normalizer
        if config.linear_gate_clamp_min is not None:
            log_decay = log_decay.clamp_min(config.linear_gate_clamp_min)
        return log_decay

    def _map_features(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Norm, feature map and RoPE, in this order.

        RoPE is last, so that a product of q and k depends on their distance alone whatever the
        feature map is (RoFormer, arXiv:2104.09864, section 3.3).
        """
        if self.config.linear_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        feature_map = FEATURE_MAPS[self.config.linear_feature_map]
        q, k = feature_map(q), feature_map(k)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        return q, k

    def _project(
        self,
        hidden_states: Tensor,
        padding: Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, L, H, K], keys [B, L, Hkv, K], values [B, L, Hkv, V]; zero where padded."""
        qkv = [proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        # Projections have biases and the convolution spreads: padding is cut before and after.
        if padding is not None:
            qkv = [x.masked_fill(padding, 0.0) for x in qkv]
        if self.config.linear_conv_kernel_dim:
            qkv = self._convolve(qkv, past_key_values, cu_seqlens)
            if padding is not None:
                qkv = [x.masked_fill(padding, 0.0) for x in qkv]
        q, k, v = qkv
        q = q.unflatten(-1, (-1, self.key_head_dim))
        k = k.unflatten(-1, (-1, self.key_head_dim))
        v = v.unflatten(-1, (-1, self.value_head_dim))
        return q, k, v

    def _convolve(
        self, qkv: list[Tensor], past_key_values: Cache | None, cu_seqlens: Tensor | None
    ) -> list[Tensor]:
        """Convolve q, k and v; one cached state [B, channels of all three, W] holds their tails."""
        taps = self.config.linear_conv_kernel_dim
        left: list[Tensor | None] = [None, None, None]
        state = None
        if past_key_values is not None:
            state = past_key_values.get_conv_state(self.layer_idx)
        if state is not None:
            left = list(state[..., 1:].mT.split([x.shape[-1] for x in qkv], dim=-1))
        convs = (self.q_conv, self.k_conv, self.v_conv)
        convolved = [
            conv(self, x, left_context=context, cu_seqlens=cu_seqlens)
            for conv, x, context in zip(convs, qkv, left, strict=True)
        ]
        if past_key_values is not None:  # last, because it overwrites `state`
            tails = torch.cat([x[:, -taps:] for x in qkv], dim=-1).mT
            past_key_values.update_conv_state(tails, self.layer_idx, conv_kernel_size=taps)
        return convolved


def memory_lengths(config: HybridGLAConfig, count: int, device: torch.device) -> Tensor:
    """Tokens that `count` heads or channels remember, fp32 [count].

    The default range, 2^5 to 2^12, is RetNet's (arXiv:2307.08621).
    """
    shortest, longest = (math.log2(end) for end in config.linear_memory_range)
    return torch.logspace(shortest, longest, count, base=2, dtype=torch.float32, device=device)


__all__ = ["HybridGLAGates", "HybridGLALinearAttention", "HybridGLAShortConvolution"]
