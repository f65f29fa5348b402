"""Makes the processes that tests start faster: Python runs sitecustomize.py first, because conftest.py puts
this folder on PYTHONPATH. A test with a sitecustomize.py of its own imports this module there.

Most of the suite's time goes to ranks, several hundred of them, that import torch and open_clip. Two thirds of that is
spent on packages that these, torch.optim and DDP import, and that training does not call:

    transformers     cannot be imported: open_clip does without it, and only tools/segment.py uses it
                     (the fixture ``all_imports``)
    cuda.bindings    cannot be imported where there is no GPU: torch does without it
    open_clip        its modules are imported alone; open_clip/__init__.py, which imports all of them and reads a
                     vocabulary, is imported when something of it is used
    torchvision      is imported when something of it is used
    timm             is imported when something of it is called, and with it wandb, which it imports
    torch._dynamo    is imported when something of it is used, by torch.compile for example, other than what stands in
                     ``STAND_INS``: decorators of functions that torch.compile leaves alone, which change nothing where
                     nothing is compiled
    torch._inductor  the same; torch.use_deterministic_algorithms imports it for its configuration
    torch.export     is imported when something of it is used

Files are not synced to the disk: a tenth of a second for each job's copy of the code becomes two on a busy disk, and no
test interrupts the power.

``test_resume.py`` compares a run of ranks that import everything with one of ranks that do not.
"""

import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace


def _later(module: str, name: str):
    """A function or class that is imported when it is called."""
    return lambda *args, **kwargs: getattr(_real(module), name)(*args, **kwargs)


STAND_INS = {
    "timm": {},
    "timm.layers": {
        name: _later("timm.layers", name) for name in ("RotAttentionPool2d", "AttentionPool2d", "Mlp", "to_2tuple")
    },
    "torch._dynamo": {
        "disable": lambda fn=None, *_, **__: (lambda function: function) if fn is None else fn,
        "graph_break": lambda: None,
        "trace_rules": SimpleNamespace(clear_lru_cache=lambda: None),
    },
    "torch._dynamo.utils": {
        "get_optimize_ddp_mode": lambda: "ddp_optimizer",  # the default, which changes nothing but compiled models
        "is_compile_supported": _later("torch._dynamo.utils", "is_compile_supported"),
    },
    "torch._inductor": {},
    "torch.export": {},
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.misc": {"FrozenBatchNorm2d": _later("torchvision.ops.misc", "FrozenBatchNorm2d")},
    "open_clip": {},
}
"""Modules, and what they give without being imported: what the import of open_clip, an optimizer and DDP ask for."""
PACKAGES = ("timm", "torch._dynamo", "torch._inductor", "torch.export", "torchvision", "open_clip")
LIGHT = ("torch._inductor.config", "torch._inductor.custom_graph_pass", "open_clip.")
"""Modules that are imported as ever, without what their package imports. "open_clip." means all in it."""
HIDDEN = ("transformers",) if os.path.exists("/dev/nvidiactl") else ("transformers", "cuda")


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if (module := f"{self.__name__}.{name}") in STAND_INS:
            return importlib.import_module(module)
        return getattr(_real(self.__name__), name)


def _package_of(module: str) -> str | None:
    """The package with replacements that a module is or is part of."""
    return next((name for name in PACKAGES if f"{module}.".startswith(f"{name}.")), None)


def _is_light(module: str) -> bool:
    return any(module == name or name.endswith(".") and module.startswith(name) for name in LIGHT)


def _real(module: str) -> ModuleType:
    """Import a module, and its package, in the place of what stands in."""
    package = _package_of(module)
    for name in [name for name in STAND_INS if _package_of(name) == package]:
        del STAND_INS[name]
        sys.modules.pop(name, None)
    found = importlib.import_module(module)
    for name in [name for name in sys.modules if name.startswith(f"{package}.") and _is_light(name)]:
        if (parent := name.rpartition("."))[0] == package:
            setattr(sys.modules[package], parent[2], sys.modules[name])
    return found


class _Lean(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ImportError(f"{name} is hidden from the processes of these tests (tests/lean)")
        if name in STAND_INS:
            if (real := PathFinder.find_spec(name, path)) is None:
                return None
            spec = ModuleSpec(name, self, origin=real.origin)
            spec.submodule_search_locations = real.submodule_search_locations
            return spec
        if not _is_light(name) and _package_of(name) in STAND_INS:  # another module of it
            module = _real(name)
            del sys.modules[name]  # Python would import it again by its own spec; create_module gives it back
            return ModuleSpec(name, self, loader_state=(module, module.__spec__))
        return None

    def create_module(self, spec):
        return spec.loader_state[0] if spec.loader_state else _StandIn(spec.name)

    def exec_module(self, module):
        if isinstance(module, _StandIn):
            vars(module).update(STAND_INS[module.__name__])
        elif state := module.__spec__.loader_state:  # torch's modules of settings keep their own
            module.__spec__ = state[1]


os.fsync = lambda descriptor: None
sys.meta_path.insert(0, _Lean())
