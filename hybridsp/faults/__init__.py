"""What goes wrong in a long run, and how a job of many ranks ends or goes on as one.

A rank that fails takes part in no further collective, and the others wait for it, silently, until a
timeout of half an hour. So every rank says where it stands (`position`), reads what the others say
(`board`), and ends the job with one message when one of them is lost (`watchdog`). What can be
survived is survived: a stop that is asked for by signal ends in a checkpoint (`signals`), a step
without a finite gradient is left out (`bad_steps`). What would be found out only by a hang, ranks
that are about to do different things, is asked beforehand (`desync`); so is the room that
checkpoints need (`resources`), and whether another job is at work in the directory (`claim`).
"""

from hybridsp.faults.bad_steps import BadSteps
from hybridsp.faults.desync import (
    batch_facts,
    check_in_step,
    engine_facts,
    settings_facts,
)
from hybridsp.faults.position import Position, follow
from hybridsp.faults.resources import check_room
from hybridsp.faults.signals import EXIT_STOPPED, StopSignals
from hybridsp.faults.watchdog import EXIT_FAULT, Watchdog

__all__ = [
    "EXIT_FAULT",
    "EXIT_STOPPED",
    "BadSteps",
    "Position",
    "StopSignals",
    "Watchdog",
    "batch_facts",
    "check_in_step",
    "check_room",
    "engine_facts",
    "follow",
    "settings_facts",
]
