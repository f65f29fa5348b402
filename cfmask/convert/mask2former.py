"""Mask2Former from Hugging Face's transformers: the pixels of an image that show a COCO category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfmask.errors import UserError
from cfmask.runtime.downloads import why_unreachable

DEFAULT = "facebook/mask2former-swin-base-coco-panoptic"
"""The hub's closest model to the paper's: Mask2Former, COCO panoptic, Swin-B. The paper's (48558700_7 in Mask2Former's
model zoo) has a Swin-B pre-trained on ImageNet-21k, which the hub has for COCO instances, ADE20K and Cityscapes only.
The paper's model can be converted to Hugging Face's format and given as a folder: --segmenter DIR."""

_FILES = "config.json, preprocessor_config.json and model.safetensors"


class Segmenter:
    """A panoptic segmentation model with its preprocessing."""

    def __init__(self, name: str, device: str) -> None:
        transformers = _transformers()
        self._processor = _load(transformers.Mask2FormerImageProcessor, name)
        self._model = _load(transformers.Mask2FormerForUniversalSegmentation, name).to(device).eval()
        self._labels = category_labels(self._model.config)
        self._device = device

    def masks(self, images: Sequence[NDArray[np.uint8]], categories: Sequence[str]) -> list[NDArray[np.bool_]]:
        """The pixels of each image that show its category.

        Args:
            images: (H, W, 3) each, of any sizes.
            categories: of each image, in ``category_labels``.

        Returns:
            (H, W) each, the union of the category's segments in the panoptic segmentation.
        """
        import torch  # takes seconds, and --help needs the name of the model only

        inputs = self._processor(images=[np.ascontiguousarray(i) for i in images], return_tensors="pt")
        inputs = {name: value.to(self._device) for name, value in inputs.items() if torch.is_tensor(value)}
        with torch.inference_mode():
            outputs = self._model(**inputs)
        segmented = self._processor.post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=set(), target_sizes=[i.shape[:2] for i in images]
        )
        found = []
        for of_image, category in zip(segmented, categories, strict=True):
            wanted = [s["id"] for s in of_image["segments_info"] if s["label_id"] == self._labels[category]]
            found.append(np.isin(of_image["segmentation"].cpu().numpy(), wanted))
        return found


def read_config(name: str) -> Any:
    """The model's configuration, without its weights."""
    config = _load(_transformers().AutoConfig, name)
    if config.model_type != "mask2former":
        raise UserError(
            f"--segmenter {name} is a model of type {config.model_type}, not mask2former, such as {DEFAULT}."
        )
    return config


def category_labels(config: Any) -> dict[str, int]:
    """The model's label of each category, by name."""
    return {str(name): int(label) for label, name in config.id2label.items()}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "Mask2Former needs the package transformers, which is not installed: pip install -r "
            "tools/segment-requirements.txt. tools/validate_masks.py does not need it for masks that exist already."
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load(kind: Any, name: str) -> Any:
    folder = Path(name)
    try:
        if folder.is_dir():
            return kind.from_pretrained(folder)
        try:
            return kind.from_pretrained(name, local_files_only=True)
        except OSError:  # not in the cache
            if why := why_unreachable(f"https://huggingface.co/{name}/resolve/main/config.json"):
                raise UserError(why) from None
            return kind.from_pretrained(name)
    except Exception as error:  # transformers and the hub's client raise many kinds; the remedy is the same
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        repository = DEFAULT if folder.is_dir() or folder.is_absolute() else name
        raise UserError(
            f"The segmentation model {name} cannot be loaded ({reason}). Without network access, download the files "
            f"{_FILES} of https://huggingface.co/{repository} elsewhere, copy them into one folder here, and give that "
            "folder: --segmenter DIR."
        ) from None
