"""The settings of tools/demo.py, and the folder that it fills."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cfmask.errors import UserError

EVAL_SETS = ("val", "shift-random", "shift-swapped", "shift-style")
RECIPE = (
    *("--batch-size", "64", "--lanes", "4", "--epochs", "4", "--warmup-steps", "20", "--lr", "3e-4"),
    *("--loader-workers", "1", "--log-steps", "5", "--eval-sets", "val", "shift-random"),
)
"""Flags of submit.py for all rows: the paper's recipe (β, thresholds, AdamW, clipping, cosine) with sizes that suit ten
classes."""
ROWS = {
    "FT": ("--preset", "ft"),
    "object-mask": ("--preset", "object-mask-single-fill"),
    "context-mask": ("--preset", "context-mask-single-fill"),
}
CONTROL = {"random-mask": ("--preset", "random-mask-single-fill")}
SEED = 0
"""Seed of the images and of the pre-training. Fine-tuning has --seeds."""


def claim(out: Path) -> Path:
    """Record the settings in the folder, and refuse one that was made with other settings."""
    record = out / "demo.json"
    makers = [Path(__file__).with_name(name) for name in ("shapes.py", "tower.py")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in makers)).hexdigest()
    settings = json.dumps({"seed": SEED, "recipe": RECIPE, "rows": ROWS, "makers": digest}, indent=2)
    if record.exists() and record.read_text() != settings:
        raise UserError(
            f"{out} was made with other settings than this version's. Delete it, or give another folder: --out DIR."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(settings)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Give another folder: --out DIR.") from error
    return out


def run_folder(out: Path, row: str, seed: int) -> Path:
    return out / f"runs/{row}-s{seed}"
