"""The second face: a TransformerLens bridge over the same parameters.

1. Copy the model's structure, not its tensors: a `deepcopy` whose memo maps every parameter and buffer to itself.
2. Choose TransformerLens' adapter by the model's own class. Sequence classifiers get the adapter of their base family with their own
   head; without this TransformerLens boots them with a new random head and says nothing.
3. Assemble the bridge on the copy. It may rename and re-wrap the copy as it likes: the original keeps its names, its attention
   implementation and its `save_pretrained`.
4. Check it: the bridge's logits must equal the model's.

Private modules of TransformerLens 4.3 are used; the version is pinned for that reason.
"""

import contextlib
import copy
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Family of the base model -> name of the head module, for TransformerLens adapters that know only the language model.
_CLASSIFIER_HEADS = {"score": "ForCausalLM", "classifier": "ForMaskedLM"}


@contextlib.contextmanager
def surroundings_kept() -> Iterator[None]:
    """Importing the bridge sets the `transformers` logger to ERROR and adds warning filters; both are put back."""
    logger = logging.getLogger("transformers")
    level, filters = logger.level, list(warnings.filters)
    try:
        yield
    finally:
        logger.setLevel(level)
        warnings.filters[:] = filters
        warnings._filters_mutated()


@contextlib.contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), then the mode each module had before."""
    training = [module for module in hf.modules() if module.training]
    try:
        if training:
            hf.eval()
        yield
    finally:
        for module in training:
            module.training = True


def twin(hf: nn.Module) -> nn.Module:
    """The same module tree around the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(hf.parameters(), hf.buffers())}
    return copy.deepcopy(hf, shared)


def _classifier_adapter(base: type, head: str) -> type:
    """TransformerLens' adapter for a family, with its unembedding replaced by the classification head."""
    from transformer_lens.model_bridge.generalized_components import LinearBridge

    class Classifier(base):
        supports_generation = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            for part in ("unembed", "mlm_head", *(("ln_final",) if head == "classifier" else ())):
                self.component_mapping.pop(part, None)
            self.component_mapping["unembed"] = LinearBridge(name=head)

    return Classifier


def _register(architecture: str, hf: nn.Module) -> None:
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    if architecture in SUPPORTED_ARCHITECTURES:
        return
    head = next((name for name in _CLASSIFIER_HEADS if hasattr(hf, name)), None)
    base = architecture.replace("ForSequenceClassification", _CLASSIFIER_HEADS.get(head or "", ""))
    if head is None or base not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"TransformerLens has no adapter for {architecture}; model.hf and the sites z, q, k, v, attn_out, mlp_out, "
            "resid_pre and resid_post work without one"
        )
    ArchitectureAdapterFactory.register_adapter(architecture, _classifier_adapter(SUPPORTED_ARCHITECTURES[base], head))


def boot(hf: nn.Module, tokenizer: Any = None) -> Any:
    """A `TransformerBridge` sharing every parameter of `hf`. No network, with or without a tokenizer.

    Raises ValueError for PEFT models (TransformerLens drops adapters silently on fused layouts), for multimodal ones (it would
    install packages by itself), for families it does not know, and when its logits differ from the model's.
    """
    if hasattr(hf, "peft_config"):
        raise ValueError(
            "model.lens does not see PEFT adapters on every family; call merge_and_unload() on a copy and load that. "
            "model.hf and the sites z, q, k, v, attn_out, mlp_out, resid_pre, resid_post work with adapters"
        )
    architecture = type(hf).__name__
    if hasattr(hf.config, "vision_config") or hasattr(hf.config, "audio_config"):
        raise ValueError(f"{architecture} is multimodal; load its text model, for example Gemma3ForCausalLM")
    with surroundings_kept():
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
        from transformer_lens.utilities.attn_implementation import force_eager_attention

        _register(architecture, hf)
        copied = twin(hf)
        dtype = next(hf.parameters()).dtype
        config = build_bridge_config_from_hf(copy.deepcopy(hf.config), architecture, "in-memory", dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        adapter.cfg.device = str(next(hf.parameters()).device)
        force_eager_attention(copied)
        adapter.prepare_model(copied)
        bridge = TransformerBridge(copied, adapter, tokenizer)
        bridge.eval()
    check(hf, bridge)
    return bridge


@torch.no_grad()
def check(hf: nn.Module, bridge: Any) -> None:
    """The bridge must compute what the model computes: a random head or a dropped part shows here, not in somebody's plot."""
    pad = hf.config.pad_token_id  # a classifier would pool the token before it
    some = [token for token in range(hf.get_input_embeddings().num_embeddings) if token != pad][:4]
    tokens = torch.tensor([some], device=next(hf.parameters()).device)
    with evaluating(hf):
        expected = hf(tokens).logits.float()
    found = bridge(tokens).float()
    if found.ndim == 3 and expected.ndim == 2:
        found = found[:, -1]
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    # Half precision rounds differently in eager and fused attention.
    if not difference < (1e-3 if next(hf.parameters()).dtype == torch.float32 else 0.1):
        raise ValueError(
            f"TransformerLens' bridge of {type(hf).__name__} does not reproduce the model (relative difference {difference:.1e}); "
            "model.lens is refused, model.hf and the sites z, q, k, v work"
        )


def shares_all(hf: nn.Module, bridge: Any) -> bool:
    """Whether every bridge parameter is memory of `hf`. NeoX's interleaved QKV is copied, so training `hf` would not show."""
    mine = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    return all(p.untyped_storage().data_ptr() in mine for p in bridge.original_model.parameters())
