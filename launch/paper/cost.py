"""The cost of a plan: FLOPs of steps and evaluations, and the GPU-hours that they take at a given rate. Pure.

F is the cost of one forward pass of the image tower. Matrix products are counted, as by tools/bench.py; starts of jobs,
reading, checkpoints, and the text tower of the zero-shot head are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfmask.data.plan import steps_per_epoch
from cfmask.evaluation_spec import Evaluation
from cfmask.models.architecture import VISION_DEFAULTS, image_size_of, patch_size_of
from cfmask.recipe import Method, Recipe
from launch.paper.plan import PlanNode

# In F, as counted on ViT-B/16. The head reads the class token only, so the last block is cheaper than the others.
_FORWARD = 0.93
_TRAINED = 2.80
_CAM = {"relevance": 0.99, "grad-cam": 0.06}


def step_forwards(method: Method) -> float:
    """F per image of a training step of a resolved method. With a CAM mask and no fill, patches are dropped, and their
    number depends on the images: then this is an upper bound."""
    if method.name == "linear-probe":
        return _FORWARD
    kept = 1 - (method.rate or 0.0) if method.mask == "random" and method.fill == "no-fill" else 1.0
    total = _TRAINED
    if method.name == "wise-kd":
        total += _FORWARD  # the ensemble's, of the clean images
    if method.by_cam and method.distils:
        total += _CAM[method.cam or "relevance"]
    if method.masked:
        total += kept * (_FORWARD + _TRAINED)
    elif method.distils:
        total += _FORWARD
    return total


def forward_flops(config: Mapping[str, Any]) -> float:
    """F of an open_clip ViT configuration, in FLOPs per image; a multiply-add counts as two."""
    vision = {**VISION_DEFAULTS, **config["vision_cfg"]}
    width, layers, patch = vision["width"], vision["layers"], patch_size_of(config)
    patches = (image_size_of(config) // patch) ** 2
    tokens = patches + 1
    block = tokens * (4 + 2 * vision["mlp_ratio"]) * width**2 + 2 * tokens**2 * width
    return 2 * (patches * 3 * patch**2 * width + layers * block + width * config["embed_dim"])


def image_forwards(node: PlanNode, images: Mapping[str, int]) -> float:
    """F of all of a node's images.

    Args:
        images: number of images by set.
    """
    work = node.work
    if isinstance(work, Evaluation):
        return work.num_candidates * sum(images[name] for name in work.sets)
    optim = work.optim
    an_epoch = optim.batch_size * steps_per_epoch(images[work.data.train_split], optim.batch_size)
    trained = an_epoch * optim.epochs * step_forwards(work.method)
    trained += an_epoch * (optim.probe_epochs or 0) * _FORWARD
    return trained + optim.total_epochs * sum(images[name] for name in work.data.eval_sets)


def hours(flops: float, tflops: float) -> float:
    """GPU-hours at this rate per GPU."""
    return flops / (tflops * 1e12) / 3600


def rate_of(recipe: Recipe, samples_per_s: float, world_size: int, flops: float) -> float:
    """TFLOP/s per rank of a run with this throughput. flops: F in FLOPs."""
    return samples_per_s * step_forwards(recipe.method) * flops / world_size / 1e12


def longest_chain(nodes: Mapping[str, PlanNode], cost: Mapping[str, float]) -> float:
    """The cost of the most expensive chain of dependent nodes: the time that the plan takes if all else runs in
    parallel.

    Args:
        nodes: in order.
        cost: of the nodes that are not done.
    """
    ends: dict[str, float] = {}
    for node in nodes.values():
        before = max((ends[name] for name in node.after if name in ends), default=0.0)
        ends[node.name] = before + cost.get(node.name, 0.0)
    return max(ends.values(), default=0.0)


# --- memory and disk --------------------------------------------------------------------------------------------------


def parameters(config: Mapping[str, Any], classes: int) -> int:
    """Number of parameters of an open_clip ViT's image tower and a linear head for this many classes."""
    vision = {**VISION_DEFAULTS, **config["vision_cfg"]}
    width, layers, patch, dim = vision["width"], vision["layers"], patch_size_of(config), config["embed_dim"]
    tokens = (image_size_of(config) // patch) ** 2 + 1
    hidden = int(vision["mlp_ratio"] * width)
    attention, mlp, norm = 4 * width * (width + 1), 2 * width * hidden + width + hidden, 2 * width
    block = attention + mlp + 2 * norm
    ends = 3 * patch**2 * width + (1 + tokens) * width + (1 if vision["no_ln_pre"] else 2) * norm + width * dim
    return ends + layers * block + (dim + 1) * classes


def gpu_memory(recipe: Recipe, config: Mapping[str, Any], classes: int, images: int) -> float:
    """Bytes of a GPU that a training step needs.

    Each parameter takes 16 bytes (weight, gradient, two moments), 2 more in bf16, and 4 for each frozen teacher. Each
    image of a micro-batch takes 34 bytes (bf16) or 66 for each token, channel and block; with recomputed activations,
    for two blocks, and the inputs of the others. This is within 10 % of what docs/benchmarks.md reports. DDP's buckets
    (4 bytes for each parameter) and CUDA's own memory are not included.

    Args:
        images: of a micro-batch on this GPU.
    """
    vision = {**VISION_DEFAULTS, **config["vision_cfg"]}
    bf16 = recipe.run.precision == "bf16"
    teachers = recipe.method.distils + (recipe.method.name == "wise-kd")
    fixed = (16 + 2 * bf16 + 4 * teachers) * parameters(config, classes)
    tokens = (image_size_of(config) // patch_size_of(config)) ** 2 + 1
    layers = vision["layers"]
    of_tokens = (34 if bf16 else 66) * layers
    if recipe.run.activation_checkpointing:
        of_tokens = (34 if bf16 else 66) * min(2, layers) + (2 if bf16 else 4) * layers
    return fixed + images * of_tokens * tokens * vision["width"]


def images_at_a_time(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """The smallest and the largest number of images of a micro-batch on one rank; they differ if --micro-batches auto
    has yet to choose."""
    optim = recipe.optim
    share = optim.batch_size // world_size
    if optim.is_open_for(world_size):
        return optim.batch_size // optim.lanes, share
    return share // optim.num_micro_batches, share // optim.num_micro_batches


def disk(node: PlanNode, params: int) -> int:
    """Bytes of a node's folder once it is finished, without logs: model files of 4 bytes for each parameter, and
    checkpoints of 12 (with both moments)."""
    work = node.work
    if isinstance(work, Evaluation):
        return 4 * params if work.make != Evaluation.make else 0
    epochs = work.optim.total_epochs if work.run.keep_epochs else 0
    best = 1 if work.run.best_on is not None and not work.run.keep_epochs else 0
    # The last checkpoint is an epoch's end as well.
    checkpoints = epochs + best + work.run.keep_checkpoints - (1 if epochs else 0)
    models = 2 + (work.method.name == "wise-kd")
    return (12 * checkpoints + 4 * models) * params
