"""The arms of the CT-SFT comparison: from the same competent model, what each one lets move.

    circuit      heads found by the method, and the norms            (CT-SFT)
    near_zero    as many heads with scores nearest zero, and norms   (the paper's control)
    least        as many heads with the lowest scores, and norms     (the paper's control)
    random       as many heads in the same layers, and norms
    avoiding     as many heads: of the twice as many most relevant, those that disturb the source task least, and norms
    norms        norms alone: part of every masked arm, and missing from the paper
    lora         LoRA on q, k, v, o of every layer, rank matched to the circuit's number of parameters
    full         every weight, early stopping                        (the paper's runs had no sweep and no stopping)
    l2sp         every weight, pulled towards the start (L2-SP)
    direct       every weight, from the base model: no source stage
    tfidf        word counts and logistic regression: no language model at all
All but the last choose learning rate, strength and epoch on the target's validation set; epoch 0 (untuned) may win.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.heads import Circuit, HeadScores

from .masks import HeadMask
from .tuning import Tuning, finetune


@dataclass(frozen=True)
class Arm:
    """One arm: which heads (None: not a mask), what is swept (rates, L2-SP strengths, the circuit's depth), where it starts."""

    heads: Callable[[Circuit, HeadScores, int], Circuit] | None = None
    rates: tuple[float, ...] = (2e-3, 5e-3)
    anchors: tuple[float, ...] = (0.0,)
    competent: bool = True
    # Controls have as many heads as the deepest circuit.
    every_depth: bool = False


ARMS: dict[str, Arm] = {
    "circuit": Arm(lambda circuit, scores, seed: circuit, rates=(5e-4, 2e-3, 5e-3), every_depth=True),
    "full": Arm(rates=(1e-4, 5e-4, 1e-3)),
    "near_zero": Arm(lambda circuit, scores, seed: Circuit.near_zero(scores, len(circuit))),
    "random": Arm(lambda circuit, scores, seed: circuit.matched_random(seed)),
    "norms": Arm(lambda circuit, scores, seed: circuit - circuit, rates=(5e-3, 1e-2)),
    "lora": Arm(),
    "l2sp": Arm(rates=(5e-4,), anchors=(0.1, 1.0)),
    "avoiding": Arm(lambda circuit, scores, seed: circuit),
    "least": Arm(lambda circuit, scores, seed: Circuit.least(scores, len(circuit))),
    "direct": Arm(rates=(5e-4, 1e-3), competent=False),
    "tfidf": Arm(competent=False),
}


def tune_arm(
    name: str,
    model: Any,
    task: Any,
    validation: Any,
    circuit: Circuit,
    scores: HeadScores,
    *,
    kept: Any,
    lr: float,
    anchor: float,
    seed: int,
    epochs: int,
    batch_size: int,
) -> tuple[Tuning, str]:
    """Tune `model` in place as the arm says. Returns the result and the heads that were trained."""
    options: dict[str, Any] = dict(
        epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, progress=False, validation=validation
    )
    heads = ARMS[name].heads
    if name == "avoiding":
        candidates = scores.top(min(2 * len(circuit), scores.values.numel()))
        mask = HeadMask.avoiding(candidates, kept, model, target_task=task, budget=len(circuit))
    elif heads is not None:
        mask = HeadMask.from_circuit(heads(circuit, scores, seed), model)
    elif name == "lora":
        return tune_lora(model, task, HeadMask.from_circuit(circuit, model).n_parameters, options), ""
    else:
        mask = None
    return finetune(model, task, mask, anchor=anchor, **options), "" if mask is None else str(mask.circuit)


def tune_lora(model: Any, task: Any, budget: int, options: dict[str, Any]) -> Tuning:
    """LoRA on the attention projections of every layer with the rank that comes nearest to `budget` parameters; merged after."""
    import torch
    from peft import get_peft_model

    from circuits import load

    every = Circuit(model.anatomy.heads())
    config = HeadMask.from_circuit(every, model, norms="none").lora_config(r=1)
    names = [f"{name}.weight" for name in config.target_modules or ()]
    per_rank = sum(sum(model.hf.get_parameter(name).shape) for name in names)
    config.r = max(1, round(budget / per_rank))
    config.lora_alpha = 2 * config.r
    with torch.random.fork_rng(devices=[]):  # PEFT draws lora_A from the global generator
        torch.manual_seed(options["seed"])
        wrapped = get_peft_model(model.hf, config)
    result = finetune(load(wrapped, model.tokenizer), task, **options)
    model.hf = wrapped.merge_and_unload()
    model.hf.requires_grad_(True)
    return result


def tfidf(task: Any, validation: Any, test: Any) -> dict[str, Any]:
    """The floor: TF-IDF words and logistic regression on the same examples; its strength chosen on validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer()
    features = vectorizer.fit_transform(task.texts)
    fitted = [LogisticRegression(C=c, max_iter=2000).fit(features, task.labels) for c in (1.0, 10.0, 100.0)]
    reached = [float(np.mean(m.predict(vectorizer.transform(validation.texts)) == validation.labels)) for m in fitted]
    best = int(np.argmax(reached))
    names = list(test.label_words)
    predictions = [names.index(label) for label in fitted[best].predict(vectorizer.transform(test.texts))]
    return {"validation": reached[best], "predictions": predictions, "trained": int(fitted[best].coef_.size)}
