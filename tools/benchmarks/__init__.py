"""Benchmarks, one file each: ``run`` is what `tools/bench.py` calls for the verb of the file's name."""
