"""Run by test_dropin.py under `accelerate launch`: DDP or FSDP2 as the launcher says; writes every rank's final weights."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from test_dropin import collate, rows, setting
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from interventions.restriction import gathered, restrict

accelerator = Accelerator()
model, mask = setting()
with restrict(model, mask) as restricted:
    optimizer = torch.optim.AdamW(restricted.parameters(), lr=1e-2, weight_decay=0.1)
    if sys.argv[2] == "fsdp2":
        # accelerate shards on accelerators only; on CPU it leaves the model whole without a word, so torch does it here.
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for layer in model.hf.model.layers:
            fully_shard(layer, mesh=mesh)
        hf = fully_shard(model.hf, mesh=mesh)
        optimizer = torch.optim.AdamW(restricted.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        hf, optimizer = accelerator.prepare(model.hf, optimizer)
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in hf.parameters())
    print(f"{sharded} sharded of {sum(1 for _ in hf.parameters())}", flush=True)
    for step in range(3):
        rank = accelerator.process_index
        batch = collate(rows(8, seed=step)[2 * rank : 2 * rank + 2])
        hf(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
print(restricted.proof(), flush=True)
save_file(
    {name: gathered(p.detach()).contiguous() for name, p in model.hf.named_parameters()},
    Path(sys.argv[1]) / f"rank{accelerator.process_index}.safetensors",
)
