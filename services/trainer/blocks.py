"""How each decoder block runs: whether its activations are computed again, and whether it is compiled.

From the inside out: checkpoint, compiled code, FSDP's hooks, as in PyTorch's own torchtitan. What is computed again is
then part of the compiled backward pass, and the gathering of weights is not.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import nn
from torch.utils.checkpoint import checkpoint

from retort.config import ConfigError, RunConfig


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep a block's input for the backward pass, and compute the rest of it again."""
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def compile_blocks(blocks: Iterable[nn.Module], backend: str) -> None:
    """Compile what the blocks have in common, once for all of them and for all numbers of tokens. Before FSDP."""
    # Else tokens and segments that happen to be equally many in the first micro-batch would have to be in all.
    symbolic_shapes.use_duck_shape = False
    for block in blocks:
        # A break in the graph of a checkpointed block would leave it uncompiled, and `fullgraph` says so.
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True, fullgraph=True)


def start_compiler(config: RunConfig, device: torch.device) -> None:
    """Where blocks are to be compiled, compile something small: a machine that cannot says so before any work is done.

    Raises ConfigError with the compiler's words.
    """
    backend = config.trainer.compile
    if backend == "none":
        return
    import torch._inductor.config as inductor
    from torch._dynamo.exc import BackendCompilerFailed

    if device.type == "cuda" and config.model.dtype == "float32":
        raise ConfigError(f"trainer.compile = {backend!r} needs model.dtype = 'bfloat16' on a GPU.")
    # Else this process would read pickles: what was compiled before, and what compiling processes answer.
    torch.compiler.config.force_disable_caches = True
    inductor.compile_threads = 1
    try:
        torch.compile(_trial, backend=backend, dynamic=True)(torch.ones(4, device=device))
    except BackendCompilerFailed as error:
        raise ConfigError(
            f"trainer.compile = {backend!r}: this machine cannot compile. {error.inner_exception} "
            "Install g++, or set trainer.compile = 'none'."
        ) from None


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute_again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return compute_again


def _trial(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1
