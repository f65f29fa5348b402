"""Real photographs and a real trained tower, where they are at hand: relevance falls on the object, in low precision
too."""

from __future__ import annotations

import copy
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cfmask.data.images import crop, decode
from cfmask.masking.cam import Relevance
from cfmask.masking.masks import object_mask
from cfmask.models.head import build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise
from made import REPO

DATA = Path(os.environ.get("CFMASK_TEST_DATA", REPO.parent / "shared/data"))
TOWER, PHOTOS = DATA / "vit-s14-dinov2.safetensors", DATA / "tiny-imagenet.tar"

pytestmark = pytest.mark.skipif(
    not (TOWER.exists() and PHOTOS.exists()), reason=f"needs {TOWER.name} and {PHOTOS.name}"
)

CLASSES, KNOWN, SHOWN = 8, 6, 4  # photographs of a class: some that the head is made of, others to look at


@pytest.fixture(scope="module")
def photographs():
    """Pixels (CLASSES, KNOWN + SHOWN, 3, 224, 224) and boxes (CLASSES, SHOWN, 4) in those pixels."""
    pixels, boxes = [], []
    with tarfile.open(PHOTOS) as tar:
        names = {name.rsplit("/", 1)[-1]: name for name in tar.getnames()}
        lists = sorted(name for name in names if name.endswith("_boxes.txt"))[:CLASSES]
        for listed in lists:
            file = tar.extractfile(names[listed])
            assert file is not None
            rows = [line.split() for line in file.read().decode().splitlines()][: KNOWN + SHOWN]
            for row in rows:
                photo = tar.extractfile(names[row[0]])
                assert photo is not None
                pixels.append(crop(decode(photo.read()), 224))
            boxes.append([[int(v) * 224 / 64 for v in row[1:5]] for row in rows[KNOWN:]])
    return torch.stack(pixels).unflatten(0, (CLASSES, -1)), torch.tensor(boxes)


@pytest.fixture(scope="module")
def model(photographs, tmp_path_factory):
    """The trained tower under a head of class means, and its normalisation."""
    config = {
        "embed_dim": 384,
        "vision_cfg": dict(
            image_size=224, patch_size=14, width=384, layers=12, head_width=64, ls_init_value=1e-5, no_ln_pre=True
        ),
        "preprocess_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    file = tmp_path_factory.mktemp("tower") / "vit.json"
    file.write_text(json.dumps(config))
    info = model_info(str(file))
    tower = build_tower(info)
    tower.load_state_dict({key.removeprefix("visual."): v.float() for key, v in load_file(TOWER).items()})
    model = Classifier(tower, nn.Linear(384, CLASSES))
    normalise = Normalise(info.mean, info.std)
    images, _ = photographs
    with torch.no_grad():
        known = model.encode(normalise(images[:, :KNOWN].flatten(0, 1)))
        means = F.normalize(known, dim=-1).unflatten(0, (CLASSES, KNOWN)).mean(1)
        model.head.weight.copy_(100 * F.normalize(means, dim=-1))
        model.head.bias.zero_()
    return model, normalise


def relevance_of(model, normalise, images) -> torch.Tensor:
    """(CLASSES · SHOWN, P), for the photographs shown."""
    parts = []
    for label, shown in enumerate(images[:, KNOWN:]):
        cam_hook = Relevance()
        logits = model.classify(model.encode(normalise(shown), cam=cam_hook))
        parts.append(cam_hook.compute(logits[:, label]).cpu())
    return torch.cat(parts)


@pytest.fixture(scope="module")
def exact(model, photographs):
    return relevance_of(*model, photographs[0])


def test_relevance_of_a_trained_tower_falls_on_the_object(photographs, exact):
    _, boxes = photographs
    centre = 14 * torch.arange(16) + 7.0
    left, top, right, bottom = boxes.flatten(0, 1).T[..., None]
    across = (left <= centre) & (centre <= right)
    down = (top <= centre) & (centre <= bottom)
    inside = (down[:, :, None] & across[:, None, :]).flatten(1)
    telling = inside.float().mean(1) < 0.7  # a box of the whole image shows nothing
    by_chance = inside[telling].float().mean()
    masked = object_mask(exact, 0.3)[telling]
    on_object = (masked & inside[telling]).sum() / masked.sum()
    print(f"{100 * on_object:.0f} % of the masked patches lie in the object's box, {100 * by_chance:.0f} % by chance")
    print(f"{telling.sum()} of {len(exact)} photographs")
    assert on_object > by_chance + 0.15
    assert 0.01 < masked.float().mean() < 0.5


class Rounded(TorchDispatchMode):
    """Matrix products and attention whose inputs, and where ``outputs`` says so results, are rounded first: what bf16
    autocast and TF32 do on a GPU, on CPUs that have neither (bf16 there is emulated, a hundred times as slow)."""

    PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution")

    def __init__(self, mantissa: int, outputs: bool) -> None:
        super().__init__()
        self.dropped, self.outputs = 23 - mantissa, outputs

    def rounded(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        bits = value.contiguous().view(torch.int32)
        odd = (bits >> self.dropped) & 1  # to nearest, ties to even
        return ((bits + (1 << (self.dropped - 1)) - 1 + odd) & -(1 << self.dropped)).view(torch.float32)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        product = name in self.PRODUCTS or "scaled_dot_product" in name
        if not product:
            return function(*args, **(kwargs or {}))
        result = function(*map(self.rounded, args), **(kwargs or {}))
        if not self.outputs:
            return result
        # of attention's results, the four-dimensional ones: the log-sum-exp stays fp32
        several = isinstance(result, tuple)
        parts = [
            self.rounded(r) if not several or getattr(r, "dim", int)() == 4 else r
            for r in (result if several else [result])
        ]
        return tuple(parts) if several else parts[0]


@pytest.mark.parametrize(("mantissa", "outputs"), [(7, True), (10, False)], ids=["bf16", "TF32"])
def test_masks_in_low_precision_are_those_of_fp32(model, photographs, exact, mantissa, outputs):
    with Rounded(mantissa, outputs):
        low = relevance_of(*model, photographs[0])
    assert not torch.equal(low, exact)
    assert_masks_agree(low, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_masks_on_a_gpu_are_those_of_fp32(model, photographs, exact, precision):
    there = [copy.deepcopy(part).cuda() for part in model]
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            low = relevance_of(*there, photographs[0].cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_masks_agree(low, exact)


def assert_masks_agree(low: torch.Tensor, exact: torch.Tensor) -> None:
    """At the thresholds that the authors give."""
    for threshold in (0.3, 0.5, 0.6):
        agree = (object_mask(low, threshold) == object_mask(exact, threshold)).float().mean()
        print(f"threshold {threshold}: {100 * agree:.2f} % of the patches agree")
        assert agree >= 0.99
