"""Conversion: every layout of ImageNet and any tree, the same bytes on every way there, nothing dropped in silence."""

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
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfmask.data import imagenet, sources
from cfmask.data.shards import ShardReader, load_manifest
from tools import make_shards

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
    return make_shards.main([verb, "--source", str(source), "--out", str(out), "--workers", "1", *map(str, arguments)])


def refused(capsys, *arguments):
    """The one paragraph that a conversion is refused with."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".tar", ".npz")
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
    """The layout that image-net.org serves: a tar of a tar a class, a flat tar, and the devkit with the labels."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = tmp_path / "official"
    folder.mkdir()
    train = imagenet_files("train")
    inner = {}
    for wnid in WNIDS:
        of_class = {name.split("/")[-1]: data for name, data in train.items() if wnid in name}
        inner[f"{wnid}.tar"] = write_tar(tmp_path / "inner.tar", of_class).read_bytes()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)

    # ILSVRC2012_ID counts in an order of its own; 1001 is one of the inner nodes that follow the 1000 leaves.
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
    assert "does not list: a." in refused(capsys, "folder", tmp_path / "val", tmp_path / "x", "--classes", listed)
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


def test_what_does_not_decode_is_listed_and_counted_and_the_rest_is_stored_as_it_is(tmp_path, capsys):
    wnid = WNIDS[0]
    files = {
        f"train/{wnid}/png.JPEG": picture(1, "PNG"),
        f"train/{wnid}/cmyk.JPEG": picture(2, mode="CMYK"),
        f"train/{wnid}/grey.JPEG": picture(3, mode="L"),
        f"train/{wnid}/cut.JPEG": picture(4)[:-200],
        f"train/{wnid}/text.JPEG": b"hello",
        f"train/{wnid}/empty.JPEG": b"",
        f"train/{wnid}/boxes.txt": b"1 2 3",
    }
    write_tree(tmp_path / "tree", files)
    assert convert("imagenet", tmp_path / "tree", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "train"
    assert "3 images do not decode and were left out" in printed and str(folder / "bad_samples.jsonl") in printed
    assert "1 files are no images by their names" in printed and "boxes.txt" in printed
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["name"].split("/")[1] for entry in bad] == ["cut.JPEG", "empty.JPEG", "text.JPEG"]
    assert all(entry["reason"] for entry in bad)
    manifest = load_manifest(folder)
    assert (manifest.num_samples, manifest.bad_samples) == (3, 3)
    good = {f"{wnid}/{name}.JPEG": (3, files[f"train/{wnid}/{name}.JPEG"]) for name in ("png", "cmyk", "grey")}
    assert samples_of(folder) == good
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert f"{wnid}_png.png" in tar.getnames() and f"{wnid}_grey.jpg" in tar.getnames()


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path, capsys):
    write_tree(tmp_path / "tree", {f"train/{WNIDS[0]}/{i}.JPEG": b"no image" for i in range(3)})
    assert "None of the 3 images of the split train decodes" in refused(
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


def test_any_number_of_processes_and_kills_gives_the_same_bytes(tmp_path):
    files = {f"train/{c}/{i}.jpg": picture(i, side=160) for c in "abcd" for i in range(60)}
    write_tar(tmp_path / "set.tar", files)
    common = ["folder", "--source", tmp_path / "set.tar", "--samples-per-shard", 5]
    assert make_shards.main([*map(str, common), "--workers", "1", "--out", str(tmp_path / "whole")]) == 0
    command = [
        sys.executable,
        REPO / "tools" / "make_shards.py",
        *common,
        "--workers",
        "2",
        "--out",
        tmp_path / "killed",
    ]
    rng = np.random.default_rng(0)
    folder = tmp_path / "killed" / "train"
    interrupted = 0
    for _ in range(4):
        process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, cwd=tmp_path)
        before = len(list(folder.glob("*.npz")))
        while process.poll() is None and len(list(folder.glob("*.npz"))) < before + 3:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        interrupted += not (folder / "manifest.json").exists()
    assert interrupted >= 2
    deadline = time.monotonic() + 20
    while subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True).returncode:
        assert time.monotonic() < deadline
    assert contents(folder) == contents(tmp_path / "whole" / "train")
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "whole" / "train" / "manifest.json").read_bytes()
    assert not list(folder.glob(".*.part"))


def test_running_again_makes_only_what_is_missing(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    convert("imagenet", tmp_path / "tree", tmp_path / "out", "--samples-per-shard", 5)
    folder = tmp_path / "out" / "train"
    before = contents(folder)
    (folder / "train-000001.tar").unlink()
    os.truncate(folder / "train-000002.tar", 1000)
    (folder / "train-000003.index.npz").unlink()
    kept = (folder / "train-000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert convert("imagenet", tmp_path / "tree", tmp_path / "out", "--samples-per-shard", 5) == 0
    assert "1 of 4 shards are there already" in capsys.readouterr().out
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
    assert "did not begin there" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "foreign")


def test_two_conversions_do_not_write_into_one_folder(tmp_path, capsys):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    (tmp_path / "out" / "train").mkdir(parents=True)
    with make_shards.sole_writer(tmp_path / "out" / "train"):
        assert "Another conversion is writing" in refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_sources_that_cannot_be_converted_are_refused_in_a_sentence(tmp_path, capsys):
    def said(verb, files, *arguments, tar=False):
        number = len(list(tmp_path.iterdir()))
        source = tmp_path / f"source{number}"
        source = write_tar(source.with_suffix(".tar"), files) if tar else write_tree(source, files)
        source.mkdir(exist_ok=True) if not files else None
        return refused(capsys, verb, source, tmp_path / "out", *arguments)

    image = picture(0)
    assert "There is no source" in refused(capsys, "folder", tmp_path / "nowhere", tmp_path / "out")
    for verb in ("imagenet", "folder"):
        assert "no class folders" in said(verb, {})
        assert "no class folders" in said(verb, {"a/readme.txt": b"x"})
    assert "no class folders (1.jpg lies at its top)" in said("folder", {"1.jpg": image, "a/2.jpg": image})
    assert "lies in 'n00000001', which is not one of ImageNet's 1000 wnids" in said(
        "imagenet", {"train/n00000001/1.JPEG": image}
    )
    assert "lies in 'dog'" in said("imagenet", {"train/dog/1.JPEG": image}, tar=True)
    assert "do not lie at one depth" in said("folder", {"a/1.jpg": image, "b/c/2.jpg": image})
    assert "add --split NAME" in said("folder", {"a/1.jpg": image, "b/2.jpg": image})
    assert "has no split 'val'; it has: train" in said("imagenet", imagenet_files("train"), "--split", "val")
    assert "has no split 'x'; it has: p, q" in said("folder", {"p/a/1.jpg": image, "q/a/1.jpg": image}, "--split", "x")
    twice = {f"{top}/train/{WNIDS[0]}/1.JPEG": image for top in "ab"}
    assert "is there twice" in said("imagenet", twice)
    assert not (tmp_path / "out").exists()


def test_a_tar_that_was_cut_is_refused(tmp_path, capsys):
    whole = write_tar(tmp_path / "set.tar", imagenet_files("train")).read_bytes()
    with tarfile.open(tmp_path / "set.tar") as tar:
        boundary = tar.getmembers()[9].offset
    for cut, message in [
        (boundary, "without an end-of-archive mark"),
        (boundary + 700, "cut or damaged"),
        (0, "cannot be read"),
    ]:
        (tmp_path / "set.tar").write_bytes(whole[:cut])
        assert message in refused(capsys, "imagenet", tmp_path / "set.tar", tmp_path / "out")
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(whole))
    assert "is compressed" in refused(capsys, "imagenet", tmp_path / "set.tar.gz", tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "tree", imagenet_files("train"))
    usage = make_shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(make_shards.shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    message = refused(capsys, "imagenet", tmp_path / "tree", tmp_path / "out")
    assert "need 0.1 MB, and the disk has 0.1 MB left" in message
    assert not list((tmp_path / "out" / "train").glob("*.tar"))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_source_that_shrinks_underfoot_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    blob = sources.Blob(str(path), 0, 9)
    with pytest.raises(make_shards.UserError, match="changed while it was being read: 4 of 9 bytes"):
        blob.read()


# --- real photographs -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet-sample.tar is not there")
def test_five_hundred_photographs_become_shards_from_any_directory(tmp_path):
    command = [sys.executable, REPO / "tools" / "make_shards.py", "imagenet", "--source", SAMPLE, "--out", "out"]
    subprocess.run([*map(str, command), "--samples-per-shard", "125"], cwd=tmp_path, check=True, capture_output=True)
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
