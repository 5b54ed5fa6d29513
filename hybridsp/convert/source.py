"""Reading what is to be converted, and refusing what would be read wrongly.

transformers is lenient where a converter must not be: a weight that is missing from a checkpoint
is made up at random, one that has no place is dropped, a quantised one stays quantised, and a
GGUF file's RoPE scaling is ignored, each with a warning at most. Here all of these are errors,
raised before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybridsp.convert.mapping import SUPPORTED_MODEL_TYPES
from hybridsp.pretrained import NO_CODE, check_safetensors, load_causal_lm
from hybridsp.untrusted import read_json, reading

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: a folder, and the name of the GGUF file in it if it is one."""

    folder: Path
    gguf_file: str | None = None

    @property
    def path(self) -> Path:
        """The GGUF file, or the folder of a Hugging Face checkpoint."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder

    @property
    def _location(self) -> dict[str, Any]:
        location = {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True}
        return location | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def load_config(self) -> PretrainedConfig:
        """Check the files without reading the weights, and load the config.

        Raises:
            ValueError: an unsupported architecture, quantised weights, files that cannot be read.
            FileNotFoundError: files that are missing.
        """
        if self.gguf_file:
            num_tensors = _check_gguf(self.path)
        else:
            _check_config_file(self.folder / "config.json")
            check_safetensors(self.folder)
        with reading(self.path, "config"):
            config = AutoConfig.from_pretrained(**self._location, **NO_CODE)
        if self.gguf_file:
            _check_gguf_used_up(self.path, num_tensors, config)
        return config

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with its chat template, or None where the source has none.

        Raises:
            ValueError: there are tokenizer files, but they cannot be read.
        """
        if not self.gguf_file and not any((self.folder / n).exists() for n in TOKENIZER_FILES):
            return None
        with reading(self.path, "tokenizer"):
            return AutoTokenizer.from_pretrained(**self._location, **NO_CODE)

    def load_model(
        self, config: PretrainedConfig, dtype: torch.dtype | str = "auto"
    ) -> PreTrainedModel:
        """Load every weight, GGUF weights dequantised.

        Args:
            config: from `load_config`.
            dtype: of the weights in memory; "auto" is the checkpoint's own, fp32 for GGUF.

        Raises:
            ValueError: weights are missing, left over or of another shape than the config says.
        """
        options: dict[str, Any] = {"config": config, "dtype": dtype}
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
            options["quantization_config"] = GgufConfig(dequantize=True)
        return load_causal_lm(self.folder, **options)


def find_source(src: str | Path) -> Source:
    """Tell a Hugging Face checkpoint from a GGUF file.

    Args:
        src: a folder with config.json, a .gguf file, or a folder with exactly one .gguf file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: neither of the three.
    """
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(
            f"SRC = {src} does not exist; a model on the Hub is downloaded with "
            "`hf download NAME --local-dir DIR`"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"SRC = {src} is neither a folder nor a .gguf file; "
                "for a safetensors checkpoint give the folder"
            )
        return Source(path.parent, path.name)
    if (path / "config.json").exists():
        return Source(path)
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if not gguf_files:
        raise FileNotFoundError(f"SRC = {src} holds neither config.json nor a .gguf file")
    if len(gguf_files) > 1:
        raise ValueError(
            f"SRC = {src} holds {len(gguf_files)} GGUF files ({', '.join(gguf_files)}); "
            "give one of them"
        )
    return Source(path, gguf_files[0])


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, path: Path
) -> None:
    """Refuse a tokenizer of another model: its tokens have no row in the embedding.

    Raises:
        ValueError: it has tokens from `config.vocab_size` on.
    """
    if tokenizer is None or not len(tokenizer):
        return
    last = max(tokenizer.get_vocab().values())
    if last >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has tokens up to {last}, and the model's vocab_size is "
            f"{config.vocab_size}: it belongs to another model; copy this model's tokenizer there"
        )


def _check_model_type(model_type: Any, path: Path) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{path} is of model_type {model_type!r}, which cannot be converted; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )


def _check_config_file(path: Path) -> None:
    config = read_json(path)
    _check_model_type(config.get("model_type"), path)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = "unknown"
            if isinstance(config[key], dict):
                method = config[key].get("quant_method", method)
            raise ValueError(
                f"{path}: {key} says the weights are quantised ({method}); convert the "
                "unquantised checkpoint, or a GGUF file"
            )


def _check_gguf(path: Path) -> int:
    """Check the header; returns the number of tensors in the file."""
    reader = _read_gguf(path)
    architecture = _gguf_field(reader, "general.architecture")
    _check_model_type(architecture, path)
    # Long-context Llamas keep their RoPE factors in a tensor.
    factors = any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    scaling = _gguf_field(reader, f"{architecture}.rope.scaling.type") or "none"
    factor = _gguf_field(reader, f"{architecture}.rope.scale_linear") or 1.0
    if factors or scaling != "none" or factor != 1.0:
        raise ValueError(
            f"{path} scales its position embedding (RoPE), which transformers does not read from "
            "GGUF files; convert the same model's safetensors checkpoint"
        )
    return len(reader.tensors)


def _check_gguf_used_up(path: Path, num_tensors: int, config: PretrainedConfig) -> None:
    with torch.device("meta"):
        num_weights = len(list(AutoModelForCausalLM.from_config(config).parameters()))
    if num_tensors != num_weights:
        raise ValueError(
            f"{path} holds {num_tensors} tensors, but the {config.model_type} model that "
            f"transformers makes of it has {num_weights} weights; convert the same model's "
            "safetensors checkpoint"
        )


def _read_gguf(path: Path) -> Any:
    from gguf import GGUFReader

    with reading(path, "GGUF header"):
        return GGUFReader(path)


def _gguf_field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


__all__ = ["Source", "find_source"]
