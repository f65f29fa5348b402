"""The student in DistributedDataParallel, with the buckets that it keeps from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_NEVER = 2**31 - 1


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP around a model on ``device``, with the buckets that it keeps. Every rank has to call it."""
    student = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    # DDP's own statistics wait for the device, every 100 steps by default.
    student._set_ddp_runtime_logging_sample_rate(_NEVER)
    warm_up_ddp(student)
    return student


def warm_up_ddp(student: DistributedDataParallel) -> None:
    """Make DDP rebuild its buckets before the first step; otherwise it does so after the first step.

    DDP orders its buckets by when gradients were ready in its first backward pass. The place of a gradient in a bucket
    decides in which order the ranks' values are added. Without this, the first step after a resume would add in another
    order than the same step of an uninterrupted run, and the results would differ in their last bits.

    For this pass, the model's forward is replaced by the sum of its parameters. So no layer runs, and torch.compile
    sees no batch of another shape. Gradients are then ready in the reverse order of ``parameters()``, close to that of
    a real backward pass. All gradients are None afterwards."""
    model = student.module

    def sum_of_parameters(_: None) -> Tensor:
        return torch.stack([parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum()

    model.forward = sum_of_parameters
    try:
        student(None).backward()  # DDP expects an argument, which it moves to the device
        with student.no_sync():
            student(None)  # buckets are rebuilt at the beginning of the next forward pass
    finally:
        del model.forward
    student.zero_grad(set_to_none=True)
