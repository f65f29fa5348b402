"""The estimated cost of a plan: GPU-hours, from the measured rate of its runs or an assumed rate; memory and disk."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from cfmask.recipe import Recipe
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.times import duration
from launch.paper import cost
from launch.paper.plan import PaperRow, PlanNode, still_needed, with_needed
from launch.paper.progress import NodeStatus, states_of
from launch.paper.reproduction import Reproduction

GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.1
"""Assumed rate of a rank before one is measured: a third of an A100's peak, and two CPU cores."""


@dataclass(frozen=True)
class RowCost:
    """The cost of a row of the table: of its jobs, and of those that they depend on, without the jobs that rows above
    it need as well."""

    row: PaperRow
    jobs: int
    hours: float
    """GPU-hours (of a rank, on CPUs)."""
    left: float
    """Of these, the hours of jobs that are not done."""
    memory: tuple[float, float] | None
    """Least and most bytes of a GPU's memory, by the number of images at a time; None: no job trains."""
    disk: int
    """Bytes."""

    @property
    def cells(self) -> list[str]:
        """Its line in the table of ``PlanCost``."""
        low, high = self.memory or (None, None)
        memory = "–" if low is None or high is None else size(low) if low == high else f"{size(low)} to {size(high)}"
        return [self.row.label, str(self.jobs), hours_text(self.hours), hours_text(self.left), memory, size(self.disk)]


@dataclass(frozen=True)
class PlanCost:
    """The cost of a plan."""

    rows: tuple[RowCost, ...]
    unit: str
    """Of hours."""
    note: str
    """Sentences: sums, and the assumptions behind them."""

    @property
    def header(self) -> list[str]:
        return ["row", "jobs", self.unit, "left", "memory", "disk"]

    @property
    def lines(self) -> list[list[str]]:
        """The lines of a table: the rows, and their sum."""
        total = ["all rows", str(sum(row.jobs for row in self.rows))]
        total += [hours_text(sum(row.hours for row in self.rows)), hours_text(sum(row.left for row in self.rows))]
        return [*(row.cells for row in self.rows), [*total, "", size(sum(row.disk for row in self.rows))]]

    def __str__(self) -> str:
        lines = [self.header, *self.lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        texts = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in lines
        ]
        return "\n".join(texts) + f"\n\n{self.note}"


def estimate(reproduction: Reproduction, statuses: Mapping[str, NodeStatus], assumed: float | None) -> PlanCost:
    """The cost of each row, and sentences with that of all jobs and of the remaining ones.

    Args:
        assumed: TFLOP/s per rank; None: as measured in the plan's runs, or a constant if none has trained.
    """
    nodes, allocation = reproduction.plan.nodes, reproduction.allocation
    flops = cost.forward_flops(reproduction.start.config)
    images = reproduction.materials.images
    gpu = allocation.gpus_per_node > 0
    rate, basis = _rate(reproduction, flops, assumed)
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
    unit = "GPU-hours" if gpu else "hours of a rank"
    note = (
        f"About {hours_text(sum(spent.values()))} {unit}, of which {hours_text(sum(left.values()))} are left "
        f"({hours_text(training)} of them training); at least {duration(chain * 3600)} from now, if no job has to wait "
        f"for {'GPUs' if gpu else 'cores'}. This assumes {flops / 1e9:.4g} GFLOP for a forward pass of one "
        f"image, the passes of each method's step as tools/bench.py counts them, and {basis}. It does not include "
        "starts, stalls of data loading, and work that is repeated after an interruption. A job that several rows need "
        "counts for the first one. "
    )
    if not gpu and reproduction.arch:
        whole = sum(cost.hours(cost.image_forwards(node, images) * flops, GPU_TFLOPS) for node in nodes.values())
        note += f"GPUs of {GPU_TFLOPS:g} TFLOP/s would take {hours_text(whole)} GPU-hours. "
    return PlanCost(_rows(reproduction, spent, left), unit, note + _about_memory(reproduction))


def _rate(reproduction: Reproduction, flops: float, assumed: float | None) -> tuple[float, str]:
    """TFLOP/s of a rank, and where the number is from."""
    gpu = reproduction.allocation.gpus_per_node > 0
    each = "GPU" if gpu else "rank"
    if assumed is not None:
        return assumed, f"{assumed:g} TFLOP/s per {each} (--tflops)"
    if found := measured(reproduction, flops):
        rate = statistics.median(found.values())
        names = ", ".join(list(found)[:3]) + (" …" if len(found) > 3 else "")
        return rate, f"{rate:.3g} TFLOP/s per {each}, measured in {names}"
    rate = GPU_TFLOPS if gpu else CPU_TFLOPS
    return rate, f"{rate:g} TFLOP/s per {each} (a guess: no run of this plan has trained yet; --tflops sets it)"


def _rows(reproduction: Reproduction, spent: Mapping[str, float], left: Mapping[str, float]) -> tuple[RowCost, ...]:
    nodes = reproduction.plan.nodes
    params = cost.parameters(reproduction.start.config, len(reproduction.start.classes))
    counted: set[str] = set()
    rows = []
    for row in reproduction.plan.rows:
        own = with_needed(nodes, row.found_in) - counted
        counted |= own
        rows.append(
            RowCost(
                row,
                len(own),
                sum(spent[name] for name in own),
                sum(left.get(name, 0.0) for name in own),
                _memory(reproduction, [nodes[name] for name in own]),
                sum(cost.disk(nodes[name], params) for name in own),
            )
        )
    return tuple(rows)


def _memory(reproduction: Reproduction, nodes: list[PlanNode]) -> tuple[float, float] | None:
    config, classes = reproduction.start.config, len(reproduction.start.classes)
    world_size = reproduction.allocation.world_size
    needs = [
        tuple(
            cost.gpu_memory(node.work, config, classes, images)
            for images in cost.images_at_a_time(node.work, world_size)
        )
        for node in nodes
        if isinstance(node.work, Recipe)
    ]
    return (max(low for low, _ in needs), max(high for _, high in needs)) if needs else None


def _about_memory(reproduction: Reproduction) -> str:
    """A sentence about the memory and the disk, whose numbers are in the table."""
    recipes = [node.work for node in reproduction.plan.nodes.values() if isinstance(node.work, Recipe)]
    if not recipes:
        return ""
    low, high = cost.images_at_a_time(recipes[0], reproduction.allocation.world_size)
    at_a_time = f"{low} images at a time" if low == high else f"{low} to {high} images at a time (--micro-batches)"
    kept = "the checkpoints of all epochs" if recipes[0].run.keep_epochs else "the last checkpoints"
    return (
        f"Memory: of each rank's device, with {at_a_time}, in {recipes[0].run.precision}. Disk: models and {kept} "
        f"({'--no-keep-epochs keeps fewer' if recipes[0].run.keep_epochs else '--keep-checkpoints'})."
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


def hours_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else "<0.01" if 0 < value < 0.01 else f"{value:.2g}"


def size(value: float) -> str:
    """Bytes in MB, GB or TB, of two digits or more."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if value >= scale:
            return f"{value / scale:.0f} {unit}" if value >= 10 * scale else f"{value / scale:.1f} {unit}"
    return f"{value / 1e6:.0f} MB" if value >= 1e6 else f"{value / 1e6:.2f} MB" if value else "0"
