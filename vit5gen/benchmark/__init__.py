"""Ratios to published code and growth with size, measured side by side on one machine in one run.

`vit5gen.benchmark.command` is the command; every other module but the first three is one benchmark. All on the CPU.
"""

NAMES = ("train-step", "classifier", "sampling", "evaluation", "memory", "start-up", "scaling")
