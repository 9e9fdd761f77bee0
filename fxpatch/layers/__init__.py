"""Layers that every port to a new device makes again, made once: compile-safe, for every device.

    platform_op, activation, norm   operators with one forward per device and a native one; FP32LayerNorm
    fp32_parameters                 its cache of converted parameters
    adoption                        `optimize(model, device)`: swaps them into transformers' and diffusers' models
    masks, npu_masks, vlm_masks     boolean decoder masks; what an NPU's attention takes; ragged batches for engines
    memory_format, causal_conv3d    channels_last_3d, matched once
    height_parallel, height_parallel_convs   a video decoder's height over ranks, with halo exchange
    scheduler                       `explicit_step(scheduler)`: every argument named and passed on

Import from the modules. docs/seeds.md says which upstream fix each comes from, and what was wrong with it.
"""
