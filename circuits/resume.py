"""Start a forward pass at layer l from a recorded residual stream, so that unchanged layers are not computed again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from .hooks import rewrite
from .model import Model


@contextmanager
def resume_at(model: Model, layer: int, residual: Float[Tensor, "row position d_model"]) -> Iterator[None]:
    """Inside, blocks below `layer` pass their input through and block `layer` reads `residual` instead.

    Embedding, masks and position angles are still the model's own, made for the rows it is called with.
    """
    with ExitStack() as stack:
        for below in range(layer):
            stack.enter_context(_pass_through(model.anatomy.module(model.hf, below, "block")))
        stack.enter_context(rewrite(model, "resid_pre", lambda stream, _: residual.to(stream), layers=[layer]))
        yield


@contextmanager
def _pass_through(block: nn.Module) -> Iterator[None]:
    def forward(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    own = vars(block).get("forward")  # device-placement hooks put a forward of their own on the instance
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
