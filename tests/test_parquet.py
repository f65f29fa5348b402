"""Parquet files as on the Hugging Face hub: they give the same shards as folders, and no class is guessed."""

from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cfmask.convert import conversion
from cfmask.convert.class_names import class_ids_of_names, is_list
from cfmask.convert.collection import collect
from cfmask.convert.request import Request
from cfmask.convert.sources import unpacking
from cfmask.data import benchmarks, imagenet
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError
from made_parquet import write_parquet
from test_make_shards import contents, convert, refused, samples_of
from tools import make_shards

NAMES = [", ".join(lemmas) for lemmas in imagenet.lemmas()]  # as ILSVRC/imagenet-1k's metadata has them
CLASSES = (0, 3, 517, 999)


def picture(number):
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (12, 14, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def train_rows(per_class=4):
    """Shuffled, like the hub's."""
    rows = [
        (picture(10 * c + i), f"{imagenet.wnids()[c]}_{i}_{imagenet.wnids()[c]}.JPEG", c)
        for i in range(per_class)
        for c in CLASSES
    ]
    return rows


def val_rows():
    return [(picture(5000 + c), f"ILSVRC2012_val_{n:08d}_{imagenet.wnids()[c]}.JPEG", c) for n, c in enumerate(CLASSES)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """ImageNet in the layout of ILSVRC/imagenet-1k, small."""
    folder = tmp_path_factory.mktemp("hub")
    rows = train_rows()
    for n, part in enumerate((rows[:7], rows[7:])):
        write_parquet(folder / "data" / f"train-{n:05d}-of-00002.parquet", part, names=NAMES)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", val_rows(), names=NAMES)
    test = [(picture(n), f"ILSVRC2012_test_{n:08d}.JPEG", -1) for n in range(5)]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", test, names=NAMES)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The same images as a tree of folders."""
    folder = tmp_path_factory.mktemp("tree")
    for split, rows in (("train", train_rows()), ("val", val_rows())):
        for data, name, c in rows:
            path = folder / split / imagenet.wnids()[c] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def test_shards_equal_those_of_a_folder_of_the_same_images(hub, tree, tmp_path, capsys):
    common = ("--samples-per-shard", 5)
    assert convert("imagenet", tree, tmp_path / "a", *common) == 0
    assert convert("imagenet", hub, tmp_path / "b", *common, "--workers", 2) == 0
    assert "Ignored (rows without a label): 5 files, such as test-00000" in capsys.readouterr().out
    for split in ("train", "val"):
        assert contents(tmp_path / "a" / split) == contents(tmp_path / "b" / split)
    manifest = load_manifest(tmp_path / "b" / "train")
    assert {c: n for c, n in enumerate(manifest.class_counts) if n} == dict.fromkeys(CLASSES, 4)
    assert manifest.made["ignored"] == 5
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [".unpacked", "train", "val"]
    [folder] = (tmp_path / "b" / ".unpacked").iterdir()
    left = {path.name for path in folder.iterdir()}
    assert left == {"train-00000.json", "train-00001.json", "validation-00000.json"}


def test_running_again_unpacks_only_files_that_missing_shards_need(hub, tmp_path, monkeypatch):
    arguments = ("imagenet", hub, tmp_path / "out", "--samples-per-shard", 100)
    assert convert(*arguments) == 0
    made = contents(tmp_path / "out" / "train") | contents(tmp_path / "out" / "val")
    unpacked = []

    def counted(task):
        unpacked.append(task)
        return unpacking.unpack(task)

    monkeypatch.setattr("cfmask.convert.conversion.unpack", counted)
    assert convert(*arguments) == 0 and unpacked == []
    (tmp_path / "out" / "val" / "val-000000.tar").unlink()
    assert convert(*arguments) == 0
    assert [task.record.stem for task in unpacked] == ["validation-00000"]
    assert contents(tmp_path / "out" / "train") | contents(tmp_path / "out" / "val") == made


def test_a_dry_run_counts_and_estimates_and_writes_nothing(hub, tmp_path, capsys):
    assert convert("imagenet", hub, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "train: 16 images" in printed and "val: 4 images" in printed
    assert "3 Parquet files are unpacked" in printed
    assert not (tmp_path / "out").exists()


def test_interrupted_unpacking_resumes_with_the_missing_files(hub, tmp_path, monkeypatch):
    done = []

    def fails(task):
        if len(done) == 1:
            raise UserError("interrupted")
        done.append(task)
        return unpacking.unpack(task)

    monkeypatch.setattr("cfmask.convert.conversion.unpack", fails)
    assert convert("imagenet", hub, tmp_path / "out") == 2
    monkeypatch.setattr("cfmask.convert.conversion.unpack", lambda task: (done.append(task), unpacking.unpack(task))[1])
    assert convert("imagenet", hub, tmp_path / "out") == 0
    assert len(done) == len({task.record for task in done}) == 3


def test_each_split_has_an_unpacking_array_of_its_own_that_the_same_command_finds_again(hub, tmp_path):
    def unpack(split):
        """Unpacks a split; returns the array's name and the records that it makes."""
        request = Request("imagenet", hub, tmp_path / "out", split=split, allow_count_mismatch=True)
        arrays = []

        def run(work, progress):
            arrays.append((work.name, sorted(task.record for task in work.items)))
            return [work.function(task) for task in work.items]

        conversion.unpack_first(conversion.plan_all(collect(request), request), request, run)
        [array] = arrays
        return array

    train, val = unpack("train"), unpack("val")
    assert train[0] != val[0] and len(train[1]) == 2 and len(val[1]) == 1
    train[1][0].unlink()
    assert unpack("train") == (train[0], train[1][:1])


def test_a_file_that_changed_is_unpacked_again(tmp_path):
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", train_rows(), names=NAMES)
    assert convert("imagenet", file, tmp_path / "a") == 0
    write_parquet(file, [(picture(n), path, c) for n, (_, path, c) in enumerate(train_rows())], names=NAMES)
    os.utime(file, (1, 1))
    assert convert("imagenet", file, tmp_path / "a") == 2  # another plan, since sizes differ
    assert convert("imagenet", file, tmp_path / "b") == 0


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wnids, reversed", "lemmas", "open_clip's names", "first lemmas", "wnid column"])
def test_class_order_comes_from_the_names(name, tmp_path):
    names, rows = NAMES, train_rows()
    if name == "wnids, reversed":
        names = list(reversed(imagenet.wnids()))
        rows = [(data, path, 999 - c) for data, path, c in rows]
    elif name == "open_clip's names":
        names = list(imagenet.class_names())
    elif name == "first lemmas":
        names = [lemmas[0] for lemmas in imagenet.lemmas()]
    elif name == "wnid column":
        names, rows = None, [(data, path, imagenet.wnids()[c]) for data, path, c in rows]
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, names=names)
    assert convert("imagenet", file, tmp_path / "out") == 0
    expected = {f"{imagenet.wnids()[c]}/{path}": (c, data) for data, path, c in train_rows()}
    assert samples_of(tmp_path / "out" / "train") == expected


def test_labels_without_names_are_taken_from_wnids_in_paths_or_refused(tmp_path, capsys):
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", train_rows())
    assert convert("imagenet", file, tmp_path / "out") == 0
    assert {label for label, _ in samples_of(tmp_path / "out" / "train").values()} == set(CLASSES)
    bare = write_parquet(tmp_path / "x" / "train-00000-of-00001.parquet", [(d, "", c) for d, _, c in train_rows()])
    assert "order would be a guess" in refused(capsys, "imagenet", bare, tmp_path / "b")


def test_paths_that_contradict_labels_are_refused(tmp_path, capsys):
    rows = [(data, path, 999 - c) for data, path, c in train_rows()]
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, names=NAMES)
    assert "contradicts itself" in refused(capsys, "imagenet", file, tmp_path / "out")


def test_lists_of_names_are_mapped_to_imagenets_classes():
    def ids(names, numbers=False):
        return class_ids_of_names(names, wordnet=True, numbers=numbers, where="The list", remedy="Look.")

    assert is_list(NAMES, range(1000)) and is_list([lemmas[0] for lemmas in imagenet.lemmas()], range(1000))
    assert ids(NAMES) == tuple(range(1000))
    odd = list(NAMES)
    odd[517] = "crane2"
    assert is_list(odd, range(1000)) and not is_list(odd[::-1], range(1000))
    assert ids(["goldfish", "tench, Tinca tinca"]) == (1, 0)
    assert ids(list(benchmarks.wnids("imagenet-r"))) == tuple(map(imagenet.wnids().index, imagenet.r_wnids()))
    assert ids(["0", "1", "10", "2"], numbers=True) == (0, 1, 10, 2)
    assert ids([NAMES[133], "crane", NAMES[135]]) == (133, 134, 135)
    for names, reason in (
        (["crane", NAMES[0]], "two classes of ImageNet share"),
        (["tench", "unicorn"], "has 1 of 2 class names that are not .*, such as 'unicorn'"),
        (["tench", "n01440764"], "names a class twice"),
        ([*NAMES[1:], NAMES[0]][:10] + ["dragonish"], "'dragonish'"),
    ):
        with pytest.raises(UserError, match=reason):
            ids(names)


def test_a_shifted_set_is_one_file_with_labels_of_its_own_list(tmp_path, capsys):
    wnids = list(imagenet.r_wnids())
    rows = [(picture(c), f"art_{c}.jpg", c) for c in (0, 1, 199)]
    file = write_parquet(tmp_path / "test.parquet", rows, names=wnids)
    assert convert("imagenet-r", file, tmp_path / "out") == 0
    expected = {imagenet.wnids().index(wnids[c]) for c in (0, 1, 199)}
    assert {label for label, _ in samples_of(tmp_path / "out" / "imagenet-r").values()} == expected
    assert "is not one of the 200 classes of imagenet-a" in refused(capsys, "imagenet-a", file, tmp_path / "a")
    assert "ObjectNet has to be converted from its own archive" in refused(capsys, "objectnet", file, tmp_path / "o")
    numbers = sorted(map(str, range(1000)))  # the order of a folder of numbers
    rows = [(picture(c), None, numbers.index(str(c))) for c in (2, 10, 999)]
    write_parquet(tmp_path / "v2" / "test.parquet", rows, names=numbers)
    assert convert("imagenet-v2", tmp_path / "v2", tmp_path / "out") == 0
    assert {label for label, _ in samples_of(tmp_path / "out" / "imagenet-v2").values()} == {2, 10, 999}


def test_a_set_of_classes_of_its_own_has_them_in_the_order_of_its_metadata(tmp_path, capsys):
    rows = [(picture(n), "same.jpg" if n < 3 else None, n % 2) for n in range(6)]
    file = write_parquet(tmp_path / "train.parquet", rows, names=["zebra", "ant"])
    assert convert("folder", file, tmp_path / "out") == 0
    manifest = load_manifest(tmp_path / "out" / "train")
    assert [name for name, _ in manifest.classes] == ["zebra", "ant"] and manifest.class_counts == (3, 3)
    assert samples_of(tmp_path / "out" / "train") == {
        "zebra/same.jpg": (0, rows[0][0]),
        "ant/same.jpg": (1, rows[1][0]),
        "zebra/same-train-00000-000002.jpg": (0, rows[2][0]),
        "ant/train-00000-000003.jpg": (1, rows[3][0]),
        "zebra/train-00000-000004.jpg": (0, rows[4][0]),
        "ant/train-00000-000005.jpg": (1, rows[5][0]),
    }
    write_parquet(tmp_path / "bare.parquet", rows)
    bare = ("folder", tmp_path / "bare.parquet", tmp_path / "bare", "--split", "train")
    assert "its metadata does not name the classes" in refused(capsys, *bare)
    (tmp_path / "classes.tsv").write_text("x\tX\ny\tY\n")
    assert convert(*bare, "--classes", tmp_path / "classes.tsv") == 0
    assert load_manifest(tmp_path / "bare" / "train").classes == (("x", "X"), ("y", "Y"))
    write_parquet(tmp_path / "high.parquet", [(picture(0), None, 7)], names=["a", "b"])
    high = ("folder", tmp_path / "high.parquet", tmp_path / "high", "--split", "train")
    assert "names 2 classes, but its set has the labels 7 … 7" in refused(capsys, *high)


def test_rows_without_bytes_are_left_out_and_listed(tmp_path, capsys):
    rows = [
        *train_rows(1),
        (None, "missing.jpg", 0),
        (None, None, 3),
        (b"", "empty.jpg", 0),
        (picture(1), "x.jpg", None),
    ]
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, names=NAMES)
    assert convert("imagenet", file, tmp_path / "out") == 0
    assert "Ignored (rows without a label): 1 files" in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "out/train/bad_samples.jsonl").read_text().splitlines()]
    ignored = listed.pop()
    names = [entry["name"].split("/")[1] for entry in listed]
    assert names == ["empty.jpg", "missing.jpg", "train-00000-000005"]
    assert ignored["files"] == 1 and ignored["issue"] == "rows without a label"
    assert load_manifest(tmp_path / "out" / "train").bad_samples == 3
    outside = write_parquet(tmp_path / "outside" / "train.parquet", [(None, "a.jpg", 0)] * 2, names=NAMES)
    assert "the rows name files outside it" in refused(capsys, "imagenet", outside, tmp_path / "b")


# --- files ----------------------------------------------------------------------------------------------------------


def test_an_incomplete_or_duplicated_set_is_refused(hub, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(hub / "data", data)
    (data / "train-00001-of-00002.parquet").unlink()
    assert "1 of the 2 files of the split train are missing" in refused(capsys, "folder", data, tmp_path / "a")
    shutil.copytree(hub / "data", tmp_path / "twice" / "x")
    shutil.copytree(hub / "data", tmp_path / "twice" / "y")
    assert "several copies of the split" in refused(capsys, "folder", tmp_path / "twice", tmp_path / "a")
    for name in ("partial-train/0000", "train/0001"):
        part = tmp_path / name.replace("/", "-")
        write_parquet(part / f"{name}.parquet", train_rows(), names=NAMES)
        assert "are missing from" in refused(capsys, "folder", part, tmp_path / "a")


def test_the_hub_s_own_conversion_and_older_uploads_are_read(tmp_path):
    rows = train_rows()
    for n, part in enumerate((rows[:9], rows[9:])):
        write_parquet(tmp_path / "default" / "train" / f"{n:04d}.parquet", part, names=NAMES)
        write_parquet(tmp_path / "old" / f"train-{n:05d}-of-00002-0123456789abcde{n}.parquet", part, names=NAMES)
    assert convert("imagenet", tmp_path / "default", tmp_path / "a") == 0
    assert convert("imagenet", tmp_path / "old", tmp_path / "b") == 0
    assert contents(tmp_path / "a" / "train") == contents(tmp_path / "b" / "train")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-300], "truncated or damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        (lambda data: data[:200] + bytes(300) + data[500:], "truncated or damaged|cannot be read|is damaged"),
    ],
)
def test_damaged_files_are_refused(damage, reason, hub, tmp_path, capsys):
    file = tmp_path / "train-00000-of-00001.parquet"
    file.write_bytes(damage((hub / "data" / "train-00000-of-00002.parquet").read_bytes()))
    assert convert("imagenet", file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert any(part in error for part in reason.split("|")) and "Traceback" not in error


def test_counts_of_a_known_set_are_checked_before_anything_is_unpacked(hub, tmp_path, capsys):
    command = ["imagenet", "--source", str(hub), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert make_shards.main(command) == 2
    assert "16 images instead of 1,281,167" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_columns_of_other_types_are_neither_labels_nor_paths(tmp_path):
    image = pa.array([{"bytes": picture(n), "path": b"\xff"} for n in range(2)])
    table = pa.table({"image": image, "label": pa.array(["b", "a"]).dictionary_encode(), "score": [0.5, 1.5]})
    features = {"label": {"_type": "ClassLabel", "names": ["x"]}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    assert convert("folder", tmp_path, tmp_path / "out") == 0
    assert set(samples_of(tmp_path / "out" / "train")) == {"a/train-00000-000001.jpg", "b/train-00000-000000.jpg"}


def test_a_column_of_plain_bytes_and_names_as_spark_writes_them(tmp_path):
    table = pa.table({"jpg": [picture(n) for n in range(4)], "class": ["b", "a", "b", "a"], "size": [1.0] * 4})
    folder = tmp_path / "train"
    folder.mkdir()
    for n in range(2):
        pq.write_table(table.slice(2 * n, 2), folder / f"part-0000{n}-4b3c-c000.snappy.parquet")
    assert convert("folder", folder, tmp_path / "out") == 0
    assert load_manifest(tmp_path / "out" / "train").classes == (("a", "a"), ("b", "b"))
    assert samples_of(tmp_path / "out" / "train")["a/train-00001-000001.jpg"] == (0, picture(3))


def test_a_split_without_labels_does_not_matter_if_another_is_chosen(tmp_path, capsys):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", train_rows(1), names=NAMES)
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "test-00000-of-00001.parquet")
    assert "has no label column" in refused(capsys, "imagenet", tmp_path, tmp_path / "out")
    assert convert("imagenet", tmp_path, tmp_path / "out", "--split", "train") == 0


def test_ambiguous_columns_need_a_flag(tmp_path, capsys):
    rows = train_rows()
    coarse = pa.array([0] * len(rows), pa.int64())
    file = write_parquet(
        tmp_path / "train.parquet",
        rows,
        label="fine_label",
        more={"coarse_label": coarse, "note": pa.array(["x"] * 16)},
    )
    ambiguous = ("imagenet", file, tmp_path / "out")
    assert "several possible label columns: fine_label, coarse_label, note" in refused(capsys, *ambiguous)
    assert "no label column 'other'" in refused(capsys, *ambiguous, "--label-column", "other")
    assert convert(*ambiguous, "--label-column", "fine_label") == 0
