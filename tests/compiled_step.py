"""Run by test_dropin.py without run-time type checks, which a tracer cannot follow: one compiled step equals the plain one."""

import shutil
import sys

import torch
from test_dropin import collate, rows, setting

from interventions.restriction import restrict

# Inductor needs a C++ compiler on the CPU and most of a minute, so one family has it; aot_eager traces forward and backward alike.
BACKEND = "inductor" if sys.argv[1] == "llama" and shutil.which("g++") else "aot_eager"
results = []
for compiled in (False, True):
    model, mask = setting(sys.argv[1])
    with restrict(model, mask) as restricted:
        run = torch.compile(model.hf, backend=BACKEND) if compiled else model.hf
        loss = run(**collate(rows(4))).loss
        loss.backward()
        results.append([loss, *(p.grad for p in restricted.parameters())])
        optimizer = torch.optim.AdamW(restricted.parameters(), lr=1e-2)
        optimizer.step()
        results[-1].append(run(**collate(rows(4))).loss)
for plain, traced in zip(*results, strict=True):
    torch.testing.assert_close(plain, traced, rtol=1e-4, atol=1e-6)
print("equal", restricted.proof(), BACKEND)
