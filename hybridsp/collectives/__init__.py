"""Communication only, each collective an autograd Function with a named transpose.

    all_scan, start_all_scan      the recurrent state from rank to rank (linear layers)
    left_halo                     a rank's last tokens to its right neighbour (short convolution)
    seq_to_heads, heads_to_seq    tokens for heads, with the zigzag order folded in (Ulysses)
    RingExchange                  K, V and their gradients around a ring (ring attention)
    KVGather                      K and V to all at once, their gradients back (ring attention)

Groups are arguments. A group of one rank costs nothing.
"""

from hybridsp.collectives.all_scan import ALGORITHMS, PendingScan, all_scan, start_all_scan
from hybridsp.collectives.all_to_all import heads_to_seq, seq_to_heads
from hybridsp.collectives.gather_kv import KVGather
from hybridsp.collectives.halo import left_halo
from hybridsp.collectives.ring import RingExchange

__all__ = [
    "ALGORITHMS",
    "KVGather",
    "PendingScan",
    "RingExchange",
    "all_scan",
    "heads_to_seq",
    "left_halo",
    "seq_to_heads",
    "start_all_scan",
]
