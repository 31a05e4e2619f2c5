"""Ratios to published code and growth with size, measured side by side on one machine in one run.

`command` is the command; a function of `steps`, `inference` or `sampling` yields the rows of one benchmark. All but
``gpu`` on the CPU.
"""

from typing import Literal

Benchmark = Literal["train-step", "classifier", "sampling", "evaluation", "memory", "start-up", "scaling", "gpu"]
GpuRow = Literal["train-step", "sampling", "tf32", "bf16", "fastest"]  # the last three against published SiT
