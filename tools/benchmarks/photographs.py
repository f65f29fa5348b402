"""Noise that looks like photographs of ImageNet's size, in trees of class/image.JPEG."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from cfmask.errors import UserError


def draw_photograph(seed: int) -> bytes:
    """A JPEG of 500 × 375 pixels and about 110 kB, ImageNet's mean: smooth shapes with grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse = coarse.resize((500, 375), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 18, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def draw_tree(folder: Path, images: int = 500) -> Path:
    """A tree of drawn images of 20 classes, made once."""
    if not (folder / "complete").exists():
        for n in range(images):
            path = folder / "images" / f"class{n % 20:02d}" / f"{n}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_photograph(n))
        (folder / "complete").touch()
    return folder / "images"


def repeat_images(source: Path, folder: Path, images: int) -> Path:
    """A tree of at least ``images`` copies of the source's images, made once."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = sorted(path for path in source.glob("*/*") if path.is_file())
        if not found:
            raise UserError(f"{source} has no class/image in it.")
        for copy in range(-(-images // len(found))):
            for path in found:
                new = folder / "images" / path.parent.name / f"{path.stem}-{copy}{path.suffix}"
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
        (folder / "complete").touch()
    return folder / "images"
