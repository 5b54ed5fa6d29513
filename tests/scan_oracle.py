"""What a scan over ranks has to give: the recurrence itself, rank after rank, in one process."""

import torch


def naive_scan(state, decay, *, reverse=False):
    """What enters each rank, of every rank's state and decay stacked in rank order.

    In(0) = 0, In(p + 1) = d_p * In(p) + S_p; reverse from the other end.
    """
    order = range(len(state))[::-1] if reverse else range(len(state))
    incoming, entering = 0 * state[0], [None] * len(state)
    for rank in order:
        entering[rank] = incoming
        incoming = decay[rank][..., None] * incoming + state[rank]
    return torch.stack(entering)
