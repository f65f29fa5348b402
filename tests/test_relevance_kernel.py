"""The relevance kernels equal the formula in fp64: by Triton's interpreter on the CPU, and for real on a GPU.

Run as a script with TRITON_INTERPRET=1, this file computes every case and writes the results; the tests compare them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from cfmask.kernels import triton_support
from cfmask.kernels.relevance_kernel import MAX_HEAD_SIZE, extend_row, usable
from made import REPO
from triton_compiler import SHARED_MEMORY, compile_for, launches_of, no_cache, run_interpreted

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Case(NamedTuple):
    """Shapes and strides of one call, and what its numbers are like.

    layout: "fused", views of one (N, L, 3, heads, d) tensor; "guarded", the same amid NaN; "apart", channels not
    next to each other. scores: "ordinary"; "huge", between about ±1e3; "high" and "low", all of them near 1e3 and
    near -1e3; "diverged", NaN in one query of the first image.
    """

    size: int
    length: int
    queries: int
    dtype: torch.dtype = torch.float32
    layout: str = "fused"
    scores: str = "ordinary"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"d{self.size}-L{self.length}-q{self.queries}-{dtype}-{self.layout}-{self.scores}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    *(
        Case(size, length, queries, dtype)
        for size in (32, 64, 80)
        for length in (10, 50, 64, 65, 197, 257, 577)
        for queries in (length, 1)
        for dtype in (F32, BF16)
    ),
    *(Case(size, 65, 65, dtype) for size in (8, 20, MAX_HEAD_SIZE) for dtype in (F32, BF16)),
    *(Case(64, 65, queries, F16) for queries in (65, 1)),
    *(
        Case(80, 50, queries, dtype, layout)
        for layout in ("guarded", "apart")
        for queries in (50, 1)
        for dtype in (F32, BF16)
    ),
    *(
        Case(64, 65, queries, dtype, "fused", scores)
        for scores in ("huge", "high", "low", "diverged")
        for queries in (65, 1)
        for dtype in (F32, BF16)
    ),
]
REPEATED = [
    case for case in CASES if (case.size, case.length, case.layout, case.scores) == (64, 65, "fused", "ordinary")
]


class Inputs(NamedTuple):
    row: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor


def make_inputs(case: Case, n: int, heads: int, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {n} {heads}".encode()))
    size, length = case.size, case.length

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    row = torch.rand(n, length, generator=generator)
    qkv, d_out = normal(n, length, 3, heads, size), normal(n, case.queries, heads, size)
    strength = math.sqrt(1000 / math.sqrt(size))  # of channels that all agree: a score of 1e3
    if case.scores == "huge":
        qkv[:, :, :2] *= math.sqrt(300)
    elif case.scores in ("high", "low"):
        qkv[:, :, :2] = strength + 0.01 * qkv[:, :, :2]
        if case.scores == "low":
            qkv[:, :, 1] *= -1
    elif case.scores == "diverged":
        qkv[0, 0, 0, 0, 0] = math.nan
    qkv, d_out = qkv.to(case.dtype), d_out.to(case.dtype)

    def guarded(t: Tensor) -> Tensor:
        """``t`` surrounded by NaN: an element read outside of it would show in the result."""
        field = torch.full([extent + 3 for extent in t.shape], math.nan, dtype=t.dtype, device=device)
        inner = field[tuple(slice(1, 1 + extent) for extent in t.shape)]
        return inner.copy_(t)

    def apart(t: Tensor) -> Tensor:
        return t.mT.contiguous().to(device).mT

    place = {"fused": lambda t: t.to(device), "guarded": guarded, "apart": apart}[case.layout]
    q, k, v = place(qkv).permute(2, 0, 3, 1, 4)
    return Inputs(place(row), q[:, :, : case.queries], k, v, place(d_out).transpose(1, 2))


def expected(inputs: Inputs) -> Tensor:
    """The formula in fp64."""
    row, q, k, v, d_out = (t.cpu().double() for t in inputs)
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    positive = (attention * (d_out @ v.mT)).relu()
    return row + torch.einsum("nl,nhlm->nm", row[:, : q.shape[2]], positive) / q.shape[1]


def assert_close(new: Tensor, inputs: Inputs, tolerance: float) -> None:
    """No element is off by more than ``tolerance`` of the largest change and the last bit of the row that it adds to.
    NaN where the formula gives it."""
    assert new.dtype == torch.float32
    right, row = expected(inputs), inputs.row.cpu().double()
    new = new.cpu().double()
    assert torch.equal(new.isnan(), right.isnan())
    change = (right - row).abs().nan_to_num().max()
    worst = (new - right).abs().nan_to_num().max()
    allowed = tolerance * change + torch.finfo(torch.float32).eps * row.max()
    assert worst <= allowed, f"off by {worst / change:.1e} of the largest change"


def tolerance(case: Case) -> float:
    # fp32 knows a score of 1e3 to 1e3 × 2^-24 = 6e-5, and that many times over after a product's roundings: so with P.
    return 2e-3 if case.scores in ("huge", "high", "low") else 1e-5


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def interpreted_shape(case: Case) -> tuple[int, int]:
    """N and heads that the interpreter, which is slow, gets through."""
    if case.length <= 10:
        return 3, 5
    return (2, 2) if case.length <= 65 else (1, 1)


def interpret(case: Case) -> np.ndarray:
    """One run of the case, or two: (runs, N, L)."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN: an element left unwritten shows
    inputs = make_inputs(case, *interpreted_shape(case))
    assert usable(inputs.row, inputs.q), "Triton's interpreter is off"
    return torch.stack([extend_row(*inputs) for _ in range(2 if case in REPEATED else 1)]).numpy()


def interpret_all(path: str) -> None:
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as processes:
        np.savez(path, **dict(zip(map(str, CASES), processes.map(interpret, CASES), strict=True)))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreted") / "results.npz"
    run_interpreted(__file__, path)
    with np.load(path) as results:
        yield results


@has_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_formula(case, interpreted):
    assert_close(
        torch.from_numpy(interpreted[str(case)][0]), make_inputs(case, *interpreted_shape(case)), tolerance(case)
    )


@has_triton
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_two_interpreted_runs_are_bitwise_identical(case, interpreted):
    assert same_bits(*torch.from_numpy(interpreted[str(case)]))


def test_without_triton_the_module_imports_and_is_not_usable():
    code = """
import sys
sys.modules["triton"] = None  # makes its import fail
import torch
from cfmask.kernels.relevance_kernel import usable
assert not usable(torch.zeros(1, 5), torch.zeros(1, 1, 5, 16))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tensors_that_the_kernels_do_not_accept_are_left_to_plain_pytorch():
    row, q = torch.zeros(1, 5), torch.zeros(1, 1, 5, 16)
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert not usable(row, q)  # on the CPU
    assert not usable(row.double(), q)
    assert not usable(row, q.double())
    assert not usable(row, torch.zeros(1, 1, 5, MAX_HEAD_SIZE + 1))


@has_triton
def test_a_triton_that_cannot_launch_causes_a_warning_and_is_not_used(monkeypatch):
    import triton

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    with pytest.warns(UserWarning, match="C compiler"):
        assert not triton_support.can_launch.__wrapped__()


@pytest.mark.parametrize(
    "wrong",
    [
        {"row": torch.zeros(2, 4)},
        {"row": torch.zeros(2, 5, dtype=torch.float64)},
        {"q": torch.zeros(2, 3, 4, 16), "d_out": torch.zeros(2, 3, 4, 16)},
        {"k": torch.zeros(2, 3, 4, 16)},
        {"v": torch.zeros(2, 3, 5, 16, dtype=torch.bfloat16)},
        {"d_out": torch.zeros(2, 3, 1, 16)},
        {name: torch.zeros(2, 3, 5, MAX_HEAD_SIZE + 1) for name in ("q", "k", "v", "d_out")},
    ],
)
def test_tensors_of_inconsistent_shapes_or_dtypes_are_refused(wrong):
    right = {"row": torch.zeros(2, 5), **{name: torch.zeros(2, 3, 5, 16) for name in ("q", "k", "v", "d_out")}}
    with pytest.raises(ValueError, match="row"):
        extend_row(**{**right, **wrong})


@has_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")
@pytest.mark.parametrize(
    "capability, heads, queries, size, dtype",
    [
        *((capability, 12, 197, size, BF16) for capability in SHARED_MEMORY for size in (64, MAX_HEAD_SIZE)),
        *((89, heads, queries, size, dtype)  # with the least shared memory
          for heads, queries, size, dtype in ((1, 1, 64, BF16), (12, 197, MAX_HEAD_SIZE, F32))),
    ],
)  # fmt: skip
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(capability, heads, queries, size, dtype, tmp_path):
    """The interpreter accepts kernels that the compiler or a GPU refuses."""
    row, keys = torch.empty(2, 197), torch.empty(2, heads, 197, size, dtype=dtype)
    q = keys[:, :, :queries]
    with no_cache(tmp_path):
        launches = launches_of(lambda: extend_row(row, q, keys, keys, q))
        assert len(launches) == (1 if size == 64 and dtype == BF16 else 2)
        for launch in launches:
            assert compile_for(launch, capability).metadata.shared <= SHARED_MEMORY[capability] * 1024


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_a_gpu_equal_the_formula(case, poisoned):
    inputs = make_inputs(case, 3, 5, "cuda")
    assert usable(inputs.row, inputs.q)
    new = extend_row(*inputs)
    # A tensor core adds up products of bf16 and fp16 less carefully than fp32 arithmetic does.
    assert_close(new, inputs, tolerance(case) * (1 if case.dtype == F32 else 10))
    assert same_bits(new, extend_row(*inputs))


@pytest.mark.gpu
@needs_gpu
def test_no_map_of_all_pairs_of_tokens_reaches_memory():
    n, heads, length = 8, 12, 577
    inputs = make_inputs(Case(64, length, length, BF16), n, heads, "cuda")
    extend_row(*inputs)  # loads the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    extend_row(*inputs)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < n * heads * length * length * 2 / 20, "a twentieth of one map in bf16"


@pytest.mark.gpu
@needs_gpu
def test_the_host_never_waits_for_the_device():
    inputs = make_inputs(Case(64, 50, 50, BF16), 3, 5, "cuda")
    extend_row(*inputs)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert usable(inputs.row, inputs.q)
        extend_row(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_more_heads_than_the_second_axis_of_a_grid_holds(poisoned):
    inputs = make_inputs(Case(16, 10, 10, BF16), 5500, 12, "cuda")
    assert_close(extend_row(*inputs), inputs, 1e-4)


@pytest.mark.gpu
@needs_gpu
def test_an_image_beyond_32_bits_of_elements(poisoned):
    n, heads, length, size = 2, 3, 65, 64
    near = make_inputs(Case(size, length, length, BF16), n, heads, "cuda")
    stride = 2**31 + 64
    try:
        field = torch.empty(stride + heads * length * size, dtype=BF16, device="cuda")
    except torch.OutOfMemoryError:
        pytest.skip("needs 4 GB of GPU memory")
    for name in ("q", "k", "v", "d_out"):
        far = field.as_strided((n, heads, length, size), (stride, length * size, size, 1))
        far.copy_(getattr(near, name))
        inputs = near._replace(**{name: far})
        assert same_bits(extend_row(*inputs), extend_row(*near))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_be_on_the_current_device(poisoned):
    inputs = make_inputs(Case(64, 65, 65, BF16), 3, 5, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(extend_row(*inputs), inputs, 1e-4)


if __name__ == "__main__":
    interpret_all(sys.argv[1])
