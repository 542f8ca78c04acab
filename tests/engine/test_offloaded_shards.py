"""FSDP2 whose shards lie in host memory, as on a GPU: of torch's fake process group, the mesh is
one of `cuda`, and no GPU is needed. What is kept for the optimizer may not get to its device."""

from __future__ import annotations

from tests.launching import python

STATE_OF_A_CHECKPOINT = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from accum_trainer.engine import fsdp
from accum_trainer.engine.fsdp import FSDPEngine

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False)


def sharded(shard):
    meta = TensorMeta(torch.Size([4, 3]), (3, 1), shard.dtype)
    return DTensor(shard, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


engine = FSDPEngine.__new__(FSDPEngine)
engine.offloaded, engine.accelerator = "all", type("", (), {"device": torch.device("cpu")})
made = []


def distribute(value, mesh, placements):  # to this rank its rows; with a GPU, on it
    made.append(sharded(value[:2]))
    return made[-1]


fsdp.distribute_tensor = distribute
parameter = torch.nn.Parameter(sharded(torch.zeros(2, 3)))
kept = engine._sharded_like(parameter, torch.arange(12.0, dtype=torch.float64).reshape(4, 3))
assert kept.to_local().device.type == "cpu" and kept.device_mesh is mesh
assert kept.to_local().dtype == torch.float64
assert kept.to_local().data_ptr() != made[0].to_local().data_ptr()  # a copy beside the weights
assert kept.to_local().tolist() == [[0, 1, 2], [3, 4, 5]]
print("kept on the host")
"""


def test_optimizer_state_of_a_checkpoint_stays_where_the_shards_lie():
    """Moved to the mesh's device, it would meet weights and gradients in host memory."""
    finished = python("-c", STATE_OF_A_CHECKPOINT, fresh=True)
    assert "kept on the host" in finished.stdout, finished.stderr[-2000:]
