"""ImageNet (ILSVRC2012): folders of classes, or the official tars with the devkit's labels."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from cfmask.convert.sources.files import SPLITS, Found, LabelledImage, Listing, Tick, Tree, chosen_tree, is_image
from cfmask.data import imagenet
from cfmask.errors import UserError

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_FLAT_VAL = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_FLAT_TEST = re.compile(r"ILSVRC2012_test_(\d{8})\.JPEG")


def imagenet_tree(source: Path, *, split: str | None, devkit: Path | None, tick: Tick) -> Tree:
    """ImageNet from any layout named at the top of this module.

    Args:
        split: "train" or "val"; None: all that are there.
        devkit: ILSVRC2012_devkit_t12.tar.gz; by default the one beside the source or in it. Only a val set that is
            not sorted into class folders needs it.

    Raises:
        UserError: nothing to convert, an unknown wnid, a split that cannot be told, a missing devkit.
    """
    known = set(imagenet.wnids())
    own_name = SPLITS.get(source.name.lower())
    listing = Listing(source, tick)
    images: dict[str, list[LabelledImage]] = {}
    unsorted: list[Found] = []
    ignored: list[str] = []

    def split_of(folder: tuple[str, ...]) -> str | None:
        above = SPLITS.get(folder[-2].lower()) if len(folder) > 1 else None
        return above or own_name or split

    def add(found: Found, split_of_tar: str | None) -> None:
        file = found.parts[-1]
        if _CLASS_TAR.fullmatch(file):
            if split != "val":
                listing.folders.add(("train", file.removesuffix(".tar")))
                for inner in listing.tar(found.blob, found.parts):
                    add(Found(("train", file.removesuffix(".tar"), inner.parts[-1]), inner.blob), None)
        elif file in (TRAIN_TAR, VAL_TAR):
            of_tar = "train" if file == TRAIN_TAR else "val"
            if split in (of_tar, None):
                for inner in listing.tar(found.blob, found.parts):
                    add(inner, of_tar)
        elif _FLAT_TEST.fullmatch(file) or not is_image(file):
            if file != DEVKIT:
                ignored.append("/".join(found.parts))
        elif len(found.parts) > 1 and found.parts[-2] in known:
            which = split_of(found.parts[:-1]) or split_of_tar
            if which is None:
                raise UserError(
                    f"{source} holds class folders ({found.parts[-2]}, …) but nothing says whether they are the "
                    f"training or the validation set: add --split train or --split val."
                )
            images.setdefault(which, []).append(LabelledImage(found.parts[-2], file, found.blob))
        elif _FLAT_VAL.fullmatch(file):
            unsorted.append(found)
        else:
            folder = found.parts[-2] if len(found.parts) > 1 else "no folder"
            raise UserError(
                f"{'/'.join(found.parts)} of {source} lies in {folder!r}, which is not one of ImageNet's 1000 wnids "
                f"(such as {imagenet.wnids()[0]}). For another data set use `make_shards.py folder`; otherwise move "
                f"what does not belong to ImageNet out of the source."
            )

    for found in listing:
        add(found, None)
    if unsorted and split != "train":
        truth = _validation_truth(_find_devkit(source, devkit))
        for found in unsorted:
            match = _FLAT_VAL.fullmatch(found.parts[-1])
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(truth):
                raise UserError(
                    f"{'/'.join(found.parts)}: the devkit's ground truth has {len(truth)} lines, not {number}."
                )
            images.setdefault("val", []).append(LabelledImage(truth[number - 1], found.parts[-1], found.blob))
    folders = [(split_of(folder), folder[-1]) for folder in listing.folders if folder[-1] in known]
    return chosen_tree(source, images, folders, ignored, split)


def _find_devkit(source: Path, given: Path | None) -> Path:
    candidates = [given] if given else [(source if source.is_dir() else source.parent) / DEVKIT]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"The validation images of {source} are not sorted into class folders, and {candidates[0]}, which has their "
        f"labels, is not there. Put {DEVKIT} (from image-net.org, where the images are) beside the images or name "
        f"it with --devkit; or convert the training set alone with --split train."
    )


def _validation_truth(devkit: Path) -> list[str]:
    """wnid of validation image 1, 2, …

    The ground truth counts classes by ILSVRC2012_ID, whose order is not that of the sorted wnids; meta.mat maps it.
    """
    import scipy.io  # for this one file

    try:
        with tarfile.open(devkit, "r:*") as archive:
            files = {Path(member.name).name: member for member in archive.getmembers()}
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None and truth is not None
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            by_id = {int(i): str(w) for i, w in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
            labels = [by_id[int(line)] for line in truth.read().split()]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{devkit} cannot be read as ILSVRC2012's devkit ({error!r}): download it again.") from None
    if strangers := sorted(set(labels) - set(imagenet.wnids())):
        raise UserError(
            f"{devkit} names classes that are not ImageNet's 1000, {strangers[0]} for one: download it again."
        )
    return labels
