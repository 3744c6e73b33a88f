"""How much a model computes for a micro-batch, and how fast a device can be."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from services.trainer.packing import Span

PEAK_RATES = (("B200", 2250e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12))
"""(part of a GPU's name, dense bfloat16 operations a second), from NVIDIA's data sheets."""
PRODUCT_SIZE, PRODUCTS = 768, 8


@dataclass(frozen=True)
class ModelCost:
    """What decides the cost of a token.

    A weight costs a token 2 operations. Attention over n tokens costs 2 x 2 x width each way, half of it masked (Kaplan
    et al. 2020, arXiv:2001.08361, section 2.1; the mask counted). The embedding is only looked up.
    """

    block_weights: int
    head_weights: int
    """The head's are used for completion tokens only."""
    attention_width: int
    """layers x heads x head size"""

    @classmethod
    def of(cls, language_model: PreTrainedModel) -> "ModelCost":
        config = language_model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            block_weights=sum(parameter.numel() for parameter in language_model.model.layers.parameters()),
            head_weights=language_model.lm_head.weight.numel(),
            attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
        )

    @property
    def parity(self) -> float:
        """The length in tokens at which attention costs a sequence as much as the weights of the blocks."""
        return self.block_weights / self.attention_width

    def forward(self, spans: Sequence[Span], predicted: int) -> float:
        """Operations of a forward pass over these tokens, `predicted` of which go through the head.

        A backward pass takes twice as many. What is computed again to save memory does not count.
        """
        tokens, squares = sum(span.tokens for span in spans), sum(span.squares for span in spans)
        return 2.0 * (self.block_weights * tokens + self.head_weights * predicted + self.attention_width * squares)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device can do at most: of a GPU by its data sheet, of others by trying."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if known := next((rate for part, rate in PEAK_RATES if part in name), None):
            return known
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices, the best of a few."""
    size = PRODUCT_SIZE if device.type == "cpu" else 8 * PRODUCT_SIZE
    left = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / min(_seconds_of_product(left) for _ in range(PRODUCTS))


def _seconds_of_product(left: torch.Tensor) -> float:
    finish(left.device)
    started = time.perf_counter()
    left @ left
    finish(left.device)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given: without it, the clock would stop before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
