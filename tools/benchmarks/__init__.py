"""Benchmarks, one module each. tools/bench.py calls ``run`` of the module that is named like the benchmark.

comparison, ours, peers/      loaders and converters of cfmask and of other libraries
training, authors_step        the steps that are measured
metering, stream_timing, fresh_process, tables, photographs      how it is measured and reported, and on what
"""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
