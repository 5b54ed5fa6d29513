"""`hybridsp.Trainer`: transformers' Trainer, with each sequence cut over many ranks.

A script that trains with `transformers.Trainer` and DeepSpeed changes one import:

    from hybridsp import Trainer

    args = TrainingArguments(deepspeed="ds_configs/zero3.json", ...)
    trainer = Trainer(model=model, args=args, train_dataset=..., data_collator=..., mesh=mesh)
    trainer.train()

    settings.py        what the arguments ask for, and what is refused
    batches.py         from a collator's batch to this rank's part
    engine_wrapper.py  DeepSpeed's engine as accelerate drives it
    evaluation.py      evaluation data in step on all ranks
    checkpoints.py     folders of checkpoints
    guards.py          what can go wrong in a long run
    trainer.py         the Trainer
"""

from hybridsp.trainer.trainer import Trainer

__all__ = ["Trainer"]
