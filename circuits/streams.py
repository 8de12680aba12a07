"""One walk through a block, spoken in verbs, and two ways to mean the verbs: ordinary values, or the relevant part of them.

1. `attend` and `finish` are the two halves of every block of every family (`blocks.Block`); between them lies z, where sources
   are set. `read_out` is the head. They know the order of modules and nothing about decomposition.
2. `Values` applies the modules as they are. It makes the totals, and, started from a block's input with a source's z at its
   mean, it carries γ: this is `rules="exact"`.
3. `Relevant` applies the rules of `decomposition` to β, looking up the total of each site in `Totals`.

Streams are [source, batch, position, ...]; totals have no source axis and broadcast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from . import decomposition
from .blocks import Affine, Block, Norm, Unembedding

# Sites whose totals are needed at every position even where only some queries are computed.
KEY_SIDE = frozenset({"norm_in", "k", "v", "k_norm", "k_rotated", "v_heads"})


@dataclass(frozen=True)
class Frame:
    """Which positions a walk covers: keys from `start` on, queries the same or, in a last block, only `rows` of them."""

    allowed: Bool[Tensor, "mask query all_keys"] | None  # None: plain causal attention over everything
    cos: Float[Tensor, "rope key rotary"] | None
    sin: Float[Tensor, "rope key rotary"] | None
    start: int = 0
    rows: Int[Tensor, "batch row"] | None = None  # counted from `start`

    def take(self, x: Tensor) -> Tensor:
        """The queries' share of a [source, batch, position, ...] stream."""
        if self.rows is None:
            return x
        return x[:, torch.arange(len(self.rows), device=x.device)[:, None], self.rows]

    def rotate(self, x: Float[Tensor, "source batch position head d_head"], query: bool) -> Tensor:
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[None, :, :, None], self.sin[None, :, :, None]
        if query and self.rows is not None:
            shape = (1, len(self.rows), *cos.shape[2:])
            cos, sin = self.take(cos.expand(shape)), self.take(sin.expand(shape))
        turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((turned, kept), -1) if kept.shape[-1] else turned


@dataclass
class Totals:
    """Ordinary activations of one block, by site, cut to a frame's positions on first use."""

    record: dict[str, Tensor]
    frame: Frame
    cut: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.cut:
            whole = self.record[site][:, self.frame.start :]
            self.cut[site] = whole if site in KEY_SIDE else self.frame.take(whole[None])[0]
        return self.cut[site]

    def scale(self, module: Norm, site: str) -> Tensor:
        key = f"{site}.scale"
        if key not in self.cut:
            self.cut[key] = module.scale(self[site]).to(self[site].dtype)
        return self.cut[key]

    def pattern(self, block: Block) -> Float[Tensor, "batch head query key"]:
        """The total attention pattern, keys from the frame's start on."""
        if "pattern" not in self.cut:
            q, k = (x.transpose(1, 2) for x in (self["q_rotated"], self.record["k_rotated"]))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            allowed = mask_of(self.frame, q.shape[2], k.shape[2], q.device)
            pattern = decomposition.relevant_pattern(q, k, block.scaling, allowed[:, None], block.softcap)
            self.cut["pattern"] = pattern[..., self.frame.start :]
        return self.cut["pattern"]


class Values:
    """The modules themselves. With a `record`, keeps what `Relevant` will look up (streams then have one source row)."""

    def __init__(self, record: dict[str, Tensor] | None = None, prefix: tuple[Tensor, Tensor] | None = None):
        self.record = record
        self.prefix = prefix  # totals of k (rotated) and v before the frame's start, where nothing has changed

    def _keep(self, site: str, x: Tensor) -> Tensor:
        if self.record is not None:
            self.record[site] = x[0]
        return x

    def norm(self, module: Norm, x: Tensor, site: str) -> Tensor:
        self._keep(site, x)
        return module(x)

    def linear(self, module: Affine, x: Tensor, site: str) -> Tensor:
        return self._keep(site, module(x))

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, of: str, site: str) -> Tensor:
        return self._keep(site, function(x))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up

    def stabilise(self, x: Tensor, site: str) -> Tensor:
        return self._keep(site, x)

    def mix(self, block: Block, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        for site, x in (("q_rotated", q), ("k_rotated", k), ("v_heads", v)):
            self._keep(site, x)
        if self.prefix is not None:
            k, v = (
                torch.cat((p.expand(len(x), -1, -1, -1, -1), x), 2) for p, x in zip(self.prefix, (k, v), strict=True)
            )
        n_sources = len(q)
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        z = attention(block, q, k, v, frame, n_sources).transpose(1, 2).unflatten(0, (n_sources, -1))
        return self._keep("z", z)


class Relevant:
    """The rules of `decomposition`, applied to β with the totals of one block at hand."""

    def __init__(self, rules: decomposition.Rules, totals: Totals):
        self.rules, self.totals = rules, totals

    def norm(self, module: Norm, x: Tensor, site: str) -> Tensor:
        total, split = self.totals[site], self.rules.split_bias
        scale = self.totals.scale(module, site)
        if not module.centred:
            return x * scale * module.weight.to(x.dtype)
        return decomposition.norm(x, total, scale, module.weight, module.bias, centred=True, split_bias=split)

    def linear(self, module: Affine, x: Tensor, site: str) -> Tensor:
        if module.bias is None or not self.rules.split_bias:
            return functional.linear(x, module.weight)
        return decomposition.linear(x, module.weight, module.bias, self.totals[site])

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, of: str, site: str) -> Tensor:
        return decomposition.activation(x, self.totals[of], self.totals[site], function)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return decomposition.gate(gate, up, self.totals["act"], self.totals["up"], self.rules.strict_gate)

    def stabilise(self, x: Tensor, site: str) -> Tensor:
        return decomposition.stabilise(x, self.totals[site]) if self.rules.stabilise else x

    def mix(self, block: Block, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        kv_heads = v.shape[3]
        k, v = (x.transpose(2, 3)[:, :, :, None] for x in (k, v))  # source batch kv 1 key d_head
        if self.rules.decompose_pattern:
            q = q.unflatten(3, (kv_heads, -1)).movedim(2, 4)  # source batch kv group query d_head
            allowed = mask_of(frame, q.shape[4], frame.start + k.shape[4], q.device)[:, None, None]
            pattern = decomposition.relevant_pattern(q, k, block.scaling, allowed, block.softcap)
        else:
            pattern = self.totals.pattern(block).unflatten(1, (kv_heads, -1))
        return (pattern @ v).flatten(2, 3).transpose(2, 3)


Verbs = Values | Relevant


def attend(
    block: Block, x: Float[Tensor, "source batch position d_model"], frame: Frame, verbs: Verbs
) -> tuple[Tensor, dict[str, Tensor]]:
    """From a block's input to z [source, batch, query, head, d_head]; also the projections q, k, v per head."""
    h = verbs.norm(block.norm_in, x, "norm_in") if block.norm_in else x
    split = (-1, block.d_head)
    q = verbs.linear(block.q, frame.take(h), "q").unflatten(-1, split)
    k = verbs.linear(block.k, h, "k").unflatten(-1, split)
    v = verbs.linear(block.v, h, "v").unflatten(-1, split)
    projections = {"q": q, "k": k, "v": v}
    q = verbs.norm(block.q_norm, q, "q_norm") if block.q_norm else q
    k = verbs.norm(block.k_norm, k, "k_norm") if block.k_norm else k
    z = verbs.mix(block, frame.rotate(q, query=True), frame.rotate(k, query=False), v, frame)
    return z, projections


def finish(
    block: Block,
    x: Float[Tensor, "source batch position d_model"],
    z: Float[Tensor, "source batch query head d_head"],
    frame: Frame,
    verbs: Verbs,
) -> Float[Tensor, "source batch query d_model"]:
    """From z to the block's output."""
    x = frame.take(x)
    written = verbs.linear(block.o, z.flatten(-2), "o")
    if block.norm_attn:
        written = verbs.norm(block.norm_attn, written, "norm_attn")
    middle = x + written
    if block.norm_mid:
        middle = verbs.norm(block.norm_mid, middle, "norm_mid")
    h = x if block.parallel else middle
    if block.norm_mlp:
        h = verbs.norm(block.norm_mlp, h, "norm_mlp")
    down = verbs.stabilise(verbs.linear(block.down, _hidden(block, h, verbs), "down"), "down")
    if block.norm_down:
        down = verbs.norm(block.norm_down, down, "norm_down")
    out = verbs.stabilise(middle + down, "out")
    return verbs.norm(block.norm_end, out, "norm_end") if block.norm_end else out


def _hidden(block: Block, h: Tensor, verbs: Verbs) -> Tensor:
    """The MLP's hidden layer, gated or not."""
    up = verbs.stabilise(verbs.linear(block.up, h, "up"), "up")
    if block.gate is None:
        return verbs.activation(block.act, up, "up", "act")
    gate = verbs.stabilise(verbs.linear(block.gate, h, "gate"), "gate")
    return verbs.gate(verbs.activation(block.act, gate, "gate", "act"), up)


def read_out(
    head: Unembedding,
    x: Float[Tensor, "source batch row d_model"],
    columns: Int[Tensor, " column"] | None,
    verbs: Verbs,
) -> Float[Tensor, "source batch row column"]:
    """Logits of the wanted columns, in float32 at least."""
    if head.norm:
        x = verbs.norm(head.norm, x, "final_norm")
    if head.dense:
        x = verbs.linear(head.dense, x, "dense")
        assert head.act is not None
        x = verbs.activation(head.act, x, "dense", "dense_act")
    if head.dense_norm:
        x = verbs.norm(head.dense_norm, x, "dense_norm")
    out = head.out if columns is None else head.out.rows(columns)
    if x.dtype.itemsize < 4:
        x, out = x.float(), Affine(*(None if part is None else part.float() for part in out))  # type: ignore[arg-type]
    logits = verbs.linear(out, x, "logits")
    cap = head.softcap
    if cap is None:
        return logits
    return verbs.activation(lambda y: cap * torch.tanh(y / cap), logits, "logits", "capped")


def mask_of(frame: Frame, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "mask query key"]:
    if frame.allowed is not None:
        return frame.allowed
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril()


def attention(
    block: Block,
    q: Float[Tensor, "row head query d_head"],
    k: Float[Tensor, "row kv key d_head"],
    v: Float[Tensor, "row kv key d_head"],
    frame: Frame,
    n_sources: int,
) -> Float[Tensor, "row head query d_head"]:
    """Ordinary attention over [source x batch] rows."""
    grouped = q.shape[1] != k.shape[1]
    allowed = frame.allowed
    if allowed is not None:
        allowed = allowed[:, None] if len(allowed) == 1 else allowed[:, None].repeat(n_sources, 1, 1, 1)
    if block.softcap is None:
        causal = allowed is None
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, scale=block.scaling, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if allowed is None:
        allowed = mask_of(frame, q.shape[2], k.shape[2], q.device)[:, None]
    return decomposition.relevant_pattern(q, k, block.scaling, allowed, block.softcap) @ v
