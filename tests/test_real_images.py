"""Real photographs and a real trained tower, where they are at hand: relevance falls on the object."""

from __future__ import annotations

import json
import tarfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from cfmask.data.images import crop, decode
from cfmask.masking.cam import Relevance
from cfmask.masking.masks import object_mask
from cfmask.models.head import build_tower, model_info
from cfmask.models.tower import Classifier, Normalise, encode
from made import REPO

DATA = REPO.parent / "shared/data"
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


def test_relevance_of_a_trained_tower_falls_on_the_object(photographs, tmp_path):
    config = {
        "embed_dim": 384,
        "vision_cfg": dict(
            image_size=224, patch_size=14, width=384, layers=12, head_width=64, ls_init_value=1e-5, no_ln_pre=True
        ),
        "preprocess_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    (tmp_path / "vit.json").write_text(json.dumps(config))
    info = model_info(str(tmp_path / "vit.json"))
    tower = build_tower(info)
    tower.load_state_dict({key.removeprefix("visual."): v.float() for key, v in load_file(TOWER).items()})
    model = Classifier(tower, nn.Linear(384, CLASSES))
    normalise = Normalise(info.mean, info.std)
    images, boxes = photographs

    with torch.no_grad():  # a head of class means
        known = encode(model.visual, normalise(images[:, :KNOWN].flatten(0, 1)))
        means = F.normalize(known, dim=-1).unflatten(0, (CLASSES, KNOWN)).mean(1)
        model.head.weight.copy_(100 * F.normalize(means, dim=-1))
        model.head.bias.zero_()
    labels = torch.arange(CLASSES).repeat_interleave(SHOWN)
    camera = Relevance()
    logits = model.classify(model.encode(normalise(images[:, KNOWN:].flatten(0, 1)), cam=camera))
    cam = camera.of(logits.gather(1, labels[:, None]).squeeze(1))

    centre = 14 * torch.arange(16) + 7.0
    left, top, right, bottom = boxes.flatten(0, 1).T[..., None]
    across = (left <= centre) & (centre <= right)
    down = (top <= centre) & (centre <= bottom)
    inside = (down[:, :, None] & across[:, None, :]).flatten(1)
    telling = inside.float().mean(1) < 0.7  # a box of the whole picture tells nothing
    by_chance = inside[telling].float().mean()
    masked = object_mask(cam, 0.3)[telling]
    on_object = (masked & inside[telling]).sum() / masked.sum()
    print(f"{100 * on_object:.0f} % of the masked patches lie in the object's box, {100 * by_chance:.0f} % by chance")
    print(f"{telling.sum()} of {len(labels)} photographs")
    assert on_object > by_chance + 0.15
    assert 0.01 < masked.float().mean() < 0.5
