"""Low-rank adapters: what is sent are two factors a layer, and each side adds their product to the same base.

    W = W0 + scale * B A        in float32, rounded once to the type in which W is served

W0 is what the model's own files hold, read anew for every version: nothing adds up from one to the next. That both
sides mean the same W0 is verified with every version, by a digest.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retort.weight_sync import LoraBase, TensorSpec, bucket_digest

FACTOR_A, FACTOR_B = "lora_A.weight", "lora_B.weight"
"""Names of the factors beside the layer's `weight`, as in peft's files: A is [rank, in], B is [out, rank]."""
_LANE_BYTES = 8


class MergedWeights:
    """The base with the adapters added, one tensor at a time, by the names of the Hugging Face checkpoint.

    `base` may hold more than the announced tensors, a tied head for example; the rest is left out. After the iteration
    `base_digest` is that of the base as it was read.
    """

    def __init__(
        self,
        announced: LoraBase,
        base: Iterable[tuple[str, Tensor]],
        adapters: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._specs = {spec.name: spec for spec in announced.tensors}
        self._scale = announced.scale
        self._base = base
        self._adapters = adapters
        self._device = device
        self._digests: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._base:
            if spec := self._specs.get(name):
                weight = tensor.to(self._device, spec.torch_dtype)
                self._digests[name] = _tensor_digest(weight)
                yield name, self._merged(name, weight)

    @property
    def base_digest(self) -> int:
        return _joint_digest(self._digests)

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        layer = name.removesuffix("weight")
        if layer + FACTOR_A not in self._adapters:
            return weight
        return merge(weight, self._adapters[layer + FACTOR_A], self._adapters[layer + FACTOR_B], self._scale)


def merge(weight: Tensor, factor_a: Tensor, factor_b: Tensor, scale: float) -> Tensor:
    """weight [out, in] + scale * factor_b [out, rank] @ factor_a [rank, in], in the type of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), factor_b.to(wide), factor_a.to(wide), alpha=scale).to(weight.dtype)


def base_digest(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> int:
    """64 bits that stand for a whole base in the types of `specs`, whatever order its tensors are read in."""
    return _joint_digest({spec.name: _tensor_digest(tensors[spec.name].to(spec.torch_dtype)) for spec in specs})


def _joint_digest(digests: Mapping[str, int]) -> int:
    text = "\n".join(f"{name} {digest:016x}" for name, digest in sorted(digests.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _tensor_digest(tensor: Tensor) -> int:
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    lanes = bucket_digest(F.pad(octets, (0, -len(octets) % _LANE_BYTES)))
    shape = ",".join(map(str, tensor.shape))
    return int.from_bytes(hashlib.blake2b(f"{shape} {lanes}".encode(), digest_size=8).digest(), "little")
