"""A separate merge kernel, and FlashInfer's and FlashMLA's attention behind the contract of ours.

No path of the runtime uses what is here: its steps merge in `attend.py` and `exchange/roles.py`.
Tests compare with it (`tests/kernels/test_kernel_merge.py`, `test_kernel_adapters.py`), and benchmarks
take it as a baseline (`benchmarks/attend.py`, `merge.py`, `exchange.py`, `step.py`).
"""
