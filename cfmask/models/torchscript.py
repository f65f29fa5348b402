"""Reads the tensors of TorchScript archives, in which OpenAI publishes its weights, without loading their code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def read_torchscript(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The tensors of the module in a TorchScript archive, by name.

    Args:
        shapes_only: return tensors on the meta device, without reading their bytes.

    ``torch.jit.load`` would compile the archive's code. Here only data.pkl is read, in which a module is an object of a
    class ``__torch__.…`` whose state is a dict of its attributes:

        NAME/data.pkl      the module, protocol 2; its tensors name their storages
        NAME/data/0 …      the storages' bytes
        NAME/code/, NAME/constants.pkl      not read

    Raises:
        pickle.UnpicklingError: the pickle names something else than modules, tensors and plain containers.
        ValueError: an entry is missing or has another size than its tensor, or ``check_inflation`` refuses the archive.
    """
    check_inflation(path)
    with zipfile.ZipFile(path) as archive:
        [main] = [entry for entry in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", entry)] or [""]
        if not main:
            raise ValueError("the archive has no data.pkl")
        root = main.removesuffix("data.pkl")
        with archive.open(main) as file:
            module = _ArchiveUnpickler(file, archive, f"{root}data/", shapes_only=shapes_only).load()
    if not isinstance(module, _Inert):
        raise pickle.UnpicklingError(f"the archive holds a {type(module).__name__} where a module was expected")
    return dict(_tensors_of(module))


def activation_of(path: Path) -> bool | None:
    """Whether the code in a TorchScript archive computes QuickGELU, x · sigmoid(1.702 x), and not GELU; None if it has
    both or neither. The code is searched as text and not run."""
    check_inflation(path)
    found = set()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if re.fullmatch(r"[^/]+/code/.*\.py", entry):
                code = archive.read(entry)
                found |= {quick for quick, name in ((True, b"torch.sigmoid("), (False, b"torch.gelu(")) if name in code}
    return found.pop() if len(found) == 1 else None


_MOST_INFLATION, _CODE_BYTES = 2, 1 << 25


def check_inflation(path: Path) -> None:
    """Raises ValueError if a zip archive inflates to more than twice its size and 32 MiB. torch stores tensors
    uncompressed, and compresses only code and debug information, which are small."""
    stored = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MOST_INFLATION * stored + _CODE_BYTES:
        raise ValueError(f"the archive of {stored} bytes inflates to {size} bytes, so it is not a file of weights")


def _tensors_of(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    for name, value in (module.state if isinstance(module.state, dict) else {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Inert):
            yield from _tensors_of(value, f"{prefix}{name}.")


class _Inert:
    """Replaces an object of any TorchScript class: keeps its state and does nothing."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads tensors and plain containers, with inert objects in place of TorchScript's, and refuses everything else.

    A pickle can only call what ``find_class`` returns, and set the state of the results.
    """

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str, *, shapes_only: bool) -> None:
        super().__init__(file)
        self._archive, self._folder, self._shapes_only = archive, folder, shapes_only
        self._storages: dict[tuple[Any, str], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Inert
        if module == "torch" and (dtype := _dtype_of(name)) is not None:
            return dtype
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"the archive's pickle names {module}.{name}, which no TorchScript module needs")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, ("storage", its type, its name, its device, its length) → (length,)."""
        import torch

        kind, dtype, name, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise pickle.UnpicklingError(f"the archive's pickle refers to {kind!r}, which is no storage")
        if (dtype, name) not in self._storages:
            if type(length) is not int or length < 0:
                raise pickle.UnpicklingError(f"the archive's pickle gives data/{name} the length {length!r}")
            size = self._archive.getinfo(self._folder + name).file_size
            if size != length * dtype.itemsize:
                raise ValueError(
                    f"the archive's data/{name} has {size} bytes, its tensors need {length * dtype.itemsize}"
                )
            if self._shapes_only:
                self._storages[dtype, name] = torch.empty(length, dtype=dtype, device="meta")
            else:
                data = bytearray(self._archive.read(self._folder + name))
                # An empty buffer is none to torch.
                storage = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                self._storages[dtype, name] = storage
        return self._storages[dtype, name]


def _dtype_of(storage: str) -> Any:
    """FloatStorage → torch.float32; None if it is not the name of a storage class."""
    import torch

    kinds = ("double", "float", "half", "bfloat16", "long", "int", "short", "uint8", "int8", "bool")
    names = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Char", "Bool")
    return {f"{name}Storage": getattr(torch, kind) for name, kind in zip(names, kinds, strict=True)}.get(storage)


def _rebuilt(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2; torch itself refuses what lies outside the storage."""
    tensor = storage.as_strided(size, stride, offset)
    if tensor.numel() > storage.numel():
        raise ValueError(f"a tensor of {tuple(size)} lies in a storage of {storage.numel()} elements")
    return tensor


def _same(value: Any, *_: Any) -> Any:
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("collections", "OrderedDict"): OrderedDict,  # a tensor's hooks: always empty
    ("torch", "device"): str,
    **{("torch.jit._pickle", f"build_{kind}list"): _same for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _same,  # of a typed list or dict
}
