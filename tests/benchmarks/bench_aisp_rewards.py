"""AISP against best-of-n, the ARGS-style search and greedy decoding on three rewards, with a held-out reward beside each.

    python tests/benchmarks/bench_aisp_rewards.py                                   # all three, 20 prompts, 3 seeds, n = 16, 16 rounds
    python tests/benchmarks/bench_aisp_rewards.py --reward rule --n 32 --rounds 32 --no-seconds

The frozen model is stories-260k from ../shared/models (children's stories). Rewards, and the ones only reported:
classifier   log p(positive) of a sentiment classifier (tinystories-656k with a new head, tuned on NusaX English train);
             held out: log p(positive) of TF-IDF + logistic regression fitted on the other NusaX English rows
rule         number of different words that begin with "s"; held out: mean log-likelihood under tinystories-656k
likelihood   mean log-likelihood per token under tinystories-656k; held out: the same under tinystories-3m
"""

import argparse
import csv
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
from interventions import classifier_reward, compare_decoding, likelihood_reward, rowwise  # noqa: E402

PROMPTS = [
    "Once upon a time, there was a", "One day, Tom and Lily went to", "The little dog was very", "Mom said to her son",
    "Sara had a big red ball", "The cat saw a bird and", "In the forest there lived", "Ben liked to play with",
    "It was a rainy day and", "The old man gave the boy", "Anna found a box under", "There was a small bear who",
    "Tim wanted to make a", "The sun was hot and", "A girl named Mia had", "Dad took them to the",
    "The frog jumped into the", "Lucy was sad because", "They opened the door and", "At night the moon was",
]  # fmt: skip


def shared() -> Path | None:
    for place in (os.environ.get("LUTHIER_SHARED"), PROJECT.parent / "shared", PROJECT.parent.parent / "shared"):
        if place and (Path(place) / "models" / "stories-260k").is_dir():
            return Path(place)
    return None


def sentiment_rows(folder: Path, *splits: str) -> tuple[list[str], list[str]]:
    rows = [row for split in splits for row in csv.DictReader((folder / "data/nusax/english" / f"{split}.csv").open())]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def tuned_classifier(folder: Path, epochs: int = 6):
    """tinystories-656k with a classification head, all weights tuned on the 500 training rows."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    labels = ["negative", "neutral", "positive"]
    base = load(str(folder / "models/tinystories-656k"))
    tokenizer = base.tokenizer
    config = LlamaConfig.from_dict({**base.hf.config.to_dict(), "pad_token_id": 0})
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = LlamaForSequenceClassification(config)
    hf.model.load_state_dict(base.hf.model.state_dict())
    texts, gold = sentiment_rows(folder, "train")
    ids = [torch.tensor(tokenizer(text)["input_ids"][:128]) for text in texts]
    target = torch.tensor([labels.index(label) for label in gold])
    optimizer = torch.optim.AdamW(hf.parameters(), lr=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(ids), generator=generator).split(16):
            tokens = torch.nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in batch], batch_first=True)
            loss = torch.nn.functional.cross_entropy(hf(tokens, attention_mask=mask).logits, target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model = load(hf.eval(), tokenizer)
    texts, gold = sentiment_rows(folder, "test")
    reward = torch.stack([classifier_reward(model, label=label)([""] * len(texts), texts) for label in labels])
    accuracy = sum(labels[int(i)] == g for i, g in zip(reward.argmax(0), gold, strict=True)) / len(gold)
    print(f"classifier: accuracy {accuracy:.2f} on {len(gold)} NusaX English test rows")
    return model


def bag_of_words(folder: Path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, gold = sentiment_rows(folder, "valid", "test")
    judge = make_pipeline(TfidfVectorizer(min_df=2), LogisticRegression(C=10, max_iter=500)).fit(texts, gold)
    column = list(judge.classes_).index("positive")

    def reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
        written = [p + r for p, r in zip(prompts, responses, strict=True)]
        return torch.tensor(judge.predict_log_proba(written)[:, column]).float()

    return reward


def words_with_s(_prompt: str, response: str) -> float:
    return float(len({word for word in response.lower().split() if word.startswith("s")}))


def rewards(folder: Path, name: str):
    small = load(str(folder / "models/tinystories-656k"))
    if name == "classifier":
        return classifier_reward(
            tuned_classifier(folder), label="positive", output="log_probability", batch_size=256
        ), bag_of_words(folder)
    if name == "rule":
        return rowwise(words_with_s), likelihood_reward(small)
    return likelihood_reward(small, batch_size=256), likelihood_reward(load(str(folder / "models/tinystories-3m")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="classifier,rule,likelihood")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--no-seconds", action="store_true", help="equal samples only")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--sigma2", type=float, default=0.5)
    parser.add_argument("--standardise", action="store_true")
    parser.add_argument("--target-ess", type=float)
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the reward in the ARGS-style search")
    parser.add_argument(
        "--sampling", type=float, nargs=2, default=(1.0, 1.0), metavar=("T", "TOP_P"), help="of best-of-n"
    )
    args = parser.parse_args()
    folder = shared()
    if folder is None:
        print("skipped: no ../shared/models beside the project")
        return
    model = load(str(folder / "models/stories-260k"))
    for name in args.reward.split(","):
        reward, heldout = rewards(folder, name)
        started = time.process_time()
        result = compare_decoding(
            model, PROMPTS[: args.prompts], reward, heldout=heldout, seeds=range(args.seeds), n=args.n, iterations=args.rounds,
            horizon=args.tokens, equal_seconds=not args.no_seconds, temperature=args.temperature, sigma2=args.sigma2,
            standardise=args.standardise, target_ess=args.target_ess, sampling_temperature=args.sampling[0],
            top_p=args.sampling[1], guidance=args.guidance, progress=False, rows=320,
        )  # fmt: skip
        print(
            f"\n### {name}: {args.prompts} prompts x {args.seeds} seeds, n = {args.n}, {args.rounds} rounds, {args.tokens} tokens\n"
        )
        print(result.table() + "\n\n" + result.statement())
        rounds = torch.stack([part.history["mean_reward"].mean(0) for part in result.runs["AISP"]]).mean(0)
        ess = torch.stack([part.history["ess"].mean(0) for part in result.runs["AISP"]]).mean(0)
        norm = torch.stack([part.history["norm"][:, -1].mean() for part in result.runs["AISP"]]).mean()
        quarters = [0, args.rounds // 4, args.rounds // 2, args.rounds - 1]
        print("mean reward of rounds " + ", ".join(f"{q + 1}: {float(rounds[q]):.2f}" for q in quarters))
        print(f"ESS of these rounds {', '.join(f'{float(ess[q]):.1f}' for q in quarters)}; final |U| {float(norm):.0f}")
        print(f"({time.process_time() - started:.0f} CPU seconds)", flush=True)


if __name__ == "__main__":
    main()
