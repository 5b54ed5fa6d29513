"""Models small enough for a test, and batches that hurt: shared by the tests of whole models."""

import torch

from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM

VOCABULARY = 61


def tiny_config(**changes):
    """9 query and 3 KV heads, as SmolLM2 has; both layer kinds twice; convolution and norms."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_heads": 9,
        "linear_num_key_value_heads": 3,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 4,
        # Gates that matter: with GLA's 16 their gradients would be rounding errors' size.
        "linear_gate_logit_normalizer": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "pad_token_id": None,
        "initializer_range": 0.2,
        # A head of 4 random channels is now and then almost zero; normalising it by its own size
        # would blow up rounding errors until fp32 itself is off by more than the tests allow.
        "rms_norm_eps": 1e-2,
    }
    return HybridGLAConfig(**{**options, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return HybridGLAForCausalLM(tiny_config(**changes))


def batch_of(rows, length, *, seed, cu_seqlens=None, ignored=()):
    """Random tokens; labels are ignored at the positions in `ignored`, given as slices."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = tokens.clone()
    for part in ignored:
        labels[:, part] = -100
    batch = {"input_ids": tokens, "labels": labels}
    if cu_seqlens is not None:
        batch["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    return batch


def reference_loss_sum(model, batch):
    """Sum of losses and number of labels on one device, by Hugging Face's own path."""
    tokens, labels = batch["input_ids"], batch["labels"]
    arguments = {}
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1).clone()
        labels[:, bounds[:-1]] = -100
        starts = torch.repeat_interleave(torch.tensor(bounds[:-1]), batch["cu_seqlens"].diff())
        arguments = {
            "position_ids": (torch.arange(tokens.shape[1]) - starts)[None],
            "cu_seq_lens_q": batch["cu_seqlens"],
        }
    logits = model(input_ids=tokens, use_cache=False, **arguments).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return loss, int((labels[:, 1:] != -100).sum())
