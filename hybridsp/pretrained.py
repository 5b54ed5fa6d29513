"""Loading a Hugging Face checkpoint, and refusing one that is not whole.

transformers is lenient: a weight that a checkpoint lacks is made up at random and one that has no
place is dropped, each with a warning at most, and training goes on. Here both are errors, and so is
a file that is cut short. Only safetensors are read, which hold no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_causal_lm(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model with every one of its weights.

    Args:
        folder: where the checkpoint is; nothing is downloaded.
        options: of `AutoModelForCausalLM.from_pretrained` (`dtype`, `config`, `gguf_file`, ...).

    Raises:
        ValueError: weights are missing, left over or of another shape than the config says.
    """
    model, loaded = AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    for problem in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, loaded[f"{problem}_keys"])):
            raise ValueError(
                f"{folder} does not fit its own config: {len(names)} {problem} weights, "
                f"for example {names[0]}; download it again or repair config.json"
            )
    return model


def check_safetensors(folder: str | Path) -> None:
    """Open every shard, which compares its header with its size.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: the index or a shard is corrupt.
    """
    folder = Path(folder)
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise FileNotFoundError(
                f"{folder} holds neither model.safetensors nor {index.name}; weights in "
                "another format are rewritten by transformers' save_pretrained"
            )
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards: {error}") from error
        files = [folder / name for name in sorted(shards)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{index.name} names {file}, which is missing")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file} is corrupt or truncated ({error}); download it again"
            ) from error


__all__ = ["check_safetensors", "load_causal_lm"]
