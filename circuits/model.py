"""`load()`: one set of weights, two faces.

`model.hf` is the Hugging Face model, untouched: train it, wrap it, save it. `model.lens` is TransformerLens on a twin that shares
every parameter, built when first asked for. `model(tokens, mask)` and `model.logits(...)` read the model: evaluation mode, position
ids from the mask (so that padding on either side changes nothing), and only the vocabulary columns that are needed.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import lens as lens_face
from .anatomy import Anatomy, finite_parameters, unwrap

Kind = Literal["causal", "masked", "classifier"]


def load(
    source: Any,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> "Model":
    """Load a causal LM, masked LM or sequence classifier.

    `source`: a hub name, a local directory (no network is touched), a `PreTrainedModel` or PEFT model in memory (used as it is), or
    `"pocket"`, the small demonstration model that comes with luthier. Without a tokenizer everything works on token ids.
    `dtype=None` keeps the checkpoint's type on an accelerator and uses float32 on CPU.

    Raises FileNotFoundError for a directory that is not there or holds no model; ValueError for NaN weights, an unknown
    attention layout, or a checkpoint without its own head (transformers would make a random one).
    """
    if isinstance(source, nn.Module):
        if device is not None or dtype is not None:
            raise ValueError(
                "device= and dtype= are for models loaded by name; move the model with .to(...) before load()"
            )
        return Model(
            source, tokenizer, name=getattr(source.config, "name_or_path", "") or type(unwrap(source)).__name__
        )
    name = str(source)
    where, local = _locate(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hf = _pretrained(where, name, revision, local, dtype or ("auto" if device.type != "cpu" else torch.float32)).to(
        device
    )
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(where, revision, local)
    label = "pocket" if name == "pocket" else Path(name).name if local else name
    return Model(hf, tokenizer, name=label, revision=revision or getattr(hf.config, "_commit_hash", None))


def _locate(name: str) -> tuple[str, bool]:
    """Where to load from, and whether that is a local directory."""
    if name == "pocket":
        from . import pocket

        return str(pocket.path()), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {name!r}; expected a directory written by save_pretrained")
        return str(path), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file():
        raise FileNotFoundError(f"no model directory {name!r}; expected a directory written by save_pretrained")
    return name, False


def _pretrained(where: str, name: str, revision: str | None, local: bool, dtype: Any) -> nn.Module:
    import transformers

    options = dict(revision=revision or "main", local_files_only=local, trust_remote_code=False)
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        architecture = (config.architectures or [None])[0]
        cls = _class_for(architecture, name)
        hf, report = cls.from_pretrained(where, **options, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        hint = "expected config.json and model.safetensors" if local else "expected a hub name or a local directory"
        raise FileNotFoundError(f"no model at {name!r}; {hint} ({str(error).splitlines()[0]})") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(
            f"{name!r} has no weights for {missing}: they would be random; load a checkpoint saved with this head"
        )
    return hf


def _class_for(architecture: str | None, name: str) -> Any:
    import transformers

    if architecture is None:
        return transformers.AutoModelForCausalLM
    suffixes = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForSequenceClassification")
    if not architecture.endswith(suffixes) or not hasattr(transformers, architecture):
        raise ValueError(
            f"{name!r} is a {architecture}; expected a causal language model, a masked language model or a sequence classifier "
            f"(its class name ends with {', '.join(suffixes)})"
        )
    return getattr(transformers, architecture)


def _tokenizer(where: str, revision: str | None, local: bool) -> Any:
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if local and not any((Path(where) / file).exists() for file in files):
        return None
    return AutoTokenizer.from_pretrained(where, revision=revision or "main", local_files_only=local)


def kind_of(hf: nn.Module) -> Kind:
    name = type(unwrap(hf)).__name__
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    raise ValueError(f"{name} is neither a causal LM, a masked LM nor a sequence classifier; load one of these")


class Model:
    """What `load()` returns; `repr(model)` shows the sizes."""

    def __init__(self, hf: Any, tokenizer: Any = None, *, name: str = "", revision: str | None = None):
        finite_parameters(hf)
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.kind: Kind = kind_of(hf)
        self.anatomy = Anatomy.of(hf, self.kind)
        self._lens: Any = None
        self._lens_state: tuple | None = None

    def __repr__(self) -> str:
        a = self.anatomy
        kv = "" if a.n_kv_heads == a.n_heads else f" ({a.n_kv_heads} key/value)"
        heads = f"{a.n_layers} layers x {a.n_heads} heads{kv} of {a.d_head}"
        return f"Model({self.name}: {a.family} {self.kind}, {heads}, d_model {a.d_model}, {self.dtype}, {self.device})"

    @property
    def base(self) -> Any:
        """The Hugging Face model without a PEFT wrapper (adapters stay active: they live in its modules)."""
        return unwrap(self.hf)

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def is_encoder(self) -> bool:
        """Bidirectional attention (BERT)."""
        return self.kind == "masked" or (self.kind == "classifier" and hasattr(self.base, "classifier"))

    @property
    def context(self) -> int:
        """The longest prompt in tokens."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", 1 << 30)

    @property
    def pad_id(self) -> int:
        """What fills the ends of short prompts. Masked everywhere, so its value never shows."""
        for holder in (self.tokenizer, self.base.config):
            for which in ("pad_token_id", "eos_token_id"):
                value = getattr(holder, which, None)
                if isinstance(value, int) and value >= 0:
                    return value
        return 0

    @property
    def lens(self) -> Any:
        """The `TransformerBridge`. Layouts that TransformerLens copies (NeoX) are booted anew after the weights changed."""
        state = None if self._lens_state is None else self._weights_state()
        if self._lens is None or state != self._lens_state:
            self._lens = lens_face.boot(self.hf, self.tokenizer)
            self._lens_state = None if lens_face.shares_all(self.base, self._lens) else self._weights_state()
        return self._lens

    def _weights_state(self) -> tuple:
        # In-place updates raise a parameter's version; writes through .data do not, so sums are compared as well.
        return tuple((p._version, p.detach().double().sum().item()) for p in self.hf.parameters())

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Evaluation mode (no dropout), then the mode each module had before."""
        return lens_face.evaluating(self.hf)

    def inputs(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None
    ) -> dict[str, Tensor]:
        """Keyword arguments of the Hugging Face forward; positions count real tokens, so left padding shifts nothing."""
        tokens = tokens.to(self.device)
        if attention_mask is None:
            return {"input_ids": tokens}
        mask = attention_mask.to(self.device)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def hidden(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The input of the unembedding or head: the residual stream after the final norm."""
        trunk = getattr(self.base, self.base.base_model_prefix)
        with self.evaluating():
            return trunk(**self.inputs(tokens, attention_mask), **({} if self.is_encoder else {"use_cache": False}))[0]

    def unembed(
        self, hidden: Float[Tensor, "*batch d_model"], columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, "*batch column"]:
        """Logits of the chosen vocabulary (or label) columns; the full vocabulary is never formed for a few of them."""
        hf = self.base
        head = self.anatomy.unembedding(hf)
        with self.evaluating():
            if self.kind == "masked":
                hidden = hf.cls.predictions.transform(hidden)
            elif self.kind == "classifier" and self.is_encoder:
                hidden = (
                    hf.bert.pooler(hidden.unsqueeze(-2)) if hidden.ndim > 1 else hf.bert.pooler(hidden[None, None])[0]
                )
        if columns is None or type(head) is not nn.Linear:
            logits = head(hidden) if columns is None else head(hidden)[..., columns.to(hidden.device)]
        else:
            columns = columns.to(hidden.device)
            logits = F.linear(hidden, head.weight[columns], None if head.bias is None else head.bias[columns])
        cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None or self.kind != "causal" else cap * torch.tanh(logits / cap)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None,
        readout: Int[Tensor, " batch"],
        columns: Int[Tensor, " column"] | None = None,
    ) -> Float[Tensor, "batch column"]:
        """Logits at one position per row: what tasks are read from."""
        hidden = self.hidden(tokens, attention_mask)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.unembed(hidden[rows, readout.to(hidden.device)], columns)

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch label"]:
        """All logits: every position of a language model, one row per text of a classifier."""
        if self.kind != "classifier":
            return self.unembed(self.hidden(tokens, attention_mask))
        return self.logits(tokens, attention_mask, self.pooled_position(tokens, attention_mask))

    def pooled_position(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None
    ) -> Int[Tensor, " batch"]:
        """Where a classifier reads (and a causal LM predicts): the first real token of an encoder, else the last."""
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        if self.is_encoder:
            return mask.int().argmax(-1).to(tokens.dtype)
        return (mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)).to(tokens.dtype)

    @torch.no_grad()
    def generate(self, prompts: str | Sequence[str] | Tensor, **options: Any) -> Any:
        """`hf.generate`: text in, the new text out; token ids in, full token ids out. Greedy unless told otherwise."""
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": self.pad_id, **options}
        if self.kind != "causal":
            raise ValueError(f"{self.name} is a {self.kind} model; only causal language models generate")
        with self.evaluating():
            if isinstance(prompts, Tensor):
                return self.hf.generate(prompts.to(self.device), **options)
            if self.tokenizer is None:
                raise ValueError(
                    "text was given but the model has no tokenizer; pass token ids or load(..., tokenizer=)"
                )
            tokens, mask = self.pad(
                [self.tokenizer(text).input_ids for text in ([prompts] if isinstance(prompts, str) else prompts)],
                side="left",
            )
            out = self.hf.generate(tokens.to(self.device), attention_mask=mask.to(self.device), **options)
        texts = self.tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
        return texts[0] if isinstance(prompts, str) else texts

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right", width: int | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Ragged token lists as one rectangle and its attention mask."""
        width = width or max(map(len, rows))
        tokens = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            tokens[i, where] = torch.as_tensor(row)
            mask[i, where] = 1
        return tokens, mask
