"""`tools/bench.py gpu`: everything that needs a GPU, measured within some minutes, most valuable first.

runner.py       parts in processes of their own with a limit each, and the report that grows as they end
setting.py      what all parts share: device, folders, models, arithmetic
command.py      which parts there are, in which order, and how long each takes
…               one file for each part, or group of parts
"""

from tools.benchmarks.gpu.command import run

__all__ = ["run"]
