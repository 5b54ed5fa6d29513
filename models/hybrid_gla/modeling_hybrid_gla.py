"""HybridGLA: a Llama-like decoder in which each layer mixes tokens by linear or softmax attention.

A softmax layer is Llama's (with Qwen's biases and norms where asked), so its weights come from
such a checkpoint unchanged; a linear layer is gated linear attention (the file beside this one).
`config.layer_types` says which is which.

This is architecture only. How attention is computed, on one device or on many, is looked up by
name: `config._attn_implementation` among transformers' attention functions for softmax layers,
`module.implementation` among `hybridsp.ops`' registries for linear ones. Packed documents are told
apart by `cu_seq_lens_q`, settled once per forward and handed to every layer. Hugging Face copies
this file and what it imports relatively beside saved weights.

Shapes: B batch, L tokens, D hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hybrid_gla import HybridGLAConfig
from .linear_attention_hybrid_gla import (
    HybridGLAGates,
    HybridGLALinearAttention,
    HybridGLAShortConvolution,
)


class HybridGLAAttention(nn.Module):
    """Softmax attention: Llama's, with optional q/k norm (Qwen3), biases (Qwen2) and NoPE."""

    def __init__(self, config: HybridGLAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] -> [B, L, D] and the attention weights, where the implementation has them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2).contiguous()), weights


class HybridGLADecoderLayer(GradientCheckpointingLayer):
    """norm, mixer (`linear_attn` or `self_attn`), norm, MLP, with two residual connections."""

    def __init__(self, config: HybridGLAConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.linear_attn = HybridGLALinearAttention(config, layer_idx)
        else:
            self.self_attn = HybridGLAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]; `kwargs` go to the mixer."""
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.linear_attn(hidden_states, **kwargs)
        else:
            hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        return residual + self.mlp(self.post_attention_layernorm(hidden_states))


class HybridGLAPreTrainedModel(PreTrainedModel):
    """What all HybridGLA models share: loading, capabilities and weight initialisation."""

    config_class = HybridGLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridGLADecoderLayer"]  # noqa: RUF012 - transformers' convention
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A recurrent state cannot be rolled back, so assisted generation is refused.
    _is_stateful = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": HybridGLADecoderLayer,
        "attentions": HybridGLAAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HybridGLAShortConvolution):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, HybridGLAGates):
            init.copy_(module.bias, module.initial_bias())


class HybridGLAModel(HybridGLAPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: HybridGLAConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have been set since it was constructed
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [HybridGLADecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_embs = nn.ModuleDict()
        if config.softmax_rope:
            self.rotary_embs["full_attention"] = LlamaRotaryEmbedding(config)
        if config.linear_rope:
            linear_heads = copy.copy(config)
            linear_heads.head_dim = config.linear_key_head_dim
            self.rotary_embs["linear_attention"] = LlamaRotaryEmbedding(linear_heads)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: int [B, L].
            attention_mask: [B, past + L], 0 at padding.
            position_ids: int [B or 1, L]. In a batch of one row, a 0 after the first token starts
                a new document, unless `cu_seq_lens_q` says where documents start.
            past_key_values: cache to continue.
            inputs_embeds: [B, L, D], in place of input_ids.
            use_cache: return a cache; packed documents never leave one.
            kwargs: go to every layer. `cu_seq_lens_q`: int [documents + 1], the boundaries of
                the documents packed in the one row.

        Raises:
            ValueError: packed documents in several rows or with a cache; a mask that linear layers
                cannot honour; neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        cu_seqlens, documents = kwargs.get("cu_seq_lens_q"), None
        if cu_seqlens is None:
            cu_seqlens = documents_in_positions(position_ids, attention_mask, inputs_embeds)
        if cu_seqlens is not None:
            require_packed_row(inputs_embeds, past_key_values)
            kwargs = packed_kwargs(cu_seqlens, kwargs)
            documents = document_ids(cu_seqlens, inputs_embeds)
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
            if cu_seqlens is not None:
                position_ids = position_ids - cu_seqlens.to(position_ids.device)[documents]
            elif past_key_values is not None:
                position_ids = position_ids + self._num_cached(past_key_values)
        rotations = {
            kind: rotary(inputs_embeds, position_ids) for kind, rotary in self.rotary_embs.items()
        }
        masks = self._masks(inputs_embeds, attention_mask, past_key_values, documents)
        hidden_states = inputs_embeds
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=rotations.get(kind),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict | None,
        past_key_values: Cache | None,
        documents: Tensor | None,
    ) -> dict:
        """The mask of each layer kind, in the form that the kind's implementation takes."""
        if isinstance(attention_mask, dict):  # `generate` prepares them so for static caches
            return attention_mask
        masks = dict.fromkeys(self.config.layer_types)
        if "linear_attention" in masks:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, but linear layers "
                    "know only padding: pass [B, L], and cu_seq_lens_q for packed documents"
                )
            masks["linear_attention"] = create_recurrent_attention_mask(
                self.config, inputs_embeds, attention_mask
            )
        if "full_attention" in masks:
            same_document = None
            if documents is not None:
                same_document = packed_sequence_mask_function(documents[None])
            masks["full_attention"] = create_causal_mask(
                self.config,
                inputs_embeds,
                attention_mask,
                past_key_values,
                and_mask_function=same_document,
            )
        return masks

    def _num_cached(self, past_key_values: Cache) -> int:
        """Tokens already in the cache, which only softmax layers count."""
        if "full_attention" in self.config.layer_types:
            return past_key_values.get_seq_length()
        if self.config.linear_rope and past_key_values.has_previous_state():
            raise ValueError(
                "position_ids = None with a cache: a model of linear layers alone does not count "
                "its tokens, but linear_rope needs their positions; pass position_ids"
            )
        return 0


class HybridGLAForCausalLM(HybridGLAPreTrainedModel, GenerationMixin):
    """HybridGLA with a language-model head; called as `LlamaForCausalLM` is."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridGLAConfig):
        super().__init__(config)
        self.model = HybridGLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # From the decoder's output to logits and loss there is nothing of this family's own.
    forward = LlamaForCausalLM.forward

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether `generate` may make the cache; else the first forward does.

        `generate` asks its cache for a length, which linear layers alone do not keep.
        """
        return "full_attention" in self.config.layer_types


def documents_in_positions(
    position_ids: Tensor | None, attention_mask: Tensor | dict | None, inputs_embeds: Tensor
) -> Tensor | None:
    """Boundaries of packed documents, int32 [documents + 1], or None where there is one document.

    A document starts at a position 0 that has tokens before it; padding is no token.
    """
    length = inputs_embeds.shape[1]
    if position_ids is None or length == 1:
        return None
    real = torch.ones_like(position_ids)
    if attention_mask is not None:
        if isinstance(attention_mask, dict) or attention_mask.ndim != 2:
            return None
        real = (attention_mask[:, -length:] != 0).long()
    starts = (position_ids == 0) & (real == 1) & (real.cumsum(-1) > 1)
    if not starts.any():
        return None
    bounds = [0, *starts.any(dim=0).nonzero()[:, 0].tolist(), length]
    return torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)


def require_packed_row(inputs_embeds: Tensor, past_key_values: Cache | None):
    """Refuse packed documents that would leak into each other."""
    if inputs_embeds.shape[0] > 1:
        raise ValueError(
            f"packed documents (cu_seq_lens_q, or position_ids that return to 0) in a batch of "
            f"{inputs_embeds.shape[0]} rows; flatten the batch to one row [1, B * L]"
        )
    if past_key_values is not None:
        raise ValueError(
            "packed documents (cu_seq_lens_q, or position_ids that return to 0) with "
            "past_key_values: a cache continues one document; pass one document, or no cache"
        )


def document_ids(cu_seqlens: Tensor, inputs_embeds: Tensor) -> Tensor:
    """[documents + 1] -> [L], the number of the document that each token belongs to."""
    position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    return torch.bucketize(position, cu_seqlens[1:].to(position.device), right=True)


def packed_kwargs(cu_seqlens: Tensor, kwargs: dict) -> dict:
    """`kwargs` with whatever any attention function wants to know of the documents."""
    longest = int(cu_seqlens.diff().max())
    packed = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return packed | {name: value for name, value in kwargs.items() if value is not None}


__all__ = ["HybridGLAForCausalLM", "HybridGLAModel", "HybridGLAPreTrainedModel"]
