"""What a notebook needs, as names of ``cfmask``: load a model, read shards, mask a batch, evaluate.

Everything runs in this process, on one device. docs/notebook.md has an example that the tests run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfmask.counting import Counts
from cfmask.data.images import crop, decode
from cfmask.data.label_space import label_space_of
from cfmask.data.remote import node_cache
from cfmask.data.shards import Manifest, load_manifest
from cfmask.data.stream import MicroBatch, eval_batches
from cfmask.errors import UserError
from cfmask.evaluation.checks import check_classes, check_set
from cfmask.masking.fills import Draws, DrawSpec, draw
from cfmask.models import head
from cfmask.models.initial import initial_model
from cfmask.models.tower import Classifier, ClassifierOutput, Normalise
from cfmask.recipe import Method, Recipe
from cfmask.report.results import SetResult
from cfmask.run_search import find_model
from cfmask.step import build_cam, counterfactual
from cfmask.urls import is_remote

__all__ = ["Counterfactuals", "Method", "Model", "batches", "counterfactuals", "evaluate", "load_model", "load_set"]


@dataclass(frozen=True)
class Model:
    """An image classifier with its preprocessing, on one device."""

    classifier: Classifier
    """Image tower and linear head, in fp32 and evaluation mode. No function here changes its weights or gradients."""
    info: head.ModelInfo
    """Architecture, mean and standard deviation of the pixels, and classes."""
    normalise: Normalise
    """Pixels to the tower's input."""

    @property
    def device(self) -> torch.device:
        return self.normalise.mean.device

    @property
    def image_size(self) -> int:
        """Side of the images that the tower takes, in pixels."""
        return self.classifier.image_size

    def preprocess(self, path: str | Path) -> Tensor:
        """Read an image file as training and evaluation do: resize the short side (bicubic), crop the centre.

        Returns:
            (3, S, S) uint8, on the CPU; S is ``image_size``. ``__call__`` normalises it.

        Raises:
            OSError: the file cannot be read.
            UserError: it is not an image, or is truncated.
        """
        try:
            return crop(decode(Path(path).read_bytes()), self.image_size).contiguous()
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}.") from None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ClassifierOutput:
        """Classify images.

        Args:
            images: (N, 3, S, S), uint8 in 0…255 or floating point in 0…1, on any device.

        Returns:
            ``features`` (N, D), not normalised, and ``logits`` (N, classes), fp32, on the model's device.
        """
        return self.classifier(self.normalise(images.to(self.device)))

    def save(self, path: str | Path) -> None:
        """Write a model file, which every command takes as MODEL, and ``submit.py`` as ``--pretrained``.

        Raises:
            OSError: it cannot be written.
        """
        head.save_model(path, self.classifier, self.info)


def load_model(
    name: str | Path,
    pretrained: str | Path | None = None,
    classes: Sequence[tuple[str, str]] = (),
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """Load a model from disk, or make a zero-shot classifier of a CLIP.

    Args:
        name: without ``pretrained``, a run folder (its trained model, or its latest checkpoint), a checkpoint folder,
            RUN/checkpoints/best.json or a model file. With ``pretrained``, open_clip's name of a ViT, or the path of
            its configuration.
        pretrained: open_clip's tag of weights, or the path of weights.
        classes: (folder name, display name) of each class, for the zero-shot head; for example ``load_set(…).classes``.
        mean, std: of the pixels in 0…1, per channel; only for weights that do not say theirs.

    Raises:
        UserError: no model there, weights that do not fit the name, unknown preprocessing, or no ``classes`` for a
            zero-shot head.
    """
    if pretrained is None:
        if classes or mean is not None or std is not None:
            raise UserError(
                f"classes, mean and std would do nothing: the model file of {name} states them. Leave them out, or "
                "give the weights of a CLIP as pretrained."
            )
        classifier, info = head.load_model(find_model(name))
    else:
        if not classes:
            raise UserError("A zero-shot head needs class names: give classes, for example load_set(…).classes.")
        classifier, info = initial_model(
            str(name), str(pretrained), None, tuple(classes), str(device), mean=mean, std=std
        )
    return Model(classifier.to(device).eval(), info, Normalise(info.mean, info.std).to(device))


def load_set(where: str | Path) -> Manifest:
    """The manifest of a set of shards: its classes, counts and files. Samples are read by ``batches``.

    Args:
        where: folder of the set, such as shards/val, or its URL.

    Raises:
        UserError: no set there, or a shard is missing or has another size.
    """
    return load_manifest(where, cache=node_cache() if is_remote(where) else None)


def batches(
    images: Manifest, *, image_size: int, batch_size: int = 64, loader_workers: int = 2, start: int = 0
) -> Iterator[MicroBatch]:
    """Read a set in its order, every sample once.

    Args:
        image_size: S, side of the crop; ``Model.image_size``.
        loader_workers: threads that read and decode; 0 reads when a batch is asked for.
        start: number of batches to leave out at the beginning; they are not read.

    Yields:
        Batches of N ≤ ``batch_size`` samples: ``images`` (N, 3, S, S) uint8, ``labels`` (N,) int64, and ``keys``, the
        names of the samples in the shards; on the CPU.

    Raises:
        UserError: a set of crops of another size, or a sample that cannot be read.
    """
    return eval_batches(
        images,
        image_size=image_size,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        loader_workers=loader_workers,
        start=start,
    )


@dataclass(frozen=True)
class Counterfactuals:
    """Masked images, on the model's device; P is the number of patches, row by row of the grid."""

    images: Tensor
    """(N, 3, S, S), of the dtype that was given; under no-fill the originals, whose masked patches the tower drops."""
    mask: Tensor
    """(N, P) bool, which patches are masked."""
    cam: Tensor | None
    """(N, P) float, relevance of each patch for the class, not normalised; None for random masks."""
    donors: Tensor | None
    """(N,) int64, the image in the batch that each takes its patches from, or (N, P) for multi-fill; None: no fill."""


def counterfactuals(
    model: Model, images: Tensor, labels: Tensor | None = None, method: Method | None = None, *, seed: int = 0
) -> Counterfactuals:
    """Mask and fill a batch, as the training step does.

    Args:
        images: (N, 3, S, S), uint8 in 0…255 or floating point in 0…1, on any device.
        labels: (N,) int64, the classes whose CAM is computed; None: those that the model predicts.
        method: mask, fill, CAM, threshold; fields that are None have the paper's values. By default an object mask
            with single-fill.
        seed: of random masks and donors.

    Raises:
        UserError: settings that contradict each other, or a method without masked images.
    """
    method = Recipe(method=method or Method()).resolved().method
    spec = DrawSpec.of(method, model.classifier.patches)
    if spec is None:
        raise UserError(f"The method {method.row} masks no images. Choose a mask: object, context or random.")
    images = images.to(model.device)
    cam_hook, cam = build_cam(method), None
    if cam_hook is not None:
        logits = model.classifier.classify(model.classifier.encode(model.normalise(images), cam=cam_hook))
        of = logits.argmax(1) if labels is None else labels.to(model.device)
        cam = cam_hook.compute(logits.gather(1, of[:, None]).squeeze(1))
    draws: Draws = draw(spec, len(images), np.random.default_rng(seed)).map(lambda drawn: drawn.to(model.device))
    masked = counterfactual(images, cam, draws, method, model.classifier.patch_size)
    return Counterfactuals(masked.images, masked.mask, cam, draws.donors)


def evaluate(
    model: Model,
    images: Manifest,
    *,
    batch_size: int = 64,
    loader_workers: int = 2,
    allow_count_mismatch: bool = False,
) -> SetResult:
    """Evaluate a model on a set in fp32, every sample once, as tools/evaluate.py does.

    On ImageNet-R and -A the model answers among their 200 classes; on ObjectNet each of several right classes counts.

    Args:
        allow_count_mismatch: accept a known set with other counts than the published ones.

    Returns:
        ``top1`` in percent with its 95 % ``interval``, ``correct`` of ``total``, ``ece``, ``calibration`` and
        ``per_class``.

    Raises:
        UserError: a set with other classes than the model's, an incomplete copy of a known set, a sample that cannot be
            read, or logits that are not finite.
    """
    check_set(images, allow_count_mismatch=allow_count_mismatch)
    check_classes(images, model.info.classes)
    counts = Counts(1, images.num_classes, model.device)
    label_space = label_space_of(images).to(model.device)
    for batch in batches(images, image_size=model.image_size, batch_size=batch_size, loader_workers=loader_workers):
        counts.add(0, model(batch.images).logits, batch.labels.to(model.device), label_space)
    if bad := int(counts.not_finite[0]):
        raise UserError(f"The model's logits are not finite for {bad} of {images.num_samples} images of {images.root}.")
    return SetResult.from_json(images.split, counts.result(0, [name for name, _ in images.classes]))
