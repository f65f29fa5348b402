"""TorchScript archives have the tensors of torch.jit.load, and no pickle can run code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from cfmask.errors import UserError
from cfmask.models.head import build_tower
from cfmask.models.torchscript import read_torchscript
from cfmask.models.weights import read_weights
from towers import TINY

# Making such archives is deprecated; there are those that were made.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class Odd(nn.Module):
    """What else an archive may hold: shared, empty and strided tensors, attributes, lists, buffers of every type."""

    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.int8,
    )

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Sequential(nn.Conv2d(1, 1, 2), nn.GELU())})
        self.tied = self.inner["a"]
        base = torch.arange(12.0)
        self.register_buffer("whole", base)
        self.register_buffer("strided", base.view(3, 4).T[1:])
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("flag", torch.tensor([True, False]))
        for kind in self.kinds:
            self.register_buffer(f"of_{str(kind).removeprefix('torch.')}", torch.arange(5).to(kind))
        self.sizes, self.name, self.rate = [1, 2, 3], "odd", 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(x) * self.rate + self.sizes[0]


@pytest.mark.parametrize("how", ["scripted", "odd"])
def test_a_torchscript_archive_has_the_tensors_of_torch_jit_load(tmp_path, how):
    path = tmp_path / "archive.pt"
    module = torch.jit.script(Odd() if how == "odd" else build_tower(TINY.info()).half().eval())
    torch.jit.save(module, path)
    expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert len(expected) > 10 and found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def archive(path, data, **storages):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/constants.pkl", pickle.dumps(()))
        file.writestr("evil/data.pkl", data)
        for name, content in storages.items():
            file.writestr(f"evil/data/{name}", content)
    return path


def call(module, name, argument):
    """A pickle that calls module.name(argument)."""
    return b"\x80\x02c%s\n%s\n\x8c%c%s\x85R." % (module, name, len(argument), argument)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("builtins", "getattr"),
        ("subprocess", "call"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch.serialization", "load"),
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections.OrderedDict", "__init__.__globals__"),
        ("__torch", "Evil"),
        ("cfmask.models.torchscript", "read_torchscript"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_in_an_archive_can_call_nothing(tmp_path, module, name, protocol):
    target = tmp_path / "owned"
    argument = f"touch {target}".encode()
    data = call(module.encode(), name.encode(), argument)
    if protocol == 4:  # STACK_GLOBAL, where a name with dots is looked up part by part
        data = b"\x80\x04\x8c%c%s\x8c%c%s\x93\x8c%c%s\x85R." % (
            *(len(module), module.encode(), len(name), name.encode()),
            *(len(argument), argument),
        )
    with pytest.raises(pickle.UnpicklingError, match="names"):
        read_torchscript(archive(tmp_path / "evil.pt", data))
    assert not target.exists()


def test_the_pickles_of_these_tests_would_do_harm(tmp_path):
    pickle.loads(call(b"posix", b"system", f"touch {tmp_path}/owned".encode()))
    assert (tmp_path / "owned").exists()


def test_torchscript_classes_are_inert(tmp_path):
    """Under any name, and when they are built, called or given a state."""
    target = tmp_path / "owned"
    inner = call(b"__torch__.os", b"system", f"touch {target}".encode())[2:-1]
    data = b"\x80\x02" + b"c__torch__\nM\n)\x81}\x8c\x01x" + inner + b"sb."
    assert read_torchscript(archive(tmp_path / "inert.pt", data)) == {}
    assert not target.exists()


def test_a_registered_extension_of_pickle_is_looked_up_like_any_name(tmp_path):
    import copyreg

    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(pickle.UnpicklingError, match="os.system"):
            read_torchscript(archive(tmp_path / "evil.pt", b"\x80\x02\x82\xf0\x8c\x01x\x85R."))
    finally:
        copyreg.remove_extension("os", "system", 240)


def one_tensor(storage, offset, size, stride):
    """The pickle of a module with one attribute, w, as TorchScript writes it."""

    def text(word):
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    def number(n):
        return b"J" + n.to_bytes(4, "little", signed=True)

    def numbers(ns):
        return b"(" + b"".join(map(number, ns)) + b"t"

    kind, dtype, key, device, length = storage
    stored = b"(" + text(kind) + f"ctorch\n{dtype}\n".encode() + text(key) + text(device) + number(length) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02c__torch__\nM\n)\x81}" + text("w") + rebuilt + b"\x89}tRsb."


@pytest.mark.parametrize(
    ("storage", "shape", "reason"),
    [
        (("storage", "FloatStorage", "0", "cpu", 4), (0, (2, 2), (2, 1)), None),
        (("storage", "FloatStorage", "0", "cpu", 5), (0, (2, 2), (2, 1)), "has 16 bytes, its tensors need 20"),
        (("storage", "FloatStorage", "0", "cpu", 4), (0, (2, 3), (3, 1)), "out of bounds"),
        (("storage", "FloatStorage", "0", "cpu", 4), (-1, (2,), (1,)), "offset"),
        (("storage", "FloatStorage", "1", "cpu", 4), (0, (2, 2), (2, 1)), "no item named 'evil/data/1'"),
        (("storage", "FloatStorage", "../data.pkl", "cpu", 4), (0, (2, 2), (2, 1)), "no item named"),
        (("module", "FloatStorage", "0", "cpu", 4), (0, (2, 2), (2, 1)), "which is no storage"),
        (("storage", "OddStorage", "0", "cpu", 4), (0, (2, 2), (2, 1)), "names torch.OddStorage"),
    ],
)
def test_a_tensor_is_read_only_from_its_own_storage(tmp_path, storage, shape, reason):
    four = torch.arange(4.0).numpy().tobytes()
    path = archive(tmp_path / "archive.pt", one_tensor(storage, *shape), **{"0": four})
    if reason is None:
        assert torch.equal(read_torchscript(path)["w"], torch.arange(4.0).view(2, 2))
    else:
        with pytest.raises((ValueError, KeyError, RuntimeError, pickle.UnpicklingError), match=reason):
            read_torchscript(path)


def deflated(archive: Path, changed=lambda name, data: data) -> Path:
    """The same archive, compressed."""
    out = archive.with_name("deflated.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, changed(name, old.read(name)))
    return out


@pytest.mark.parametrize("kind", ["scripted", "state dict"])
def test_an_archive_that_would_inflate_is_refused(tmp_path, kind, monkeypatch):
    path = tmp_path / "archive.pt"
    tower = build_tower(TINY.info()).eval()
    torch.jit.save(torch.jit.script(tower), path) if kind == "scripted" else torch.save(tower.state_dict(), path)
    whole = read_weights if kind != "scripted" else read_torchscript

    big = deflated(path, lambda name, data: bytes(1 << 27) if name.endswith("data/0") else data)
    inflated = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, name, *rest: inflated.append(name))
    monkeypatch.setattr(torch, "load", lambda *rest, **more: inflated.append("all"))
    with pytest.raises(ValueError, match="inflates to"):
        whole(big)
    assert not inflated


def test_an_entry_that_is_larger_than_its_tensor_is_not_read(tmp_path):
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(build_tower(TINY.info()).eval()), path)
    padded = deflated(path, lambda name, data: data + bytes(8) if name.endswith("data/0") else data)
    with pytest.raises(ValueError, match=r"data/0 has \d+ bytes, its tensors need"):
        read_torchscript(padded)
    assert read_torchscript(deflated(path)).keys() == read_torchscript(path).keys()


def test_a_tensor_that_repeats_its_storage_is_refused(tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(1).expand(1 << 20)}, tmp_path / "archive.pt")
    with pytest.raises(UserError, match="repeats 4 bytes"):
        read_weights(tmp_path / "archive.pt")
