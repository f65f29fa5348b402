"""What all parts have in common: device and folders, models, arithmetic, memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo

from cfmask.session import choose_arithmetic
from tools.benchmarks.training import Case, Materials, materials

B16, B32, L14 = "ViT-B-16-quickgelu", "ViT-B-32-quickgelu", "ViT-L-14-quickgelu"

TINY_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 64, "layers": 2, "head_width": 32, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
"""The model of a dry run, in place of every model that a part names."""


@dataclass(frozen=True)
class Setting:
    """Where and how parts run."""

    dry: bool
    """Run on the CPU, with TINY_CONFIG and the fewest repetitions."""
    out: Path
    """Folder of the report."""
    work: Path
    """Folder for temporary files."""
    data: Path | None
    """Folder with photographs and a trained tower, which some tests need."""
    tiny: Path
    """TINY_CONFIG as a file."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def case(self, model: str, batch: int) -> Case:
        """A model and its batch; the tiny ones in a dry run."""
        return Case(str(self.tiny), 4, self.device) if self.dry else Case(model, batch, self.device)

    def materials(self, model: str, batch: int) -> Materials:
        """Models and a batch, drawn on the device, which is faster for a large model."""
        with torch.device(self.device):
            return materials(self.case(model, batch))

    def times(self, number: int) -> int:
        """``number`` repetitions, or one in a dry run."""
        return 1 if self.dry else number


def set_arithmetic(precision: str, *, deterministic: bool) -> None:
    """``choose_arithmetic``, after undoing an earlier choice in this process."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    choose_arithmetic(precision, deterministic=deterministic)


def free_memory(device: str) -> None:
    """Release cached memory of the device, and compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
