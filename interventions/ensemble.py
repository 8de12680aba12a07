"""`RenyiEnsemble`: members that may disagree when the data does.

1. M LoRA members on one frozen base model (`lora.py`), each with its own start;
2. `fit`: labelled task, texts, prompt/completion rows or preference pairs -> s [member, batch] -> ℓ_α (`renyi.py`,
   `coupled.py`);
3. `predict`, `score`, `generate`: mixtures, votes, and how far members disagree (`uncertainty.py`);
4. `save`: every member is an ordinary PEFT adapter directory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.files import fingerprint, read_json, write_json

from .coupled import Settings, TrainingLog, train
from .examples import Examples, after_texts, from_pairs, from_rows, from_task, is_task
from .likelihood import Objective, combine, member_logits, reference_margins, token_values
from .lora import StackedLoRA
from .mixing import Generation, generate
from .renyi import _check, responsibilities
from .targets import confine
from .uncertainty import Prediction, SequenceScores, responsibility_entropy


class RenyiEnsemble:
    """Ensemble of LoRA adapters trained with the α-Rényi objective.

    `model`: from `circuits.load`, or a plain Hugging Face model (with `tokenizer=` for text). `alpha`: 0 independent
    members, 1 mixture, 0.8 as in the paper's experiments. `lora_alpha` defaults to 2 r, `target_modules` to PEFT's
    choice for the architecture; `circuit` confines every member to the rows and columns of its heads.
    """

    def __init__(
        self,
        model: Any,
        members: int = 8,
        alpha: float | int = 0.8,
        r: int = 8,
        target_modules: Sequence[str] | str | None = None,
        *,
        lora_alpha: float | int | None = None,
        layers: Sequence[int] | None = None,
        circuit: Any = None,
        kv: str = "shared",
        dropout: float = 0.0,
        seed: int = 0,
        tokenizer: Any = None,
    ):
        _check(torch.zeros(1, 1), alpha)
        self.model = model
        self.hf = getattr(model, "hf", model)
        if not isinstance(self.hf, torch.nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected what circuits.load returns, or a torch model")
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        self.alpha, self.seed = alpha, seed
        self.circuit, self.kv, self.layers = circuit, kv, layers
        keep = None if circuit is None else confine(model, circuit, kv)
        self.stack = StackedLoRA(self.hf, members, r, lora_alpha, target_modules, layers, keep, dropout, seed)
        self.stack.eval()
        self.task: Any = None
        self.settings: dict[str, Any] = {}
        self.log: TrainingLog = TrainingLog()

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(repr(self))}</pre>"

    def __repr__(self) -> str:
        stack = self.stack
        state = (
            f"fitted for {len(self.log.steps)} steps" if self.log.steps else "fitted" if self.settings else "not fitted"
        )
        return (
            f"RenyiEnsemble({stack.members} members, alpha {self.alpha:g}, r {stack.r}, {len(stack.names)} layers of "
            f"{type(self.hf).__name__}; {state})"
        )

    @property
    def members(self) -> int:
        return self.stack.members

    # training

    def fit(self, data: Any, settings: Settings | None = None, accelerator: Any = None, **options: Any) -> TrainingLog:
        """Train on a labelled task, texts, prompt/completion rows or preference pairs; `options` as in `Settings`.

        Returns the log (also `self.log`): one row per step and responsibilities [member, example].
        """
        settings = replace(settings or Settings(), **options)
        self.hf.eval()
        if accelerator is not None:
            self.hf.to(accelerator.device)
            self.stack.to(accelerator.device)
        objective = self._objective(data, settings.likelihood, settings.beta, settings.batch_size, settings.max_length)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # dropout masks
            self.log = train(objective, self.alpha, settings, accelerator)
        self.settings = asdict(settings)
        return self.log

    def _objective(
        self, data: Any, form: str, beta: float | int = 0.1, batch_size: int = 8, max_length: int | None = None
    ) -> Objective:
        if is_task(data):
            self.task = data
            return Objective(self.hf, self.stack, from_task(self._loaded(), data)[0], form)
        rows = list(data)
        if rows and isinstance(rows[0], Mapping) and "chosen" in rows[0]:
            pairs = from_pairs(rows, self.tokenizer, max_length)
            reference = reference_margins(self.hf, pairs, batch_size)
            return Objective(self.hf, self.stack, pairs, "sequence", reference, beta)
        return Objective(self.hf, self.stack, from_rows(rows, self.tokenizer, max_length), form)

    def _loaded(self) -> Any:
        """Tasks are encoded by `circuits.Model`."""
        if not hasattr(self.model, "anatomy"):
            from circuits import load

            self.model = load(self.hf, self.tokenizer)
        return self.model

    # reading

    @torch.no_grad()
    def log_likelihood(
        self, data: Any, batch_size: int = 16, likelihood: str = "sequence", beta: float | int | None = None
    ) -> Float[Tensor, "member example"]:
        """s of labelled data, as in training."""
        task = self.task
        beta = float(self.settings.get("beta", 0.1)) if beta is None else beta
        objective = self._objective(data, likelihood, beta, batch_size)
        self.task = task or self.task
        parts = []
        for rows in torch.arange(len(objective)).split(batch_size):
            with objective.forward(rows) as s:
                parts.append(s.cpu())
        return torch.cat(parts, 1)

    def responsibilities(self, data: Any, batch_size: int = 16) -> Float[Tensor, "member example"]:
        """Who answers for which labelled example."""
        return responsibilities(self.log_likelihood(data, batch_size), self.alpha)

    def responsibility_entropy(self, data: Any, batch_size: int = 16) -> Float[Tensor, " example"]:
        """Entropy of responsibilities per labelled example: low where the data is in conflict or contaminated."""
        return responsibility_entropy(self.log_likelihood(data, batch_size), self.alpha)

    @torch.no_grad()
    def predict(self, data: Any, combine: str = "mixture", batch_size: int = 16) -> Prediction:
        """Probabilities for texts or a labelled task. After fitting on a task: its labels; otherwise the next token.

        `combine`: "mixture" or "vote". One token is predicted, so token and sequence mixture are the same; they differ
        in `score` and `generate`.
        """
        if combine not in ("mixture", "vote"):
            raise ValueError(f"combine={combine!r}; expected mixture or vote")
        task = data if is_task(data) else self._ask(data)
        if task is None:
            rows = [data] if isinstance(data, str) else list(data)
            examples = after_texts(rows, self.tokenizer)
            return Prediction(self._probabilities(examples, None, batch_size), (), combine)
        if not hasattr(task, "label_words"):
            raise ValueError(
                f"predict answers labelled tasks and texts; got {type(task).__name__}: use score on its rows"
            )
        examples, columns = from_task(self._loaded(), task)
        gold = None if task is not data else task.encode(self._loaded()).gold.cpu()
        return Prediction(self._probabilities(examples, columns, batch_size), tuple(task.label_words), combine, gold)

    def _ask(self, texts: Any) -> Any:
        """The fitted task's question about other texts; their labels are placeholders."""
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        if self.task is None:
            return None
        return replace(self.task, texts=texts, labels=(next(iter(self.task.label_words)),) * len(texts))

    def _probabilities(
        self, examples: Examples, columns: Tensor | None, batch_size: int
    ) -> Float[Tensor, "member example column"]:
        device, parts = next(self.hf.parameters()).device, []
        self.hf.eval()
        with self.stack.attached(self.hf) as repeat:
            for rows in torch.arange(len(examples)).split(batch_size):
                batch = examples.select(rows).to(device)
                logits = member_logits(self.hf, batch, batch.where, self.members, repeat).float()
                chosen = logits if columns is None else logits[..., columns.to(device)]
                parts.append(torch.softmax(chosen, -1).cpu())
        return torch.cat(parts, 1)

    @torch.no_grad()
    def score(self, rows: Sequence[Any], batch_size: int = 16, max_length: int | None = None) -> SequenceScores:
        """log-likelihoods of texts or completions: per member, token mixture, exact sequence mixture."""
        examples = from_rows(list(rows), self.tokenizer, max_length)
        device, members, mixture = next(self.hf.parameters()).device, [], []
        self.hf.eval()
        with self.stack.attached(self.hf) as repeat:
            for chosen in torch.arange(len(examples)).split(batch_size):
                batch = examples.select(chosen).to(device)
                values = token_values(self.hf, batch, self.members, repeat)
                each = torch.logsumexp(values, 0, keepdim=True) - torch.tensor(float(self.members)).log()
                members.append(combine(values, batch, "sequence").cpu())
                mixture.append(combine(each, batch, "sequence")[0].cpu())
        return SequenceScores(torch.cat(members, 1), torch.cat(mixture), examples.counts())

    @torch.no_grad()
    def margins(self, pairs: Sequence[Mapping[str, Any]], batch_size: int = 16) -> Float[Tensor, "member pair"]:
        """DPO's implicit reward margins β h of every member; their spread over members is its uncertainty."""
        beta = self.settings.get("beta", 0.1)
        objective = self._objective(pairs, "sequence", beta, batch_size)
        parts = []
        for rows in torch.arange(len(objective)).split(batch_size):
            with objective.margin(rows) as h:
                parts.append(beta * h.cpu())
        return torch.cat(parts, 1)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 32,
        combine: str = "mixture",
        temperature: float | int = 0,
        seed: int = 0,
    ) -> Generation:
        """Continue prompts with all members at once; `combine`: "mixture", "sequence" or "vote", see `mixing.py`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.hf.eval()
        return generate(self.hf, self.stack, self.tokenizer, prompts, max_new_tokens, combine, temperature, seed)

    # files

    def save(self, directory: str | Path) -> Path:
        """`ensemble.json` and one PEFT adapter directory per member, member_0, member_1, ..."""
        directory, stack = Path(directory), self.stack
        for member in range(self.members):
            stack.save_member(member, directory / f"member_{member}", self.hf)
        task = None
        if self.task is not None:
            names = ("template", "label_words", "max_length", "truncate", "padding_side", "name")
            task = {name: getattr(self.task, name) for name in names}
        content = {
            "members": self.members,
            "alpha": self.alpha,
            "r": stack.r,
            "lora_alpha": stack.lora_alpha,
            "target_modules": stack.names,
            "dropout": stack.dropout,
            "seed": self.seed,
            "circuit": None if self.circuit is None else str(self.circuit),
            "kv": self.kv,
            "settings": self.settings,
            "task": task,
            "data": None if self.task is None else self.task.fingerprint,
            "base": getattr(self.hf.config, "_name_or_path", "") if hasattr(self.hf, "config") else "",
            "weights": fingerprint([[n, list(p.shape)] for n, p in self.hf.named_parameters()]),
        }
        write_json(directory / "ensemble.json", content)
        return directory

    @classmethod
    def load(cls, directory: str | Path, model: Any, tokenizer: Any = None) -> "RenyiEnsemble":
        """Read what `save` wrote, on the same base model."""
        meta = read_json(Path(directory) / "ensemble.json")
        hf = getattr(model, "hf", model)
        if meta["weights"] != fingerprint([[n, list(p.shape)] for n, p in hf.named_parameters()]):
            raise ValueError(
                f"{str(directory)!r} was trained on {meta['base'] or 'another model'}; this model's parameters have "
                "other names or shapes: load the same base model"
            )
        options = {name: meta[name] for name in ("members", "alpha", "r", "target_modules", "lora_alpha", "dropout")}
        if meta["circuit"] is not None:
            from circuits import Circuit, Head

            options |= {"circuit": Circuit([Head.parse(name) for name in meta["circuit"].split()]), "kv": meta["kv"]}
        ensemble = cls(model, **options, seed=meta["seed"], tokenizer=tokenizer)
        for member in range(meta["members"]):
            ensemble.stack.load_member(member, Path(directory) / f"member_{member}")
        ensemble.settings = meta["settings"]
        if meta["task"] is not None:
            from circuits import LabelledTask

            words = meta["task"]["label_words"]
            ensemble.task = LabelledTask(texts=("",), labels=(next(iter(words)),), **meta["task"])
        return ensemble
