"""Arithmetic and packing. Nothing here knows the rest of the package.

The package itself imports nothing, because Triton is optional: import the modules.

    without Triton
      reference        attention, merge, sink, absorb and project in plain torch: the definitions
      coverage         hash, sum, tag and comparison of what an answer covers: the definition
      limits           sizes and dtypes that the kernels take
      checks           shapes, dtypes and devices, as launchers check them
      pool_layout      where a rank's blocks and their tables lie in memory that peers can read
    a step on GPUs
      plan, decide     who is asked for what, and how (plan.cu, decide.cuh, device.cuh; compiled by nvrtc)
      exchange/        routed queries out, answers back: memory layout, signals, roles, launcher
      fetch            entries of other ranks into staged rows
      gather           rows of a pool into one tensor
      attend           partial attention over listed entries; attend_sm90 is its Hopper kernel
      mix, pdl, nvrtc  the hash for Triton; early launches; CUDA C++ at run time
    called by tests and benchmarks only
      codec, rope      encode and decode entries; move cached entries to other positions
      library/         a separate merge, FlashInfer and FlashMLA
"""
