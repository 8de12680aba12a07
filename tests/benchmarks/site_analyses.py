"""What SITE's alphas mean on the pocket model: every analysis of the page, from one command.

    python tests/benchmarks/site_analyses.py [--tasks opposite,uppercase,...] [--seeds 5]

1. seeds     do other batches give the same alpha? rank correlation, Jaccard, held-out loss; how near to 0 or 1 it ends
2. nulls     the same with permuted answers, and with another task's embedding
3. curve     accuracy of the k highest, k lowest and k random heads, injected hard
4. transfer  heads of one task with the embedding and the rows of another
5. leave-one-out, roles, and rank agreement with other ways to score a head, contextual decomposition among them

Heads are chosen on training rows and scored on test rows that nothing was fitted on. Intervals are 95 % bootstrap.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import (
    alpha_curve,
    head_roles,
    indirect_effect,
    leave_one_out,
    load,
    null_selections,
    pocket,
    relevance,
    slope,
    task_embedding,
    transfer_matrix,
)
from circuits.alphas import bootstrap

TASKS = ("opposite", "uppercase", "plural", "english_vela", "next", "fruit_of_3", "animal_of_3")
TEST_ROWS = 60
PULLS = (0.01, 0.1, 1.0)


def saturated(alpha: torch.Tensor) -> float:
    """Share of alphas below 0.1 or above 0.9."""
    return ((alpha < 0.1) | (alpha > 0.9)).float().mean().item()


def interval(values, form: str = ".3f") -> str:
    middle, low, high = bootstrap(torch.as_tensor(values))
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def lines(header: list[str], rows: list[list[str]], title: str) -> None:
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def fits(model, train, embeddings, names, steps, seeds):
    """Per task the three fits: its own, permuted labels, another task's embedding (the next task of the list)."""
    found = {}
    for number, name in enumerate(names):
        other = embeddings[names[(number + 1) % len(names)]]
        found[name] = null_selections(
            model, train[name], embeddings[name], other, steps=steps, seeds=seeds, validate_every=20, progress=False
        )
    return found


def seeds_and_nulls(found, names) -> None:
    kinds = ("task", "permuted labels", "mismatched embedding")
    rows = []
    for name in names:
        cells = [name]
        for kind in kinds:
            fit = found[name][kind]
            agreement = fit.agreement()
            loss = f"{fit.curve[0].mean():.2f} → {fit.validation.mean():.2f}"
            cells.append(
                f"{loss} / {agreement['spearman']:.2f} / {agreement['jaccard']:.2f} / {saturated(fit.examples):.2f}"
            )
        rows.append(cells)
    title = "Seeds and nulls: held-out loss, α = 0.5 → checkpoint / Spearman / Jaccard of α > 0.5 / share of α outside [0.1, 0.9]"
    lines(["mapping", *kinds], rows, title)
    for kind in kinds:
        agreements = [found[name][kind].agreement()["spearman"] for name in names]
        print(f"{kind}: mean Spearman between seeds {interval(agreements, '.2f')} over mappings")


def curves(model, test, embeddings, selections, names) -> None:
    found = {name: alpha_curve(model, test[name], embeddings[name], selections[name], random=10) for name in names}
    sizes = found[names[0]].sizes
    rows = []
    for number, size in enumerate(sizes):
        top, bottom = (
            [getattr(found[n], which)[number].float().mean().item() for n in names] for which in ("top", "bottom")
        )
        draws = torch.stack([found[n].random[number].float().mean(-1) for n in names]).mean(0)
        rows.append(
            [str(size), interval(top), interval(bottom), f"{draws.mean():.3f} [{draws.min():.3f}, {draws.max():.3f}]"]
        )
    lines(
        ["k", "top-k of α", "bottom-k", "random k: mean [min, max of 10 draws]"],
        rows,
        "Accuracy against k, mean over mappings",
    )
    for label in ("soft", "clean"):
        values = [getattr(found[name], label).float().mean().item() for name in names]
        print(f"{label}: {interval(values)}")


def transfers(model, test, embeddings, selections, names) -> None:
    found = transfer_matrix(model, test, embeddings, selections)
    rows = [[name, *(f"{value:.2f}" for value in found.accuracy[row])] for row, name in enumerate(names)]
    rows.append(["no injection", *(f"{value:.2f}" for value in found.clean)])
    lines(["heads of \\ embedding and rows of", *names], rows, "Transfer: first-token accuracy")
    away = ~torch.eye(len(names), dtype=torch.bool)
    print(f"diagonal {found.accuracy.diagonal().mean():.3f}, off it {found.accuracy[away].mean():.3f}; cosine of the alphas off "
          f"the diagonal {found.cosine[away].mean():.2f}, Jaccard {found.jaccard[away].mean():.2f}")  # fmt: skip


def single_heads(model, train, test, embeddings, selections, names) -> None:
    first, second, correlations = [], [], []
    for name in names:
        few = (model, test[name], embeddings[name])
        left_out = leave_one_out(*few, selections[name])
        low, high = left_out.interval()
        best, alpha = left_out.rank()[0], selections[name].alpha
        rise = f"{left_out[best]:+.2f} [{low[best]:+.2f}, {high[best]:+.2f}]"
        helps, hurts = str(int((low > 0).sum())), str(int((high < 0).sum()))
        first.append([name, str(best), rise, f"{alpha[best]:.2f}", helps, hurts])
        pairs = train[name].paired(30, 5)
        others = {
            "leave-one-out": left_out,
            "slope": slope(model, train[name], embeddings[name]),
            "indirect effect": indirect_effect(model, train[name], embeddings[name], n_shots=5, n_prompts=25),
            "CD-T, zero means": relevance(model, pairs, means="zero", progress=False),
            "CD-T, task means": relevance(model, pairs, means="task", progress=False),
        }
        correlations.append({label: selections[name].correlation(scores) for label, scores in others.items()})
        second.append([name, *(f"{c['spearman']:+.2f} / {c['top10']:.1f}" for c in correlations[-1].values())])
    header = [
        "mapping",
        "costliest head",
        "rise of the loss without it (nats)",
        "its α",
        "heads that help",
        "heads that hurt",
    ]
    lines(header, first, "Leave one head out (32 heads; help and hurt: interval beyond 0)")
    title = "Mean α of the seeds against other scores: Spearman / share of the top ten in common (0.31 by chance)"
    lines(["mapping", *correlations[0]], second, title)
    means = {label: interval([c[label]["spearman"] for c in correlations], "+.2f") for label in correlations[0]}
    print("mean Spearman over mappings: " + "; ".join(f"{label} {value}" for label, value in means.items()))


def head_kinds(model, train, embeddings, names, steps) -> None:
    """How many heads each role gets, for a weak, a middling and a strong pull."""
    rows = []
    for name in names:
        cells = [name]
        for pull in PULLS:
            found = head_roles(
                model, train[name], embeddings[name], chg=pull, steps=steps, validate_every=20, progress=False
            )
            counts = [int((getattr(found, role).values > 0.5).sum()) for role in ("needed", "harmful", "indifferent")]
            best = found.needed.rank()[0]
            cells.append(f"{' / '.join(map(str, counts))} ({best})")
        rows.append(cells)
    header = ["mapping", *(f"pull {pull:g}" for pull in PULLS)]
    lines(header, rows, "Roles: heads over 0.5 that are needed / harmful / indifferent (the most needed one)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, names, model = time.process_time(), arguments.tasks.split(","), load("pocket")
    train, test, embeddings = {}, {}, {}
    for name in names:
        task = pocket.fewshot_task(name)
        test[name], train[name] = task.split(min(TEST_ROWS, len(task) // 3), 0)
        embeddings[name] = task_embedding(model, train[name], n_prompts=30, n_shots=10, progress=False)
    found = fits(model, train, embeddings, names, arguments.steps, arguments.seeds)
    selections = {name: found[name]["task"] for name in names}
    print(f"pocket, {len(names)} mappings, {arguments.seeds} seeds of {arguments.steps} steps, test rows "
          + ", ".join(f"{name} {len(test[name])}" for name in names))  # fmt: skip
    seeds_and_nulls(found, names)
    curves(model, test, embeddings, selections, names)
    transfers(model, test, embeddings, selections, names)
    head_kinds(model, train, embeddings, names, arguments.steps)
    single_heads(model, train, test, embeddings, selections, names)
    print(f"\n({time.process_time() - started:.0f} CPU seconds)")


if __name__ == "__main__":
    main()
