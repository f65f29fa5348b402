"""Photograph-like noise of ImageNet's size, and trees of class/image.JPEG made of it or of a source's images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from cfmask.errors import UserError


def draw_photograph(seed: int) -> bytes:
    """A JPEG of 500 × 375 of about 110 kB, ImageNet's mean: smooth shapes with grain."""
    import io

    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 18, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def draw_tree(folder: Path, images: int = 500) -> Path:
    """class/image.JPEG, drawn once."""
    if not (folder / "whole").exists():
        for n in range(images):
            path = folder / "images" / f"class{n % 20:02d}" / f"{n}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_photograph(n))
        (folder / "whole").touch()
    return folder / "images"


def multiply(source: Path, folder: Path, images: int) -> Path:
    """The source's images as often as gives at least ``images``: hard links, or copies across file systems."""
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = sorted(path for path in source.glob("*/*") if path.is_file())
        if not found:
            raise UserError(f"{source} has no class/image in it.")
        for copy in range(-(-images // len(found))):
            for path in found:
                new = folder / "images" / path.parent.name / f"{path.stem}-{copy}{path.suffix}"
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
        (folder / "whole").touch()
    return folder / "images"
