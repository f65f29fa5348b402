"""Small towers in open_clip's layout, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import CLIP
from torch import nn

from cfmask.models.head import ModelInfo, build_tower
from cfmask.models.tower import Classifier

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass(frozen=True)
class Geometry:
    image: int
    patch: int
    width: int = 32
    layers: int = 3
    heads: int = 4
    embed: int = 24
    quick: bool = True

    def config(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, **changes: Any) -> str:
        """A configuration file with preprocessing: an open_clip_config.json."""
        config = {**self.info().config, **changes}
        return json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}})

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def info(self, classes: int = 5) -> ModelInfo:
        config = {
            "embed_dim": self.embed,
            "quick_gelu": self.quick,
            "vision_cfg": {
                "image_size": self.image,
                "patch_size": self.patch,
                "width": self.width,
                "layers": self.layers,
                "head_width": self.width // self.heads,
                "mlp_ratio": 4.0,
            },
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }
        names = tuple(f"n{i:08d}" for i in range(classes))
        return ModelInfo("tiny", config, MEAN, STD, names, provenance="random weights")

    def classifier(self, seed: int = 0, classes: int = 5, dtype: torch.dtype = torch.float32) -> Classifier:
        """Weights wide enough that attention is uneven and relevance has structure."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Classifier(build_tower(self.info(classes)), nn.Linear(self.embed, classes))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "in_proj" in name or "positional" in name or "class_embedding" in name:
                        parameter.normal_(std=0.4)
                    elif name.endswith("bias"):
                        parameter.normal_(std=0.1)
                    elif name == "head.weight":
                        parameter.normal_(std=5.0)
        return model.to(dtype)


# B/32-like (7×7 grid), B/16-like (14×14), and one whose image is not a multiple of its patch.
B32 = Geometry(image=56, patch=8)
B16 = Geometry(image=56, patch=4, layers=2)
ODD = Geometry(image=53, patch=7, width=36, layers=4, heads=3, embed=20, quick=False)
# Heads of 64 channels, as CLIP's, with the keys of B/16 and L/14: 257 are more than two tiles of any attention kernel,
# whose backward pass then adds in an order that only strict determinism fixes.
KEYS_197 = Geometry(image=56, patch=4, width=128, layers=3, heads=2, embed=64)
KEYS_257 = Geometry(image=64, patch=4, width=128, layers=3, heads=2, embed=64)
TINY = Geometry(image=16, patch=4, width=16, layers=2, heads=2, embed=8)


def tiny_clip(geometry: Geometry = TINY, seed: int = 0) -> CLIP:
    """A whole CLIP with random weights, text tower included."""
    torch.manual_seed(seed)
    return CLIP(**geometry.info().config)
