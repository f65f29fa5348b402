"""Labels in keys, in a .cls and in a field of a .json; ambiguous ones are refused."""

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from cfmask.convert.labels import class_id_in, class_id_of, json_object, label_of_key
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from test_index_shards import CLASSES, jpeg, write_tar
from tools import index_shards, verify_shards

IDS = {name: n for n, name in enumerate(["Faces", "Faces_easy", "cat", "cat_1", "1", "10", "owl"])}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("Faces_0001", "Faces"),
        ("Faces_easy_0001", "Faces_easy"),
        ("x/Faces_easy/0001", "Faces_easy"),
        ("Faces_easy/Faces_easy_0001", "Faces_easy"),
        ("Faces/1234_0", "Faces"),
        ("owl", "owl"),
        ("cat_1_7", "cat_1"),
        ("10_3", "10"),
        ("1_3", "1"),
        # Ambiguous, or no class.
        ("Faces/Faces_easy_0001", None),
        ("Faces_easy/Faces_0001", None),
        ("Faces_easy-0001", None),
        ("Faces_easy0001", None),
        ("Faces_easy (2)", None),
        ("cat_1", None),
        ("100_3", None),
        ("Facesx_1", None),
        ("faces_1", None),
        ("Faces-1", None),
        ("_Faces_1", None),
    ],
)
def test_a_key_has_the_longest_class_that_it_begins_with(key, name):
    assert label_of_key(key, IDS) == (None if name is None else IDS[name])


@pytest.mark.parametrize(
    "data", [b"", b"1e3", b"NaN", b"-1", "０１".encode(), "٣".encode(), b"9" * 5000, b"3.0", b"true"]
)
@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: b"\xef\xbb\xbf" + data])
def test_a_cls_is_decimal_digits_and_nothing_else(data, wrap):
    assert class_id_of(wrap(data)) is None
    assert class_id_of(b" 12\n") == 12 and class_id_of(b"\xef\xbb\xbf12") is None


@pytest.mark.parametrize(
    ("text", "label"),
    [("3", 3), ("3.0", 3), ("1e3", 1000), ("0", 0)]
    + [(text, None) for text in ("-1", "3.5", "NaN", "Infinity", "1e400", "true", "null", '"3"', "[3]", '{"a": 3}')]
    + [(text, None) for text in ("1000000000", "1" * 400, "-0.5")],
)
def test_a_json_field_is_a_whole_number(text, label):
    assert class_id_in(json.loads(text)) == label


@pytest.mark.parametrize("data", [b"", b"\xff", b"[1]", b"{", b'{"label": ' + b"1" * 5000 + b"}", b'{"a":' * 100_000])
def test_data_other_than_json_objects_has_no_fields(data):
    assert json_object(data) is None
    assert json_object(b"\xef\xbb\xbf" + b'{"label": 1}') == {"label": 1}


@pytest.fixture
def index(tmp_path, capsys):
    names = tmp_path / "names.tsv"
    names.write_text(CLASSES)

    def run(*flags):
        command = [tmp_path / "train", "--classes", names, "--workers", "1", *flags]
        return index_shards.main(list(map(str, command))), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("extension", "data", "message"),
    [
        ("cls", b"1" * 30, "not a number in decimal digits"),
        ("cls", b"-1", "its .cls is b'-1', not a number"),
        ("json", b'{"label": 99999999999}', "'label' is 99999999999, not a class id"),
        ("json", b'{"label": NaN}', "'label' is nan, not a class id"),
        ("json", b'{"label": ' + b"1" * 5000 + b"}", "its .json is not a JSON object: b'"),
        ("json", b"[" * 100_000, "its .json is not a JSON object"),
    ],
)
def test_invalid_labels_are_refused_with_the_sample_and_the_reason(tmp_path, index, extension, data, message):
    write_tar(tmp_path / "train/0.tar", [("a.jpg", jpeg(0)), (f"a.{extension}", data)])
    flags = ("--label-field", "label") if extension == "json" else ()
    status, _, errors = index(*flags)
    assert status == 2 and "Sample a of" in errors and message in errors and "Traceback" not in errors


def test_labels_written_as_floats_are_whole_numbers(tmp_path, index):
    files = [file for n in range(3) for file in ((f"{n}.jpg", jpeg(n)), (f"{n}.json", b'{"label": %d.0}' % n))]
    write_tar(tmp_path / "train/0.tar", files)
    assert index()[0] == 0
    manifest = load_manifest(tmp_path / "train")
    with ShardReader(manifest) as reader:
        assert [reader.read(i)["__label__"] for i in range(3)] == [0, 1, 2]
    assert verify_shards.main([str(tmp_path / "train"), "--full", "--workers", "1"]) == 0


def listed(tmp_path: Path) -> dict[str, str]:
    lines = (tmp_path / "train/bad_samples.jsonl").read_text().splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def test_images_that_are_links_or_have_invalid_names_are_listed(tmp_path, index):
    tar = write_tar(tmp_path / "train/0.tar", [(f"{n}.{kind}", data) for n in range(2) for kind, data in pair(n)])
    with tarfile.open(tar, "a") as archive:
        for name, kind in (("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.SYMTYPE), ("0.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            archive.addfile(info)
        for name, data in (
            ("2.cls", b"1"),
            ("b.c.jpg", jpeg(5)),
            ("b.cls", b"1"),
            ("1.v2.jpg", jpeg(6)),
            ("1.seg.png", b"mask"),
            ("d.my photo.jpg", jpeg(7)),
            ("._0.jpg", b"macOS"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    status, output, errors = index()
    assert status == 0, errors
    found = listed(tmp_path)
    assert set(found) == {"2", "3.jpg", "b", "1.v2.jpg", "d.my photo.jpg"}
    assert found["2"] == "2.jpg is a hard link to 0.jpg, which readers skip"
    assert found["3.jpg"] == "a symbolic link to 0.jpg, which readers skip"
    assert (
        "b.c.jpg cannot be the image of a sample" in found["b"]
        and "1.v2.jpg cannot be the image of a sample" in found["1.v2.jpg"]
    )
    assert "white space" in found["d.my photo.jpg"]
    assert "5 samples have no image and are left out" in output and "1 samples have several images" in output
    assert load_manifest(tmp_path / "train").bad_samples == 5
    for flags in ((), ("--full",)):
        assert verify_shards.main([str(tmp_path / "train"), "--workers", "1", *flags]) == 0


def pair(number):
    return [("jpg", jpeg(number)), ("cls", b"%d" % number)]


def test_a_label_that_is_a_link_is_named(tmp_path, index):
    tar = write_tar(tmp_path / "train/0.tar", [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1))])
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("1.cls")
        info.type, info.linkname = tarfile.LNKTYPE, "0.cls"
        archive.addfile(info)
    status, _, errors = index()
    assert status == 2 and "1.cls is a hard link to 0.cls" in errors


def test_names_with_several_dots_are_explained(tmp_path, index):
    write_tar(tmp_path / "train/0.tar", [(f"cat_{n}.{kind}.{kind}", b"x") for n in range(2) for kind in ("jpg", "cls")])
    status, _, errors = index()
    assert status == 2 and "No sample of" in errors and "a key ends at the first dot" in errors


def test_sparse_members_are_listed(tmp_path, index):
    (tmp_path / "owl_1.jpg").write_bytes(b"")
    with open(tmp_path / "owl_1.jpg", "r+b") as file:
        file.truncate(1 << 20)
    (tmp_path / "cat_1.jpg").write_bytes(jpeg(0))
    (tmp_path / "train").mkdir()
    command = ["tar", "--sparse", "-cf", tmp_path / "train/0.tar", "-C", tmp_path, "owl_1.jpg", "cat_1.jpg"]
    subprocess.run(command, check=True)
    assert index()[0] == 0
    assert "sparse file" in listed(tmp_path)["owl_1.jpg"]
    assert load_manifest(tmp_path / "train").num_samples == 1


def test_file_formats_are_recognized_by_their_first_bytes(tmp_path, index):
    write_tar(tmp_path / "train/0.tar", [(f"0.{kind}", data) for kind, data in pair(0)])
    whole = (tmp_path / "train/0.tar").read_bytes()
    (tmp_path / "train/0.tar.md5").write_text("d41d8cd98f00b204e9800998ecf8427e")
    assert index()[0] == 0, "a checksum beside a tar is no compressed tar"
    for name, data, message in (
        ("1.tar.part", whole, "1.tar.part is a tar by its content but not by its name"),
        ("1.tar.gz", gzip.compress(whole), "1.tar.gz is compressed (gzip)"),
        ("1.tar", gzip.compress(whole), "1.tar is compressed (gzip) by its content"),
        ("1.tar", b"\x28\xb5\x2f\xfd" + bytes(600), "1.tar is compressed (zstd) by its content"),
        ("1.tar", b"PK\x03\x04" + bytes(600), "an archive of another kind (zip)"),
        ("1.tar", b"<html>Not found</html>", "1.tar is not a tar: it begins with the text '<html>"),
        ("1.tar", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("1.tar", b"", "1.tar is an empty file"),
        ("1.tar", whole + bytes(2 << 20) + whole, "tars were joined by `cat`"),
        ("1.tar", whole + b"x" * 512, "after its end-of-archive mark: it was overwritten"),
    ):
        (tmp_path / "train" / name).write_bytes(data)
        status, _, errors = index()
        assert status == 2 and message in errors, errors
        (tmp_path / "train" / name).unlink()
    for link in ("nowhere", "1.tar"):  # dangling, and a loop
        (tmp_path / "train/1.tar").symlink_to(link)
        status, _, errors = index()
        assert status == 2 and "1.tar is a link to a file that does not exist" in errors
        (tmp_path / "train/1.tar").unlink()


def test_a_truncated_image_of_an_indexed_set_has_the_remedy_of_an_indexed_set(tmp_path, index):
    from cfmask.data.stream import eval_batches
    from cfmask.errors import UserError

    files = [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1)[:300]), ("1.cls", b"1")]
    write_tar(tmp_path / "train/0.tar", files)
    assert index()[0] == 0
    manifest = load_manifest(tmp_path / "train")
    with pytest.raises(UserError, match="Indexing reads no images. Copy the shard again") as error:
        list(eval_batches(manifest, image_size=8, batch_size=2, rank=0, world_size=1, loader_workers=0))
    assert "convert the set again" not in str(error.value) and "checksum is right" not in str(error.value)


def test_a_key_that_begins_with_another_spelling_of_a_longer_class_is_refused(tmp_path, index):
    (tmp_path / "names.tsv").write_text("Faces\tfaces\nFaces easy\teasy\nhot dog\tdog\n")
    for n, (key, label) in enumerate(
        [("Faces_0001", 0), ("Faces easy_0001", 1), ("Faces_easy_0001", None), ("Faces_Easy-1", None)]
        + [("Faces/Faces_easy_0001", 0), ("hot dog_1", 2)]
    ):
        write_tar(tmp_path / "train/0.tar", [(f"{key}.jpg", jpeg(n))])
        status, _, errors = index("--label-from", "key")
        if label is None:
            assert status == 2 and "does not begin with exactly one class" in errors
        else:
            assert status == 0 and load_manifest(tmp_path / "train").class_counts[label] == 1


def test_keys_that_all_begin_with_one_class_are_no_evidence(tmp_path, index):
    files = [f for n in range(4) for f in ((f"owl_{n}.jpg", jpeg(n)), (f"owl_{n}.cls", b"%d" % n))]
    write_tar(tmp_path / "train/0.tar", files)
    status, output, _ = index()
    assert status == 0 and "keys begin" not in output


def sample(number):
    return [(f"{number}.{extension}", data) for extension, data in pair(number)]


def test_a_sample_of_links_counts_once_and_invalid_ends_of_names_are_listed(tmp_path, index):
    tar = write_tar(tmp_path / "train/0.tar", [*sample(0), ("b.jpg ", b"x"), ("c.jpg ", b"x"), ("c.cls", b"1")])
    with tarfile.open(tar, "a") as archive:
        for name in ("a.jpg", "a.cls", "a.json"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, "0.jpg"
            archive.addfile(info)
    assert index()[0] == 0
    found = listed(tmp_path)
    assert set(found) == {"a.jpg", "b.jpg ", "c"}
    assert "hard link" in found["a.jpg"] and "white space" in found["b.jpg "] and "white space" in found["c"]


def test_labels_that_contradict_the_keys_are_refused(tmp_path, index):
    names = ("cat", "dog", "owl", "eel")
    files = [f for n in range(3) for f in ((f"{names[n]}_1.jpg", jpeg(n)), (f"{names[n]}_1.cls", b"%d" % (n + 1)))]
    write_tar(tmp_path / "train/0.tar", files)
    status, _, errors = index()
    assert status == 2 and "3 of 3 keys begin with the name of another class" in errors and "count from 1" in errors
    status, output, _ = index("--label-from", "cls")
    assert status == 0 and "note: 3 of 3 keys" in output
    assert index("--label-from", "key")[0] == 0


def test_duplicate_and_missing_tars_are_reported(tmp_path, index):
    for n in (0, 1, 3):
        write_tar(tmp_path / f"train/{n:03d}.tar", sample(n))
    assert "has numbered tars, but not 002.tar" in index()[1]
    (tmp_path / "train/000 (1).tar").write_bytes((tmp_path / "train/000.tar").read_bytes())
    assert "have the same content" in index()[2]
    (tmp_path / "train/000 (1).tar").rename(tmp_path / "train/004.TAR")
    assert "is a tar by its content but not by its name" in index()[2]
    (tmp_path / "train/004.TAR").unlink()
    for n, total in ((0, 3), (1, 3), (3, 5)):
        (tmp_path / f"train/{n:03d}.tar").rename(tmp_path / f"train/{n:03d}-of-{total:03d}.tar")
    assert "shards of several sets" in index()[2]
    (tmp_path / "train/003-of-005.tar").unlink()
    assert "has numbered tars, but not 002-of-003.tar" in index()[1]
