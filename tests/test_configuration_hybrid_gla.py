"""What HybridGLAConfig accepts, fills in and refuses."""

import pytest
import torch
from tiny_hybrid_gla import SHAPE

from hybridsp.models.hybrid_gla import HybridGLAConfig


def test_keys_of_hugging_face_pass(tmp_path):
    foreign = {
        "architectures": ["HybridGLAForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_hybrid_gla.HybridGLAConfig"},
        "dtype": "bfloat16",
        "transformers_version": "5.23.0",
        "quantization_config": {"quant_method": "bitsandbytes"},
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "num_labels": 3,
        "output_attentions": False,
        "output_hidden_states": True,
        "return_dict": True,
        "_name_or_path": "somewhere",
        "_attn_implementation_internal": "eager",
        "attn_implementation": "sdpa",
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "temperature": 0.7,
        "max_length": 20,
    }
    config = HybridGLAConfig(**(SHAPE | foreign | {"model_type": "hybrid_gla"}))
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.num_labels == 3
    assert config._attn_implementation == "sdpa"
    config.save_pretrained(tmp_path)
    assert HybridGLAConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_default_layer_types():
    layer_types = HybridGLAConfig(num_hidden_layers=6).layer_types
    assert [t == "full_attention" for t in layer_types] == [False, False, False, True, False, False]


BAD_CONFIGS = [
    ({"linear_num_head": 4}, "linear_num_head = 4 .* did you mean 'linear_num_heads'"),
    ({"qk_normm": True}, "qk_normm = True .* did you mean 'qk_norm'"),
    ({"per_layer_config": {0: {"hidden_size": 8}}}, "per_layer_config is not supported"),
    ({"layer_types": ["sliding_attention"] * 4}, r"layer_types\[0\] = 'sliding_attention'"),
    ({"layer_types": ["linear_attention"] * 3}, "3 entries for num_hidden_layers = 4"),
    ({"linear_decay": "none"}, "linear_decay = 'none' is unknown; use one of vector, scalar"),
    ({"linear_feature_map": "exp"}, "linear_feature_map = 'exp' is unknown; use one of none, relu"),
    ({"linear_output_gate_act": "relu"}, "linear_output_gate_act = 'relu' is unknown"),
    ({"linear_memory_range": [32]}, r"linear_memory_range = \[32\] must be the shortest"),
    ({"linear_memory_range": [64, 32]}, r"linear_memory_range = \[64, 32\] must be the shortest"),
    ({"linear_memory_range": [1, 32]}, "both above 1"),
    ({"linear_memory_range": [8, float("inf")]}, "linear_memory_range"),
    ({"linear_gate_clamp_min": 0.0}, "linear_gate_clamp_min = 0.0 bounds .* must be negative"),
    ({"hidden_act": "slu"}, "hidden_act = 'slu' is unknown"),
    ({"hidden_size": 0}, "hidden_size = 0 must be positive"),
    ({"num_attention_heads": -4}, "num_attention_heads = -4 must be positive"),
    ({"linear_key_head_dim": 0}, "linear_key_head_dim = 0 must be positive"),
    ({"linear_gate_logit_normalizer": 0}, "linear_gate_logit_normalizer = 0 must be positive"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of"),
    ({"linear_num_key_value_heads": 3}, "linear_num_heads = 4 must be a multiple of"),
    ({"num_attention_heads": 5}, "hidden_size = 32 must be a multiple of num_attention_heads = 5"),
    ({"linear_num_heads": 5}, "linear_num_heads = 5 does not divide 16.*set linear_key_head_dim"),
    ({"linear_key_head_dim": 4, "expand_k": 1.0}, "linear_key_head_dim = 4 contradicts expand_k"),
    ({"linear_conv_kernel_dim": -1}, "linear_conv_kernel_dim = -1 must not be negative"),
    ({"attention_dropout": 1.0}, "attention_dropout = 1.0"),
    ({"partial_rotary_factor": 0.5}, "rope_parameters = .*partial_rotary_factor"),
    ({"head_dim": 7}, "head_dim = 7 must be even"),
    ({"linear_key_head_dim": 7, "linear_rope": True}, "linear_key_head_dim = 7 must be even"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        HybridGLAConfig(**(SHAPE | bad))


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match=r"'hidden_size'[\s\S]*expected int, got str"):
        HybridGLAConfig(hidden_size="32")
