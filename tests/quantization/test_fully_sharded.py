"""QuEST's layers in pieces on two processes (torch's FSDP2, on CPUs): trained as they are in one piece."""

import pytest
import torch

from hfnoise import QuestConfig, prepare_qat
from tests.quantization.tiny_models import llama


def model():
    torch.manual_seed(0)
    return prepare_qat(llama(), QuestConfig(weight_bits=1, activation_bits=4)).train()


def trained(model, ids):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def check():
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    plain, sharded = model(), model()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh)
    ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(1))
    own = ids[2 * state.process_index : 2 * state.process_index + 2]
    for found, wanted in zip(trained(sharded, own), trained(plain, ids), strict=True):
        # Sums of gradients in another order, after Adam, whose steps are of 1e-3 whatever the size of a gradient.
        assert (found.full_tensor() - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_fully_sharded(two_processes):
    two_processes(check)
