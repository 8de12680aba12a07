"""Wall clock of AISP against best-of-n at equal samples, same model, prompts, rows and length; the reward costs nothing.

    python tests/benchmarks/bench_aisp.py                        # n = 32, 32 rounds, 24 tokens; 4 prompts at once, then 1
    python tests/benchmarks/bench_aisp.py --prompts 8 --tokens 48

best-of-n runs on the same decoder (shared prefixes, one prefill, rows dropped): once with as many rows per call as AISP has, n * prompts,
and once with up to 1024 rows, which its samples allow and AISP's rounds do not. And once on transformers' own
`generate(num_return_sequences=n)`. The arms take turns; a ratio compares neighbours. CPU seconds of one thread: other work on the machine
does not count in them.
"""

import argparse
import os
import statistics
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
WIDE = 1024
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
                                        max_new_tokens=tokens, pad_token_id=0, max_length=None)  # fmt: skip
            REWARD([prompt] * n, model.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


def timed(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def measured(name: str, model, prompts: list[str], args) -> None:
    """One line per arm: CPU seconds (median), and their ratio to AISP's of the same repeat (median, smallest, largest)."""
    samples, common = args.n * args.rounds, dict(progress=False, max_new_tokens=args.tokens)
    rows = args.n * len(prompts)
    arms = {
        "AISP": lambda: aisp(
            model, prompts, REWARD, n=args.n, iterations=args.rounds, horizon=args.tokens, rows=rows, **common
        ),
        f"best-of-n, {rows} rows": lambda: best_of_n(model, prompts, REWARD, n=samples, rows=rows, **common),
        f"best-of-n, {WIDE} rows": lambda: best_of_n(model, prompts, REWARD, n=samples, rows=WIDE, **common),
    }
    spent = {label: [] for label in arms}
    for _ in range(args.repeats):
        for label, arm in arms.items():
            spent[label].append(timed(arm))
    if len(prompts) == args.prompts:
        spent["transformers generate"] = [timed(lambda: hugging_face(model, prompts, args.n, args.rounds, args.tokens))]
    for label, seconds in spent.items():
        ratios = sorted(a / b for a, b in zip(spent["AISP"], seconds, strict=False))
        ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        line = [name, len(prompts), label, samples * len(prompts), f"{statistics.median(seconds):.1f}", ratio]
        print(f"| {' | '.join(map(str, line))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", default="pocket,stories-260k")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | prompts | method | samples | CPU s | AISP / method, median [min, max] |\n|---|---|---|---|---|---|"
    )
    for name, prompts in models().items():
        if Path(name).name in args.models.split(","):
            model = load(name)
            for count in sorted({args.prompts, 1}, reverse=True):
                measured(Path(name).name, model, prompts[:count], args)


if __name__ == "__main__":
    main()
