"""What tests/lean keeps from being imported is imported when it is used."""

from __future__ import annotations

import subprocess
import sys

from made import REPO

PROGRAM = """
import sys

import torch

import cfmask.training.train
from cfmask.data import imagenet

parameter = torch.nn.Parameter(torch.ones(1))
torch.use_deterministic_algorithms(True)
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
optimizer.zero_grad()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
assert len(imagenet.wnids()) == 1000, "timm's data is found"
late = {"torchvision.transforms", "open_clip.factory", "torch.export.exported_program"}
late |= {"timm.models", "wandb", "torch._dynamo.config", "torch._inductor.utils", "transformers"}
print(*(late & sys.modules.keys()))

graphs = []
print(torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph)(torch.ones(1)).item())
import timm.models.vision_transformer
import torch._dynamo.config

print(len(graphs), timm.layers.Mlp(2)(torch.ones(1, 2)).shape[1])
assert timm.models.vision_transformer is sys.modules["timm.models.vision_transformer"]
import torch._inductor.utils
assert torch._inductor.config.deterministic and torch._inductor.config is sys.modules["torch._inductor.config"]
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.config.recompile_limit
import open_clip
import torchvision

assert open_clip.transformer is sys.modules["open_clip.transformer"] and open_clip.get_model_config("ViT-B-32")
assert open_clip.utils.FrozenBatchNorm2d(3) and torchvision.transforms.Compose([])
assert torch.Generator().manual_seed(0)
try:
    import transformers
except ImportError as error:
    print(error)
"""


def test_what_is_not_imported_at_the_start_is_imported_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hidden = "transformers is hidden from the processes of these tests (tests/lean)"
    assert done.stdout.splitlines() == ["", "2.0", "1 2", hidden]
