"""`hybridsp doctor`: is this machine ready, what will be used on it, and what has to be mended.

finding     one line of the report, and how the ranks' lines become one table
host        shared memory, limits, host memory, disk
gpu         GPUs, the links between them, NCCL and settings that hurt
software    versions, kernels of linear and softmax attention, the offloaded optimizer
plan        what a recipe needs, against what is there
roll_call   who is there and who is not, through the job's store and no collective
trials      each collective that training uses, once, with its result checked
diagnosis   all of them, in order, on every rank

What is broken on a machine breaks the tools that look for it, too. So a check returns findings and
raises nothing, whatever is missing; nothing that the ranks say to each other goes over the network
that is being examined; and a collective runs on a thread that is given up when its time is over.
"""

from hybridsp.doctor.diagnosis import Diagnosis, diagnose
from hybridsp.doctor.finding import Finding, Status

__all__ = ["Diagnosis", "Finding", "Status", "diagnose"]
