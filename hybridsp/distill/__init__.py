"""From a converted checkpoint to a model: what its teacher knows, in three phases.

A conversion reuses every weight of a softmax model and yet computes something else, because a
linear layer is no softmax layer. What was lost comes back in far fewer tokens than it was learnt
with if the softmax model, which is still there, is the teacher (HALO, arXiv:2601.22156; RADLADS,
arXiv:2505.03005; MambaInLlama, arXiv:2408.15237):

    phase     what learns           from what
    align     the new layers' mixer each layer's attention output, given the teacher's own input
    distill   all, or those mixers  the teacher's distribution over the next token
    finetune  all                   the next token, on sequences that grow

    recipe.py      one file for the three, each with the keys of a fine-tuning recipe
    teacher.py     the frozen model: parallelized, sharded where the student is
    objective.py   what both objectives have in common
    align.py       the first objective; layers do not depend on each other
    match.py       the second; divergence.py is its mathematics
    optimizer.py   two learning rates
    report.py      one record, summary and picture of a run of three phases

An objective is installed in a parallelized model and answers its forward in training; in evaluation
mode the model's loss is what it always is, the cross-entropy of the next token. Both objectives
count the tokens whose label counts, and both are exact under sequence parallelism.
"""

from hybridsp.distill.align import Alignment
from hybridsp.distill.divergence import tiled_divergence
from hybridsp.distill.match import Matching
from hybridsp.distill.optimizer import learning_only, two_rates
from hybridsp.distill.recipe import DistillRecipe, Phase, load_distill_recipe
from hybridsp.distill.report import PhaseLogger, summarize
from hybridsp.distill.teacher import Teacher, check_pair

__all__ = [
    "Alignment",
    "DistillRecipe",
    "Matching",
    "Phase",
    "PhaseLogger",
    "Teacher",
    "check_pair",
    "learning_only",
    "load_distill_recipe",
    "summarize",
    "tiled_divergence",
    "two_rates",
]
