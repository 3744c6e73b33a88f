"""A vLLM worker that can be made to receive or load weights wrongly, in the ways that a real one might."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from retort import weight_sync
from services.rollout.vllm_plugin import WorkerExtension

Tensors = Iterable[tuple[str, Tensor]]
SWAPPED = {
    "model.layers.0.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
}
TRANSPOSED = "model.layers.1.self_attn.o_proj.weight"
LOST = "model.layers.0.self_attn.k_proj.weight"
DROPPED = 2
"""Number of the bucket that gets lost."""


class FaultyWorker(WorkerExtension):
    """Takes the place of the service's own extension; without a fault it does the same."""

    def inject(self, fault: str) -> None:
        """Make the next updates go wrong in one way. Empty: none does any more."""
        if fault in ARRIVING:
            self._replace(weight_sync, "_unpack", ARRIVING[fault])
        elif fault == "stale_head":
            self._replace(self._model.lm_head.quant_method, "process_weights_after_loading", lambda _: lambda _: None)
        elif fault:
            self._replace(self._model, "load_weights", LOADING[fault])
        else:
            for owner, name, original in self.__dict__.pop("_replaced", []):
                setattr(owner, name, original)

    @property
    def _model(self) -> Any:
        return self.weight_transfer_engine.model

    def _replace(self, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self.__dict__.setdefault("_replaced", []).append((owner, name, original))
        # A module of torch looks its own dictionary up before its class.
        owner.__dict__[name] = change(original)


Unpack = Callable[[Tensor, Any], Iterable[tuple[str, Tensor]]]


def flip_one_bit(unpack: Unpack) -> Unpack:
    def flipped(bucket: Tensor, specs: Any) -> Iterable[tuple[str, Tensor]]:
        bucket[7] ^= 64
        return unpack(bucket, specs)

    return flipped


def lose_a_bucket(unpack: Unpack) -> Unpack:
    seen = []

    def lossy(bucket: Tensor, specs: Any) -> Iterable[tuple[str, Tensor]]:
        seen.append(specs)
        if len(seen) == DROPPED:
            bucket.zero_()
        return unpack(bucket, specs)

    return lossy


def swap_two(load_weights: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    return lambda tensors: load_weights((SWAPPED.get(name, name), tensor) for name, tensor in tensors)


def transpose_a_square(load_weights: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    return lambda tensors: load_weights((name, tensor.T if name == TRANSPOSED else tensor) for name, tensor in tensors)


def drop_a_bucket(load_weights: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    seen = []

    def lossy(tensors: Tensors) -> object:
        seen.append(tensors)
        return None if len(seen) == DROPPED else load_weights(tensors)

    return lossy


ARRIVING = {"flipped_bit": flip_one_bit, "lost_on_the_wire": lose_a_bucket}


def lose_a_tensor(load_weights: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    """One of the three that vLLM keeps as one: the others make its name known as loaded."""
    return lambda tensors: load_weights((name, tensor) for name, tensor in tensors if name != LOST)


def load_nothing(_: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    return lambda _: None


LOADING = {
    "swapped_pair": swap_two,
    "wrong_transpose": transpose_a_square,
    "dropped_bucket": drop_a_bucket,
    "lost_tensor": lose_a_tensor,
    "nothing_loaded": load_nothing,
}
