"""Conversion: all layouts of ImageNet and any folder tree give the same bytes, and nothing is dropped silently."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfmask.convert import collection, conversion
from cfmask.convert.collection import hold_out
from cfmask.convert.shard_writer import write_shard
from cfmask.convert.sources import files
from cfmask.data import imagenet, images
from cfmask.data.blobs import Blob, SourceFile
from cfmask.data.shard_index import load_index
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from cfmask.data.stream import eval_batches
from cfmask.runtime.files import sole_writer
from tools import make_shards, verify_shards

REPO = Path(__file__).resolve().parents[1]
SAMPLE = REPO.parent / "shared" / "data" / "imagenet-sample.tar"
WNIDS = [imagenet.wnids()[i] for i in (3, 0, 999, 151)]


def picture(number, kind="JPEG", mode="RGB", side=24):
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side + 5, 3), dtype=np.uint8)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), time.time()
            tar.addfile(info, io.BytesIO(data))
    return path


def imagenet_files(split, per_class=5, prefix=""):
    return {
        f"{prefix}{split}/{wnid}/{wnid}_{i}.JPEG": picture(i + 10 * c + 1000 * (split == "val"))
        for c, wnid in enumerate(WNIDS)
        for i in range(per_class)
    }


def convert(verb, source, out, *arguments):
    """Convert in this process; the sets here are small, so count mismatches are allowed."""
    known = ["--allow-count-mismatch"] if verb != "folder" else []
    return make_shards.main(
        [verb, "--source", str(source), "--out", str(out), "--workers", "1", *known, *map(str, arguments)]
    )


def refused(capsys, *arguments):
    """The error message of a refused conversion."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".tar", ".safetensors")
    }


def samples_of(folder):
    """{original name: (class id, bytes)} of a converted split."""
    manifest = load_manifest(folder)
    found = {}
    with ShardReader(manifest) as reader:
        for i in range(manifest.num_samples):
            sample = reader.read(i)
            facts = json.loads(sample["json"])
            assert facts["key"] == sample["__key__"] and facts["class"] == int(sample["cls"])
            assert manifest.classes[facts["class"]][0] == facts["wnid"]
            data = next(sample[name] for name in ("jpg", "png") if name in sample)
            assert facts["bytes"] == len(data)
            found[facts["name"]] = (facts["class"], data)
    return found


def expected(files, split):
    return {
        "/".join(name.split("/")[-2:]): (imagenet.wnids().index(name.split("/")[-2]), data)
        for name, data in files.items()
        if f"{split}/" in name
    }


# --- layouts --------------------------------------------------------------------------------------------------------


def test_folder_trees_and_tars_in_any_order_give_the_same_shards(tmp_path):
    files = {**imagenet_files("train"), **imagenet_files("val", 2)}
    write_tree(tmp_path / "tree", files)
    write_tar(tmp_path / "plain.tar", dict(reversed(files.items())))
    write_tar(tmp_path / "leading.tar", {f"./ILSVRC/Data/{name}": data for name, data in files.items()})
    for n, source in enumerate(["tree", "plain.tar", "leading.tar"]):
        assert convert("imagenet", tmp_path / source, tmp_path / f"out{n}", "--samples-per-shard", 7) == 0
        for split in ("train", "val"):
            assert samples_of(tmp_path / f"out{n}" / split) == expected(files, split)
            assert contents(tmp_path / f"out{n}" / split) == contents(tmp_path / "out0" / split)
    manifest = load_manifest(tmp_path / "out0" / "train")
    assert manifest.classes == imagenet.classes() and manifest.num_classes == 1000
    assert manifest.sample_counts.tolist() == [6, 7, 7]
    assert {c: n for c, n in enumerate(manifest.class_counts) if n} == {0: 5, 3: 5, 151: 5, 999: 5}
    assert manifest.made["images"] == 20 and manifest.bad_samples == 0


def test_a_folder_of_wnids_takes_its_split_from_its_name_or_the_option(tmp_path, capsys):
    write_tree(tmp_path, imagenet_files("train"))
    assert convert("imagenet", tmp_path / "train", tmp_path / "a") == 0
    (tmp_path / "train").rename(tmp_path / "photos")
    assert "add --split train or --split val" in refused(capsys, "imagenet", tmp_path / "photos", tmp_path / "b")
    assert convert("imagenet", tmp_path / "photos", tmp_path / "b", "--split", "train") == 0
    assert contents(tmp_path / "a" / "train") == contents(tmp_path / "b" / "train")


@pytest.fixture
def official(tmp_path):
    """The layout of image-net.org: a tar with a tar for each class, a flat tar, and the devkit with the labels."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = tmp_path / "official"
    folder.mkdir()
    train = imagenet_files("train")
    inner = {}
    for wnid in WNIDS:
        of_class = {name.split("/")[-1]: data for name, data in train.items() if wnid in name}
        inner[f"{wnid}.tar"] = write_tar(tmp_path / "inner.tar", of_class).read_bytes()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)

    # ILSVRC2012_ID has an order of its own; 1001 is one of the inner nodes that follow the 1000 leaves.
    leaves = [*reversed(imagenet.wnids())]
    synsets = np.zeros(1001, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    for i, wnid in enumerate([*leaves, "n00001740"]):
        synsets[i] = (float(i + 1), wnid, "words", 0.0 if i < 1000 else 3.0)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    labels = [WNIDS[i % 4] for i in range(9)]
    truth = "".join(f"{leaves.index(wnid) + 1}\n" for wnid in labels)
    flat = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(500 + i) for i in range(9)}
    write_tar(folder / "ILSVRC2012_img_val.tar", flat)
    kit = write_tar(
        tmp_path / "kit.tar",
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        },
    )
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(kit.read_bytes()))
    val = {f"val/{wnid}/{name}": flat[name] for wnid, name in zip(labels, flat, strict=True)}
    return folder, {**train, **val}


def test_the_official_tars_equal_the_sorted_folders(official, tmp_path):
    folder, files = official
    write_tree(tmp_path / "tree", files)
    assert convert("imagenet", folder, tmp_path / "a") == 0
    assert convert("imagenet", tmp_path / "tree", tmp_path / "b") == 0
    for split in ("train", "val"):
        assert samples_of(tmp_path / "a" / split) == expected(files, split)
        assert contents(tmp_path / "a" / split) == contents(tmp_path / "b" / split)


def test_an_official_tar_may_be_named_itself(official, tmp_path):
    folder, files = official
    assert convert("imagenet", folder / "ILSVRC2012_img_train.tar", tmp_path / "out") == 0
    assert convert("imagenet", folder / "ILSVRC2012_img_val.tar", tmp_path / "out") == 0
    for split in ("train", "val"):
        assert samples_of(tmp_path / "out" / split) == expected(files, split)


def test_validation_images_without_labels_name_the_file_that_has_them(official, tmp_path, capsys):
    folder, files = official
    kit = folder / "ILSVRC2012_devkit_t12.tar.gz"
    kit.rename(tmp_path / "elsewhere.tgz")
    message = refused(capsys, "imagenet", folder, tmp_path / "out")
    assert "ILSVRC2012_devkit_t12.tar.gz" in message and "--devkit" in message and "--split train" in message
    assert convert("imagenet", folder, tmp_path / "out", "--split", "train") == 0
    assert convert("imagenet", folder, tmp_path / "out", "--split", "val", "--devkit", tmp_path / "elsewhere.tgz") == 0
    assert samples_of(tmp_path / "out" / "val") == expected(files, "val")
    kit.write_bytes(b"nothing")
    assert "cannot be read as ILSVRC2012's devkit" in refused(capsys, "imagenet", folder, tmp_path / "out2")


def test_any_tree_keeps_one_class_list_for_all_its_splits(tmp_path):
    files = {
        f"{s}/{c}/{i}.png": picture(i, "PNG")
        for s, c, i in [("train", "dog", 1), ("train", "cat", 1), ("photo", "eel", 2)]
    }
    write_tree(tmp_path / "tree", files)
    assert convert("folder", tmp_path / "tree", tmp_path / "out") == 0
    for split in ("train", "photo"):
        assert load_manifest(tmp_path / "out" / split).classes == (("cat", "cat"), ("dog", "dog"), ("eel", "eel"))
    assert set(samples_of(tmp_path / "out" / "train")) == {"cat/1.png", "dog/1.png"}
    assert convert("folder", tmp_path / "tree", tmp_path / "one", "--split", "photo") == 0
    assert os.listdir(tmp_path / "one") == ["photo"]
    assert load_manifest(tmp_path / "one" / "photo").classes == load_manifest(tmp_path / "out" / "photo").classes


def test_a_class_list_orders_and_names_the_classes(tmp_path, capsys):
    write_tree(tmp_path / "val", {f"{c}/1.jpg": picture(1) for c in ("a", "b")})
    listed = tmp_path / "classes.txt"
    listed.write_text("b\tthe b\nc\tthe c\na\tthe a\n")
    assert convert("folder", tmp_path / "val", tmp_path / "out", "--classes", listed) == 0
    manifest = load_manifest(tmp_path / "out" / "val")
    assert manifest.classes == (("b", "the b"), ("c", "the c"), ("a", "the a")) and manifest.class_counts == (1, 0, 1)
    listed.write_text("b\tthe b\n")
    assert "does not list: 'a'." in refused(capsys, "folder", tmp_path / "val", tmp_path / "x", "--classes", listed)
    listed.write_text("b the b\n")
    assert "line 1: expected a folder, a tab" in refused(
        capsys, "folder", tmp_path / "val", tmp_path / "x", "--classes", listed
    )
    listed.write_text("b\tx\nb\ty\n")
    assert "line 2: the folder 'b'" in refused(capsys, "folder", tmp_path / "val", tmp_path / "x", "--classes", listed)


def test_keys_are_unique_and_free_of_dots(tmp_path):
    names = [
        "a.b.jpg",
        "a_b.jpg",
        "a_b.png",
        "ä.jpg",
        "ö.jpg",
        "a_b-1.jpg",
        f"{'long' * 60}x.jpg",
        f"{'long' * 60}y.jpg",
        ".hidden.jpg",
    ]
    write_tree(
        tmp_path / "val" / "c", {name: picture(i, "PNG" if ".png" in name else "JPEG") for i, name in enumerate(names)}
    )
    assert convert("folder", tmp_path / "val", tmp_path / "out") == 0
    assert set(samples_of(tmp_path / "out" / "val")) == {f"c/{name}" for name in names[:-1]}
    with tarfile.open(tmp_path / "out" / "val" / "val-000000.tar") as tar:
        members = tar.getnames()
    assert len(set(members)) == len(members) == 3 * 8
    assert all(member.count(".") == 1 and member.isascii() for member in members)


# --- contents -------------------------------------------------------------------------------------------------------


def rotated(number):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(number))).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that claims 400 million pixels."""
    data = bytearray(picture(0, "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def deep(number):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100 + number).save(buffer, "PNG")
    return buffer.getvalue()


def floats():
    buffer = io.BytesIO()
    Image.new("F", (30, 20), 0.5).save(buffer, "TIFF")
    return buffer.getvalue()


LEFT_OUT = "left out"
ODD = {  # file: (its bytes, the issue, the policy)
    "text.JPEG": (b"hello", "not an image (5 bytes)", LEFT_OUT),
    "empty.JPEG": (b"", "not an image (0 bytes)", LEFT_OUT),
    "cut.JPEG": (picture(4)[:-200], "does not decode", LEFT_OUT),
    "cutpng.png": (picture(5, "PNG")[:-300], "does not decode", LEFT_OUT),
    "bomb.png": (bomb(), "decompression bomb", LEFT_OUT),
    "float.tif": (floats(), "does not define which value is black", LEFT_OUT),
    "cmyk.JPEG": (picture(6, mode="CMYK"), "CMYK", "kept, read as RGB"),
    "grey.JPEG": (picture(7, mode="L"), "greyscale", "kept, read as RGB"),
    "palette.png": (picture(8, "PNG", "P"), "palette", "kept, read as RGB"),
    "alpha.png": (picture(9, "PNG", "RGBA"), "alpha", "kept, read as RGB"),
    "deep.png": (deep(1), "16-bit", "kept, scaled to 8 bits"),
    "rotated.JPEG": (rotated(10), "EXIF orientation 6", "kept, orientation not applied"),
    "png.JPEG": (picture(11, "PNG"), "jpg by its name, png by its content", "kept, under the extension of its content"),
    "same_name.png": (picture(12, "PNG"), "its name makes the key of another image", "kept, its key numbered"),
}
PLAIN = {"plain.JPEG": picture(1), "same.name.JPEG": picture(13)}


@pytest.mark.parametrize("store", images.STORES)
def test_every_issue_follows_its_policy_and_is_listed(store, tmp_path, capsys):
    tree = {f"train/{WNIDS[0]}/{name}": data for name, (data, _, _) in ODD.items()}
    tree |= {f"train/{WNIDS[0]}/{name}": data for name, data in PLAIN.items()}
    write_tree(tmp_path / "tree", {**tree, f"train/{WNIDS[0]}/boxes.txt": b"1 2 3"})
    (tmp_path / "tree" / "train" / WNIDS[1]).mkdir()
    assert convert("imagenet", tmp_path / "tree", tmp_path / "out", "--store", store) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "train"
    assert "6 images were left out" in printed and "9 other issues" in printed
    assert str(folder / "bad_samples.jsonl") in printed
    boxes = {"name": f"train/{WNIDS[0]}/boxes.txt", "files": 1, "issue": "no image by its name", "policy": "ignored"}
    assert "Ignored (no image by its name): 1 files" in printed and "boxes.txt" in printed
    listed = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert listed.pop() == boxes
    empty = listed.pop(0)
    assert empty == {"name": f"{WNIDS[1]}/", "class": 0, "issue": "no image in it", "policy": "class has no images"}
    assert [entry["name"] for entry in listed] == [f"{WNIDS[0]}/{name}" for name in sorted(ODD)]
    for entry in listed:
        data, issue, policy = ODD[entry["name"].split("/")[1]]
        assert issue in entry["issue"] and entry["policy"] == policy
        assert (entry["class"], entry["bytes"]) == (3, len(data))
    manifest = load_manifest(folder)
    assert (manifest.num_samples, manifest.bad_samples, manifest.made["ignored"]) == (10, 6, 1)
    kept = {name: data for name, (data, _, policy) in ODD.items() if policy != LEFT_OUT} | PLAIN
    if store == images.ORIGINAL:
        assert samples_of(folder) == {f"{WNIDS[0]}/{name}": (3, data) for name, data in kept.items()}
    with tarfile.open(folder / "train-000000.tar") as tar:
        members = {name for name in tar.getnames() if not name.endswith(("cls", "json"))}
    extensions = {"original": "png", "crop-jpeg": "jpg", "crop-raw": "npy"}
    assert f"{WNIDS[0]}_png.{extensions[store]}" in members and f"{WNIDS[0]}_same_name-1.{extensions[store]}" in members


def test_crops_of_16_bit_grey_are_scaled_and_those_of_an_earlier_release_are_made_again(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "tree", {"train/a/deep.png": deep(0), "train/b/plain.JPEG": picture(1)})
    arguments = ("folder", tmp_path / "tree", tmp_path / "out", "--store", "crop-raw", "--image-size", 20)
    monkeypatch.setattr("cfmask.convert.writing.SCALED", "kept, read as RGB")  # as the earlier release lists it
    assert convert(*arguments, "--samples-per-shard", 1) == 0
    monkeypatch.undo()
    made = sorted((tmp_path / "out" / "train").glob("*.tar"))
    before = [path.stat().st_ino for path in made]
    assert verify_shards.main([str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "an earlier release clipped to white" in capsys.readouterr().out
    assert convert(*arguments, "--samples-per-shard", 1) == 0
    assert [path.stat().st_ino != inode for path, inode in zip(made, before, strict=True)].count(True) == 1
    assert convert(*arguments, "--samples-per-shard", 1) == 0
    [crop] = [data for name, (_, data) in raw_crops(tmp_path / "out" / "train").items() if name == "a/deep.png"]
    assert np.array_equal(crop[0], (np.arange(600, dtype=np.uint16).reshape(20, 30) * 100 >> 8)[:, 5:25])


def raw_crops(folder):
    with ShardReader(load_manifest(folder)) as reader:
        samples = [reader.read(i) for i in range(2)]
    return {json.loads(s["json"])["name"]: (int(s["cls"]), np.load(io.BytesIO(s["npy"]))) for s in samples}


def test_a_set_without_any_usable_image_is_refused(tmp_path, capsys):
    write_tree(tmp_path / "tree", {f"train/{WNIDS[0]}/{i}.JPEG": b"no image" for i in range(3)})
    assert "None of the 3 images of the split train can be decoded" in refused(
        capsys, "imagenet", tmp_path / "tree", tmp_path / "out"
    )
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_classes_are_spread_over_shards(tmp_path):
    files = {f"train/{c}/{i}.jpg": picture(0, side=8) for c in "abcd" for i in range(40)}
    write_tree(tmp_path / "tree", files)
    assert convert("folder", tmp_path / "tree", tmp_path / "out", "--samples-per-shard", 40) == 0
    manifest = load_manifest(tmp_path / "out" / "train")
    with ShardReader(manifest) as reader:
        labels = np.array([int(reader.read(i)["cls"]) for i in range(160)]).reshape(4, 40)
    for shard in labels:
        assert np.bincount(shard, minlength=4).min() >= 3
    assert convert("folder", tmp_path / "tree", tmp_path / "seed", "--samples-per-shard", 40, "--seed", 1) == 0
    assert contents(tmp_path / "seed" / "train") != contents(tmp_path / "out" / "train")


# --- kills and repetitions ------------------------------------------------------------------------------------------


KILLS = 25


def test_kills_and_any_number_of_processes_leave_the_same_bytes(tmp_path):
    # Large, flat PNGs: a few kB to store, 5 ms to check. A shard takes long enough to be killed in the middle.
    flat = io.BytesIO()
    Image.new("RGB", (1000, 1000), (1, 2, 3)).save(flat, "PNG")
    write_tar(tmp_path / "set.tar", {f"train/{c}/{i}.png": flat.getvalue() for c in "abcd" for i in range(150)})
    common = ["folder", "--source", tmp_path / "set.tar", "--samples-per-shard", 5]

    def start(out, workers):
        command = [sys.executable, REPO / "tools" / "make_shards.py", *common, "--out", out, "--workers", workers]
        return subprocess.Popen([*map(str, command)], stdout=-3, stderr=-3, cwd=tmp_path, start_new_session=True)

    whole, killed = tmp_path / "whole" / "train", tmp_path / "killed" / "train"
    assert start(tmp_path / "whole", 2).wait() == 0
    rng = np.random.default_rng(0)
    kills, in_a_shard, leftover = 0, 0, set()
    while kills < KILLS:
        process = start(tmp_path / "killed", (1, 1, 1, 1, 3)[kills % 5])
        while process.poll() is None and not set(killed.glob(".*.part")) - leftover:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.08)))
        assert process.poll() is None, f"finished after {kills} kills"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        now = set(killed.glob(".*.part"))
        in_a_shard += bool(now - leftover)
        leftover = now
        assert not (killed / "manifest.json").exists()
    assert in_a_shard >= KILLS // 2
    assert start(tmp_path / "killed", 4).wait() == 0
    assert len(contents(whole)) == 240 and contents(killed) == contents(whole)
    assert (killed / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


def workers_of(command):
    """Pids of the workers of a command's process pool: children of its one child."""

    def children(pid):
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    return [worker for launcher in children(command.pid) for worker in children(launcher)]


@pytest.mark.parametrize("tool", ["make_shards", "verify_shards"])
def test_a_worker_that_is_killed_ends_the_command_which_names_the_shard_and_resumes(tmp_path, tool):
    flat = io.BytesIO()
    Image.new("RGB", (1000, 1000), (1, 2, 3)).save(flat, "PNG")
    source = write_tar(tmp_path / "set.tar", {f"train/{c}/{i}.png": flat.getvalue() for c in "abcd" for i in range(20)})
    making = ["make_shards.py", "folder", "--source", source, "--out", tmp_path / "out", "--samples-per-shard", 10]
    flags = making if tool == "make_shards" else ["verify_shards.py", "--full", tmp_path / "out"]
    if tool == "verify_shards":
        assert convert("folder", source, tmp_path / "out", "--samples-per-shard", 10) == 0
    command = [sys.executable, str(REPO / "tools" / flags[0]), *map(str, flags[1:]), "--workers", "2"]
    process = subprocess.Popen(command, stdout=-3, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out/train"
    while len(workers := workers_of(process)) < 2 or (tool == "make_shards" and not list(folder.glob(".*.tar.*.part"))):
        time.sleep(0.002)
        assert process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    error = errors[errors.index("error: ") :]
    assert process.returncode == 2 and "Traceback" not in errors and len(error.splitlines()) == 1
    assert "A worker process was killed by signal 9 (SIGKILL)" in error
    assert tool == "verify_shards" or f"while it worked on {folder}/train-0000" in error
    again = {"make_shards": make_shards, "verify_shards": verify_shards}[tool]
    assert again.main([flag for flag in command[2:] if flag != "--full"]) == 0  # --full would import torch again
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part")) and (folder / "manifest.json").exists()


def test_a_second_writer_of_a_finished_shard_leaves_it_alone(tmp_path):
    samples = [(f"k{i}", i, {"jpg": picture(i), "cls": b"1"}) for i in range(3)]
    write_shard(tmp_path / "a.tar", samples, about={"plan": "p"})
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    write_shard(tmp_path / "a.tar", samples, about={"plan": "p"})  # like a job that is requeued while it still runs
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    write_shard(tmp_path / "a.tar", samples[:2], about={"plan": "p"})
    assert len(load_index(tmp_path / "a.tar")) == 2


def test_tar_headers_are_those_of_tarfile(tmp_path):
    write_shard(tmp_path / "a.tar", [("k" * 96, 7, {"jpg": picture(1)}), ("ä", 0, {"cls": b"", "npy": bytes(10**6)})])
    expected = io.BytesIO()
    with tarfile.open(tmp_path / "a.tar") as tar, tarfile.open(fileobj=expected, mode="w", format=0) as again:
        for member in tar:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = member.size, 0o444
            again.addfile(info, tar.extractfile(member))
    assert (tmp_path / "a.tar").read_bytes() == expected.getvalue()


def test_running_again_makes_only_missing_shards(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    convert("imagenet", tmp_path / "tree", tmp_path / "out", "--samples-per-shard", 5)
    folder = tmp_path / "out" / "train"
    before = contents(folder)
    (folder / "train-000001.tar").unlink()
    os.truncate(folder / "train-000002.tar", 1000)
    (folder / "train-000003.index.safetensors").unlink()
    kept = (folder / "train-000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert convert("imagenet", tmp_path / "tree", tmp_path / "out", "--samples-per-shard", 5) == 0
    assert "1 of 4 shards exist already" in capsys.readouterr().out
    assert contents(folder) == before and (folder / "train-000000.tar").stat().st_mtime_ns == kept


def test_a_folder_of_another_plan_is_left_alone(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    convert("imagenet", tmp_path / "tree", tmp_path / "out")
    before = contents(tmp_path / "out" / "train")
    message = refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out", "--seed", 1)
    assert "shards of another plan" in message and "seed 0" in message and "seed 1" in message
    write_tree(tmp_path / "tree", {f"train/{WNIDS[0]}/new.JPEG": picture(77)})
    assert "shards of another plan" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out")
    assert contents(tmp_path / "out" / "train") == before
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "theirs.tar").write_bytes(b"")
    assert "holds tars of another program" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "foreign")


def test_two_conversions_do_not_write_into_one_folder(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    (tmp_path / "out" / "train").mkdir(parents=True)
    with sole_writer(tmp_path / "out" / "train"):
        assert "Another process is writing" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_sources_that_cannot_be_converted_are_refused_in_a_sentence(tmp_path, capsys):
    def said(verb, files, *arguments, tar=False):
        number = len(list(tmp_path.iterdir()))
        source = tmp_path / f"source{number}"
        source = write_tar(source.with_suffix(".tar"), files) if tar else write_tree(source, files)
        source.mkdir(exist_ok=True) if not files else None
        return refused(capsys, verb, source, tmp_path / "out", *arguments)

    image = picture(0)
    assert "cannot be read" in refused(capsys, "folder", tmp_path / "nowhere", tmp_path / "out")
    for verb in ("imagenet", "folder"):
        assert "no class folders" in said(verb, {})
        assert "no class folders" in said(verb, {"a/readme.txt": b"x"})
    assert "no class folders (1.jpg lies at its top)" in said("folder", {"1.jpg": image, "a/2.jpg": image})
    assert "lies in 'n00000001', which is not one of ImageNet's 1000 wnids" in said(
        "imagenet", {"train/n00000001/1.JPEG": image}
    )
    assert "lies in 'dog'" in said("imagenet", {"train/dog/1.JPEG": image}, tar=True)
    assert "do not all lie at" in said("folder", {"a/1.jpg": image, "b/c/2.jpg": image})
    assert "add --split NAME" in said("folder", {"a/1.jpg": image, "b/2.jpg": image})
    assert "has no split 'val'; it has: train" in said("imagenet", imagenet_files("train"), "--split", "val")
    assert "has no split 'x'; it has: p, q" in said("folder", {"p/a/1.jpg": image, "q/a/1.jpg": image}, "--split", "x")
    twice = {f"{top}/train/{WNIDS[0]}/1.JPEG": image for top in "ab"}
    assert "1.JPEG twice" in said("imagenet", twice)
    assert not (tmp_path / "out").exists()


def test_a_truncated_tar_is_refused(tmp_path, capsys):
    whole = write_tar(tmp_path / "set.tar", imagenet_files("train")).read_bytes()
    with tarfile.open(tmp_path / "set.tar") as tar:
        boundary = tar.getmembers()[9].offset
    for cut, message in [
        (boundary, "no end-of-archive mark"),
        (boundary + 700, "truncated or damaged"),
        (0, "is an empty file"),
    ]:
        (tmp_path / "set.tar").write_bytes(whole[:cut])
        assert message in refused(capsys, "imagenet", tmp_path / "set.tar", tmp_path / "out")
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(whole))
    assert "is compressed" in refused(capsys, "imagenet", tmp_path / "set.tar.gz", tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    message = refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out")
    assert "need about 0.1 MB, but the disk has only 0.0 MB left" in message
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_stops_the_conversion_and_finished_shards_are_kept(tmp_path, capsys, monkeypatch):
    source = write_tree(tmp_path / "tree", imagenet_files("train"))
    path = sorted(source.glob("train/*/*"))[7]
    before, data = path.stat(), path.read_bytes()
    plan_all = make_shards.plan_all

    def after_the_plan(change):
        def plan_then_change(*arguments):
            splits = plan_all(*arguments)
            change()
            return splits

        monkeypatch.setattr(make_shards, "plan_all", plan_then_change)

    for change, message in [
        (lambda: path.write_bytes(data[:-1]), "its size differs"),
        (lambda: path.write_bytes(data + b"x"), "its size differs"),
        (lambda: path.write_bytes(data), "its modification time differs"),
        (path.unlink, "cannot be read (No such file or directory)"),
    ]:
        after_the_plan(change)
        said = refused(capsys, "imagenet", source, tmp_path / "out", "--samples-per-shard", 5)
        assert message in said and str(path) in said and "finished work is kept" in said
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    made = contents(tmp_path / "out" / "train")
    monkeypatch.setattr(make_shards, "plan_all", plan_all)
    assert convert("imagenet", source, tmp_path / "out", "--samples-per-shard", 5) == 0
    assert made.items() <= contents(tmp_path / "out" / "train").items()


def test_a_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "tree", {**imagenet_files("train"), **imagenet_files("val", 2)})
    for arguments, sizes in {
        (): ("0.1 MB", "0.0 MB"),
        ("--store", "crop-raw"): ("3.1 MB", "1.2 MB"),  # 20 and 8 times 128 + 3 * 224 * 224 bytes, and 2.6 kB
        ("--store", "crop-raw", "--image-size", 32): ("0.1 MB", "0.0 MB"),
        ("--store", "crop-jpeg"): ("0.7 MB", "0.3 MB"),
    }.items():
        capsys.readouterr()
        assert convert("imagenet", tmp_path / "tree", tmp_path / "out", "--dry-run", *arguments) == 0
        printed = capsys.readouterr().out
        assert f"train: 20 images, 1 shards, about {sizes[0]} in" in printed
        assert f"val: 8 images, 1 shards, about {sizes[1]} in" in printed
        assert "Nothing was written" in printed and not (tmp_path / "out").exists()
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    large = ("--dry-run", "--store", "crop-raw")
    assert "need about 4.3 MB" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out", *large)
    assert not (tmp_path / "out").exists()


def test_the_estimate_is_close(tmp_path):
    write_tree(tmp_path / "tree", {f"train/a/{i}.png": picture(i, "PNG", side=100) for i in range(40)})
    for store, tolerance in [("original", 0.02), ("crop-raw", 0.02)]:
        assert convert("folder", tmp_path / "tree", tmp_path / store, "--store", store) == 0
        args = make_shards.parser().parse_args(
            [*("folder", "--source", str(tmp_path / "tree"), "--out", str(tmp_path / store), "--store", store)]
        )
        request = make_shards.request_of(args)
        [split] = conversion.plan_all(collection.collect(request), request)
        made = sum(path.stat().st_size for path in split.folder.glob("train-*"))
        assert abs(sum(task.num_bytes for task in split.tasks) / made - 1) < tolerance


def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    for arguments, message in {
        ("--image-size", 224): "--image-size is the side of the crops of a crop store",
        ("--partition", "low", "--time", 5): "--time, --partition without --executor slurm would do nothing",
        ("--executor", "slurm"): "--workers would do nothing",
        ("--samples-per-shard", 0): "--samples-per-shard must be at least 1",
    }.items():
        assert message in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out", *arguments)


# --- stores ---------------------------------------------------------------------------------------------------------


def pixels_of(folder, size):
    """{original name: pixels for the model}, read by the evaluation's pipeline."""
    manifest = load_manifest(folder)
    with ShardReader(manifest) as reader:
        names = [json.loads(reader.read(i)["json"])["name"] for i in range(manifest.num_samples)]
    batches = eval_batches(manifest, image_size=size, batch_size=7, rank=0, world_size=1, loader_workers=0)
    return dict(zip(names, torch.cat([batch.images for batch in batches]), strict=True))


def test_crops_are_the_pixels_that_training_makes_of_the_original(tmp_path):
    modes = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]
    files = {
        f"val/c/{mode}-{side}.{kind.lower()}": picture(i + side, kind, mode, side)
        for i, (kind, mode) in enumerate(modes)
        for side in (48, 70, 131)
    }
    smooth = np.fromfunction(lambda y, x, c: (y + x * (c + 1)) % 256 // 2, (150, 200, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG")
    write_tree(tmp_path / "tree", {**files, "val/c/smooth.jpg": buffer.getvalue()})
    for store in images.STORES:
        size = () if store == images.ORIGINAL else ("--image-size", 64)
        assert convert("folder", tmp_path / "tree", tmp_path / store, "--store", store, *size) == 0
    original, jpeg, raw = (pixels_of(tmp_path / store / "val", 64) for store in images.STORES)
    assert set(original) == set(raw) == set(jpeg) and len(original) == 19
    for name, pixels in original.items():
        assert pixels.shape == (3, 64, 64) and torch.equal(raw[name], pixels), name
    difference = (jpeg["c/smooth.jpg"].int() - original["c/smooth.jpg"].int()).abs().float().mean()
    assert difference < 3
    for store in images.STORES:
        manifest = load_manifest(tmp_path / store / "val")
        assert (manifest.store, manifest.image_size) == (store, None if store == images.ORIGINAL else 64)
    with ShardReader(load_manifest(tmp_path / "crop-raw" / "val")) as reader:
        facts = json.loads(reader.read(0)["json"])
    assert facts["width"] >= 53 and facts["bytes"] == len(files.get(f"val/{facts['name']}", buffer.getvalue()))
    # A conversion with another store must not continue in the same folder.
    again = [*("folder", tmp_path / "tree", tmp_path / "crop-raw"), "--store"]
    assert convert(*again, "crop-jpeg", "--image-size", 64) == 2 and convert(*again, "crop-raw") == 2


@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet-sample.tar is not there")
def test_real_photographs_survive_a_crop_store(tmp_path):
    with tarfile.open(SAMPLE) as tar:
        members = [member for member in tar if member.isfile()][::10]
        files = {"/".join(m.name.split("/")[-3:]): tar.extractfile(m).read() for m in members}
    write_tree(tmp_path / "tree", files)
    for store in images.STORES:
        assert convert("imagenet", tmp_path / "tree", tmp_path / store, "--store", store) == 0
    original, jpeg, raw = (pixels_of(tmp_path / store / "train", 224) for store in images.STORES)
    assert len(original) == 50
    difference = []
    for name, pixels in original.items():
        assert torch.equal(raw[name], pixels), name
        difference.append((jpeg[name].int() - pixels.int()).abs().float().mean().item())
    assert (
        np.mean(difference) < 3 and max(difference) < 8
    )  # of 255; the worst is foliage, its colours at half resolution


def test_originals_are_converted_without_torch(tmp_path):
    write_tree(tmp_path / "tree", {f"train/a/{i}.jpg": picture(i) for i in range(3)})
    program = (
        "import sys; from tools import make_shards;"
        "assert make_shards.main(['folder', '--workers', '1', *sys.argv[1:]]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "--source", tmp_path / "tree", "--out", tmp_path / "out"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)


# --- holdout --------------------------------------------------------------------------------------------------------


def test_a_holdout_is_stratified_taken_out_of_train_and_independent_of_order(tmp_path):
    sizes = {"a": 40, "b": 21, "c": 9, "d": 1}
    files = {f"train/{c}/{i}.jpg": picture(i, side=8) for c, n in sizes.items() for i in range(n)}
    write_tree(tmp_path / "tree", files)
    write_tar(tmp_path / "set.tar", dict(reversed(files.items())))
    assert convert("folder", tmp_path / "tree", tmp_path / "a", "--holdout", 14) == 0
    assert convert("folder", tmp_path / "set.tar", tmp_path / "b", "--holdout", 14) == 0
    for split in ("train", "holdout"):
        assert contents(tmp_path / "a" / split) == contents(tmp_path / "b" / split)
    train, held = (samples_of(tmp_path / "a" / split) for split in ("train", "holdout"))
    assert len(held) == 14 and len(train) == 57 and not set(train) & set(held)
    assert {f"train/{name}" for name in {**train, **held}} == set(files)
    counts = load_manifest(tmp_path / "a" / "holdout").class_counts
    assert counts == (8, 4, 2, 0)  # of 7.9, 4.1, 1.8 and 0.2
    assert load_manifest(tmp_path / "a" / "holdout").classes == load_manifest(tmp_path / "a" / "train").classes
    assert load_manifest(tmp_path / "a" / "train").made["holdout"] == 14
    assert convert("folder", tmp_path / "tree", tmp_path / "c", "--holdout", 14, "--seed", 1) == 0
    assert set(samples_of(tmp_path / "c" / "holdout")) != set(held)


@pytest.mark.parametrize("n", [1, 10, 333, 900])
def test_shares_of_a_holdout_are_within_one_of_proportion(n):
    rng = np.random.default_rng(n)
    found = [
        files.LabelledImage(f"c{c:02d}", f"{i}.jpg", Blob(SourceFile("", 0, 0), 0, 0))
        for c, size in enumerate(rng.integers(1, 100, 20))
        for i in range(size)
    ]
    rest, held = hold_out(found, n, seed=0)
    assert len(held) == n and sorted(rest + held) == sorted(found)
    total, taken = (Counter(image.folder for image in part) for part in (found, held))
    assert all(abs(taken[c] - n * total[c] / len(found)) < 1 for c in total)
    assert {*hold_out(found[::-1], n, seed=0)[1]} == {*held}


def test_an_impossible_holdout_is_refused(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    write_tree(tmp_path / "other", imagenet_files("val"))
    for n in (0, 20, 21):
        said = refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out", "--holdout", n)
        assert "the training set has 20" in said
    assert "the source has val" in refused(capsys, "imagenet", tmp_path / "other", tmp_path / "out", "--holdout", 2)


# --- real photographs -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet-sample.tar is not there")
def test_five_hundred_photographs_become_shards_from_any_directory(tmp_path):
    command = [sys.executable, REPO / "tools" / "make_shards.py", "imagenet", "--source", SAMPLE, "--out", "out"]
    options = ["--samples-per-shard", "125", "--allow-count-mismatch"]
    subprocess.run([*map(str, command), *options], cwd=tmp_path, check=True, capture_output=True)
    manifest = load_manifest(tmp_path / "out" / "train")
    assert manifest.sample_counts.tolist() == [125] * 4 and manifest.bad_samples == 0
    with tarfile.open(SAMPLE) as tar:
        for member in [member for member in tar if member.isfile()][::50]:
            wnid, name = member.name.split("/")[-2:]
            file = tar.extractfile(member)
            assert file is not None
            assert samples_of(tmp_path / "out" / "train")[f"{wnid}/{name}"] == (
                imagenet.wnids().index(wnid),
                file.read(),
            )
