"""How long a checkpoint stops training."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.checkpoint import HEADER, NOTE, checkpoint_stall
from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, Setting


def checkpoints(setting: Setting, section: Section) -> dict[str, Any]:
    model = setting.case(B16, 1).model
    rows = checkpoint_stall(model, setting.work, device=setting.device, rounds=setting.times(2) + 1)
    section.note(f"{B16}. {NOTE}")
    section.table(HEADER, rows)
    return {row[0]: row[1:] for row in rows}
