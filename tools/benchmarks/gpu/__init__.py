"""`tools/bench.py gpu`: the measurements that need a GPU, within some minutes, the most valuable first.

command.py      the parts, their order and how long each takes
runner.py       runs each part in a process of its own with a limit, and writes the report
setting.py      what all parts have in common: device, folders, models, arithmetic
…               one module for each part, or group of parts
"""

from tools.benchmarks.gpu.command import run

__all__ = ["run"]
