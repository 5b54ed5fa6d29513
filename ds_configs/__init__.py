"""DeepSpeed configurations by name: zero1, zero2, zero3, zero3_offload.

Each holds what is DeepSpeed's business alone: the ZeRO stage, where states live, gradient clipping.
Batch sizes, precision, optimizer and schedule come from the recipe (`hybridsp.recipe`), which fills
them in, so no value is "auto" and none is said twice. (At start each device holds all weights
once, at every stage.)

    name            split over all ranks                          use it when
    zero1           optimizer states                              weights and gradients fit
    zero2           and gradients                                 the weights fit
    zero3           and weights                                   training needs the room; usual
    zero3_offload   as zero3, optimizer states in host memory     the GPUs' memory is the limit
"""
