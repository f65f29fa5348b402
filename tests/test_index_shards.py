"""Shards in the styles of other programs: with an index, they have the samples that webdataset itself reads."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cfmask.convert import shard_writer
from cfmask.data import imagenet, shard_index
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from tools import index_shards, verify_shards

CLASSES = "cat\tthe cat\ndog\tthe dog\nowl\tthe owl\neel\tthe eel\n"


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset_files(number: int, **facts):
    facts = {"caption": "a photo", "key": f"{number:09d}", "status": "success", **facts}
    yield f"{number:09d}.jpg", jpeg(number)
    yield f"{number:09d}.txt", b"a photo"
    yield f"{number:09d}.json", json.dumps(facts).encode()


def img2dataset(folder: Path) -> None:
    for s in range(2):
        files = [file for n in range(s * 4, s * 4 + 4) for file in img2dataset_files(n, label=n % 4)]
        write_tar(folder / f"{s:05d}.tar", files, tarfile.PAX_FORMAT)
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{s:05d}_stats.json").write_text("{}")


def open_clip(folder: Path) -> None:
    files = [file for n in range(4) for file in ((f"s{n:07d}.cls", b"%d" % n), (f"s{n:07d}.webp", jpeg(n)))]
    write_tar(folder / "0.tar", files)


def timm(folder: Path) -> None:
    for s in range(2):
        files = []
        for n in range(s * 3, s * 3 + 3):
            label = 100 * n
            key = f"{imagenet.wnids()[label]}_{n}"
            files.append((f"{key}.jpg", jpeg(n)))
            files.append((f"{key}.cls", str(label).encode()))
            files.append((f"{key}.json", json.dumps({"label": label, "width": 16, "class_name": "x"}).encode()))
        write_tar(folder / f"imagenet1k-train-{s:04d}.tar", files)


def webdatasets_writer(folder: Path) -> None:
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "part-%06d.tar"), maxcount=3, verbose=0) as sink:
        for n in range(7):
            sink.write({"__key__": f"{n:06d}", "jpg": jpeg(n), "cls": n % 4, "json": {"n": n}})


def long_names(format):
    def write(folder: Path) -> None:
        files = [("./", b""), ("a/", b"")]
        for n in range(4):
            key = f"a/{'very_' * 40}long_bäume/{n}"
            files += [(f"{key}.JPEG", jpeg(n)), (f"{key}.cls", b" %d\n" % n)]
        write_tar(folder / "0.tar", files, format)

    return write


def folders(folder: Path) -> None:
    files = [("__meta__", b"{}"), ("readme", b"no dot"), ("x/.hidden.jpg", b""), ("__old__/x.jpg", b"")]
    for n in range(4):
        # The same name in two folders makes two samples.
        files += [(f"{'ab'[n % 2]}.d/{n // 2}.jpg", jpeg(n)), (f"{'ab'[n % 2]}.d/{n // 2}.cls", b"%d" % n)]
    write_tar(folder / "0.tar", files)


def with_masks(folder: Path) -> None:
    files = []
    for n in range(4):
        files += [(f"{n}.npy", b"embedding"), (f"{n}.png", b"mask"), (f"{n}.seg.png", b"mask")]
        files += [(f"{n}.jpg", jpeg(n)), (f"{n}.cls", b"%d" % n)]
    write_tar(folder / "0.tar", files)


def interleaved(folder: Path) -> None:
    files = [(f"{n}.jpg", jpeg(n)) for n in range(4)] + [(f"{n}.cls", b"%d" % n) for n in range(4)]
    write_tar(folder / "0.tar", files)


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.tsv"
    path.write_text(CLASSES)
    return path


@pytest.fixture
def index(capsys):
    """Run the command in this process → (exit status, standard output, standard error)."""

    def run(*arguments):
        status = index_shards.main(["--workers", "1", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def ours(folder: Path) -> list[dict]:
    manifest = load_manifest(folder)
    with ShardReader(manifest) as reader:
        return [reader.read(i) for i in range(manifest.num_samples)]


def theirs(folder: Path) -> list[dict]:
    urls = sorted(str(tar) for tar in folder.glob("*.tar"))
    samples = wds.WebDataset(urls, shardshuffle=False, nodesplitter=None)
    return [sample for sample in samples if "hidden.jpg" not in sample]  # webdataset turns these into the sample "x/"


def snapshot(folder: Path) -> dict:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))}


@pytest.mark.parametrize("checksums", [(), ("--checksums",)])
@pytest.mark.parametrize(
    ("style", "count", "label_from"),
    [
        (img2dataset, 8, "json"),
        (open_clip, 4, "cls"),
        (timm, 6, "cls"),
        (webdatasets_writer, 7, "cls"),
        (long_names(tarfile.PAX_FORMAT), 4, "cls"),
        (long_names(tarfile.GNU_FORMAT), 4, "cls"),
        (folders, 4, "cls"),
        (with_masks, 4, "cls"),
    ],
)
def test_samples_are_those_that_webdataset_reads(tmp_path, names, index, style, count, label_from, checksums):
    folder = tmp_path / "train"
    style(folder)
    before = snapshot(folder)
    classes = () if style is timm else ("--classes", names)
    status, output, errors = index(folder, *classes, *checksums)
    assert status == 0, errors
    assert f"{count} samples" in output
    assert snapshot(folder) == before
    manifest = load_manifest(folder)
    assert (manifest.split, manifest.num_samples, manifest.bad_samples) == ("train", count, 0)
    assert manifest.made["label_from"] == label_from and manifest.made["checksums"] == bool(checksums)
    assert all(bool(shard.sha256) == bool(checksums) for shard in manifest.shards)
    for a, b in zip(ours(folder), theirs(folder), strict=True):
        assert a["__key__"] == b["__key__"]
        members = {name for name in b if not name.startswith("__")}
        assert {name: bytes(a[name]) for name in members} == {name: b[name] for name in members}
        assert set(a) - members == {"__key__", "__url__", "__label__"}
        assert a["__label__"] == (int(b["cls"]) if label_from == "cls" else json.loads(b["json"])["label"])
    with ShardReader(manifest) as reader:
        # The image is the photograph, not its mask or its embedding.
        image = next(iter(reader.read_images([count - 1])))
        [name] = [name for name in image if not name.startswith("__")]
        assert name in ("jpg", "jpeg", "webp") and bytes(image[name]) == jpeg(count - 1)
    for mode in ((), ("--full",)):
        assert verify_shards.main([str(folder), *mode, "--workers", "1"]) == 0


def test_interleaved_samples_are_put_together(tmp_path, names, index):
    folder = tmp_path / "train"
    interleaved(folder)
    status, output, _ = index(folder, "--classes", names)
    assert status == 0 and "4 samples are interleaved" in output
    assert len(theirs(folder)) == 8, "webdataset makes two of each"
    for n, sample in enumerate(ours(folder)):
        assert (sample["__key__"], sample["__label__"], bytes(sample["cls"])) == (str(n), n, b"%d" % n)
        assert bytes(sample["jpg"]) == jpeg(n)
    assert verify_shards.main([str(folder), "--full", "--workers", "1"]) == 0


@pytest.mark.parametrize("name", ["{wnid}_{n}.jpg", "{wnid}/{n}.jpg", "x/{wnid}/{wnid}_{n}.jpg"])
def test_labels_from_wnids_in_keys(tmp_path, index, name):
    wnids = imagenet.wnids()
    write_tar(tmp_path / "val/0.tar", [(name.format(wnid=wnids[7 * n], n=n), jpeg(n)) for n in range(5)])
    status, output, errors = index(tmp_path / "val")
    assert status == 0, errors
    assert [sample["__label__"] for sample in ours(tmp_path / "val")] == [0, 7, 14, 21, 28]
    manifest = load_manifest(tmp_path / "val")
    assert manifest.made["label_from"] == "key" and manifest.classes == imagenet.classes()


def test_labels_from_folders_of_a_class_list(tmp_path, names, index):
    write_tar(tmp_path / "val/0.tar", [(f"{name}/{n}.jpg", jpeg(n)) for n, name in enumerate(("owl", "cat", "dog"))])
    assert index(tmp_path / "val", "--classes", names)[0] == 0
    assert [sample["__label__"] for sample in ours(tmp_path / "val")] == [2, 0, 1]
    # With another class order, the same keys have other labels.
    names.write_text("cat\tcat\ndog\tdog\nyak\tyak\nowl\towl\n")
    assert index(tmp_path / "val", "--classes", names)[0] == 0
    assert [sample["__label__"] for sample in ours(tmp_path / "val")] == [3, 0, 1]


def test_flags_choose_among_labels(tmp_path, names, index):
    files = [(f"{n}.{kind}", data) for n in range(3) for kind, data in contradicting(n)]
    write_tar(tmp_path / "a/0.tar", files)
    status, _, errors = index(tmp_path / "a", "--classes", names)
    assert status == 2 and "Sample 0 of" in errors and "0 in its .cls and 1 in its .json's field 'label'" in errors
    for flags, labels in [
        (("--label-from", "cls"), [0, 1, 2]),
        (("--label-from", "json"), [1, 2, 3]),
        (("--label-field", "other"), [0, 0, 0]),
    ]:
        status, _, errors = index(tmp_path / "a", "--classes", names, *flags)
        assert status == 0, errors
        assert [sample["__label__"] for sample in ours(tmp_path / "a")] == labels
        assert verify_shards.main([str(tmp_path / "a"), "--full", "--workers", "1"]) == 0
    status, _, errors = index(tmp_path / "a", "--label-from", "cls", "--label-field", "other")
    assert status == 2 and "use one of them" in errors


def contradicting(n: int):
    return [("jpg", jpeg(n)), ("cls", b"%d" % n), ("json", json.dumps({"label": n + 1, "other": 0}).encode())]


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (
            list(img2dataset_files(0)),
            (),
            "Sample 000000000 of .*0.tar has no label: it has jpg, txt, json; its .json "
            "has the fields caption, key, status, and none .*its key does not begin with a wnid.*--label-from",
        ),
        ([("a.jpg", b"x"), ("a.txt", b"a cat")], (), "Sample a of .*Captions are not labels"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], (), "Sample a of .*0.tar has no label: its .cls is b'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"y")], (), "Sample b of .* has no .cls"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": true}')], ("--label-field", "label"), "'label' is True, not a class"),
        ([("a.jpg", b"x"), ("a.json", b"{}")], ("--label-field", "y"), "no field 'y' .it has none"),
        ([("a.jpg", b"x"), ("a.cls", b"4")], (), "Sample a of .* has the label 4, but --classes has classes 0 … 3"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b""), ("a.JPG", b"y")], (), "0.tar holds a.jpg twice"),
        ([("a.txt", b"x"), ("a.cls", b"1")], (), "No sample of .*train has an image .a member called jpg, jpeg"),
    ],
)
def test_samples_without_a_label_are_refused(tmp_path, names, index, files, flags, message):
    write_tar(tmp_path / "train/0.tar", files)
    status, _, errors = index(tmp_path / "train", "--classes", names, *flags)
    assert status == 2
    assert re.search(message, errors), errors
    assert errors.splitlines()[-1].startswith("error: ") and not (tmp_path / "train/manifest.json").exists()


def test_samples_without_an_image_are_left_out_and_listed(tmp_path, names, index):
    files = [file for n in range(3) for file in ((f"{n}.jpg", jpeg(n)), (f"{n}.cls", b"%d" % n))]
    files[2:2] = [("lost.cls", b"1"), ("lost.json", b"{}")]
    write_tar(tmp_path / "train/0.tar", files)
    status, output, _ = index(tmp_path / "train", "--classes", names)
    assert status == 0 and "1 samples have no image and are left out" in output
    assert [sample["__key__"] for sample in ours(tmp_path / "train")] == ["0", "1", "2"]
    assert load_manifest(tmp_path / "train").bad_samples == 1
    listed = [json.loads(line) for line in (tmp_path / "train/bad_samples.jsonl").read_text().splitlines()]
    assert listed == [{"name": "lost", "shard": "0.tar", "reason": "no image among its members (cls, json)"}]
    for mode in ((), ("--full",)):
        assert verify_shards.main([str(tmp_path / "train"), *mode, "--workers", "1"]) == 0


def test_imagenets_classes_are_assumed_only_with_evidence(tmp_path, index):
    open_clip(tmp_path / "few")
    status, _, errors = index(tmp_path / "few")
    assert status == 2 and "labels are 0 … 3, and their classes are unknown" in errors
    status, output, _ = index(tmp_path / "few", "--classes", "imagenet")
    assert status == 0 and "1 of 1 shards are indexed already" in output
    assert load_manifest(tmp_path / "few").classes == imagenet.classes()

    write_tar(tmp_path / "all/0.tar", [f for n in range(1000) for f in ((f"{n}.jpg", b"x"), (f"{n}.cls", b"%d" % n))])
    status, output, _ = index(tmp_path / "all")
    assert status == 0 and "a sample of each label 0 … 999" in output

    wnids = imagenet.wnids()
    files = [f for n in range(3) for f in ((f"{wnids[5 + n]}_1.jpg", b"x"), (f"{wnids[5 + n]}_1.cls", b"%d" % n))]
    write_tar(tmp_path / "subset/0.tar", files)
    status, _, errors = index(tmp_path / "subset")
    assert status == 2 and "3 of 3 keys have a wnid whose class id in ImageNet's list differs" in errors


def damage_cut_between_members(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        os.truncate(tar, archive.getmembers()[-1].offset)


def damage_cut_inside(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        os.truncate(tar, archive.getmembers()[-3].offset_data + 10)


def damage_header(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        at = archive.getmembers()[5].offset
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)


def damage_joined(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)


def damage_compressed(tar: Path) -> None:
    import gzip

    tar.write_bytes(gzip.compress(tar.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut_between_members, "has no end-of-archive mark: it was truncated.*Download it again"),
        (damage_cut_inside, "cannot be read after byte [0-9]+ .unexpected end of data.: it is truncated"),
        (damage_header, "has a damaged header at byte"),
        (
            damage_joined,
            "has another tar after its end-of-archive mark.*tars were joined by `cat`.*--ignore-zeros",
        ),
        (damage_compressed, "is compressed .gzip."),
    ],
)
def test_a_torn_tar_is_refused_by_name(tmp_path, names, index, damage, message):
    img2dataset(tmp_path / "train")
    damage(tmp_path / "train/00001.tar")
    status, _, errors = index(tmp_path / "train", "--classes", names)
    assert status == 2 and "00001.tar" in errors
    assert re.search(message, errors), errors
    assert not (tmp_path / "train/manifest.json").exists()


def test_folders_that_cannot_be_a_set_are_refused(tmp_path, names, index, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "holds no .tar files" in index(tmp_path / "empty")[2]
    assert "is not a folder" in index(tmp_path / "nowhere")[2]
    img2dataset(tmp_path / "up/train")
    assert "Its subfolders do" in index(tmp_path / "up")[2]
    (tmp_path / "up/train/00002.tar.gz").write_bytes(b"")
    assert "00002.tar.gz is compressed by its name, and empty" in index(tmp_path / "up/train")[2]
    timm(tmp_path / "mixed")
    write_tar(tmp_path / "mixed/imagenet1k-validation-00.tar", [])
    status, _, errors = index(tmp_path / "mixed")
    assert status == 2 and "holds shards of several splits (imagenet1k-train-0000.tar, imagenet1k-validation" in errors
    timm(tmp_path / "readonly")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root ignores permissions
    assert "readonly is read-only" in index(tmp_path / "readonly")[2]


def test_shards_of_make_shards_are_left_alone(tmp_path, index):
    (tmp_path / "train").mkdir()
    shard_writer.write_shard(tmp_path / "train/train-000000.tar", [("a", 0, {"jpg": jpeg(0), "cls": b"0"})])
    before = shard_index.index_path(tmp_path / "train/train-000000.tar").read_bytes()
    status, _, errors = index(tmp_path / "train")
    assert status == 2 and "were indexed by make_shards" in errors
    assert shard_index.index_path(tmp_path / "train/train-000000.tar").read_bytes() == before


def test_indexed_shards_are_skipped_and_changed_ones_are_indexed_again(tmp_path, names, index):
    folder = tmp_path / "train"
    img2dataset(folder)
    assert index(folder, "--classes", names)[0] == 0
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")}
    manifest = (folder / "manifest.json").read_bytes()

    status, output, _ = index(folder, "--classes", names)
    assert status == 0 and "2 of 2 shards are indexed already" in output
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")} == first
    assert (folder / "manifest.json").read_bytes() == manifest

    os.utime(folder / "00001.tar")
    assert "1 of 2 shards are indexed already" in index(folder, "--classes", names)[1]
    # Missing checksums are added, and kept.
    status, output, _ = index(folder, "--classes", names, "--checksums")
    assert "have their index already" not in output and load_manifest(folder).made["checksums"]
    assert "2 of 2" in index(folder, "--classes", names)[1] and load_manifest(folder).made["checksums"]
    # Another place of labels gives another index.
    for shard in range(2):
        files = [file for n in range(4) for file in img2dataset_files(4 * shard + n, label=n % 4, other=3)]
        write_tar(folder / f"0000{shard}.tar", files)
    index(folder, "--classes", names)
    assert "have their index" not in index(folder, "--classes", names, "--label-field", "other")[1]
    assert load_manifest(folder).class_counts == (0, 0, 0, 8)


def test_leftovers_of_a_killed_command_are_removed_and_those_of_others_are_not(tmp_path, names, index):
    folder = tmp_path / "train"
    folder.mkdir()
    interleaved(folder)
    ours, theirs = folder / ".0.index.safetensors.node-1.part", folder / ".download.part"
    for path in (ours, theirs, folder / ".manifest.json.node-1.part"):
        path.write_bytes(b"half")
    assert index(folder, "--classes", names)[0] == 0
    assert sorted(path.name for path in folder.glob(".*.part")) == [theirs.name]


def test_checksums_find_what_headers_do_not(tmp_path, names, index, capsys):
    for flags, status in (((), 0), (("--checksums",), 1)):
        folder = tmp_path / f"train{len(flags)}"
        img2dataset(folder)
        assert index(folder, "--classes", names, *flags)[0] == 0
        tar = folder / "00000.tar"
        with tarfile.open(tar) as archive:
            at = archive.getmember("000000001.txt").offset_data
        data = bytearray(tar.read_bytes())
        data[at] ^= 1
        tar.write_bytes(data)
        assert verify_shards.main([str(folder), "--full", "--workers", "1"]) == status
        output = capsys.readouterr().out
        assert ("without --checksums" in output) == (status == 0)
        assert ("000000001.txt" in output) == (status == 1)


def test_a_tar_that_lost_samples_after_it_was_indexed(tmp_path, names, index):
    img2dataset(tmp_path / "train")
    assert index(tmp_path / "train", "--classes", names)[0] == 0
    damage_cut_between_members(tmp_path / "train/00001.tar")
    assert verify_shards.main([str(tmp_path / "train"), "--workers", "1"]) == 1


def test_several_processes_write_the_same_indexes(tmp_path, names):
    import subprocess
    import sys

    from made import REPO

    img2dataset(tmp_path / "train")
    command = [sys.executable, REPO / "tools/index_shards.py", tmp_path / "train", "--classes", names, "--workers", 2]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [sample["__label__"] for sample in ours(tmp_path / "train")] == [0, 1, 2, 3] * 2


def test_training_reads_them(tmp_path, names, index):
    from cfmask.data.stream import eval_batches

    img2dataset(tmp_path / "train")
    assert index(tmp_path / "train", "--classes", names)[0] == 0
    manifest = load_manifest(tmp_path / "train")
    batches = list(eval_batches(manifest, image_size=8, batch_size=4, rank=0, world_size=1, loader_workers=0))
    assert torch_list(batches) == [0, 1, 2, 3] * 2


def torch_list(batches) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]
