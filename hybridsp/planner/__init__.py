"""What a run will need and how fast it will be, from the model's config alone.

setting   one way to run: degrees, ZeRO stage, what is kept, offloaded, computed in tiles
model     layers, parameters and products of a config (presets: of well-known models)
hardware  what GPUs, links and hosts do per second, measured or from data sheets
memory    peak of a GPU and of a host, item by item (activations: what layers keep and need)
time      seconds of an optimizer step, part by part, each with what bounds it
search    every way to run, ranked; the longest sequence that fits
report    the plan as text
files     the DeepSpeed configuration and the recipe of the plan

Nothing here needs a GPU or weights: bytes and operations follow from shapes, and the constants
stand in `hardware`. The figures are a model, not measurements; docs/planner.md says what it
leaves out.
"""

from hybridsp.planner.files import write_files
from hybridsp.planner.hardware import GPUS, Cluster
from hybridsp.planner.model import ModelShape, load_shape
from hybridsp.planner.report import render
from hybridsp.planner.search import Job, Plan, make_plan
from hybridsp.planner.setting import Setting

__all__ = [
    "GPUS",
    "Cluster",
    "Job",
    "ModelShape",
    "Plan",
    "Setting",
    "load_shape",
    "make_plan",
    "render",
    "write_files",
]
