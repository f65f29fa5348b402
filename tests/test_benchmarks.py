"""The shifted sets: labels from folder names, subsets, ObjectNet's mapping, and counts that are checked first."""

import json
from collections import Counter

import pytest
import torch

from cfmask.data import benchmarks, imagenet, images
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from test_make_shards import convert, picture, pixels_of, refused, write_tar, write_tree
from tools import make_shards

WNIDS = imagenet.wnids()


def labels_of(folder):
    """{original name: label}"""
    manifest = load_manifest(folder)
    with ShardReader(manifest) as reader:
        samples = [reader.read(i) for i in range(manifest.num_samples)]
    facts = [json.loads(sample["json"]) for sample in samples]
    assert all(manifest.classes[f["class"]][0] == f["wnid"] for f in facts)
    return {f["name"]: sample["__label__"] for f, sample in zip(facts, samples, strict=True)}


# --- known sets ---------------------------------------------------------------------------------------------------


def test_the_known_sets_are_those_of_the_paper():
    known = {name: (b.images, b.classes, b.class_ids) for name, b in benchmarks.BENCHMARKS.items()}
    assert known == {
        "train": (1_281_167, 1000, 1000),
        "val": (50_000, 1000, 1000),
        "imagenet-v2": (10_000, 1000, 1000),
        "imagenet-r": (30_000, 200, 200),
        "imagenet-sketch": (50_889, 1000, 1000),
        "objectnet": (18_574, 113, 125),
        "imagenet-a": (7_500, 200, 200),
    }
    r, a = (set(benchmarks.wnids(name)) for name in ("imagenet-r", "imagenet-a"))
    assert len(r) == len(a) == 200 and len(r & a) == 86 and r | a < set(WNIDS)
    assert benchmarks.wnids("imagenet-sketch") == WNIDS


def test_a_complete_copy_has_no_deviations():
    images_of = {wnid: 30 for wnid in benchmarks.wnids("imagenet-a")}
    whole = {wnid: 37 + (i < 100) for i, wnid in enumerate(images_of)}
    assert benchmarks.IMAGENET_A.deviations(whole, 200) == []
    assert benchmarks.IMAGENET_A.deviations(images_of, 200) == ["6,000 images instead of 7,500"]
    whole[WNIDS[0]] = whole.pop(next(iter(whole)))
    assert benchmarks.IMAGENET_A.deviations({**whole, "empty": 0}, 199) == ["199 ImageNet class ids instead of 200"]


# --- folders and labels ---------------------------------------------------------------------------------------------


def test_folders_of_imagenet_v2_are_read_as_numbers(tmp_path):
    data = picture(0, side=8)
    numbers = {f"imagenetv2-matched-frequency-format-val/{n}/{n:03d}a.jpeg": data for n in range(1000)}
    source = write_tar(tmp_path / "v2.tar", numbers)
    assert convert("imagenet-v2", source, tmp_path / "numbers") == 0
    folder = tmp_path / "numbers" / "imagenet-v2"
    assert labels_of(folder) == {f"{n}/{n:03d}a.jpeg": n for n in range(1000)}
    as_strings = sorted(str(n) for n in range(1000))
    assert sum(as_strings[n] != str(n) for n in range(1000)) == 988, (
        "sorted as strings, nearly all labels would be wrong"
    )
    manifest = load_manifest(folder)
    assert manifest.classes == imagenet.classes() and manifest.class_counts == (1,) * 1000

    wnids = {f"v2/{WNIDS[n]}/{n:03d}a.jpeg": data for n in range(0, 1000, 7)}
    assert convert("imagenet-v2", write_tree(tmp_path / "tree", wnids), tmp_path / "wnids") == 0
    found = labels_of(tmp_path / "wnids" / "imagenet-v2")
    assert found == {f"{WNIDS[n]}/{n:03d}a.jpeg": n for n in range(0, 1000, 7)}


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a", "imagenet-sketch"])
def test_sets_of_wnids_have_the_labels_of_imagenet(name, tmp_path, capsys):
    some = benchmarks.wnids(name)[::23]
    files = {f"{name}/{wnid}/art_{i}.jpg": picture(i, side=8) for wnid in some for i in range(2)}
    source = write_tree(tmp_path / "tree", {**files, f"{name}/README.txt": b"read"})
    assert convert(name, source, tmp_path / "out") == 0
    manifest = load_manifest(tmp_path / "out" / name)
    assert labels_of(manifest.root) == {f"{w}/art_{i}.jpg": WNIDS.index(w) for w in some for i in range(2)}
    assert [WNIDS[c] for c, n in enumerate(manifest.class_counts) if n] == list(some)
    assert manifest.num_classes == 1000 and manifest.border == 0 and not manifest.accepted

    stranger = "n00000001" if name == "imagenet-sketch" else next(w for w in WNIDS if w not in benchmarks.wnids(name))
    write_tree(tmp_path / "tree", {f"{name}/{stranger}/1.jpg": picture(0, side=8)})
    message = refused(capsys, name, tmp_path / "tree", tmp_path / "other")
    assert f"lies in {stranger!r}" in message and f"wnids of {name}" in message


def test_counts_are_checked_before_anything_is_written(tmp_path, capsys):
    source = write_tree(tmp_path / "a", {f"{w}/1.jpg": picture(1) for w in benchmarks.wnids("imagenet-a")[:3]})
    command = ["imagenet-a", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert make_shards.main(command) == 2
    message = capsys.readouterr().err
    assert "3 images instead of 7,500; 3 classes with images instead of 200" in message
    assert "--allow-count-mismatch" in message and not (tmp_path / "out").exists()
    assert make_shards.main([*command, "--allow-count-mismatch"]) == 0
    made = load_manifest(tmp_path / "out" / "imagenet-a").made
    assert made["count_mismatch"][0] == "3 images instead of 7,500"


def test_a_complete_set_is_accepted_without_a_flag(tmp_path, monkeypatch):
    known = benchmarks.BENCHMARKS | {"imagenet-a": benchmarks.Benchmark("imagenet-a", 6, 3, 3)}
    monkeypatch.setattr(benchmarks, "BENCHMARKS", known)
    wnids = benchmarks.wnids("imagenet-a")[:3]
    source = write_tree(tmp_path / "a", {f"{w}/{i}.jpg": picture(i) for w in wnids for i in range(2)})
    assert make_shards.main(["imagenet-a", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "count_mismatch" not in load_manifest(tmp_path / "out" / "imagenet-a").made


# --- ObjectNet ------------------------------------------------------------------------------------------------------

FOLDERS = {"alarm_clock": "Alarm clock", "pen": "Pen", "mug": "Mug", "dress_shoe_men": "Dress shoe (men)", "jar": "Jar"}
OBJECTS = {
    "Alarm clock": "digital clock; analog clock",
    "Pen": "ballpoint, ballpoint pen, ballpen, Biro; quill, quill pen; fountain pen",
    "Mug": "coffee mug",
    "Dress shoe (men)": "Loafer",
}
IDS = {"alarm_clock": (409, 530), "pen": (418, 563, 749), "mug": (504,), "dress_shoe_men": (630,)}


def mapping_files():
    """The four files of the archive, with five of 313 folders. Class texts are WordNet's, from timm. As in the devkit,
    their lines are not in the order of class ids."""
    info = imagenet._package_folder("timm") / "data" / "_info"
    lemma = dict(line.split("\t") for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    numbers = {class_id: (class_id * 7 + 355) % 1000 for class_id in range(1000)}
    lines = [""] * 1000
    for class_id, number in numbers.items():
        lines[number] = lemma[WNIDS[class_id]]
    return {
        "folder_to_objectnet_label.json": json.dumps(FOLDERS).encode(),
        "objectnet_to_imagenet_1k.json": json.dumps(OBJECTS).encode(),
        "pytorch_to_imagenet_2012_id.json": json.dumps(numbers).encode(),
        "imagenet_to_label_2012_v2": ("\n".join(lines) + "\n").encode(),
    }


def objectnet_files(top="objectnet-1.0/"):
    """Grey images with a red border of two pixels."""
    files = {f"{top}mappings/{name}": data for name, data in mapping_files().items()}
    return files | {f"{top}images/{folder}/{i}.png": bordered(i) for folder in FOLDERS for i in range(3)}


def bordered(number):
    import io

    from PIL import Image

    image = Image.new("RGB", (60, 80), (255, 0, 0))
    image.paste(Image.open(io.BytesIO(picture(number, side=80))).resize((56, 76)), (2, 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_objectnet_is_labelled_by_its_mapping(tmp_path, capsys):
    files = objectnet_files()
    tree, tar = write_tree(tmp_path / "tree", files), write_tar(tmp_path / "objectnet.tar", files)
    sources = [tree, tar, tree / "objectnet-1.0", tree / "objectnet-1.0" / "images"]
    for n, source in enumerate(sources):
        assert convert("objectnet", source, tmp_path / str(n)) == 0
        assert (
            "Ignored (in a folder of ObjectNet that does not overlap with ImageNet): 3 files" in capsys.readouterr().out
        )
        manifest = load_manifest(tmp_path / str(n) / "objectnet")
        assert labels_of(manifest.root) == {f"{f}/{i}.png": ids[0] for f, ids in IDS.items() for i in range(3)}
        assert manifest.accepted == {409: (409, 530), 418: (418, 563, 749)}
        assert Counter(manifest.class_counts) == {0: 996, 3: 4}
        assert manifest.made["left_out_by_design"] == 3 and manifest.made["ignored"] == 0
        assert "12 images instead of 18,574" in manifest.made["count_mismatch"]
        assert "7 ImageNet class ids instead of 125" in manifest.made["count_mismatch"]


def test_objectnets_border_is_removed_from_crops_and_recorded_for_originals(tmp_path):
    tree = write_tree(tmp_path / "tree", objectnet_files())
    for store in images.STORES:
        assert convert("objectnet", tree, tmp_path / store, "--store", store) == 0
        assert load_manifest(tmp_path / store / "objectnet").border == (2 if store == images.ORIGINAL else 0)
    original, jpeg, raw = (pixels_of(tmp_path / store / "objectnet", 224) for store in images.STORES)
    for name, pixels in original.items():
        assert torch.equal(raw[name], pixels), name
        red = (pixels[0] > 200) & (pixels[1:].amax(0) < 50)
        assert red.float().mean() < 0.01, "no border is left"
        assert torch.equal(pixels, images.crop(images.decode(bordered(int(name[-5])))[:, 2:-2, 2:-2], 224))
    for store in ("original", "crop-raw"):
        assert convert("objectnet", tree, tmp_path / "plain" / store, "--store", store, "--border-removed") == 0
        manifest = load_manifest(tmp_path / "plain" / store / "objectnet")
        assert manifest.border == 0 and manifest.made["border_removed_before"] is True
    kept = pixels_of(tmp_path / "plain" / "crop-raw" / "objectnet", 224)
    assert torch.equal(kept["pen/0.png"], images.pixels(bordered(0), "png", 224))


def test_images_smaller_than_the_border_are_left_out(tmp_path):
    files = {**objectnet_files(), "objectnet-1.0/images/pen/tiny.png": picture(0, "PNG", side=4)}
    tree = write_tree(tmp_path / "tree", files)
    for store in images.STORES:
        assert convert("objectnet", tree, tmp_path / store, "--store", store) == 0
        assert load_manifest(tmp_path / store / "objectnet").bad_samples == 1
        line, jars = (tmp_path / store / "objectnet" / "bad_samples.jsonl").read_text().splitlines()
        assert '"objectnet-1.0/images/jar/**/*.png", "files": 3' in jars
        assert "nothing is left of its 9x4 pixels" in line


def test_an_objectnet_that_cannot_be_labelled_is_refused(tmp_path, capsys):
    files = objectnet_files()
    bare = write_tree(tmp_path / "bare", {name: data for name, data in files.items() if "images/" in name})
    message = refused(capsys, "objectnet", bare, tmp_path / "out")
    assert "folder_to_objectnet_label.json" in message and "--mappings" in message
    mappings = write_tree(tmp_path / "mappings", mapping_files())
    assert convert("objectnet", bare, tmp_path / "out", "--mappings", mappings) == 0

    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps({**OBJECTS, "Jar": "crane"}))
    message = refused(capsys, "objectnet", bare, tmp_path / "x", "--mappings", mappings)
    assert "contradict each other" in message and "'crane' is two classes" in message
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps({**OBJECTS, "Jar": "no class"}))
    assert "'no class'" in refused(capsys, "objectnet", bare, tmp_path / "x", "--mappings", mappings)
    (mappings / "objectnet_to_imagenet_1k.json").write_text("{")
    assert "contradict each other" in refused(capsys, "objectnet", bare, tmp_path / "x", "--mappings", mappings)
    write_tree(bare, {"objectnet-1.0/images/dog/1.png": bordered(0)})
    message = refused(capsys, "objectnet", write_tree(bare, mapping_files()), tmp_path / "x")
    assert "lies in 'dog', which is none of ObjectNet's 5 folders" in message
