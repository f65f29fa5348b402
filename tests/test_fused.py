"""The kernels between a block's matrix products equal plain PyTorch in fp64, values and gradients: by Triton's
interpreter on the CPU, and for real on a GPU.

Run as a script with TRITON_INTERPRET=1, this file computes every case and writes the results; the tests compare them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cfmask.kernels import fused, fused_kernels
from cfmask.kernels.fused import Branch, activation_gradients_only
from cfmask.models.tower import encode, store_products_in
from cfmask.recipe import Method
from cfmask.step import training_step
from test_step import make_batch, resolved, student_and_teachers
from towers import B32, Geometry
from triton_compiler import SHARED_MEMORY, compile_for, launches_of, no_cache, run_interpreted

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEEP = Geometry(image=32, patch=8, width=16, layers=12, heads=2)
HEADLINE = resolved(Method(mask="object", fill="single-fill"))


class Case(NamedTuple):
    """One call. name: of FUNCTIONS; shape: (N, L, C), or (N, heads, L, d) for "split"."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"


def tensors(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Named inputs and cotangents, equal in every process; activations in the case's dtype, parameters in fp32."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    *_, width = case.shape
    made: dict[str, Tensor] = {}
    for name in ("x", "branch", "d_a", "d_b", "d_c"):
        made[name] = torch.randn(case.shape, generator=generator).to(case.dtype)
    made["x"] = made["x"] + 2  # a mean that is not 0, for the norm
    for name in ("weight", "bias", "branch_bias"):
        made[name] = torch.randn(width, generator=generator)
    return {name: tensor.to(device) for name, tensor in made.items()}


def add_norm(t: dict[str, Tensor], with_branch: bool, with_bias: bool, used: str = "both", strided: bool = False):
    """used: which of the results the loss depends on."""
    leaves = {name: t[name].clone().requires_grad_() for name in ("x", "branch", "branch_bias", "weight", "bias")}
    norm = nn.LayerNorm(t["x"].shape[-1], eps=1e-5, device=t["x"].device)
    norm.weight, norm.bias = nn.Parameter(leaves["weight"].detach()), nn.Parameter(leaves["bias"].detach())
    branch = Branch(leaves["branch"], leaves["branch_bias"] if with_bias else None) if with_branch else None
    x = leaves["x"]
    if strided:
        x = x[:, :1]
        branch = branch and Branch(branch.value[:, :1], branch.bias)
    total, normed = fused.add_norm(x, branch, norm.to(leaves["weight"].dtype))
    losses = {"normed": (normed * t["d_a"][:, : x.shape[1]]).sum(), "total": (total * t["d_b"][:, : x.shape[1]]).sum()}
    sum(losses.values() if used == "both" else [losses[used]]).backward()
    wanted = [leaves["x"].grad]
    if used != "total":
        wanted += [norm.weight.grad, norm.bias.grad]
    if with_branch:
        wanted += [total, leaves["branch"].grad]
    if with_bias:
        wanted.append(leaves["branch_bias"].grad)
    return [normed, *wanted]


def quick_gelu(t: dict[str, Tensor]):
    x, bias = t["x"].clone().requires_grad_(), t["bias"].clone().requires_grad_()
    if x.dtype == torch.float64:
        u = x + bias
        out = u * torch.sigmoid(1.702 * u)
    else:
        out = fused.bias_quick_gelu(Branch(x, bias))
    (out * t["d_a"]).sum().backward()
    return [out, x.grad, bias.grad]


def split(t: dict[str, Tensor], parts: int):
    """Heads of a projection that is the identity: so the gradients are seen as they are joined."""
    n, heads, length, size = t["x"].shape
    joined = torch.cat([t[name].transpose(1, 2).reshape(n, length, -1) for name in ("x", "branch", "d_c")[:parts]], -1)
    joined.requires_grad_()
    bias = torch.zeros(parts * heads * size, device=joined.device, dtype=torch.promote_types(joined.dtype, F32))
    bias.requires_grad_()
    pieces = fused._SplitHeads.apply(joined.view(n, length, parts, heads, size), bias)
    if joined.dtype == torch.float64:  # the plain path leaves the bias to the product
        pieces = (joined + bias).view(n, length, parts, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    loss = sum((piece * t[name]).sum() for piece, name in zip(pieces, ("d_a", "d_b", "d_c"), strict=False))
    loss.backward()
    return [joined.grad, bias.grad]


FUNCTIONS = {
    "norm": lambda t: add_norm(t, False, False, "normed"),
    "norm-kept": lambda t: add_norm(t, False, False),
    "add-norm": lambda t: add_norm(t, True, False),
    "add-bias-norm": lambda t: add_norm(t, True, True),
    "last-add-bias-norm": lambda t: add_norm(t, True, True, "normed"),
    "add-bias": lambda t: add_norm(t, True, True, "total"),
    "class-token": lambda t: add_norm(t, True, True, strided=True),
    "gelu": quick_gelu,
    "split-3": lambda t: split(t, 3),
    "split-2": lambda t: split(t, 2),
}
CASES = [
    *(
        Case(name, shape, dtype)
        for name in FUNCTIONS
        for shape in ([(3, 2, 7, 16), (2, 3, 50, 20)] if "split" in name else [(3, 7, 36), (2, 50, 768)])
        for dtype in (F32, BF16)
    ),
    Case("add-bias-norm", (40, 5, 1280), BF16),  # more rows than programs with one tile each
    Case("add-bias-norm", (2, 3, 768), F16),
    Case("gelu", (40, 50, 300), BF16),
    Case("split-3", (40, 2, 33, 64), BF16),
]


def expected(case: Case) -> list[Tensor]:
    wide = {name: tensor.double() for name, tensor in tensors(case).items()}
    return FUNCTIONS[case.name](wide)


def assert_close(results: list[Tensor], case: Case) -> None:
    """Within the rounding of one result to its dtype, and of the stream to the case's before the norm reads it."""
    unit = {F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}
    for place, (ours, right) in enumerate(zip(results, expected(case), strict=True)):
        assert ours.shape == right.shape
        scale = right.abs().max().item() if ours.dim() > 1 else right.abs().mean().item() + right.abs().max().item() / 3
        error = (ours.cpu().double() - right).abs().max().item()
        assert error <= unit[case.dtype] * scale, f"result {place} is off by {error / scale:.1e}"
        mean_error = (ours.cpu().double() - right).abs().mean() / right.abs().mean()
        assert mean_error <= unit[case.dtype] / 3, f"result {place} is off by {mean_error:.1e} in the mean"


# --- by the interpreter -----------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts operator calls, including views: each takes host time. A Triton kernel counts as one call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def add(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def __enter__(self):
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import GridExecutor

            self._launch = launch = GridExecutor.__call__

            def counted(executor, *arguments, **options):
                self.add(executor.fn.__name__)
                with _disable_current_modes():
                    return launch(executor, *arguments, **options)

            GridExecutor.__call__ = counted
        return super().__enter__()

    def __exit__(self, *reason):
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import GridExecutor

            GridExecutor.__call__ = self._launch
        return super().__exit__(*reason)


def step_of(geometry: Geometry, dtype: torch.dtype, *, autocast: bool) -> dict[str, Any]:
    """The headline step: loss, gradients and operator calls."""
    student, teachers, normalise = student_and_teachers(geometry, HEADLINE)
    for model in (student, teachers.pretrained, normalise):
        model.to(dtype)
    if autocast:
        store_products_in(teachers.pretrained, BF16)
    images, labels, draws = make_batch(geometry, HEADLINE, 4)
    with torch.autocast("cpu", BF16, enabled=autocast), Counter() as counter:
        metrics = training_step(student, teachers, normalise, images.to(dtype), labels, draws, HEADLINE)
    return {
        "loss": metrics.loss,
        "gradients": {name: p.grad for name, p in student.named_parameters()},
        "calls": counter.total,
        "by name": counter.calls,
    }


def saved_by_a_block() -> int:
    """Bytes that a block in the middle keeps for its backward pass, bf16, in elements of the stream (N · L · C)."""
    model = B32.classifier()
    pixels = torch.randn(2, 3, B32.image, B32.image)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def run(layers: int) -> int:
        kept.clear()
        visual = copy.deepcopy(model.visual)
        visual.transformer.resblocks = visual.transformer.resblocks[-layers:]
        weights = {p.numel() * 2 for p in visual.parameters()}  # as bf16 copies, which are not activations
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", BF16):
            graph = encode(visual, pixels)
        total = sum(size for size in kept.values() if size not in weights)
        del graph
        return total

    return run(3) - run(2)


def interpret(case: Case) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN: an element left unwritten shows
    inputs = tensors(case)
    assert fused.usable(inputs["x"]), "Triton's interpreter is off"
    results = FUNCTIONS[case.name](inputs)
    again = FUNCTIONS[case.name](tensors(case))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "two runs differ"
    return [result.detach() for result in results]


def interpret_all(path: str) -> None:
    torch.set_num_threads(1)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as processes:
        results = dict(zip(map(str, CASES), processes.map(interpret, CASES), strict=True))
    with open(path, "wb") as file:
        steps = {"fp32": step_of(B32, F32, autocast=False), "bf16": step_of(DEEP, F32, autocast=True)}
        pickle.dump({"cases": results, "steps": steps, "saved": saved_by_a_block()}, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreted") / "results.pkl"
    run_interpreted(__file__, path)
    return pickle.loads(path.read_bytes())


@has_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_formula(case, interpreted):
    assert_close(interpreted["cases"][str(case)], case)


@has_triton
def test_a_step_with_kernels_equals_the_step_without(interpreted):
    ours = interpreted["steps"]["fp32"]
    plain = step_of(B32, torch.float64, autocast=False)
    torch.testing.assert_close(ours["loss"].double(), plain["loss"], rtol=1e-5, atol=0)
    for name, gradient in plain["gradients"].items():
        error = (ours["gradients"][name].double() - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name} is off by {error:.1e}"


@has_triton
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 takes 10 % more operators for the same step")
def test_operator_calls_of_a_step_do_not_grow(interpreted):
    """Of a tower as deep as CLIP's B models, whose step was 4,508 calls when each norm, activation and residual add was
    a chain of operators of its own; without Triton it still is. How large a block is does not matter."""
    by_kernels, plain = interpreted["steps"]["bf16"], step_of(DEEP, F32, autocast=True)
    print(by_kernels["calls"], "by kernels,", plain["calls"], "without;", by_kernels["by name"])
    assert by_kernels["calls"] <= 3850
    assert plain["calls"] <= 4100


@has_triton
def test_a_block_saves_the_bytes_that_were_counted_by_hand(interpreted):
    """In channels a token: the stream twice, both norms' outputs, q, k and v, the heads' outputs, and the MLP before
    and after its activation: 2 + 2 + 3 + 1 + 4 + 4 = 16 in bf16, and the log-sum-exp of each head."""
    tokens = 2 * (B32.patches + 1)
    by_hand = 16 * tokens * B32.width * 2 + 4 * tokens * B32.heads
    print(interpreted["saved"], by_hand)
    assert interpreted["saved"] <= 1.02 * by_hand


# --- without Triton ---------------------------------------------------------------------------------------------------


def test_activation_gradients_only_ends_with_its_scope():
    with pytest.raises(KeyError), activation_gradients_only():
        assert fused._activations_only
        raise KeyError
    assert not fused._activations_only


def launches_of_all(dtype: torch.dtype, width: int, heads: int):
    x = torch.empty(2, 50, width, dtype=dtype)
    w = torch.empty(width)
    wide, wide_bias = torch.empty(2, 50, 4 * width, dtype=dtype), torch.empty(4 * width)
    parts = tuple(torch.empty(2, heads, 50, width // heads, dtype=dtype) for _ in range(3))
    return launches_of(
        lambda: [
            fused_kernels.add_norm(x, None, None, w, w, 1e-5),
            fused_kernels.add_norm(x, x, w, w, w, 1e-5),
            fused_kernels.add_norm_backward(x, x, x, w, 1e-5, sums=True),
            fused_kernels.add_norm_backward(x, None, x, w, 1e-5, sums=False),
            fused_kernels.bias_quick_gelu(wide, wide_bias),
            fused_kernels.bias_quick_gelu_backward(wide, wide_bias, wide, sums=True),
            fused_kernels.join(parts, sums=True),
            fused_kernels.join(parts[:2], sums=False),
        ]
    )


@has_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")
def test_kernels_read_and_write_the_bytes_that_were_counted_by_hand():
    """fused_kernels' docstring counts what a block moves a token and channel of its stream; a kernel that is handed one
    activation more moves more."""
    tokens, width = 100, 64

    def bytes_of(call) -> float:
        moved = 0
        for _, arguments, _ in launches_of(call):
            activations = {t.data_ptr(): t.nbytes for t in arguments if isinstance(t, Tensor) and t.dtype == BF16}
            moved += sum(activations.values())
        return moved / (tokens * width)

    def stream(channels: int = width) -> Tensor:
        return torch.empty(2, 50, channels, dtype=BF16)

    w, wide_bias = torch.empty(width), torch.empty(4 * width)
    heads = tuple(torch.empty(2, 2, 50, width // 2, dtype=BF16) for _ in range(3))
    assert 2 * bytes_of(lambda: fused_kernels.add_norm(stream(), stream(), w, w, w, 1e-5)) == 16
    assert 2 * bytes_of(lambda: fused_kernels.add_norm_backward(stream(), stream(), stream(), w, 1e-5, sums=True)) == 16
    assert bytes_of(lambda: fused_kernels.bias_quick_gelu(stream(4 * width), wide_bias)) == 16
    wide = stream(4 * width), wide_bias, stream(4 * width)
    assert bytes_of(lambda: fused_kernels.bias_quick_gelu_backward(*wide, sums=True)) == 24
    assert bytes_of(lambda: fused_kernels.join(heads, sums=True)) == 12


@has_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")
@pytest.mark.parametrize(
    "capability, dtype, width, heads",
    [
        *((capability, BF16, 768, 12) for capability in SHARED_MEMORY),
        *((89, dtype, width, 16) for dtype, width in ((BF16, 1280), (F32, 1024))),  # with the least shared memory
    ],
)
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(capability, dtype, width, heads, tmp_path):
    """The interpreter accepts kernels that the compiler or a GPU refuses."""
    with no_cache(tmp_path):
        for launch in launches_of_all(dtype, width, heads):
            compiled = compile_for(launch, capability)
            assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_a_gpu_equal_the_formula_and_repeat_bitwise(case, poisoned):
    results = FUNCTIONS[case.name](tensors(case, "cuda"))
    assert_close(results, case)
    again = FUNCTIONS[case.name](tensors(case, "cuda"))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_full_sized_batch_equals_the_formula(poisoned):
    case = Case("add-bias-norm", (128, 197, 768), BF16)
    assert_close(FUNCTIONS[case.name](tensors(case, "cuda")), case)


if __name__ == "__main__":
    interpret_all(sys.argv[1])
