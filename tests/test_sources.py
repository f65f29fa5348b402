"""Sources of a conversion: today's downloads, and unusual files in them. Ignored files are counted and listed."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cfmask.convert.collection import collect
from cfmask.convert.request import Request
from cfmask.convert.sources.listing import DANGLING, HIDDEN, LOOP, Listing
from cfmask.convert.tables import read_classes, whole_number
from cfmask.data import blobs, imagenet
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError
from test_make_shards import contents, convert, picture, refused, samples_of, write_tar, write_tree

REPO = Path(__file__).resolve().parents[1]
WNIDS = [imagenet.wnids()[i] for i in (3, 0, 999, 151)]


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_links(tar, links):
    """Append links: name → target, "=target" for a hard link."""
    with tarfile.open(tar, "a") as archive:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.LNKTYPE if target.startswith("=") else tarfile.SYMTYPE
            info.linkname = target.lstrip("=")
            archive.addfile(info)
    return tar


def listed(source):
    """The files that a walk finds {path: bytes}, and those that it ignores {(name, reason): number}."""
    listing = Listing(source, lambda: None)
    found = {}
    for path, blob in ((("/".join(file.parts)), file.blob) for file in listing):
        assert path not in found
        found[path] = blob.read() if hasattr(blob, "file") else blob.why
    return found, {(issue["name"], issue["issue"]): issue["files"] for issue in listing.ignored.issues()}


def request(source, kind="folder", **more):
    return Request(kind, Path(source), Path("unused"), allow_count_mismatch=kind != "folder", **more)


def labels_in(source, kind="folder", **more):
    """{split: {name: class folder}} of a source."""
    found = collect(request(source, kind, **more))
    return {
        split: {image.file: image.folder for image in of_split} for split, of_split in found.splits.items()
    }, found.classes


def message_of(*arguments, **more):
    with pytest.raises(UserError) as raised:
        labels_in(*arguments, **more)
    return str(raised.value)


# --- links, hidden and special files --------------------------------------------------------------------------------

FILES = {"train/a/1.jpg": b"one", "train/a/2.jpg": b"two", "pool/3.jpg": b"three"}
LINKS = {
    "train/b/hard.jpg": "=train/a/1.jpg",
    "train/b/soft.jpg": "../a/2.jpg",
    "train/b/chain.jpg": "soft.jpg",
    "train/c": "../pool",
    "train/b/gone.jpg": "../a/9.jpg",
    "train/b/outside.jpg": "/etc/passwd",
    "train/b/self.jpg": "self.jpg",
    "train/b/up": "..",
    "gone.txt": "nowhere",
}
FOLLOWED = {
    **FILES,
    "train/b/hard.jpg": b"one",
    "train/b/soft.jpg": b"two",
    "train/b/chain.jpg": b"two",
    "train/c/3.jpg": b"three",
    "train/b/gone.jpg": DANGLING,
    "train/b/self.jpg": LOOP,
}


def test_links_in_folders_and_archives_are_followed_and_dangling_ones_are_listed(tmp_path):
    tree = write_tree(tmp_path / "tree", FILES)
    (tree / "train/b").mkdir()
    for name, target in LINKS.items():
        if target.startswith("="):
            os.link(tree / target[1:], tree / name)
        elif name != "train/b/outside.jpg":
            os.symlink(target, tree / name)
    (tree / "train/.hidden").mkdir()
    write_tree(tree, {"train/a/._1.jpg": b"resource fork"})
    os.mkfifo(tree / "train/b/pipe.jpg")
    found, ignored = listed(tree)
    assert found == {**FOLLOWED, "train/b/pipe.jpg": "a named pipe"}
    assert ignored == {("train/**/.*", HIDDEN): 2, ("train/b/up", LOOP): 1, ("gone.txt", DANGLING): 1}

    archive = write_links(write_tar(tmp_path / "set.tar", {**FILES, "train/a/._1.jpg": b"fork"}), LINKS)
    with tarfile.open(archive, "a") as opened:
        pipe = tarfile.TarInfo("train/b/pipe.jpg")
        pipe.type = tarfile.FIFOTYPE
        opened.addfile(pipe)
    found, ignored = listed(archive)
    special = "a named pipe, a device or another special file"
    assert found == {**FOLLOWED, "train/b/outside.jpg": DANGLING, "train/b/pipe.jpg": special}
    assert ignored == {("train/a/._1.jpg", HIDDEN): 1, ("train/b/up", LOOP): 1, ("gone.txt", DANGLING): 1}

    packed = write_zip(tmp_path / "set.zip", FILES)
    with zipfile.ZipFile(packed, "a") as opened:
        for name, target in LINKS.items():
            if not target.startswith("="):
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                opened.writestr(info, target)
    expected = {name: data for name, data in FOLLOWED.items() if name != "train/b/hard.jpg"}
    assert listed(packed)[0] == {**expected, "train/b/outside.jpg": DANGLING}


def test_links_to_missing_folders_are_refused(tmp_path):
    tree = write_tree(tmp_path / "tree", FILES)
    os.symlink("../../pool/dogs", tree / "train/dogs")
    archive = write_links(write_tar(tmp_path / "set.tar", FILES), {"train/dogs": "../../pool/dogs"})
    for source in (tree, archive):
        with pytest.raises(UserError, match="train/dogs of .* an unknown number of images is missing"):
            listed(source)


def test_images_that_are_dangling_links_are_counted_and_listed(tmp_path, capsys):
    tree = write_tree(tmp_path / "train", {f"{c}/{i}.jpg": picture(i) for c in "ab" for i in range(2)})
    assert convert("folder", tree, tmp_path / "without") == 0
    os.symlink("nowhere", tree / "a" / "3.jpg")
    (tree / "c").mkdir()
    os.symlink("nowhere", tree / "c" / "1.jpg")
    write_tree(tree, {"a/notes.txt": b"", ".DS_Store": b""})
    assert convert("folder", tree, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "2 images were left out" in printed and "Ignored (hidden by its name): 1 files, such as .DS_Store" in printed
    manifest = load_manifest(tmp_path / "out" / "train")
    assert manifest.bad_samples == 2 and manifest.num_classes == 3 and manifest.made["ignored"] == 2
    lines = [json.loads(line) for line in (manifest.root / "bad_samples.jsonl").read_text().splitlines()]
    assert lines[1] == {"name": "a/3.jpg", "class": 0, "bytes": 0, "issue": DANGLING, "policy": "left out"}
    assert {(line["name"], line["policy"]) for line in lines} == {
        *(("c/", "class has no images"), ("a/3.jpg", "left out"), ("c/1.jpg", "left out")),
        *((".DS_Store", "ignored"), ("a/notes.txt", "ignored")),
    }
    assert set(samples_of(manifest.root)) == set(samples_of(tmp_path / "without" / "train"))
    for path in [*tree.glob("a/[012]*"), *tree.glob("b/*")]:
        path.unlink()
    assert "None of the 2 images of the split train" in refused(capsys, "folder", tree, tmp_path / "x")


def test_sources_that_are_neither_folder_nor_archive_are_refused(tmp_path, capsys):
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for source, message in [
            ("loop", "Too many levels of symbolic links"),
            ("pipe", "is a named pipe"),
            ("socket", "is a socket"),
            ("x" * 300, "File name too long"),
            ("missing", "No such file"),
        ]:
            assert message in refused(capsys, "folder", tmp_path / source, tmp_path / "out")


# --- archives -------------------------------------------------------------------------------------------------------


def encrypted(data):
    """Set the encryption flag in the local header and in the directory."""
    data = bytearray(data)
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def part_of_several(data):
    data = bytearray(data)
    data[data.rindex(b"PK\5\6") + 4] = 2
    return bytes(data)


def test_incomplete_archives_and_unreadable_layouts_are_refused(tmp_path, capsys):
    import bz2
    import gzip
    import lzma

    files = {f"train/{c}/{i}.jpg": picture(i) for c in "ab" for i in range(3)}
    tar = write_tar(tmp_path / "a.tar", files).read_bytes()
    packed = write_zip(tmp_path / "a.zip", files).read_bytes()
    sparse = tarfile.TarInfo("train/a/9.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "512", "GNU.sparse.numblocks": "1"}
    sparse.size = 512
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse, io.BytesIO(bytes(512)))
    for name, data, message in [
        ("joined.tar", tar + tar, "after its end-of-archive mark"),
        ("compressed.tar", gzip.compress(tar), "compressed (gzip) by its content"),
        ("compressed.zip", bz2.compress(tar), "compressed (bzip2)"),
        ("compressed", lzma.compress(tar), "compressed (xz)"),
        ("sparse.tar", (tmp_path / "sparse.tar").read_bytes(), "as a sparse file"),
        ("cut.zip", packed[:-100], "cannot be read as a zip archive"),
        ("begins.zip", packed[:2000], "cannot be read as a zip archive"),
        ("encrypted.zip", encrypted(packed), "train/a/0.jpg in"),
        ("part.zip", part_of_several(packed), "the last of several parts"),
        ("lzma.zip", write_zip(tmp_path / "l", files, zipfile.ZIP_LZMA).read_bytes(), "compressed by method 14"),
    ]:
        (tmp_path / name).write_bytes(data)
        assert message in refused(capsys, "folder", tmp_path / name, tmp_path / "out"), name


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_of_zips_are_read_by_offset_and_checked(tmp_path, compression):
    files = {f"a/{i}.txt": bytes([i]) * 1000 for i in range(3)} | {"a/ä.txt": b"", "b\\c.txt": b"windows"}
    path = write_zip(tmp_path / "x", files, compression)
    with zipfile.ZipFile(path, "a", compression) as archive, archive.open("large", "w", force_zip64=True) as entry:
        entry.write(b"zip64" * 100)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())  # like a self-extracting archive
    file = blobs.SourceFile.listed(path)
    from cfmask.data import zips

    entries = {entry.name: entry.data for entry in zips.entries(file)}
    assert {name: entry.read() for name, entry in entries.items()} == {**files, "large": b"zip64" * 100}
    data = bytearray(path.read_bytes())
    data[entries["a/1.txt"].offset + 30 + len("a/1.txt") + 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, file.mtime_ns))
    assert entries["a/0.txt"].read() == files["a/0.txt"]
    with pytest.raises(UserError, match="is damaged"):
        entries["a/1.txt"].read()
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="changed since it was listed"):
        entries["a/0.txt"].read()


# --- Kaggle's ImageNet ----------------------------------------------------------------------------------------------

VAL = {f"ILSVRC2012_val_{i + 1:08d}": WNIDS[i % 4] for i in range(8)}


def solution(labels):
    rows = [f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4 " for name, wnid in labels.items()]
    return "\r\n".join(["ImageId,PredictionString", *reversed(rows), ""]).encode()


@pytest.fixture(scope="module")
def kaggle():
    """The files of `kaggle competitions download -c imagenet-object-localization-challenge`, in small."""
    train = {f"{wnid}/{wnid}_{i}.JPEG": picture(10 * c + i) for c, wnid in enumerate(WNIDS) for i in range(2)}
    data = "ILSVRC/Data/CLS-LOC"
    return {
        **{f"{data}/train/{name}": image for name, image in train.items()},
        **{f"{data}/val/{name}.JPEG": picture(100 + i) for i, name in enumerate(VAL)},
        **{f"{data}/test/ILSVRC2012_test_{i:08d}.JPEG": picture(i) for i in range(1, 4)},
        **{f"ILSVRC/Annotations/CLS-LOC/val/{name}.xml": b"<annotation/>" for name in VAL},
        "ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1\n",
        "LOC_val_solution.csv": solution(VAL),
        "LOC_sample_submission.csv": b"ImageId,PredictionString\n",
        "LOC_synset_mapping.txt": b"n01440764 tench, Tinca tinca\n",
    }


def sorted_folders(kaggle):
    """The same images in class folders, as torchvision's examples expect them."""
    found = {}
    for name, data in kaggle.items():
        if name.endswith(".JPEG") and "/test/" not in name:
            split, *_, file = name.split("/")[3:]
            wnid = VAL[file.removesuffix(".JPEG")] if split == "val" else file.split("_")[0]
            found[f"{split}/{wnid}/{file}"] = data
    return found


def test_kaggles_zip_its_folders_and_sorted_folders_give_the_same_shards(kaggle, tmp_path, capsys):
    stored = write_zip(tmp_path / "imagenet-object-localization-challenge.zip", kaggle, zipfile.ZIP_STORED)
    tree = write_tree(tmp_path / "kaggle", kaggle)
    sources = [write_tree(tmp_path / "sorted", sorted_folders(kaggle)), stored, tree]
    for n, source in enumerate(sources):
        capsys.readouterr()
        assert convert("imagenet", source, tmp_path / f"out{n}", "--samples-per-shard", 5) == 0
        for split in ("train", "val"):
            assert contents(tmp_path / f"out{n}" / split) == contents(tmp_path / "out0" / split)
        if source != sources[0]:
            printed = capsys.readouterr().out
            assert "Ignored (of the test set, which has no labels): 3 files" in printed
            assert "Ignored (no image by its name): 11 files, such as ILSVRC/Annotations" in printed
            manifest = load_manifest(tmp_path / f"out{n}" / "val")
            assert manifest.made["ignored"] == 14
            lines = (manifest.root / "bad_samples.jsonl").read_text().splitlines()
            assert '{"name": "ILSVRC/Annotations/CLS-LOC/val/**/*.xml", "files": 8' in "".join(lines)
    assert samples_of(tmp_path / "out1/val")["n01440764/ILSVRC2012_val_00000002.JPEG"][0] == 0


def test_labels_of_kaggles_validation_set_are_found_in_and_above_a_subfolder_of_its_tree(kaggle, tmp_path):
    tree = write_tree(tmp_path / "kaggle", kaggle)
    expected = {f"{name}.JPEG": wnid for name, wnid in VAL.items()}
    for part in ("", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/val"):
        assert labels_in(tree / part, "imagenet")[0]["val"] == expected
    flat = write_tree(tmp_path / "flat", {f"val/{name}.JPEG": b"" for name in VAL})
    assert "has no label" in message_of(flat, "imagenet") and "LOC_val_solution.csv" in message_of(flat, "imagenet")
    csv = tree / "LOC_val_solution.csv"
    assert labels_in(flat, "imagenet", devkit=csv)[0] == {"val": expected}
    assert convert("imagenet", flat, tmp_path / "out", "--split", "train", "--devkit", csv) == 2
    assert not (tmp_path / "out").exists()
    named = write_tree(tmp_path / "named", {f"{name}_{wnid}.JPEG": b"" for name, wnid in VAL.items()})
    assert labels_in(named, "imagenet")[0] == {"val": {f"{n}_{wnid}.JPEG": wnid for n, wnid in VAL.items()}}
    loose = write_tree(tmp_path / "loose", {f"train_images_0/{w}_1_{w}.JPEG": b"" for w in WNIDS})
    assert labels_in(loose, "imagenet")[0] == {"train": {f"{w}_1_{w}.JPEG": w for w in WNIDS}}


def test_labels_of_imagenet_that_contradict_each_other_are_refused(kaggle, tmp_path):
    name, other = next(iter(VAL)), WNIDS[1]
    csv = {"LOC_val_solution.csv": solution({name: WNIDS[0]})}
    for files, message in [
        ({f"val/{other}/{name}.JPEG": b"", **csv}, f"its folder says {other}, LOC_val_solution.csv says {WNIDS[0]}"),
        ({f"val/{name}_{other}.JPEG": b"", **csv}, f"its name says {other}, LOC_val_solution.csv says {WNIDS[0]}"),
        ({f"val/{WNIDS[0]}/{name}_{other}.JPEG": b""}, f"its folder says {WNIDS[0]}, its name says {other}"),
        ({f"train/{WNIDS[0]}/{other}_1.JPEG": b""}, f"its folder says {WNIDS[0]}, its name says {other}"),
        ({f"train/{WNIDS[0]}/{name}.JPEG": b""}, "is that of an image of the split val"),
        ({f"val/{name}.JPEG": b"", f"val/{name}_{WNIDS[0]}.JPEG": b"", **csv}, "holds the validation image 1 twice"),
        (
            {"val/ILSVRC2012_val_00000002.JPEG": b"", **csv},
            "has no label for val/ILSVRC2012_val_00000002.JPEG",
        ),
    ]:
        source = write_tree(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        assert message in message_of(source, "imagenet")


@pytest.mark.parametrize(
    "row",
    [
        b"ILSVRC2012_val_00000001,n01440764 1 2 3",
        b"ILSVRC2012_val_00000001,n99999999 1 2 3 4",
        b"ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01443537 1 2 3 4",
        b"ILSVRC2012_val_1,n01440764 1 2 3 4",
        b"ILSVRC2012_val_00000001",
        b'"ILSVRC2012_val_00000001,n01440764 1 2 3 4',
        b"PK\3\4",
        b"\xff",
        b"",
    ],
)
def test_malformed_solution_files_are_refused(row, tmp_path):
    write_tree(tmp_path, {"val/ILSVRC2012_val_00000001.JPEG": b"", "LOC_val_solution.csv": row})
    assert "LOC_val_solution.csv" in message_of(tmp_path, "imagenet")


def test_invalid_numbers_in_the_devkit_and_in_objectnets_mappings_are_refused(tmp_path):
    from test_benchmarks import mapping_files, objectnet_files

    scipy_io = pytest.importorskip("scipy.io")

    def devkit(ids, truth):
        synsets = np.zeros(len(ids), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
        for i, number in enumerate(ids):
            synsets[i] = (number, imagenet.wnids()[i])
        meta = io.BytesIO()
        scipy_io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
        path = write_tar(
            tmp_path / "kit", {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
        )
        return {"devkit": path}

    write_tree(tmp_path / "val", {"ILSVRC2012_val_00000001.JPEG": b""})
    assert labels_in(tmp_path / "val", "imagenet", **devkit([2.0, 1.0], b"2\n"))[0]["val"].popitem()[1] == "n01440764"
    for ids, truth in [
        ([float("inf"), 1.0], b"1\n"),
        ([float("nan"), 1.0], b"1\n"),
        ([1.5, 1.0], b"1\n"),
        ([1.0, 1.0], b"1\n"),
        ([1.0, 2.0], b"3\n"),
        ([1.0, 2.0], b"1_0\n"),
        ([1.0, 2.0], b"-1\n"),
        ([1.0, 2.0], b"\xd9\xa1\n"),
        ([1.0, 2.0], b""),
    ]:
        assert "devkit" in message_of(tmp_path / "val", "imagenet", **devkit(ids, truth)) or truth == b""

    images = write_tree(tmp_path / "images", {n: b"" for n in objectnet_files() if "/images/" in n})
    numbers = mapping_files()["pytorch_to_imagenet_2012_id.json"]
    for odd in [b'{"0": 1e999', b'{"0": 355.5', b'{"0": NaN', b'{"0": true', b'{"0": 362', b'{"0": 355, "0": 355']:
        mappings = write_tree(tmp_path / "mappings", mapping_files())
        (mappings / "pytorch_to_imagenet_2012_id.json").write_bytes(odd + numbers[len(b'{"0": 355') :])
        assert "contradict each other" in message_of(images, "objectnet", mappings=mappings), odd
    (mappings / "pytorch_to_imagenet_2012_id.json").write_bytes(b"[" * 100_000)
    assert "contradict each other" in message_of(images, "objectnet", mappings=mappings)


# --- tables of paths and labels -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    return write_tree(tmp_path / "photos", {f"{i // 2}/{i}.jpg": picture(i) for i in range(4)})


def table(folder, text, name="labels.csv"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "0/0.jpg,my dog\n0/1.jpg,cat\n1/2.jpg,my\u00a0dog\n1/3.jpg,cat\n",
        "\ufeffpath;label\r\n0/0.jpg;my dog\r\n./0/1.jpg;cat\r\n1//2.jpg;my dog\r\n1/3.jpg;cat\r\n;\r\n",
        "Width\tClass Name\tFile Name\n9\tmy dog\t0/0.jpg\n9\tcat\t0\\1.jpg\n9\tmy dog\t1/2.jpg\n9\tcat\t./1/3.jpg\n",
        '"0/0.jpg","my dog"\n"0/1.jpg","cat"\n"1/2.jpg","my dog"\n"1/3.jpg","cat"',
        "0/0.jpg,my dog\n0/1.jpg,cat\n1/2.jpg,my dog\n1/3.jpg,cat\n".encode("utf-16"),
    ],
)
def test_tables_of_paths_and_labels_are_read_in_every_dialect(text, tmp_path, photos):
    labels = table(tmp_path, text)
    expected = {"0/0.jpg": "my dog", "0/1.jpg": "cat", "1/2.jpg": "my dog", "1/3.jpg": "cat"}
    archive = write_zip(tmp_path / "photos.zip", {f"{p.parent.name}/{p.name}": b"" for p in photos.glob("*/*")})
    for source in (photos, archive):
        found, classes = labels_in(source, labels=labels, split="train")
        assert found == {"train": expected} and classes == (("cat", "cat"), ("my dog", "my dog"))
    assert labels_in(table(photos, text), split="val")[0] == {"val": expected}


def test_a_table_becomes_shards_and_files_that_it_does_not_name_are_ignored(tmp_path, photos):
    write_tree(tmp_path, {"else/where.jpg": picture(9)})
    rows = [("../else/where.jpg", 1, "train"), (photos / "0/0.jpg", 0, "train"), ("1/2.jpg", 0, "validation")]
    labels = table(tmp_path, "".join(f"{path},{label},{split}\n" for path, label, split in rows))
    assert convert("folder", photos, tmp_path / "out", "--labels", labels) == 0
    assert set(samples_of(tmp_path / "out/train")) == {"1/../else/where.jpg", "0/0/0.jpg"}
    assert samples_of(tmp_path / "out/val") == {"0/1/2.jpg": (0, picture(2))}
    manifest = load_manifest(tmp_path / "out/train")
    assert manifest.classes == (("0", "0"), ("1", "1")) and manifest.made["ignored"] == 2
    assert (
        '"**/*.jpg", "files": 2, "issue": "not named in the label file"'
        in (manifest.root / "bad_samples.jsonl").read_text()
    )
    classes = table(tmp_path, "n01\tdog\nn02\tcat\n", "classes.tsv")
    found, listed = labels_in(
        photos, labels=table(tmp_path, "0/0.jpg,1\n0/1.jpg,dog\n1/2.jpg,n02\n"), split="x", classes=classes
    )
    assert found == {"x": {"0/0.jpg": "n02", "0/1.jpg": "n01", "1/2.jpg": "n02"}} and listed[1] == ("n02", "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/0.jpg,dog\n0/9.jpg,cat\n", "1 of the 2 files named in"),
        ("0/0.jpg,dog\n0/./0.jpg,cat\n", "line 2: '0/./0.jpg' already has a label in line 1"),
        ("0/0.jpg,1\n0/1.jpg,2\n", "no image of class 0. Do they count from 1"),
        ("0/0.jpg,0\n0/1.jpg,cat\n", "the label 'cat' is not a class number"),
        ("0/0.jpg,0\n0/1.jpg,1.0\n", "the label '1.0' is not a class number"),
        ("0/0.jpg,0.0\n0/1.jpg,1.0\n", "line 1: the label '0.0'"),
        ("0/0.jpg,-1\n", "the label '-1'"),
        ("0/0.jpg,007\n", "the label '007'"),
        ("0/0.jpg,nan\n", "the label 'nan'"),
        ("0/0.jpg,\n", "rows of 1 cells"),
        ("0/0.jpg,d\u200bog\n", "U+200B"),
        ("0/0.jpg,dog\n0/1.jpg\n", "line 2: expected path, label"),
        ("path,class,label\n0/0.jpg,a,b\n", "several columns for the label"),
        ("path,kind\n0/0.jpg,a\n", "no column for the label"),
        ("0/0.jpg,dog,3,4\n", "rows of 4 cells and no header"),
        ("0/0.jpg,dog,../x\n", "'../x', which is not a known split"),
        ('0/0.jpg,"dog\n', "line 1: unexpected end of data"),
        ("path,label\n", "a header and no rows"),
        ("", "is empty"),
        (b"PK\3\4...", "an .xlsx"),
        (b"0/0.jpg,d\xf6g\n", "neither UTF-8 nor UTF-16"),
        (b"0\0/\0", "NUL"),
    ],
)
def test_ambiguous_or_invalid_tables_are_refused(text, message, tmp_path, photos):
    assert message in message_of(photos, labels=table(tmp_path, text), split="train")


def test_class_order_is_torchvisions_and_is_checked_against_class_to_idx(tmp_path):
    tree = write_tree(tmp_path / "train", {f"{c}/1.jpg": b"" for c in ("b", "B", "a10", "a9", "ä")})
    order = sorted(entry.name for entry in os.scandir(tree))  # torchvision.datasets.folder.find_classes
    assert [folder for folder, _ in labels_in(tree)[1]] == order == ["B", "a10", "a9", "b", "ä"]
    mapping = {name: i for i, name in enumerate([*order, "zebra"])}
    given = table(tmp_path, json.dumps({"class_to_idx": mapping}), "class_to_idx.json")
    assert [folder for folder, _ in labels_in(tree, class_to_idx=given)[1]] == [*order, "zebra"]
    import torch

    torch.save({"class_to_idx": dict(reversed(mapping.items())), "epoch": 3}, tmp_path / "model.pt")
    assert [folder for folder, _ in labels_in(tree, class_to_idx=tmp_path / "model.pt")[1]] == [*order, "zebra"]
    listed = table(tmp_path, "".join(f"{name}\tthe {name}\n" for name in mapping), "classes.tsv")
    assert labels_in(tree, class_to_idx=given, classes=listed)[1][0] == ("B", "the B")
    listed = table(tmp_path, "".join(f"{name}\tx\n" for name in sorted(mapping, key=str.lower)), "classes.tsv")
    assert "class 0 is 'B' in the former and 'a10'" in message_of(tree, class_to_idx=given, classes=listed)
    for content, message in [
        ({"a": 0}, "does not list: 'B', 'a10'"),
        ({"a": 0, "b": 2}, "are not 0 … 1, each once"),
        ({"a": 0, "b": 0}, "are not 0 … 1, each once"),
        ({"a": "0"}, "a class_to_idx maps folder names to whole numbers"),
        ({"a": True}, "whole numbers"),
        (["a"], "has no class_to_idx"),
        ("nonsense", "neither JSON nor a PyTorch checkpoint"),
    ]:
        given = table(tmp_path, content if isinstance(content, str) else json.dumps(content), "class_to_idx.json")
        assert message in message_of(tree, class_to_idx=given)


# --- class lists ----------------------------------------------------------------------------------------------------

CLASSES = (("n1", "tench, Tinca tinca"), ("n2", 'the "big" fish'))


@pytest.mark.parametrize(
    "text",
    [
        'n1\ttench, Tinca tinca\nn2\tthe "big" fish\n',
        '\ufeffn1\ttench, Tinca tinca\r\nn2\t"the ""big"" fish"\r\n\r\n\t\r\n',
        'folder;display name;\r\nn1;tench, Tinca tinca;;\r\n"n2";"the ""big"" fish"\r\n;;\r\n',
        'n1,"tench, Tinca tinca"\rn2,"the ""big"" fish",\r',
        'n1\u00a0\ttench,\u00a0Tinca\u202ftinca\nn2\t the "big" fish \n',
        'n1\ttench, Tinca tinca\nn2\tthe "big" fish\n'.encode("utf-16"),
    ],
)
def test_class_lists_are_read_as_spreadsheets_write_them(text, tmp_path):
    assert read_classes(table(tmp_path, text)) == CLASSES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1,tench, Tinca tinca\nn2,fish\n", "line 1: expected a folder, a tab"),
        ("n1;a, b\nn2;c, d\n", "by semicolons and by commas"),
        ("n\u00a01\ttench\n", "U+00A0"),
        ("n\u200b1\ttench\n", "U+200B"),
        ("n1\ttench\t3\n", "got 3 cells"),
        ("n1\t\n", "got 1 cells"),
        ('n1\t"tench" fish\n', "doubled"),
        ("n1\ta\nn1\tb\n", "has an earlier line"),
        ("n1\ta".encode("utf-16-le"), "NUL"),
        (b"n1\t\xe9\n", "neither UTF-8"),
        (b"PK\3\4", "workbook"),
        ("\n\n", "is empty"),
    ],
)
def test_ambiguous_or_invalid_class_lists_are_refused(text, message, tmp_path):
    with pytest.raises(UserError, match="class list|labels.csv") as raised:
        read_classes(table(tmp_path, text))
    assert message in str(raised.value)


def test_whole_numbers_are_plain_ascii():
    odd = ("", "00", "01", "+1", "-1", "1_0", " 1", "1.0", "1e3", "\u0661", "\u00b2", "1" * 10)
    assert [whole_number(text) for text in ("0", "10", *odd)] == [0, 10, *[None] * len(odd)]


# --- names that are not UTF-8 ---------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_converted_and_printed_under_any_locale(tmp_path):
    root = os.fsencode(tmp_path) + b"/tr\xff"
    for name in (b"a/\xe9.jpg", b"\xe4/1.jpg", b"a/n\xe9.txt"):
        os.makedirs(os.path.dirname(root + b"/" + name), exist_ok=True)
        Path(os.fsdecode(root + b"/" + name)).write_bytes(picture(1) if name.endswith(b"jpg") else b"")
    command = [sys.executable, REPO / "tools/make_shards.py", "folder", "--workers", "1", "--out", tmp_path / "out"]

    def said(encoding, code, *more):
        full = [*map(str, command), "--source", root, *more]
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        done = subprocess.run(full, env=environment, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    assert "such as a/n\\udce9.txt" in said("utf-8:strict", 0, "--split", "train")
    manifest = load_manifest(tmp_path / "out/train")
    assert manifest.num_samples == 2 and manifest.classes == (("a", "a"), ("\udce4", "\\udce4"))
    lines = (tmp_path / "out/train/bad_samples.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["name"] == "a/n\\udce9.txt"
    assert "tr\\udcff holds class folders" in said("ascii:strict", 2)


# --- what would be read as something else ---------------------------------------------------------------------------


def test_similar_names_of_splits_and_of_classes_are_refused(tmp_path):
    for number, (files, message) in enumerate(
        [
            ({"val/a/1.jpg": b"", "valid/a/2.jpg": b""}, "'val' and 'valid', and both names mean the split val"),
            ({"train/a/1.jpg": b"", "Train/b/2.jpg": b""}, "'Train' and 'train'"),
            ({"train/Cat/1.jpg": b"", "val/cat/2.jpg": b""}, "'Cat' and 'cat', which differ only in case"),
            (
                {"train/caf\u00e9/1.jpg": b"", "train/cafe\u0301/2.jpg": b""},
                "differ only in case or in the encoding",
            ),
        ]
    ):
        assert message in message_of(write_tree(tmp_path / str(number), files))
    both = write_tree(tmp_path / "both", {"train/B/1.jpg": b"", "train/b/2.jpg": b"", "val/b/3.jpg": b""})
    assert [folder for folder, _ in labels_in(both)[1]] == ["B", "b"]
    listed = table(tmp_path, "Cat\tcat\ncat\tcat, small\n", "classes.tsv")
    assert labels_in(tmp_path / "2", classes=listed)[0] == {"train": {"1.jpg": "Cat"}, "val": {"2.jpg": "cat"}}


def test_tables_that_would_be_misread_are_refused(tmp_path, photos):
    link = tmp_path / "link"
    link.symlink_to(photos)
    numbers = table(tmp_path, "1\tone\n2\ttwo\n3\tthree\n", "classes.tsv")
    for text, message, more in [
        ("0/0.jpg,0,tench\n0/1.jpg,1,crane\n", "line 1: the third cell is 'tench', which is not a known split", {}),
        ("0/0.jpg,cat\n0/1.jpg,Cat\n", "'Cat' and 'cat', which differ only in case", {"split": "train"}),
        (f"{photos}/0/0.jpg,cat\n0/0.jpg,dog\n", "line 2: '0/0.jpg' already has a label in line 1", {"split": "train"}),
        ("0/0.jpg,0\n0/1.jpg,3\n", "the label '0' is not a class", {"split": "train", "classes": numbers}),
    ]:
        assert message in message_of(link, labels=table(tmp_path, text), **more)
    headed = table(tmp_path, "path,label,split\n0/0.jpg,a,fold1\n0/1.jpg,b,fold1\n")
    assert labels_in(link, labels=headed)[0] == {"fold1": {"0/0.jpg": "a", "0/1.jpg": "b"}}


def test_the_header_of_a_class_list_is_not_a_class(tmp_path):
    for header in ("class_id,class_name", "Folder;Display-Name", "wnid\twords"):
        separator = header.strip("abcdefghijklmnopqrstuvwxyzFDN-_")[0]
        assert read_classes(table(tmp_path, f"{header}\nn1{separator}fish\n")) == (("n1", "fish"),)
    with pytest.raises(UserError, match="line 1: 'idx', 'class' looks like a header"):
        read_classes(table(tmp_path, "idx,class\nn1,fish\n"))
    assert read_classes(table(tmp_path, "key\tkey\nlock\tlock\n"))[0] == ("key", "key")


def test_self_extracting_zips_are_read_in_place(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"train/a/1.jpg": b"one"})
    archive.write_bytes(b"#!/bin/sh\n" * 100 + archive.read_bytes())
    assert listed(archive) == ({"train/a/1.jpg": b"one"}, {})


def test_names_in_tars_do_not_depend_on_the_locale(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", {"train/ä/1.jpg": b""})
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    assert list(listed(tar)[0]) == ["train/ä/1.jpg"]


def test_names_of_zip_entries_may_be_utf_8_without_its_flag_and_have_the_separators_of_windows(tmp_path):
    """As written by programs that do not set the flag; Python decodes such names as cp437."""
    from cfmask.data import zips

    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, system in (("xx.png", 3), ("val!1.png", 0), ("yy.png", 3)):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, b"data")
    bytes_of = path.read_bytes().replace(b"xx.png", "ü.png".encode()).replace(b"val!1.png", b"val\\1.png")
    path.write_bytes(bytes_of.replace(b"yy.png", b"\x81\xff.png"))  # no UTF-8
    names = [entry.name for entry in zips.entries(blobs.SourceFile.listed(path))]
    assert names == ["ü.png", "val/1.png", b"\x81\xff.png".decode("cp437")]
