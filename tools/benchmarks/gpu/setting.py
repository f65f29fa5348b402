"""What all parts share: device and folders, models, arithmetic, memory."""

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
"""The model of a dry run, whatever model a part names."""


@dataclass(frozen=True)
class Setting:
    """Where and how parts run.

    dry: on the CPU, with TINY_CONFIG and the fewest repetitions.
    out: the folder of the report; work: a folder for files that nobody keeps.
    data: photographs and a trained tower for the tests that look for them.
    tiny: path of TINY_CONFIG as a file.
    """

    dry: bool
    out: Path
    work: Path
    data: Path | None
    tiny: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def case(self, model: str, batch: int) -> Case:
        """A model and its batch; in a dry run a tiny one."""
        return Case(str(self.tiny), 4, self.device, 1) if self.dry else Case(model, batch, self.device, 1)

    def materials(self, model: str, batch: int) -> Materials:
        """What is trained, on the device. It is drawn there, which saves seconds for a large model."""
        with torch.device(self.device):
            return materials(self.case(model, batch))

    def times(self, number: int) -> int:
        """How often to repeat something; in a dry run once."""
        return 1 if self.dry else number


def set_arithmetic(precision: str, *, deterministic: bool) -> None:
    """``choose_arithmetic`` in a process that may have chosen another before."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    choose_arithmetic(precision, deterministic=deterministic)


def free_memory(device: str) -> None:
    """Give memory of tensors that are gone back to the device, and compiled code back to the process."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
