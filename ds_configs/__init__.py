"""DeepSpeed configurations by name: zero1, zero2, zero3, zero3_offload.

Each holds what is DeepSpeed's business alone: the ZeRO stage, where states live, gradient clipping.
Batch sizes, precision, optimizer and schedule come from the recipe (`hybridsp.recipe`), which fills
them in, so no value is "auto" and none is said twice.

    name            split over all ranks                          use it when
    zero1           optimizer states                              weights and gradients fit
    zero2           and gradients                                 the weights fit
    zero3           and weights                                   they do not; the usual choice
    zero3_offload   as zero3, optimizer states in host memory     the GPUs' memory is the limit
"""
