"""A small data set and a small model, made in seconds: what launch/drill.py trains, and tests do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from cfmask.models.head import ModelInfo

REPO = Path(__file__).resolve().parents[2]
CLASSES = ("n00000000", "n00000001", "n00000002")
MAKE_SHARDS = (sys.executable, str(REPO / "tools/make_shards.py"))
_CONFIG = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make_materials(folder: Path, *, per_class: int) -> list[str]:
    """Make shards of ``per_class`` images of each of three classes, and a model with random weights.

    Returns:
        The flags of submit.py that name them.
    """
    shards, model = folder / "shards", folder / "model.safetensors"
    if not model.exists():  # written last
        if not shards.exists():
            draw_images(folder / "images", per_class=per_class)
            convert(folder / "images", shards, "--samples-per-shard", str(max(1, per_class // 2)))
        from cfmask.models.head import ModelInfo  # imports torch

        mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
        save_random_model(model, ModelInfo("small", _CONFIG, mean, std, CLASSES, provenance="random weights"))
    return ["--shards", str(shards), *flags_of_model(model)]


def draw_images(root: Path, *, per_class: int = 16, splits: Sequence[str] = ("train", "val"), size: int = 20) -> Path:
    """root/<split>/<class>/<i>.JPEG; the class shows in the colour, so that a loss can fall."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 120, (size, size + 3, 3), dtype=np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(root / split / name / f"{name}_{i}.JPEG", quality=95)
    return root


def convert(source: Path, out: Path, *flags: str) -> Path:
    """Shards of a tree of images, by tools/make_shards.py.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [*MAKE_SHARDS, "folder", "--source", source, "--out", out, *flags]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


def save_random_model(path: Path, info: ModelInfo) -> None:
    """Write a model file, and before it the configuration for --model, as ``flags_of_model`` names them."""
    import torch

    from cfmask.models.head import build_tower, save_model
    from cfmask.models.tower import Classifier

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(build_tower(info), torch.nn.Linear(info.config["embed_dim"], len(info.classes)))
    path.with_suffix(".json").write_text(json.dumps(info.config))
    save_model(path, model, info)


def flags_of_model(path: Path) -> list[str]:
    return ["--model", str(path.with_suffix(".json")), "--pretrained", str(path)]
