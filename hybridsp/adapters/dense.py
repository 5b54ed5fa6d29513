"""Dense softmax models: the sources that hybrids are converted from, and their baseline."""

from hybridsp.adapters.base import Adapter


class DenseAdapter(Adapter):
    """Llama and the families built like it."""

    model_types = ("llama", "mistral", "qwen2", "qwen3")
    softmax = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
    mlps = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
