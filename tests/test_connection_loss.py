"""What counts as the loss of a node, for which a job is requeued: a connection that broke in a group that had formed.
The texts are those of torch's own errors; some are provoked here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.state.failure_reports import is_connection_loss

PAIR = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] "
LOSSES = [
    PAIR + "Connection closed by peer [10.0.0.2]:30088. This is typically caused by a remote worker crashing.",
    PAIR + "Read error [10.0.0.2]:5357: Connection reset by peer.",
    PAIR + "Write error [10.0.0.2]:5357: Broken pipe",
    PAIR + "Read error [10.0.0.2]:5357: No route to host",
    "[…/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
    "Application timeout caused pair closure",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "wait timeout after 1800000ms, keys: /default_pg/0//rank 1",
    "NCCL error in: NCCLUtils.hpp:77, remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
]
OWN_FAULTS = [
    "[enforce fail at …/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: ib7",
    "The server socket has failed to listen on any local network address. port: 29500, EADDRINUSE: Address already in "
    "use",
    "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: "
    "This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 "
    "both on CUDA device 5000",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function "
    "failed.\nLast error:\nCuda failure 101 'invalid device ordinal'",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error\nncclSystemError: System call failed.\nLast "
    "error:\nsocketPollConnect: connect to 10.0.0.2<41000> failed: Connection timed out",
    "[…/tcp/pair.cc:500] connect [10.0.0.2]:30088: Connection refused",
    "mat1 and mat2 shapes cannot be multiplied",
    "gloo",
]


@pytest.mark.parametrize("text", LOSSES)
def test_a_connection_that_breaks_is_a_loss_where_the_group_had_formed(text):
    assert is_connection_loss(RuntimeError(text), group_formed=True)
    assert not is_connection_loss(RuntimeError(text), group_formed=False)
    assert not is_connection_loss(ConnectionResetError(text), group_formed=True), "of a download, say"


@pytest.mark.parametrize("text", OWN_FAULTS)
def test_how_a_machine_is_set_up_is_no_loss(text):
    assert not is_connection_loss(RuntimeError(text), group_formed=True)


RANK = """
import datetime, os, pathlib, signal, sys, time
import torch, torch.distributed as dist
from launch.state import failure_reports
from launch.ranks import supervisor
how, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if how == "interface" and rank == 1:
    os.environ["GLOO_SOCKET_IFNAME"] = "none7"
patience = datetime.timedelta(seconds=4)
pathlib.Path(f"{file}-{rank}").touch()
while not pathlib.Path(f"{file}-{1 - rank}").exists():  # which may take longer to import torch than the patience
    time.sleep(0.02)
try:
    store = dist.FileStore(file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    dist.all_reduce(torch.zeros(1))
    if how == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        time.sleep(8)  # silent for longer than rank 0 waits
    dist.all_reduce(torch.zeros(1))
except Exception as error:
    print(failure_reports.is_connection_loss(error, group_formed=supervisor._group_formed()), repr(error), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "losses"),
    [("interface", ["False", "False"]), ("killed", ["True", ""]), ("silent", ["True", None])],
    ids=["an interface that one rank lacks", "a rank is killed", "a rank is silent"],
)
def test_errors_of_a_real_group(tmp_path, how, losses):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, how, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for output, loss in zip(outputs, losses, strict=True):
        assert loss is None or output.partition(" ")[0].strip() == loss, output
