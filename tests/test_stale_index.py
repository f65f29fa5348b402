"""A tar that changed after it was indexed is refused, even with its old size and times; a copied set is accepted."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from cfmask.convert.shard_writer import write_shard
from cfmask.data import shard_reader
from cfmask.data.shard_index import StaleIndex, stamp
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from test_index_shards import CLASSES, jpeg, write_tar
from test_verify_shards import commit
from tools import index_shards, verify_shards


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(shard_reader, "RETRY_S", ())


def write(tar: Path, labels: list[int], names: str = "{n}", kind: str = "cls") -> None:
    files = []
    for n, label in enumerate(labels):
        key = names.format(n=n, label=("cat", "dog", "owl", "eel")[label])
        files.append((f"{key}.jpg", jpeg(n)))
        if kind == "cls":
            files.append((f"{key}.cls", b"%d" % label))
        elif kind == "json":
            files.append((f"{key}.json", b'{"label": %d}' % label))
    write_tar(tar, files)


def index(folder: Path, *flags: str) -> None:
    (folder.parent / "names.tsv").write_text(CLASSES)
    command = [str(folder), "--classes", str(folder.parent / "names.tsv"), "--workers", "1", *flags]
    assert index_shards.main(command) == 0


def labels_of(where) -> list[int]:
    manifest = load_manifest(where)
    with ShardReader(manifest) as reader:
        images = [sample["__label__"] for sample in reader.read_images(range(manifest.num_samples))]
        assert images == [reader.read(i)["__label__"] for i in range(manifest.num_samples)]
        return images


def verify(folder: Path, *flags: str) -> int:
    return verify_shards.main([str(folder), "--workers", "1", *flags])


def refused(folder: Path) -> str:
    with ShardReader(load_manifest(folder)) as reader, pytest.raises(StaleIndex) as error:
        list(reader.read_images([0, 1, 2]))
    return str(error.value)


@pytest.mark.parametrize(
    ("style", "flags"),
    [
        ({}, ()),
        ({}, ("--checksums",)),
        ({"kind": "json"}, ()),
        ({"names": "{label}_{n}", "kind": ""}, ()),
        ({"names": "{label}/{n}", "kind": ""}, ("--checksums",)),
    ],
)
@pytest.mark.parametrize("times", ["new", "put back"])
def test_a_tar_of_another_program_that_got_other_labels_is_refused(tmp_path, capsys, style, flags, times):
    folder, tar = tmp_path / "train", tmp_path / "train/0.tar"
    write(tar, [0, 1, 2], **style)
    index(folder, *flags)
    assert labels_of(folder) == [0, 1, 2] and verify(folder) == 0
    before = tar.stat()
    write(tar, [1, 0, 3], **style)
    if times == "put back":
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tar.stat().st_size == before.st_size
    assert "was changed after it was indexed" in refused(folder)
    capsys.readouterr()
    assert verify(folder) == 1
    assert "0.tar: has other headers or labels than when it was indexed" in capsys.readouterr().out
    digest = load_manifest(folder).digest
    index(folder, *flags)
    assert labels_of(folder) == [1, 0, 3] and verify(folder) == 0
    assert load_manifest(folder).digest != digest, "results on the old labels are not those on the new ones"


@pytest.mark.parametrize("flags", [(), ("--checksums",)])
def test_a_copied_tar_is_accepted_and_a_changed_copy_is_refused(tmp_path, flags):
    folder, copy = tmp_path / "train", tmp_path / "copy"
    write(folder / "0.tar", [0, 1, 2])
    index(folder, *flags)
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert (copy / "0.tar").stat().st_mtime_ns != (folder / "0.tar").stat().st_mtime_ns
    os.chmod(folder / "0.tar", 0o600)
    for where in (folder, copy):
        assert labels_of(where) == [0, 1, 2] and verify(where) == 0 and verify(where, "--full") == 0
    index(copy, *flags)
    assert load_manifest(copy).digest == load_manifest(folder).digest
    write(copy / "0.tar", [2, 1, 2])
    assert "run tools/index_shards.py on the folder" in refused(copy)


def test_a_set_behind_a_url_is_compared_with_its_index_too(tmp_path):
    from cfmask.data.remote import Cache

    folder = tmp_path / "train"
    write(folder / "0.tar", [0, 1, 2])
    index(folder)

    def read(cache: str) -> list[int]:
        manifest = load_manifest(f"pipe:cat {folder}/{{}}", cache=Cache(tmp_path / cache, 10**6))
        with ShardReader(manifest) as reader:
            return [sample["__label__"] for sample in reader.read_images([0, 1, 2])]

    assert read("cache") == read("cache") == [0, 1, 2]
    write(folder / "0.tar", [1, 1, 2])
    with pytest.raises(StaleIndex):
        read("other cache")


def relabel(tar: Path, label: bytes) -> None:
    """Change the label of the second sample only."""
    with tarfile.open(tar) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for info, data in members:
            if info.name == "b.cls":
                data, info.size = label, len(label)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("label", [b"2", b"11"])
def test_a_shard_of_ours_that_got_another_label_is_refused(tmp_path, capsys, label):
    folder, tar = tmp_path / "train", tmp_path / "train/train-000000.tar"
    folder.mkdir()
    samples = [(key, n, {"jpg": jpeg(n), "cls": b"%d" % n, "json": b"{}"}) for n, key in enumerate("abc")]
    write_shard(tar, samples)
    commit(folder, [tar])
    assert labels_of(folder) == [0, 1, 2] and verify(folder) == 0
    size = tar.stat().st_size
    relabel(tar, label)
    assert tar.stat().st_size == size
    message = refused(folder)
    assert f"begins with {label.decode()[:1]} and differs from the index (sample b)" in message
    assert verify(folder) == 1


def test_a_changed_tar_ends_evaluation_and_is_no_bad_sample(tmp_path):
    from cfmask.data.stream import eval_batches

    folder = tmp_path / "train"
    write(folder / "0.tar", [0, 1, 2])
    index(folder)
    write(folder / "0.tar", [0, 1, 3])
    for workers in (0, 2):
        with pytest.raises(StaleIndex, match="was changed after it was indexed"):
            list(
                eval_batches(
                    load_manifest(folder), image_size=8, batch_size=3, rank=0, world_size=1, loader_workers=workers
                )
            )


def test_an_index_of_an_earlier_version_is_accepted_while_the_modification_time_agrees(tmp_path):
    from dataclasses import replace

    from cfmask.convert.shard_writer import shard_and_index
    from cfmask.data.shard_index import index_path, load_index, write_index
    from cfmask.data.shards import Manifest, write_manifest

    folder, tar = tmp_path / "train", tmp_path / "train/0.tar"
    write(tar, [0, 1, 2])
    index(folder)
    old = load_index(tar)
    write_index(
        index_path(tar), replace(old, about={k: v for k, v in old.about.items() if k not in ("frame", "ctime_ns")})
    )
    manifest: Manifest = replace(load_manifest(folder), shards=(shard_and_index(tar)[0],))
    write_manifest(manifest)
    assert labels_of(folder) == [0, 1, 2]
    assert verify(folder) == 1, "what cannot be known is said"
    os.utime(tar)
    assert "was changed after it was indexed" in refused(folder)
    index(folder)
    assert labels_of(folder) == [0, 1, 2] and verify(folder) == 0


def test_a_tar_that_is_changed_while_it_is_read_is_compared_again(tmp_path):
    """File systems' times are coarse: the times of a tar that was new when it was opened prove nothing."""
    folder = tmp_path / "set"
    write(folder / "0.tar", [0, 1])
    status = (folder / "0.tar").stat()
    assert stamp(status, now=status.st_ctime + 1)["ctime_ns"] == 0
    assert stamp(status, now=status.st_ctime + 3)["ctime_ns"] == status.st_ctime_ns
    index(folder)
    manifest = load_manifest(folder)
    with ShardReader(manifest, max_open=1) as reader:
        assert reader.read(1)["__label__"] == 1
        write(folder / "0.tar", [0, 2])
        os.utime(folder / "0.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
        reader.close()  # as if another shard had replaced it
        with pytest.raises(StaleIndex):
            reader.read(1)


def test_sizes_in_headers_may_be_written_as_other_programs_do(tmp_path):
    folder = tmp_path / "set"
    write(folder / "0.tar", [0, 1])
    data = bytearray((folder / "0.tar").read_bytes())
    at = data.index(b"0.cls\0")
    data[at + 124 : at + 136] = b"         1 \0"
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512]))
    (folder / "0.tar").write_bytes(data)
    index(folder, "--checksums")
    assert labels_of(folder) == [0, 1]
