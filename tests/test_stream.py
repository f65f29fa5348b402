"""The stream follows the plan for any ranks, threads, micro-batches and restarts."""

import dataclasses
import errno
import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfmask.convert import shard_writer
from cfmask.convert.shard_writer import write_shard
from cfmask.data import images, plan, receipts, shard_index, shard_reader, stream
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import Manifest, load_manifest, write_manifest
from cfmask.data.stream import MicroBatch, eval_batches, train_batches
from cfmask.errors import UserError
from cfmask.masking.fills import DrawSpec, concat, draw

REPO = Path(__file__).resolve().parents[1]
SIZE = 28
COUNTS = (13, 9, 17, 11, 15)  # 65 samples: 4 steps of 16, one sample left out
BATCH, LANES = 16, 8
SPECS = {
    "single-fill": DrawSpec("object", "single-fill", 0.3, 49),
    "multi-fill": DrawSpec("random", "multi-fill", 0.5, 49),
    "no-fill": DrawSpec("random", "no-fill", 0.75, 49),
    "nothing": None,
}


def picture(number):
    rng = np.random.default_rng(number)
    colours = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((40 + number % 7, 36 + number % 5)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_set(folder, data_of=picture, store="original"):
    folder.mkdir(parents=True)
    extension = "npy" if store == "crop-raw" else "jpg"
    indexes, entries = [], []
    number = 0
    for s, count in enumerate(COUNTS):
        samples = []
        for _ in range(count):
            fields = {extension: data_of(number), "cls": str(number % 10).encode(), "json": b"{}"}
            samples.append((f"s{number}", number % 10, fields))
            number += 1
        tar = folder / f"train-{s:06d}.tar"
        write_shard(tar, samples)
        shard, index = shard_writer.shard_and_index(tar)
        entries.append(shard)
        indexes.append(index)
    write_manifest(
        Manifest(
            root=folder,
            split="train",
            store=store,
            image_size=SIZE if store != "original" else None,
            classes=tuple((f"n{c}", f"class {c}") for c in range(10)),
            class_counts=shard_writer.class_counts_of(indexes, 10),
            shards=tuple(entries),
        )
    )
    return load_manifest(folder)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("stream") / "train")


def train(manifest, *, rank=0, world_size=1, workers=0, epoch=1, start_step=0, spec="single-fill", micro_batches=1):
    return train_batches(
        manifest,
        image_size=SIZE,
        batch_size=BATCH,
        lanes=LANES,
        rank=rank,
        world_size=world_size,
        seed=5,
        epoch=epoch,
        start_step=start_step,
        loader_workers=workers,
        draw_spec=SPECS[spec],
        micro_batches=micro_batches,
    )


def assert_equal(a: MicroBatch, b: MicroBatch):
    assert (a.epoch, a.step, a.keys) == (b.epoch, b.step, b.keys)
    assert a.images.dtype == b.images.dtype == torch.uint8 and torch.equal(a.images, b.images)
    assert torch.equal(a.receipt, b.receipt) and a.bad == b.bad
    assert a.labels.dtype == b.labels.dtype == torch.int64 and torch.equal(a.labels, b.labels)
    for name in ("mask", "keep", "donors"):
        x, y = getattr(a.draws, name), getattr(b.draws, name)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def joined(parts: list[MicroBatch]) -> MicroBatch:
    """Batches of one step side by side, in lane order, as the one batch they are parts of."""
    assert len({(part.epoch, part.step) for part in parts}) == 1
    return MicroBatch(
        epoch=parts[0].epoch,
        step=parts[0].step,
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        keys=[key for part in parts for key in part.keys],
        draws=concat([part.draws for part in parts]),
        receipt=receipt_of([key for part in parts for key in part.keys], parts[0].epoch),
    )


def receipt_of(keys, epoch):
    return torch.tensor(receipts.to_digits(receipts.receipt(keys, epoch)))


@pytest.fixture(scope="module", params=SPECS)
def epoch(request, manifest):
    """The uninterrupted epoch of one rank without loader processes, and the kind of its draws."""
    return request.param, list(train(manifest, spec=request.param))


def test_batches_follow_the_plan(manifest, epoch):
    """Spelled out once, from the plan, the bytes on disk and the generator of each lane."""
    spec, batches = epoch
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    orders = [
        plan.lane_order(manifest.sample_counts, seed=5, epoch=1, lane=lane, lanes=LANES, batch_size=BATCH)
        for lane in range(LANES)
    ]
    with ShardReader(manifest) as reader:
        for batch in batches:
            ids = np.concatenate([order[batch.step] for order in orders])
            samples = [reader.read(i) for i in ids]
            draws = [draw(SPECS[spec], 2, plan.lane_generator(5, 1, batch.step, lane)) for lane in range(LANES)]
            expected = MicroBatch(
                epoch=1,
                step=batch.step,
                images=torch.stack([images.crop(images.decode(sample["jpg"]), SIZE) for sample in samples]),
                labels=torch.tensor([i % 10 for i in ids]),
                keys=[f"s{i}" for i in ids],
                draws=concat(draws),
                receipt=receipt_of([f"s{i}" for i in ids], 1),
            )
            assert_equal(batch, expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_for_every_world_size(manifest, epoch, world_size):
    spec, whole = epoch
    assert_ranks_make_up(
        whole, [list(train(manifest, rank=r, world_size=world_size, spec=spec)) for r in range(world_size)]
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_global_batches_are_the_same_for_every_number_of_threads(manifest, world_size, workers):
    whole = list(train(manifest, spec="multi-fill"))
    ranks = [
        list(train(manifest, rank=r, world_size=world_size, workers=workers, spec="multi-fill"))
        for r in range(world_size)
    ]
    assert_ranks_make_up(whole, ranks)


def assert_ranks_make_up(whole: list[MicroBatch], ranks: list[list[MicroBatch]]):
    assert {len(rank) for rank in ranks} == {len(whole)}
    for step, batch in enumerate(whole):
        assert_equal(joined([rank[step] for rank in ranks]), batch)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_are_the_lanes_of_a_step_in_order(manifest, epoch, micro_batches):
    spec, whole = epoch
    parts = list(train(manifest, micro_batches=micro_batches, spec=spec))
    assert len(parts) == micro_batches * len(whole)
    for step, batch in enumerate(whole):
        assert_equal(joined(parts[step * micro_batches : (step + 1) * micro_batches]), batch)
    if spec == "multi-fill" and micro_batches == 4:
        for a, b in zip(train(manifest, micro_batches=micro_batches, spec=spec, workers=3), parts, strict=True):
            assert_equal(a, b)


def test_a_resumed_stream_equals_the_rest_of_the_uninterrupted_one(manifest, epoch):
    spec, whole = epoch
    for start_step in range(len(whole) + 1):
        rest = list(train(manifest, start_step=start_step, spec=spec))
        assert len(rest) == len(whole) - start_step
        for a, b in zip(rest, whole[start_step:], strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("start_step", [1, 3])
def test_a_resumed_stream_with_threads_equals_the_rest_of_one_without(manifest, start_step):
    whole = list(train(manifest))
    for a, b in zip(train(manifest, start_step=start_step, workers=3), whole[start_step:], strict=True):
        assert_equal(a, b)


def test_resuming_may_change_world_size_and_loaders(manifest, epoch):
    spec, whole = epoch
    ranks = [list(train(manifest, rank=r, world_size=4, start_step=2, spec=spec, micro_batches=2)) for r in range(4)]
    for step in (2, 3):
        parts = [part for rank in ranks for part in rank if part.step == step]
        assert_equal(joined(parts), whole[step])


def test_epochs_have_different_orders_of_the_same_samples(manifest):
    epochs = [[key for batch in train(manifest, epoch=e) for key in batch.keys] for e in range(3)]
    assert all(len(set(keys)) == len(keys) == 64 for keys in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_streaming_does_not_use_the_global_generator_of_torch(manifest):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(train(manifest))
    list(train(manifest, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (7, 0), (1, 2), (3, 3)])
def test_evaluation_sees_each_sample_once_in_order_without_padding(manifest, world_size, workers):
    ranks = [
        list(
            eval_batches(manifest, image_size=SIZE, batch_size=6, rank=r, world_size=world_size, loader_workers=workers)
        )
        for r in range(world_size)
    ]
    batches = [batch for turn in zip_longest(*ranks) for batch in turn if batch is not None]
    assert [key for batch in batches for key in batch.keys] == [f"s{i}" for i in range(65)]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.arange(65) % 10)
    assert [len(batch.images) for batch in batches] == [6] * 10 + [5], "the same batches on any number of ranks"
    assert all(batch.draws.donors is None for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_resumes_from_any_batch_on_any_number_of_ranks(manifest, world_size):
    common = {"image_size": SIZE, "batch_size": 6, "world_size": world_size, "loader_workers": 0}
    ranks = [list(eval_batches(manifest, rank=r, start=4, **common)) for r in range(world_size)]
    keys = {key for rank in ranks for batch in rank for key in batch.keys}
    assert keys == {f"s{i}" for i in range(24, 65)}


def test_a_rank_may_have_nothing_to_evaluate(manifest):
    seen = [
        len(list(eval_batches(manifest, image_size=SIZE, batch_size=6, rank=r, world_size=80, loader_workers=0)))
        for r in range(80)
    ]
    assert sum(seen) == 11 and 0 in seen


def test_a_sample_that_cannot_be_used_is_named_when_its_batch_is_due(tmp_path):
    made = make_set(tmp_path / "train", lambda n: picture(n)[:200] if n == 30 else picture(n))
    order = list(range(65))
    for workers in (0, 2):
        batches = eval_batches(made, image_size=SIZE, batch_size=10, rank=0, world_size=1, loader_workers=workers)
        seen = [key for batch in islice(batches, 3) for key in batch.keys]
        assert seen == [f"s{i}" for i in order[:30]]
        with pytest.raises(UserError, match=r"Sample s30 of shard .*train-000002.tar cannot be used") as caught:
            next(batches)
        assert "\n" not in str(caught.value)


def test_an_evaluation_names_a_shard_that_has_vanished(quick_retries, tmp_path):
    made = make_set(tmp_path / "train")
    (made.root / "train-000003.tar").unlink()
    batches = eval_batches(made, image_size=SIZE, batch_size=10, rank=0, world_size=1, loader_workers=2)
    with pytest.raises(UserError, match=r"Sample s39 of shard .*train-000003.tar cannot be read \(No such file"):
        list(batches)


# --- bad samples in training are replaced by others of their lane ----------------------------------------------------


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(shard_reader, "RETRY_S", (0.01, 0.01))


def expected_with_replacements(whole, bad_ids, epoch=1):
    """Keys of each batch of an epoch without bad samples, each bad one replaced by the next good one of its lane."""
    order = {
        lane: plan.lane_order(np.array(COUNTS), seed=5, epoch=epoch, lane=lane, lanes=LANES, batch_size=BATCH).reshape(
            -1
        )
        for lane in range(LANES)
    }
    keys = []
    for batch in whole:
        row = []
        for n in range(BATCH):
            lane, place = n // 2, batch.step * 2 + n % 2
            following = np.roll(order[lane], -place)
            row.append(f"s{next(i for i in following if i not in bad_ids)}")
        keys.append(row)
    return keys


@pytest.mark.parametrize("damage", ["bit rot", "missing shard", "does not decode"])
def test_a_bad_sample_is_replaced_by_the_next_good_one_of_its_lane(quick_retries, tmp_path, damage):
    good = make_set(tmp_path / "good")
    whole = list(train(good))
    if damage == "does not decode":
        bad_ids = {3, 4, 30}
        made = make_set(tmp_path / "bad", lambda n: picture(n)[:200] if n in bad_ids else picture(n))
    else:
        made = make_set(tmp_path / "bad")
        tar = made.root / "train-000001.tar"
        if damage == "missing shard":
            bad_ids = set(range(13, 22))
            tar.unlink()
        else:
            bad_ids = {13}
            data = bytearray(tar.read_bytes())
            data[shard_index.load_index(tar).offset[0] + 5] ^= 1
            tar.write_bytes(data)
    keys = expected_with_replacements(whole, bad_ids)
    labels = [[int(key[1:]) % 10 for key in row] for row in keys]
    streams = [
        (dict(workers=0), 0),
        (dict(workers=3), 0),
        (dict(workers=2, start_step=2), 2),  # and does the same after a resume
        (dict(workers=1, micro_batches=4), 0),
    ]
    for flags, first in streams:
        batches = list(train(made, **flags))
        parts = flags.get("micro_batches", 1)
        for n, step in enumerate(range(first, len(whole))):
            got = batches[n * parts : (n + 1) * parts]
            assert [key for batch in got for key in batch.keys] == keys[step]
            assert [int(x) for batch in got for x in batch.labels] == labels[step]
            bad = [entry for batch in got for entry in batch.bad]
            planned, order = whole[step].keys, [f"s{entry.sample}" for entry in bad]
            assert order == [key for key in planned if int(key[1:]) in bad_ids]
            assert [entry.substitute for entry in bad] == [
                used for key, used in zip(planned, keys[step], strict=True) if key != used
            ]
            for entry in bad:
                assert (entry.epoch, entry.step, entry.key) == (1, step, f"s{entry.sample}") and entry.reason
                assert entry.shard.endswith(".tar") and entry.lane == planned.index(entry.key) // 2
            assert torch.equal(got[0].receipt, receipt_of(got[0].keys, 1))
    ranks = [list(train(made, rank=r, world_size=4)) for r in range(4)]
    for step in range(len(whole)):
        assert [key for rank in ranks for key in rank[step].keys] == keys[step]


def raw_picture(number):
    return images.encode(images.pixels(picture(number), "jpg", SIZE), "crop-raw")[1]


def test_raw_crops_stream_the_pixels_of_the_originals(manifest, tmp_path):
    raw = make_set(tmp_path / "raw", raw_picture, store="crop-raw")
    for flags in ({}, {"workers": 3}, {"workers": 2, "micro_batches": 4, "start_step": 1}):
        for a, b in zip(train(raw, **flags), train(manifest, **flags), strict=True):
            assert_equal(a, b)
    common = {"image_size": SIZE, "batch_size": 9, "rank": 0, "world_size": 1}
    for a, b in zip(
        eval_batches(raw, loader_workers=2, **common), eval_batches(manifest, loader_workers=0, **common), strict=True
    ):
        assert_equal(a, b)


@pytest.mark.parametrize("damage", ["a pixel", "another size"])
def test_a_damaged_raw_crop_is_replaced(quick_retries, manifest, tmp_path, damage):
    def wrong(number):
        crop = torch.zeros(3, SIZE + 1, SIZE + 1, dtype=torch.uint8)
        return images.encode(crop, "crop-raw")[1] if number == 13 else raw_picture(number)

    raw = make_set(tmp_path / "raw", wrong if damage == "another size" else raw_picture, store="crop-raw")
    if damage != "another size":
        tar = raw.root / "train-000001.tar"
        data = bytearray(tar.read_bytes())
        data[shard_index.load_index(tar).offset[0] + 200] ^= 1
        tar.write_bytes(data)
    whole = list(train(manifest))
    keys = expected_with_replacements(whole, {13})
    batches = list(train(raw, workers=2))
    assert [batch.keys for batch in batches] == keys
    [bad] = [entry for batch in batches for entry in batch.bad]
    assert bad.key == "s13"
    by_key = {key: image for batch in whole for key, image in zip(batch.keys, batch.images, strict=True)}
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert torch.equal(image, by_key[key]), "the replacement's pixels are in the row of its key"


def test_a_temporary_error_is_retried(quick_retries, manifest, monkeypatch):
    whole = list(train(manifest))
    real, failures = os.preadv, []

    def fails_at_times(descriptor, buffers, offset):
        if offset % 3 == 0 and offset not in failures:
            failures.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(shard_reader.os, "preadv", fails_at_times)
    again = list(train(manifest, workers=2))
    assert len(failures) > 3
    for a, b in zip(again, whole, strict=True):
        assert_equal(a, b)


def test_a_lane_without_readable_samples_ends_the_stream(quick_retries, tmp_path):
    made = make_set(tmp_path / "train")
    for shard in made.shards:
        (made.root / shard.name).unlink()
    for workers in (0, 2):
        with pytest.raises(UserError, match="cannot be read .No such file"):
            next(train(made, workers=workers))


def test_crops_of_another_size_are_refused_at_once(manifest):
    crops = dataclasses.replace(manifest, store="crop-raw", image_size=32)
    with pytest.raises(UserError, match="holds crops of 32 × 32 pixels, and the model takes 28 × 28. Convert"):
        train(crops)
    with pytest.raises(UserError, match="holds crops of 32 × 32 pixels"):
        eval_batches(crops, image_size=28, batch_size=4, rank=0, world_size=1, loader_workers=0)


def test_sizes_that_do_not_divide_are_refused_before_anything_starts(manifest):
    with pytest.raises(UserError, match="3 ranks cannot share 8 lanes evenly: use 1, 2, 4 or 8 ranks"):
        train(manifest, world_size=3)
    with pytest.raises(UserError, match="4 lanes .* cannot be cut into 3 equal micro-batches: use one of 1, 2, 4"):
        train(manifest, world_size=2, micro_batches=3)
    with pytest.raises(UserError, match="step 5 is not within an epoch of 4 steps"):
        train(manifest, start_step=5)
    common = {"image_size": SIZE, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0, "loader_workers": 0}
    with pytest.raises(UserError, match="a global batch of 20 cannot be made of 8 equal lanes"):
        train_batches(manifest, batch_size=20, lanes=8, draw_spec=None, **common)
    with pytest.raises(UserError, match="leaves one sample a lane: use at most 4 lanes"):
        train_batches(manifest, batch_size=8, lanes=8, draw_spec=SPECS["multi-fill"], **common)
    with pytest.raises(UserError, match="65 samples do not fill one global batch of 128"):
        train_batches(manifest, batch_size=128, lanes=8, draw_spec=None, **common)


# --- threads --------------------------------------------------------------------------------------------------------


def loaders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cfmask-loader")]


def open_shards():
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))


def test_no_more_than_the_bounded_number_of_batches_is_read_ahead(manifest, monkeypatch):
    monkeypatch.setattr(stream, "PREFETCH", 2)
    begun = []
    filler = stream._Filler.__init__

    def counted(self, *args):
        begun.append(1)
        filler(self, *args)

    monkeypatch.setattr(stream._Filler, "__init__", counted)
    batches = train(manifest, workers=3, micro_batches=4)
    for taken in range(1, 17):
        next(batches)
        assert len(begun) <= taken + 1


def test_a_stream_that_is_closed_early_leaves_no_thread_and_no_open_file(tmp_path):
    """However it is left: closed, by an error of its own, or forgotten in a cycle."""
    made = make_set(tmp_path / "train", lambda n: b"no image" if n == 64 else picture(n))
    batches = train(made, workers=2)
    next(batches)
    assert loaders()
    batches.close()
    assert not loaders() and not open_shards()
    batches = eval_batches(made, image_size=SIZE, batch_size=8, rank=0, world_size=1, loader_workers=2)
    try:
        list(batches)
    except UserError as error:
        kept = error  # with its traceback, as a debugger or a log would
    assert kept.__traceback__ is not None and not loaders()
    batches = train(made, workers=2)
    next(batches)
    cycle: list = [batches]
    cycle.append(cycle)
    del batches, cycle
    gc.collect()
    assert not loaders() and not open_shards()


TRAINER = """
    import os, signal, sys, time

    from cfmask.data.shards import load_manifest
    from cfmask.data.stream import train_batches

    flags = []
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, frame: flags.append(number))
    keys = []
    for epoch in range(2):
        for batch in train_batches(
            load_manifest({folder!r}), image_size=28, batch_size=16, lanes=8, rank=0, world_size=1, seed=5,
            epoch=epoch, loader_workers=2, draw_spec=None,
        ):
            keys += batch.keys
            print("step", flush=True)
            {then}
    print("keys", len(keys), "flags", sorted(set(flags)), flush=True)
"""


def start_trainer(tmp_path, manifest, then):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER.format(folder=str(manifest.root), then=then)))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_signals_of_a_job_do_not_affect_the_stream(tmp_path, manifest):
    with start_trainer(tmp_path, manifest, then="time.sleep(0.2)") as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "step\n"
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            trainer.send_signal(number)
        output = trainer.stdout.read()
    flags = sorted([signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
    assert output.splitlines()[-1] == f"keys 128 flags {[int(flag) for flag in flags]}", output


def test_an_error_in_the_training_loop_ends_the_process_with_its_traceback(tmp_path, manifest):
    with start_trainer(tmp_path, manifest, then="raise ZeroDivisionError('loss')") as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "step\n"
        begun = time.monotonic()
        assert trainer.stdout.read().endswith("ZeroDivisionError: loss\n")
        assert trainer.wait() == 1
        assert time.monotonic() - begun < 100
