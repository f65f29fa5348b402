"""Each kind of damage to a set of shards is found, by the mode that should find it; a good set passes."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfmask.convert import shard_writer
from cfmask.convert.shard_writer import write_shard
from cfmask.data import shard_index
from cfmask.data.shard_index import index_path
from cfmask.data.shards import Manifest, write_manifest
from made import REPO
from slurm_fixture import wait_until
from tools import verify_shards

SAMPLES = 6


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(number: int, label: int | None = None, image: bytes | None = None):
    label = number % 3 if label is None else label
    fields = {"jpg": image or jpeg(number), "cls": str(label).encode(), "json": json.dumps({"class": label}).encode()}
    return f"sample_{number}", number % 3, fields


def commit(folder: Path, tars: list[Path], **more) -> Manifest:
    entries = [shard_writer.shard_and_index(tar) for tar in tars]
    manifest = Manifest(
        root=folder,
        split=folder.name,
        store=more.pop("store", "original"),
        classes=(("a", "one"), ("b", "two"), ("c", "three")),
        class_counts=shard_writer.class_counts_of((index for _, index in entries), 3),
        shards=tuple(shard for shard, _ in entries),
        made={"tool": "test"},
        **more,
    )
    write_manifest(manifest)
    return manifest


def make_set(folder: Path, count: int = 3, **replaced) -> Manifest:
    """``count`` shards of SAMPLES samples; ``replaced`` are samples by number, as s7=sample(…)."""
    folder.mkdir(parents=True)
    tars = [folder / f"{folder.name}-{s:06d}.tar" for s in range(count)]
    for s, tar in enumerate(tars):
        write_shard(tar, [replaced.get(f"s{n}", sample(n)) for n in range(s * SAMPLES, (s + 1) * SAMPLES)])
    return commit(folder, tars)


@pytest.fixture
def made(tmp_path) -> Manifest:
    return make_set(tmp_path / "train")


@pytest.fixture
def verify(tmp_path, capsys):
    """Run the command in this process → (exit status, report, standard output)."""

    def run(*flags):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        status = verify_shards.main(["--workers", "1", "--out", str(report), *map(str, flags)])
        return status, json.loads(report.read_text()) if report.exists() else None, capsys.readouterr()

    return run


def tar_of(made: Manifest, number: int = 1) -> Path:
    return Path(made.root) / made.shards[number].name


def edit(path: Path, change) -> None:
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)


def update_records(made: Manifest, number: int = 1) -> None:
    """Update manifest and index to the tar as it is: damage from before they were written."""
    tar = tar_of(made, number)
    index = shard_index.load_index(tar)
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    shard_index.write_index(
        index_path(tar), replace(index, about={**index.about, "bytes": tar.stat().st_size, "sha256": digest})
    )
    commit(Path(made.root), [Path(made.root) / shard.name for shard in made.shards])


def test_a_good_set_passes_both_modes(made, verify):
    for mode in ((), ("--full",)):
        status, report, output = verify(made.root, *mode)
        assert status == 0 and report["good"] and report["sets"][0]["problems"] == []
        assert "3 shards, all good; 18 samples" in output.out
    assert report["mode"] == "full"


def test_a_folder_of_sets_is_all_its_sets(made, verify):
    make_set(made.root.parent / "val", count=1)
    status, report, _ = verify(made.root.parent)
    assert status == 0 and [Path(s["set"]).name for s in report["sets"]] == ["train", "val"]
    # A set that is named twice is checked once.
    status, report, _ = verify(made.root, made.root.parent)
    assert status == 0 and len(report["sets"]) == 2


def cut(size):
    return lambda made: edit(tar_of(made), lambda data: data[: size(data, shard_index.load_index(tar_of(made)))])


def at_header_boundary(data, index):
    """Before the last sample's first header."""
    return int(index.offset[index.first[-2]]) - 512


def inside_data(data, index):
    return int(index.offset[index.first[-2]]) + 100


def flip(where):
    def damage(made):
        def change(data):
            data[where(shard_index.load_index(tar_of(made)))] ^= 1

        edit(tar_of(made), change)

    return damage


def wrong_index(made):
    shutil.copy(index_path(tar_of(made, 0)), index_path(tar_of(made, 1)))


def torn_index(made):
    edit(index_path(tar_of(made)), lambda data: data[:-30])


def no_end_mark(made):
    edit(tar_of(made), lambda data: data[: at_header_boundary(data, shard_index.load_index(tar_of(made)))])
    update_records(made)


def only_end_mark_gone(made):
    index = shard_index.load_index(tar_of(made))
    end = int(index.offset[-1] + index.size[-1])
    edit(tar_of(made), lambda data: data[: end + -end % 512])
    update_records(made)


def appended(made):
    edit(tar_of(made), lambda data: data + tar_of(made, 0).read_bytes())
    update_records(made)


def relabelled(made):
    """The index has other labels than the tar, and the manifest agrees with the index."""
    index = shard_index.load_index(tar_of(made))
    shard_index.write_index(index_path(tar_of(made)), replace(index, labels=np.roll(index.labels, 1)))
    commit(Path(made.root), [Path(made.root) / shard.name for shard in made.shards])


def histogram(made):
    first, *rest = made.class_counts
    write_manifest(replace(made, class_counts=(first + 1, rest[0] - 1, *rest[1:])))


def swapped(made):
    one, other = tar_of(made, 0), tar_of(made, 1)
    data = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "quick", "full"),
    [
        (cut(at_header_boundary), ["size"], ["size"]),
        (cut(inside_data), ["size"], ["size"]),
        (cut(lambda data, index: 0), ["size"], ["size"]),
        (no_end_mark, ["end"], ["end", "crc", "headers"]),
        (only_end_mark_gone, ["end"], ["end", "headers"]),
        (appended, ["end"], ["end", "headers"]),
        (flip(lambda index: int(index.offset[6]) + 40), [], ["crc", "sha256"]),
        (flip(lambda index: int(index.offset[0]) - 512 + 3), ["header"], ["header", "sha256", "headers"]),
        (flip(lambda index: int(index.offset[2]) - 512 + 3), [], ["sha256", "headers"]),
        (flip(lambda index: int(index.offset[1]) + 300), [], ["sha256"]),  # in the padding after a .cls
        (lambda made: tar_of(made).unlink(), ["missing"], ["missing"]),
        (lambda made: index_path(tar_of(made)).unlink(), ["index-missing"], ["index-missing"]),
        (wrong_index, ["index"], ["index"]),
        (torn_index, ["index"], ["index"]),
        (relabelled, ["label"], ["label"]),
        (histogram, ["histogram"], ["histogram"]),
    ],
)
def test_damage_is_found(made, verify, damage, quick, full):
    damage(made)
    for mode, kinds in (((), quick), (("--full",), full)):
        status, report, output = verify(made.root, *mode)
        problems = report["sets"][0]["problems"]
        assert [p["kind"] for p in problems] == kinds
        assert status == (1 if kinds else 0)
        lines = [line for line in output.out.splitlines() if line.startswith("BAD ")]
        assert len(lines) == (1 if kinds else 0), "a line a shard"
        if kinds and kinds != ["histogram"]:
            assert {p["shard"] for p in problems} == {"train-000001.tar"}
            assert f"BAD  {tar_of(made)}: " in lines[0] and "3 shards, 1 BAD of them" in output.out
        assert all(p["what"] and p["remedy"] for p in problems)


def test_every_bad_shard_is_reported_with_its_samples(made, verify):
    flip(lambda index: int(index.offset[6]) + 40)(made)
    tar_of(made, 0).unlink()
    index_path(tar_of(made, 2)).unlink()
    status, report, output = verify(made.root, "--full")
    assert status == 1 and report["sets"][0]["bad_shards"] == 3
    assert sum(line.startswith("BAD ") for line in output.out.splitlines()) == 3
    assert "1 member with other bytes than were written: sample_8.jpg" in output.out
    [crc] = [p for p in report["sets"][0]["problems"] if p["kind"] == "crc"]
    assert crc["samples"] == ["sample_8.jpg"]


def test_two_swapped_tars_are_found_by_their_headers(made, verify):
    swapped(made)
    assert made.shards[0].bytes == made.shards[1].bytes, "tars are filled up to a record"
    status, report, _ = verify(made.root)
    found = {p["shard"] for p in report["sets"][0]["problems"] if p["kind"] == "header"}
    assert status == 1 and found == {"train-000000.tar", "train-000001.tar"}


def test_an_image_that_does_not_decode_is_found_although_its_checksum_is_right(tmp_path, verify):
    whole = jpeg(7)
    made = make_set(tmp_path / "train", s7=sample(7, image=whole[: len(whole) // 2]), s9=sample(9, image=b"text"))
    assert verify(made.root)[0] == 0
    status, report, output = verify(made.root, "--full")
    [problem] = report["sets"][0]["problems"]
    assert status == 1 and problem["kind"] == "decode" and problem["shard"] == "train-000001.tar"
    assert [name.split()[0] for name in problem["samples"]] == ["sample_7.jpg", "sample_9.jpg"]
    assert "2 images that cannot be used: sample_7.jpg (does not decode" in output.out and "not an image" in output.out


def test_a_label_in_cls_or_json_that_is_not_the_indexs_is_found(tmp_path, verify):
    made = make_set(tmp_path / "train", s3=sample(3, label=2), s4=("sample_4", 1, {"jpg": jpeg(4), "cls": b"one"}))
    status, report, _ = verify(made.root, "--full")
    [problem] = report["sets"][0]["problems"]
    assert status == 1 and problem["kind"] == "label"
    assert [name.split()[0] for name in problem["samples"]] == ["sample_3.cls", "sample_3.json", "sample_4.cls"]


def test_crops_have_to_be_of_the_manifests_size(tmp_path, verify):
    folder = tmp_path / "train"
    folder.mkdir()
    write_shard(folder / "train-000000.tar", [sample(0)])
    commit(folder, [folder / "train-000000.tar"], store="crop-jpeg", image_size=12)
    status, report, _ = verify(folder, "--full")
    assert status == 1 and "a crop of 16×12, not 12×12" in report["sets"][0]["problems"][0]["what"]


def test_a_tar_that_the_manifest_does_not_know_is_a_warning(made, verify):
    shutil.copy(tar_of(made), made.root / "train-000009.tar")
    status, report, output = verify(made.root)
    assert status == 0 and "train-000009.tar is not in the manifest" in report["sets"][0]["warnings"][0]
    assert "note " in output.out


def test_leftovers_of_a_killed_command_are_removed(made, verify, tmp_path):
    leftover = tmp_path / ".report.json.node-1.part"
    leftover.write_text("{")
    assert verify(made.root)[0] == 0 and not leftover.exists()


def test_sets_that_cannot_be_verified_exit_with_status_2(made, verify, tmp_path):
    for flags, message in [
        ([tmp_path / "nowhere"], "no folder of shards at"),
        ([made.root, "--workers", "0"], "--workers must be at least 1"),
        ([made.root, "--array", "4"], "--array without --executor slurm would do nothing"),
        (["https://example.org/shards/val"], "is a URL"),
    ]:
        status, report, output = verify(*flags)
        assert status == 2 and report is None and message in output.err
    (made.root / "manifest.json").unlink()
    for folder in (made.root, made.root.parent):  # an unfinished set among several is not skipped
        status, _, output = verify(folder)
        assert status == 2 and "holds tars but no manifest.json" in output.err
    with pytest.raises(SystemExit) as usage:
        verify_shards.main(["--fast", "x"])
    assert usage.value.code == 2


def test_quick_reads_labels_and_no_images(made, verify, monkeypatch):
    read = 0
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: count(real(*args)))

    def count(data):
        nonlocal read
        read += len(data)
        return data

    assert verify(made.root)[0] == 0
    assert read == 3 * SAMPLES  # one digit for each sample; headers and end marks are read through the file


def processes_below(pid: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found |= {int(path.parent.name)} | processes_below(int(path.parent.name))
    return found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_it_leaves_no_process(tmp_path, number, status):
    # Enough work for a minute.
    folder = tmp_path / "train"
    folder.mkdir()
    big = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)).save(big, "JPEG")
    tars = [folder / f"train-{s:06d}.tar" for s in range(40)]
    for s, tar in enumerate(tars):
        if s == 0:
            write_shard(tar, [sample(n, image=big.getvalue()) for n in range(40)])
        else:
            os.link(tars[0], tar)
            shutil.copy(index_path(tars[0]), index_path(tar))
    commit(folder, tars)
    command = [sys.executable, str(REPO / "tools/verify_shards.py"), str(folder), "--full", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: len(processes_below(process.pid)) >= 3, "its processes to be there")
    time.sleep(1)
    children = processes_below(process.pid)
    # To the whole process group, like a terminal.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status
    assert "Traceback" not in errors
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "its processes to be gone")


def test_several_processes_find_the_same_problems(made, tmp_path):
    flip(lambda index: int(index.offset[6]) + 40)(made)
    command = [sys.executable, str(REPO / "tools/verify_shards.py"), str(made.root), "--full", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "sample_8.jpg" in done.stdout and "Traceback" not in done.stderr


def test_help_is_fast():
    for tool in ("verify_shards", "index_shards"):
        command = [sys.executable, "-X", "importtime", str(REPO / f"tools/{tool}.py"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and " torch\n" not in done.stderr and " submitit\n" not in done.stderr


# --- on Slurm ---------------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_as_an_array_that_is_requeued_it_finds_the_same(slurm_cluster, made, tmp_path):
    flip(lambda index: int(index.offset[6]) + 40)(made)
    tar_of(made, 0).unlink()
    report = tmp_path / "report.json"
    command = [sys.executable, REPO / "tools/verify_shards.py", made.root, "--full", "--out", report]
    allocation = ["--executor", "slurm", "--array", 2, "--cpus-per-task", 1, "--time", "30:00", "--partition", "low"]
    process = subprocess.Popen(
        [str(part) for part in [*command, *allocation, "--logs", tmp_path / "jobs"]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # An administrator's requeue while tasks still import torch.
    job = f"{array_of(process)}_1"
    wait_until(lambda: slurm_cluster.job(job)["JobState"] == "RUNNING", "the task to run")
    slurm_cluster.call("scontrol", "requeue", job)
    slurm_cluster.start_again_now(job)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert slurm_cluster.job(job)["Restarts"] == "1"
    problems = {(p["shard"], p["kind"]) for p in json.loads(report.read_text())["sets"][0]["problems"]}
    assert problems == {("train-000000.tar", "missing"), ("train-000001.tar", "crc"), ("train-000001.tar", "sha256")}
    assert "Traceback" not in errors


def array_of(process: subprocess.Popen) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if "array job " in line:
            return line.partition("array job ")[2].split()[0]
    raise AssertionError("no array was submitted")
