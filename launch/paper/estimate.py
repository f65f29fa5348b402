"""The estimated GPU-hours of a plan, from the measured rate of its runs or an assumed rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from cfmask.recipe import Recipe
from cfmask.runtime.jsonl import read_lines
from launch.paper import cost
from launch.paper.plan import still_needed
from launch.paper.progress import NodeStatus, states_of
from launch.paper.reproduction import Reproduction

GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.1
"""Assumed rate of a rank before one is measured: a third of an A100's peak, and two CPU cores."""


def estimate(reproduction: Reproduction, statuses: Mapping[str, NodeStatus], assumed: float | None) -> str:
    """Sentences with the GPU-hours of all jobs and of the remaining ones, and the assumptions behind them.

    Args:
        assumed: TFLOP/s per rank; None: as measured in the plan's runs, or a constant if none has trained.
    """
    nodes, allocation = reproduction.plan.nodes, reproduction.allocation
    flops = cost.forward_flops(reproduction.start.config)
    images = {name: manifest.num_samples for name, manifest in reproduction.sets.items()}
    gpu = allocation.gpus_per_node > 0
    unit, each = ("GPU-hours", "GPU") if gpu else ("hours of a rank", "rank")
    found = {} if assumed is not None else measured(reproduction, flops)
    if assumed is not None:
        rate, basis = assumed, f"{assumed:g} TFLOP/s per {each} (--tflops)"
    elif found:
        rate = statistics.median(found.values())
        names = ", ".join(list(found)[:3]) + (" …" if len(found) > 3 else "")
        basis = f"{rate:.3g} TFLOP/s per {each}, measured in {names}"
    else:
        rate = GPU_TFLOPS if gpu else CPU_TFLOPS
        basis = f"{rate:g} TFLOP/s per {each} (a guess: no run of this plan has trained yet; --tflops sets it)"
    spent = {name: cost.hours(cost.image_forwards(node, images) * flops, rate) for name, node in nodes.items()}
    left = {}
    for node in still_needed(reproduction.plan, states_of(statuses)):
        status = statuses[node.name].status
        share = (status.step or 0) / status.total_steps if status.total_steps else 0.0
        left[node.name] = (1 - min(1.0, share)) * spent[node.name]
    ranks = {
        name: allocation.world_size if isinstance(node.work, Recipe) else allocation.tasks_per_node
        for name, node in nodes.items()
    }
    chain = cost.longest_chain(nodes, {name: value / ranks[name] for name, value in left.items()})
    training = sum(value for name, value in left.items() if isinstance(nodes[name].work, Recipe))
    return (
        f"About {_hours(sum(spent.values()))} {unit}, of which {_hours(sum(left.values()))} are left "
        f"({_hours(training)} of them training); at least {_hours(chain)} hours from now, if no job has to wait for "
        f"{'GPUs' if gpu else 'cores'}. This assumes {flops / 1e9:.4g} GFLOP for a forward pass of one image, the "
        f"passes of each method's step as tools/bench.py counts them, and {basis}. It does not include "
        "starts, stalls of data loading, and work that is repeated after an interruption."
    )


def measured(reproduction: Reproduction, flops: float) -> dict[str, float]:
    """TFLOP/s per rank in the plan's training runs on this kind of device, by node name.

    Args:
        flops: of a forward pass of one image (``cost.forward_flops``).
    """
    found = {}
    kind = "cuda" if reproduction.allocation.gpus_per_node else "cpu"
    for name, node in reproduction.plan.nodes.items():
        run = reproduction.folder(name)
        starts = [line for line in read_lines(run.attempts) if str(line.get("device", "")).startswith(kind)]
        rates = [line["samples_per_s"] for line in read_lines(run.log, tail=1 << 16) if "samples_per_s" in line]
        if isinstance(node.work, Recipe) and starts and rates and starts[-1].get("world_size"):
            rate = statistics.median(rates)
            found[name] = cost.rate_of(node.work, rate, starts[-1]["world_size"], flops)
    return found


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
