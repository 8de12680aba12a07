"""Two gloo processes started by torchrun (what `accelerate launch` uses) against one."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def test_two_processes_give_the_scores_of_one(tmp_path):
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [str(HERE / "sharded_discovery.py"), str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for command in ([sys.executable, *script], [*launch, *script]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "0", "1"))
    assert (first["mine"], second["mine"], alone["mine"]) == (2, 3, 5)
    assert torch.equal(first["examples"], second["examples"]) and first["circuit"] == second["circuit"]
    torch.testing.assert_close(first["examples"], alone["examples"], atol=1e-6, rtol=1e-5)
    assert first["circuit"] == alone["circuit"]
