"""Wall clock of AISP against best-of-n at equal samples, same model, prompts, rows and length; the reward costs nothing.

    python tests/benchmarks/bench_aisp.py            # n = 32, 32 rounds, 4 prompts at once, 24 tokens
    python tests/benchmarks/bench_aisp.py --prompts 1 --tokens 48

best-of-n runs on the same decoder (shared prefixes, one prefill, rows dropped), with as many rows per call, and on transformers' own
`generate(num_return_sequences=n)`. CPU seconds are given beside wall seconds: other work on the machine does not count in them.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402

from circuits import load  # noqa: E402
from interventions import aisp, best_of_n, rowwise  # noqa: E402

STORIES = [
    "Once upon a time, there was a",
    "One day, Tom and Lily went to",
    "The little dog was very",
    "Mom said to her son",
]
REWARD = rowwise(lambda _prompt, response: float(len(response)))


def models() -> dict[str, list[str]]:
    from circuits.pocket import world

    starts = [" ".join(row["text"].split()[:4]) for row in world.sentiment("english", 4, seed=1, split="test")]
    found = {"pocket": starts}
    for place in (os.environ.get("LUTHIER_SHARED"), PROJECT.parent / "shared", PROJECT.parent.parent / "shared"):
        for name in ("stories-260k", "tinystories-3m"):
            if place and (Path(place) / "models" / name).is_dir():
                found[str(Path(place) / "models" / name)] = STORIES
    return found


def hugging_face(model, prompts: list[str], n: int, rounds: int, tokens: int) -> None:
    """What one would write without this library: n sequences per call, one prompt after the other."""
    for prompt in prompts:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        for round_ in range(rounds):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(round_)
                out = model.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=n,
                                        max_new_tokens=tokens, pad_token_id=0)  # fmt: skip
            REWARD([prompt] * n, model.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


def timed(function) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", default="pocket,stories-260k")
    args = parser.parse_args()
    print("| model | method | samples | wall s | CPU s | of best-of-n (CPU) |\n|---|---|---|---|---|---|")
    for name, prompts in models().items():
        if Path(name).name not in args.models.split(","):
            continue
        model, prompts = load(name), prompts[: args.prompts]
        rows, options = args.n * len(prompts), dict(progress=False, max_new_tokens=args.tokens)
        methods = {
            "best-of-n": lambda m=model, p=prompts, r=rows, o=options: best_of_n(
                m, p, REWARD, n=args.n * args.rounds, rows=r, **o
            ),
            "AISP": lambda m=model, p=prompts, r=rows, o=options: aisp(
                m, p, REWARD, n=args.n, iterations=args.rounds, horizon=args.tokens, rows=r, **o
            ),
            "transformers generate": lambda m=model, p=prompts: hugging_face(m, p, args.n, args.rounds, args.tokens),
        }
        best = {label: (float("inf"), float("inf")) for label in methods}
        for _ in range(args.repeats):  # alternated, so that a slow minute of the machine falls on every method
            for label, method in methods.items():
                best[label] = min(best[label], timed(method), key=lambda pair: pair[1])
        for label, (wall, cpu) in best.items():
            ratio = cpu / best["best-of-n"][1]
            samples = args.n * args.rounds * len(prompts)
            print(f"| {Path(name).name} | {label} | {samples} | {wall:.1f} | {cpu:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
