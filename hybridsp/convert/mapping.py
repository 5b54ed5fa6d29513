"""How a softmax model becomes a hybrid: the fields of its config and the names of its weights.

The four supported families are one architecture with small differences, and `hybrid_gla` has a
field for each of these:

    family    bias on q, k, v    bias on o         bias in MLP    RMSNorm on q and k
    llama     attention_bias     attention_bias    mlp_bias       no
    mistral   no                 no                no             no
    qwen2     yes                no                no             no
    qwen3     attention_bias     attention_bias    no             yes

Every weight is reused. A layer that stays softmax keeps its names, so a conversion that keeps all
layers computes the source's logits bit for bit. In a layer that becomes linear, q, k, v and o (and
Qwen3's norms) move from `self_attn` to `linear_attn`: linear attention is softmax attention without
the softmax, and a KV head serves the same query heads as before (HALO, arXiv:2601.22156, section
3). New are the decay gates and a norm on the output, see `initialise_new_weights`. By default
position embedding (RoPE) stays on in linear layers and there is no output gate, which leaves q, k,
v and o as they were trained and adds least. It is not what is fitted best: features that are not
negative and a sigmoid output gate lower the error of a fitted layer by a good third on held-out
text of SmolLM2-135M (docs/quality.md), for a matrix more in each layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from hybridsp.convert.layer_choice import SoftmaxLayers, choose_softmax_layers
from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Same name, same meaning in every family and in hybrid_gla.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# Softmax attention averages values, which shrinks them: its output has 0.15 to 0.33 of the values'
# magnitude in SmolLM2-135M, in all layers but the first two.
OUTPUT_OVER_VALUES = 0.25

# Gates start alike in all channels, at 0.958 a token, which is sigmoid(0)^(1 / 16) as GLA's are
# (arXiv:2312.06635, section 4.4).
GATE_MEMORY = [23.08, 23.08]


class HybridOptions(TypedDict, total=False):
    """Fields of `HybridGLAConfig` that a conversion may choose; the rest follow from the source."""

    linear_decay: str
    linear_memory_range: list[float]
    linear_gate_low_rank_dim: int
    linear_gate_logit_normalizer: float
    linear_feature_map: str
    linear_qk_norm: bool
    linear_rope: bool
    linear_num_key_value_heads: int
    linear_output_gate: bool
    linear_output_gate_act: str
    linear_output_norm: bool
    softmax_rope: bool


def convert_model(
    model: PreTrainedModel,
    softmax_layers: SoftmaxLayers = 0.25,
    *,
    seed: int = 0,
    share_weights: bool = False,
    **options: Unpack[HybridOptions],
) -> HybridGLAForCausalLM:
    """Build the hybrid of a causal language model in memory.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 `...ForCausalLM`; left as it is.
        softmax_layers: which layers stay softmax; see `choose_softmax_layers`.
        seed: of the new weights; the global random state is left alone.
        share_weights: the hybrid uses the source's tensors instead of copies, to save memory
            where the source is not needed any more.
        options: how linear and softmax layers compute, see `HybridOptions`.

    Returns:
        The hybrid in evaluation mode, in the source's dtype, device and attention implementation.

    Raises:
        ValueError: an architecture, a layer choice or an option that is not supported.
    """
    config = hybrid_config(model.config, softmax_layers, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # transformers leaves them untied where a checkpoint contradicts its config.
    config.tie_word_embeddings = head.weight is embedding.weight

    weights = reused_weights(model, config)
    if not share_weights:
        weights = {name: weight.clone() for name, weight in weights.items()}
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.default_generator.manual_seed(seed)
        hybrid, loaded = HybridGLAForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
        )
    assert not loaded["unexpected_keys"], loaded
    assert not loaded["mismatched_keys"], loaded
    initialise_new_weights(hybrid)
    hybrid.generation_config = copy.deepcopy(model.generation_config)
    return hybrid.to(model.device)


def hybrid_config(
    source: PretrainedConfig,
    softmax_layers: SoftmaxLayers = 0.25,
    **options: Unpack[HybridOptions],
) -> HybridGLAConfig:
    """The config of the hybrid; see `convert_model` for arguments and errors."""
    family = family_fields(source)
    refuse_sliding_window(source)
    check_options(source, options)
    kept = choose_softmax_layers(softmax_layers, source.num_hidden_layers)
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    linear: HybridOptions = {
        "linear_decay": "vector",
        "linear_rope": True,
        "linear_qk_norm": family["qk_norm"],
        "linear_output_norm": True,
        "linear_output_gate": False,
        "linear_num_key_value_heads": source.num_key_value_heads,
    }
    if options.get("linear_decay") != "fixed":
        linear["linear_memory_range"] = GATE_MEMORY
    return make_config(
        **{name: getattr(source, name) for name in COMMON_FIELDS},
        **family,
        head_dim=head_dim,
        attention_dropout=source.attention_dropout or 0.0,
        rope_parameters=copy.deepcopy(source.rope_parameters),
        layer_types=[
            "full_attention" if i in kept else "linear_attention"
            for i in range(source.num_hidden_layers)
        ],
        linear_num_heads=source.num_attention_heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        **(linear | options),
    )


def make_config(**fields: Any) -> HybridGLAConfig:
    """A hybrid's config; a field of a wrong type is a ValueError as any other wrong value is."""
    try:
        return HybridGLAConfig(**fields)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"this is no config of a hybrid: {reason}; correct that field") from error


def check_options(source: PretrainedConfig, options: HybridOptions) -> None:
    """Refuse options that a conversion has not, and heads that cannot be had by cloning."""
    for name in options:
        if name not in HybridOptions.__annotations__:
            raise ValueError(
                f"{name} is no option of a conversion; use some of "
                f"{', '.join(HybridOptions.__annotations__)}"
            )
    kept, all_heads = source.num_key_value_heads, source.num_attention_heads
    heads = options.get("linear_num_key_value_heads", kept)
    if heads not in (kept, all_heads):
        raise ValueError(
            f"linear_num_key_value_heads = {heads} is neither the source's {kept} nor its "
            f"{all_heads} query heads, for which KV heads are cloned; use one of the two"
        )


def family_fields(source: PretrainedConfig) -> dict[str, bool]:
    """The row of the module's table that belongs to `source`, in hybrid_gla's field names."""
    bias = getattr(source, "attention_bias", False)
    match source.model_type:
        case "llama":
            row = (bias, bias, source.mlp_bias, False)
        case "mistral":
            row = (False, False, False, False)
        case "qwen2":
            row = (True, False, False, False)
        case "qwen3":
            row = (bias, bias, False, True)
        case unknown:
            raise ValueError(
                f"model_type = {unknown!r} cannot be converted; "
                f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
    names = ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")
    return dict(zip(names, row, strict=True))


def refuse_sliding_window(source: PretrainedConfig) -> None:
    """Refuse a source any of whose layers attends within a window, which hybrid_gla has not."""
    window = getattr(source, "sliding_window", None)
    if source.model_type == "mistral":
        active = window is not None
    else:
        active = "sliding_attention" in (getattr(source, "layer_types", None) or ())
    if active:
        switch = "sliding_window to null"
        if source.model_type != "mistral":
            switch = "use_sliding_window to false and drop layer_types"
        raise ValueError(
            f"sliding_window = {window} is active in this {source.model_type} model, and hybrids "
            "see the whole sequence; if that is what you want, set "
            f"{switch} in the source's config.json (shorter sequences stay as they are)"
        )


def reused_weights(model: PreTrainedModel, config: HybridGLAConfig) -> dict[str, Tensor]:
    """The source's weights under the hybrid's names; tied embeddings appear once.

    Linear layers that have a KV head per query head get clones: query head i reads source head
    i // group, as `repeat_kv` does. Norms of q and k that the hybrid has not are left out.
    """
    reused = {}
    for name, weight in model.named_parameters():
        match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.(.+)", name)
        if match and config.layer_types[int(match[1])] == "linear_attention":
            if "_norm." in match[2] and not config.linear_qk_norm:
                continue
            name = f"model.layers.{match[1]}.linear_attn.{match[2]}"
            if match[2].startswith(("k_proj.", "v_proj.")):
                weight = clone_heads(weight, model.config.num_key_value_heads, config)
        reused[name] = weight.detach()
    return reused


def clone_heads(weight: Tensor, num_heads: int, config: HybridGLAConfig) -> Tensor:
    """Weight or bias of k or v, [Hkv * K, ...], with each head repeated for its query heads."""
    clones = config.linear_num_key_value_heads // num_heads
    if clones == 1:
        return weight
    return weight.unflatten(0, (num_heads, -1)).repeat_interleave(clones, dim=0).flatten(0, 1)


@torch.no_grad()
def initialise_new_weights(hybrid: HybridGLAForCausalLM) -> None:
    """Set what the source cannot give to values from which training recovers fast.

    Gates start as `linear_memory_range` says, see `GATE_MEMORY`. A sigmoid output gate starts at
    one half everywhere, which the output norm makes up for.

    Linear attention adds values where softmax attention averages them, so its output grows with
    the sequence. The output norm takes that away, and its weight is set to `OUTPUT_OVER_VALUES`
    times the root mean square of the layer's values, which is what the reused o_proj is used to.
    The layer's input x leaves an RMSNorm of weight w, so E[x_j^2] = w_j^2, and with inputs taken
    as uncorrelated E[v_i^2] = sum_j (W_v[i, j] w_j)^2 + b_i^2.
    """
    config = hybrid.config
    sigmoid_gate = config.linear_output_gate and config.linear_output_gate_act == "sigmoid"
    for layer in hybrid.model.layers:
        if layer.layer_type != "linear_attention":
            continue
        mixer = layer.linear_attn
        if sigmoid_gate:
            mixer.output_gate.weight.zero_()
        if config.linear_output_norm:
            energy = (mixer.v_proj.weight.float() * layer.input_layernorm.weight.float()).square()
            energy = energy.sum(dim=1)
            if mixer.v_proj.bias is not None:
                energy += mixer.v_proj.bias.float().square()
            scale = OUTPUT_OVER_VALUES * (2 if sigmoid_gate else 1)
            mixer.output_norm.weight.fill_(scale * energy.mean().sqrt())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No load report and no progress bar: new weights are no accident here."""
    verbosity: Any = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "convert_model",
    "hybrid_config",
    "make_config",
    "reused_weights",
]
