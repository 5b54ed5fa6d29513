"""Training scripts for the `deepspeed` launcher and torchrun, and the recipes they read.

A script is glue that reads from top to bottom; whatever could be wrong in an interesting way lives
in `hybridsp` and has tests there.
"""
