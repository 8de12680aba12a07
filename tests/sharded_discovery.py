"""Run by `test_sharding` in two processes: the same relevance and circuit, each process scoring half of the examples."""

import sys
from pathlib import Path

import torch
from test_discovery import TokenTask

from circuits import discover, load, relevance, sharding

from models import tiny

sharding.start()
model, task = load(tiny("qwen3")), TokenTask(n=5)
scores = relevance(model, task, progress=False)
circuit = discover(model, task, depth=1, per_depth=2, progress=False)
out = Path(sys.argv[1])
name = torch.distributed.get_rank() if sharding.active() else "alone"
torch.save({"examples": scores.examples, "circuit": str(circuit), "mine": len(sharding.share(5))}, out / f"{name}.pt")
