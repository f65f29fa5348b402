"""CLIP-benchmark's WebDataset copies have the labels of the same sets converted from their originals."""

import json
from pathlib import Path

import pytest

from cfmask.convert import clip_benchmark
from cfmask.data import benchmarks, imagenet
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError
from test_benchmarks import FOLDERS, IDS, WNIDS, bordered, convert, mapping_files, objectnet_files, picture, write_tree
from test_index_shards import write_tar
from tools import index_shards

NAMES = imagenet.class_names()


def names_of(name: str) -> list[str]:
    return [NAMES[WNIDS.index(wnid)] for wnid in benchmarks.wnids(name)]


def write_copy(root: Path, names: list[str], images: list[tuple[bytes, int]], extension: str = "jpg") -> Path:
    """Write a copy in the layout of clip_benchmark's webdataset_builder, in two tars; returns their folder."""
    for number in range(2):
        files = []
        for n, (image, label) in list(enumerate(images))[number::2]:
            files += [(f"s{n:07d}.cls", b"%d" % label), (f"s{n:07d}.{extension}", image)]
        write_tar(root / "test" / f"{number}.tar", files)
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root / "test"


def index(folder: Path, *flags: object) -> int:
    return index_shards.main([str(folder), "--workers", "1", *map(str, flags)])


def contents(where: Path) -> dict[bytes, int]:
    """Labels by image."""
    manifest = load_manifest(where)
    found = {}
    with ShardReader(manifest) as reader:
        for i in range(manifest.num_samples):
            sample = reader.read(i)
            [image] = [bytes(sample[name]) for name in ("jpg", "png") if name in sample]
            found[image] = sample["__label__"]
    return found


def assert_same(copy: Path, original: Path) -> None:
    assert contents(copy) == contents(original)
    a, b = load_manifest(copy), load_manifest(original)
    for name in ("split", "classes", "class_counts", "accepted", "border", "store"):
        assert getattr(a, name) == getattr(b, name), name
    assert benchmarks.right_ids(a) == benchmarks.right_ids(b)
    assert benchmarks.deviations_of(a) == benchmarks.deviations_of(b)


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a", "imagenet-sketch", "imagenet-v2"])
def test_a_copy_has_the_labels_of_its_original(tmp_path, capsys, name):
    wnids = benchmarks.wnids(name)
    some = list(range(0, len(wnids), len(wnids) // 9))
    files = {f"{wnids[i]}/{n}.jpg": picture(10 * i + n, side=8) for i in some for n in range(2)}
    assert convert(name, write_tree(tmp_path / "tree", files), tmp_path / "original") == 0
    images = [(data, wnids.index(path.split("/")[0])) for path, data in files.items()]
    folder = write_copy(tmp_path / "wds", names_of(name), images)
    link = tmp_path / name  # the name of the set for evaluation
    link.symlink_to(folder)
    assert index(link) == 2, "it is no whole copy"
    assert f"{len(files)} images instead of" in capsys.readouterr().err
    assert index(link, "--allow-count-mismatch") == 0
    assert_same(link, tmp_path / "original" / name)


def test_objectnets_copy_has_the_labels_accepted_ids_and_border_of_its_original(tmp_path, capsys):
    files = objectnet_files()
    files |= {path: bordered(n) for n, path in enumerate(files) if path.endswith(".png")}  # all different
    assert convert("objectnet", write_tree(tmp_path / "tree", files), tmp_path / "original") == 0
    folders = sorted(IDS)
    images = [
        (data, folders.index(path.split("/")[-2])) for path, data in files.items() if path.split("/")[-2] in folders
    ]
    folder = write_copy(tmp_path / "wds", [FOLDERS[name].lower() for name in folders], images, "png")
    flags = ("--split", "objectnet", "--allow-count-mismatch")
    assert index(folder, *flags) == 2
    assert "has 4 of 4 class names that are not open_clip" in capsys.readouterr().err
    mappings = write_tree(tmp_path / "mappings", mapping_files())
    assert index(folder, *flags, "--mappings", mappings) == 0
    assert_same(folder, tmp_path / "original" / "objectnet")
    assert load_manifest(folder).border == 2
    # All classes of ObjectNet, including those that ImageNet lacks.
    (tmp_path / "wds/classnames.txt").write_text("".join(f"{FOLDERS[name].lower()}\n" for name in sorted(FOLDERS)))
    assert index(folder, *flags, "--mappings", mappings) == 2
    assert f"The {len(FOLDERS)} classes are all of ObjectNet's" in capsys.readouterr().err
    # A copy without a border is not cut again.
    bare = [(picture(n, side=20), label) for n, (_, label) in enumerate(images)]
    folder = write_copy(tmp_path / "bare", [FOLDERS[name].lower() for name in folders], bare)
    assert index(folder, *flags, "--mappings", mappings) == 0
    assert load_manifest(folder).border == 0
    mixed = write_copy(tmp_path / "mixed", [FOLDERS[name].lower() for name in folders], bare[:4] + images[4:])
    assert index(mixed, *flags, "--mappings", mappings) == 2
    assert "have ObjectNet's red frame: two kinds" in capsys.readouterr().err


def test_a_copy_needs_the_name_of_its_benchmark(tmp_path, capsys):
    folder = write_copy(tmp_path / "wds", names_of("imagenet-a"), [(picture(n, side=8), n) for n in range(4)])
    assert index(folder, "--allow-count-mismatch") == 2
    message = capsys.readouterr().err
    assert "are imagenet-a's" in message and "--split imagenet-a" in message
    assert index(folder, "--split", "imagenet-r", "--allow-count-mismatch") == 2
    assert not (folder / "manifest.json").exists()
    # The labels are not ImageNet's class ids under any flag.
    assert index(folder, "--split", "imagenet-a", "--allow-count-mismatch", "--classes", "imagenet") == 0
    labels = [WNIDS.index(wnid) for wnid in benchmarks.wnids("imagenet-a")[:4]]
    assert sorted(contents(folder).values()) == labels


def test_missing_files_are_named(tmp_path, capsys):
    folder = write_copy(tmp_path / "wds", names_of("imagenet-a"), [(picture(n, side=8), n) for n in range(4)])
    for count, message in (
        ("3", "says that there are 3 tars, 0.tar to 2.tar. Missing: 2.tar"),
        ("1", "Surplus: 1.tar"),
        ("two", "contains 'two' instead of a number"),
    ):
        (folder / "nshards.txt").write_text(count)
        assert index(folder) == 2 and message in capsys.readouterr().err
    (folder / "nshards.txt").write_text("2")
    (folder / "0.tar").rename(tmp_path / "0.tar")
    (folder / "nshards.txt").unlink()
    assert index(folder) == 2 and "but not 0.tar: the copy is not complete" in capsys.readouterr().err
    (tmp_path / "0.tar").rename(folder / "0.tar")
    (folder / "nshards.txt").write_text("2")
    (tmp_path / "wds/classnames.txt").unlink()
    assert index(folder) == 2
    assert "there is no classnames.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (list(NAMES), list(range(1000))),
        ([lemmas[0] for lemmas in imagenet.lemmas()], list(range(1000))),  # crane, maillot: resolved by their places
        ([NAMES[5], "missile", NAMES[700]], [5, 657, 700]),
        ([NAMES[700], "missile", NAMES[800]], [700, 744, 800]),
        (["missile", "missile"], [657, 744]),
        ([NAMES[9], NAMES[3]], [9, 3]),
        ([NAMES[5], "missile", NAMES[800]], "'missile', which two classes"),
        ([NAMES[800], "missile"], "'missile', which two classes"),
        ([NAMES[5], "crane"], "has 1 of 2 class names that are not .* such as 'crane'"),
        ([NAMES[5], NAMES[5]], "names a class twice"),
        (["airplane", "automobile"], "has 2 of 2 class names that are not"),
        (sorted(NAMES), "which two classes"),
        ([f"thing {n}" for n in range(113)], "If they are ObjectNet's, its mapping files .*--mappings"),
        ([*NAMES[1:], NAMES[0]], None),
        ([NAMES[5], "", NAMES[6]], "line 2: there is no class name"),
    ],
)
def test_class_names_are_mapped_or_refused(tmp_path, names, ids):
    (tmp_path / "classnames.txt").write_text("\n".join(names))

    def found():
        mapping = clip_benchmark.find_mapping(tmp_path, [tmp_path / "0.tar"], None)
        assert mapping is not None
        return [i for (i,) in mapping.ids]

    if isinstance(ids, str):
        with pytest.raises(UserError, match=ids):
            found()
    elif ids is None:
        # Another order of all classes: names are mapped, except for those of two classes.
        with pytest.raises(UserError, match="which two classes"):
            found()
    else:
        assert found() == ids


def test_a_given_class_list_overrides_the_sets_own(tmp_path):
    folder = write_copy(tmp_path / "wds", ["airplane", "bird"], [(picture(n, side=8), n % 2) for n in range(4)])
    names = tmp_path / "names.tsv"
    names.write_text("plane\tplane\nbird\tbird\n")
    assert index(folder, "--classes", names) == 0
    assert load_manifest(folder).class_counts == (2, 2)
    assert json.loads((folder / "manifest.json").read_text())["classes"][0] == ["plane", "plane"]
