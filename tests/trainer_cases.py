"""Datasets, models and arguments with which the tests of the Trainer train."""

import torch
import transformers
from test_parallelize import dense_model
from tiny import VOCABULARY, tiny_model
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

LENGTHS = (9, 16, 5, 13, 11, 16, 3, 8, 14, 2, 10, 7, 12, 6, 15, 4)


class Documents(Dataset):
    """Documents of uneven lengths, of which the first tokens are a prompt without labels."""

    def __init__(self, count=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for index in range(count):
            tokens = torch.randint(VOCABULARY, (LENGTHS[index % 16],), generator=generator)
            labels = tokens.clone()
            labels[: index % 4] = -100
            self.items.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def pad_right(samples):
    """Rows of one length, padding hidden by a mask and without labels."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(key, fill):
        rows = [sample[key] + [fill] * (longest - len(sample[key])) for sample in samples]
        return torch.tensor(rows)

    masked = [{"mask": [1] * len(sample["input_ids"])} for sample in samples]
    rows = [sample["mask"] + [0] * (longest - len(sample["mask"])) for sample in masked]
    return {
        "input_ids": padded("input_ids", 1),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(rows),
    }


COLLATORS = {
    "padded": pad_right,
    "flattened": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "flattened positions": DataCollatorWithFlattening(),
}


def model_of(kind):
    if kind == "hybrid":
        return tiny_model()
    sizes = {"hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
    return dense_model("llama", attn_implementation="eager", **sizes)


def arguments(output_dir, **changes):
    """TrainingArguments of a short run: a schedule, clipping and weight decay that all matter."""
    options = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(str(output_dir), **{**options, **changes})


def zero(stage, **changes):
    """A DeepSpeed configuration as users of transformers write it."""
    sizes = ("reduce_bucket_size", "stage3_param_persistence_threshold")
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **dict.fromkeys(sizes, "auto")},
        **changes,
    }


def history(trainer, *keys):
    """The logged values, one row per step."""
    rows = [row for row in trainer.state.log_history if keys[0] in row]
    return [[row[key] for key in keys] for row in rows]
