"""The student in DistributedDataParallel, with the buckets that it keeps from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_NEVER = 2**31 - 1


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A model on ``device`` whose gradients are averaged over the ranks; parameters without ``requires_grad`` take no
    part. Every rank has to call it."""
    student = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    # DDP's own statistics wait for the device, in each 100th step by default.
    student._set_ddp_runtime_logging_sample_rate(_NEVER)
    warm_up_ddp(student)
    return student


def warm_up_ddp(student: DistributedDataParallel) -> None:
    """Let DDP arrange its buckets anew before the first step, as it otherwise does after it.

    DDP fixes its buckets in the order in which gradients were ready in the first backward pass that it saw. Where in a
    bucket a gradient lies decides in which order the ranks' values are added. Without this, the first step after a
    resume would add in another order than the same step of a run that was not interrupted, and their last bits would
    differ.

    The pass runs through no layer of the model: for its time the model's forward is the sum of its parameters. So
    nothing is compiled, and what is compiled later has never seen a batch of another shape. Gradients are ready in the
    reverse order of ``parameters()`` then, which is close to the order of a real backward pass: later layers first.
    All gradients are None afterwards.
    """
    model = student.module

    def sum_of_parameters(_: None) -> Tensor:
        return torch.stack([parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum()

    model.forward = sum_of_parameters
    try:
        student(None).backward()  # None: DDP moves the arguments to the device, and expects one
        with student.no_sync():
            student(None)  # the buckets are made anew where the next forward pass begins
    finally:
        del model.forward
    student.zero_grad(set_to_none=True)
