"""Shards that other readers can read, their indexes, and the errors of damaged ones."""

import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds

from cfmask.convert import shard_writer
from cfmask.convert.shard_writer import write_shard
from cfmask.data import shard_index
from cfmask.data.shard_reader import SampleError, ShardReader
from cfmask.data.shards import Manifest, load_manifest, write_manifest
from cfmask.errors import UserError

CLASSES = (("n01", "one"), ("n02", "two"), ("n03", "three"))


def make_set(folder, counts=(4, 0, 3, 5)):
    """A set of shards with recognisable contents; the image member is any bytes."""
    folder.mkdir(parents=True)
    indexes, entries = [], []
    number = 0
    for s, count in enumerate(counts):
        samples = []
        for _ in range(count):
            extension = "png" if number % 5 == 3 else "jpg"
            fields = {extension: bytes([number]) * (number * 300), "cls": str(number % 3).encode(), "json": b"{}"}
            samples.append((f"sample_{number}", number % 3, fields))
            number += 1
        tar = folder / f"train-{s:06d}.tar"
        write_shard(tar, samples)
        shard, index = shard_writer.shard_and_index(tar)
        entries.append(shard)
        indexes.append(index)
    manifest = Manifest(
        root=folder,
        split="train",
        store="original",
        classes=CLASSES,
        class_counts=shard_writer.class_counts_of(indexes, 3),
        shards=tuple(entries),
        made={"tool": "test"},
    )
    write_manifest(manifest)
    return manifest


@pytest.fixture
def made(tmp_path):
    return make_set(tmp_path / "train")


def test_a_manifest_survives_writing_and_reading(made):
    again = load_manifest(made.root)
    assert again == made
    assert again.num_samples == 12 and again.num_classes == 3
    assert again.sample_counts.dtype == np.int64 and again.sample_counts.tolist() == [4, 0, 3, 5]
    assert again.class_counts == (4, 4, 4)
    for shard in again.shards:
        data = (again.root / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_ids_follow_the_shards_in_manifest_order(made):
    shard, row = made.locate(np.arange(12))
    assert shard.tolist() == [0, 0, 0, 0, 2, 2, 2, 3, 3, 3, 3, 3]
    assert row.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            made.locate([outside])


def test_webdataset_itself_reads_the_same_samples(made):
    urls = [str(made.root / shard.name) for shard in made.shards if shard.samples]
    theirs = list(wds.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    with ShardReader(made) as reader:
        ours = [reader.read(i) for i in range(made.num_samples)]
    assert len(theirs) == len(ours) == 12
    for a, b in zip(theirs, ours, strict=True):
        members = set(b) - {"__key__", "__url__", "__label__"}
        assert a["__key__"] == b["__key__"] and members == {k for k in a if not k.startswith("__")}
        assert {m: a[m] for m in members} == {m: b[m] for m in members}


def test_bytes_depend_only_on_the_samples(made, tmp_path):
    again = make_set(tmp_path / "elsewhere")
    for file in sorted(os.listdir(made.root)):
        assert (made.root / file).read_bytes() == (again.root / file).read_bytes(), file
    with tarfile.open(made.root / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_files_stay_open_within_the_bound_and_close(made):
    def open_files():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))

    with ShardReader(made, max_open=2) as reader:
        for i in [0, 5, 11, 0, 5, 11]:
            assert reader.read(i)["__key__"] == f"sample_{i}"
            assert open_files() <= 2
        assert open_files() == 2
    assert open_files() == 0


def test_keys_with_dots_are_refused(tmp_path):
    with pytest.raises(ValueError, match="first dot"):
        write_shard(tmp_path / "x.tar", [("a.b", 0, {"cls": b"0"})])


def test_a_folder_without_manifest_is_an_error_that_names_the_command_to_make_one(made, tmp_path):
    with pytest.raises(
        UserError,
        match=r"no folder of shards at .*nowhere\. \S* has train\. Make one with `python tools/make_shards.py",
    ):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no manifest.json.*make_shards.py"):
        load_manifest(tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds several. Give one of them: .*/train"):
        load_manifest(tmp_path)
    (made.root / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds tars but no manifest.json.*run the same.*index_shards.py"):
        load_manifest(made.root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as a manifest"),
        (lambda text: "[]", "cannot be read as a manifest"),
        (lambda text: json.dumps({**json.loads(text), "format": "other"}), "cannot be read as a manifest"),
        (
            lambda text: json.dumps({**json.loads(text), "version": 3}),
            "version 3 of the manifest, and this program reads",
        ),
        (lambda text: json.dumps({**json.loads(text), "shards": [{"name": "x"}]}), "is damaged"),
        (
            lambda text: json.dumps({**json.loads(text), "class_counts": [1, 1, 1]}),
            "histogram and sample count disagree",
        ),
        (lambda text: json.dumps({**json.loads(text), "shards": []}), "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(made, damage, message):
    path = made.root / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_manifest(made.root)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_truncated_shards_are_named_at_loading(made):
    tar = made.root / "train-000002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(
        UserError, match=rf"train-000002.tar has {len(whole) - 512} bytes, and {len(whole)} in the manifest"
    ):
        load_manifest(made.root)
    tar.unlink()
    with pytest.raises(UserError, match="train-000002.tar of the manifest cannot be found"):
        load_manifest(made.root)
    tar.write_bytes(whole)
    shard_index.index_path(tar).unlink()
    with pytest.raises(UserError, match="has no index train-000002.index.safetensors"):
        load_manifest(made.root)


def test_a_flipped_bit_is_found_when_its_sample_is_read(made):
    tar = made.root / "train-000003.tar"
    data = bytearray(tar.read_bytes())
    data[shard_index.load_index(tar).offset[3] + 5] ^= 1  # second sample's first member
    tar.write_bytes(data)
    with ShardReader(load_manifest(made.root)) as reader:
        assert reader.read(7)["__key__"] == "sample_7"
        with pytest.raises(SampleError, match=r"Sample sample_8 of shard .*train-000003.tar .*checksum differs") as e:
            reader.read(8)
        assert (e.value.key, e.value.shard) == ("sample_8", str(tar))


def test_an_index_of_other_contents_is_refused(made, tmp_path):
    make_set(tmp_path / "other", counts=(4, 0, 3, 6))
    shutil.copy(tmp_path / "other" / "train-000003.index.safetensors", made.root)
    with ShardReader(load_manifest(made.root)) as reader, pytest.raises(UserError, match="two conversions were mixed"):
        reader.read(11)
    (made.root / "train-000003.index.safetensors").write_bytes(b"PK nonsense")
    with ShardReader(load_manifest(made.root)) as reader, pytest.raises(UserError, match="index .* cannot be read"):
        reader.read(11)


def test_a_failed_shard_leaves_nothing_under_its_name(tmp_path):
    def samples():
        yield "a", 0, {"jpg": b"x", "cls": b"0"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "train-000000.tar", samples())
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_a_set_behind_a_url_reads_as_its_folder_and_a_damaged_copy_is_downloaded_again(made, tmp_path):
    from cfmask.data.remote import Cache

    cache = Cache(tmp_path / "cache", 10**6)
    there = load_manifest(f"pipe:cat {made.root}/{{}}", cache=cache)
    assert there.digest == made.digest and there.num_samples == 12
    with ShardReader(there) as remote, ShardReader(made) as local:
        for i in range(12):
            ours, theirs = remote.read(i), local.read(i)
            assert ours.pop("__url__").startswith("pipe:cat") and theirs.pop("__url__")
            assert ours == theirs
    [copy] = (tmp_path / "cache").glob("train-000003.tar.*")
    data = bytearray(copy.read_bytes())
    data[shard_index.load_index(made.root / "train-000003.tar").offset[3] + 5] ^= 1
    copy.write_bytes(data)
    with ShardReader(there) as remote:
        assert remote.read(8)["__key__"] == "sample_8"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("the source has changed")])
def test_a_shard_that_cannot_be_finished_leaves_nothing(tmp_path, error):
    """On a full disk, for example."""

    def samples():
        yield "a", 0, {"jpg": b"image" * 10**6}
        raise error

    with pytest.raises(type(error)):
        write_shard(tmp_path / "train-000000.tar", samples())
    assert not list(tmp_path.iterdir())
