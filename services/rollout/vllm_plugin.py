"""Retort's part inside vLLM's worker processes: the receiving end of the weight broadcast.

vLLM loads `register` in every process it starts (entry point group `vllm.general_plugins`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from retort.lora import MergedWeights
from retort.telemetry import die_with_parent
from retort.weight_sync import Membership, TransferRequest, WeightManifest

BACKEND = "retort"


def register() -> None:
    """Make the broadcast receiver known to vLLM, and tie the life of its processes to their parent's."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, BroadcastReceiver.__name__)
    if os.environ.get("RETORT_ENGINE_PARENT", str(os.getpid())) != str(os.getpid()):
        # Only processes below the rollout server: a killed server must not leave an engine that holds memory or a GPU.
        die_with_parent()


@dataclass
class NothingToInit(WeightTransferInitInfo):
    """The first transfer opens the process group, so there is nothing to set up ahead."""


@dataclass
class ReceiveInfo(WeightTransferUpdateInfo):
    """What to receive and how, as msgpack, since vLLM passes plain values to its workers."""

    request: bytes
    manifest: bytes


class BroadcastReceiver(WeightTransferEngine[NothingToInit, ReceiveInfo]):
    """Receives buckets from the trainer (broadcast rank 0) and loads them as vLLM loads a checkpoint."""

    init_info_cls = NothingToInit
    update_info_cls = ReceiveInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digests: list[int] = []
        self.is_loading = False
        self._membership = Membership()

    def init_transfer_engine(self, init_info: NothingToInit) -> None:
        """Nothing to do; see `NothingToInit`."""

    def start_weight_update(self) -> None:
        self.digests = []
        self.is_loading = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ReceiveInfo) -> None:
        request = TransferRequest.from_bytes(update_info.request)
        manifest = WeightManifest.from_bytes(update_info.manifest)
        load_weights = cast(Callable[[Iterable[tuple[str, Tensor]]], object], self.model.load_weights)
        adapters: dict[str, Tensor] = {}
        for tensors, digest in self._membership.receive(request, manifest, self.device, self.parallel_config.rank):
            if manifest.lora_base:
                adapters |= dict(tensors)
            else:
                load_weights(iter(tensors))
            self.digests.append(digest)
        if manifest.lora_base:
            merged = MergedWeights(manifest.lora_base, self._files(), adapters, self.device)
            load_weights(iter(merged))
            self.digests.append(merged.base_digest)

    def _files(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as the model's files hold them, of which vLLM keeps nothing."""
        quiet = replace(self.vllm_config.load_config, use_tqdm_on_load=False)
        loader = get_model_loader(quiet)
        assert isinstance(loader, DefaultModelLoader), f"{type(loader).__name__} does not read safetensors"
        yield from loader.get_all_weights(self.model_config, self.model)

    def finish_weight_update(self) -> None:
        """Raises RuntimeError, and leaves the update open, if a layer has not got all of its weights."""
        if lacking := self._lacking():
            raise RuntimeError(
                f"worker {self.parallel_config.rank}: the engine was not given all weights of {len(lacking)} layers "
                f"(first {', '.join(lacking[:3])})"
            )
        self.close_weight_update()

    def _lacking(self) -> list[str]:
        """Layers of which the update has not brought every element: vLLM would keep what they held, and warn at most.

        Small changes of few layers are within the probe's tolerance, so that it would not see this.
        """
        is_tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
        lacking = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # all of it has come; or nothing but scales, which no checkpoint in float has
            loadable = {key: p for key, p in layer.named_parameters(recurse=False) if key not in SKIP_LOAD_TENSORS}
            expected = sum(map(get_tensor_load_numel, loadable.values()))
            if isinstance(layer, VocabParallelEmbedding):
                if is_tied and isinstance(layer, ParallelLMHead):
                    continue  # its weight is the embedding's
                # The rows that fill up the last worker's share are in no checkpoint.
                expected = layer.shard_indices.num_org_elements * layer.embedding_dim
            if info.load_numel < expected:
                lacking.append(name)
        return lacking

    def close_weight_update(self) -> None:
        """Put the layers back to work, with what came for them."""
        finalize_layerwise_reload(self.model, self.model_config)
        self.is_loading = False
        lm_head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and lm_head is not None:
            # vLLM's CPU build keeps a packed copy of the head. With tied embeddings nothing loads "lm_head", so
            # without this line the copy stays at the old weights and nobody says so.
            lm_head.quant_method.process_weights_after_loading(lm_head)

    def shutdown(self) -> None:
        """The process group ends with the process."""


class WorkerExtension:
    """Methods that vLLM mixes into its worker class, called by name through `collective_rpc`."""

    weight_transfer_engine: BroadcastReceiver
    _weight_update_active: bool

    def received_digests(self) -> list[int]:
        return self.weight_transfer_engine.digests

    def abandon_weight_update(self) -> None:
        """Close an update that failed half-way. The weights are unusable until the next full update."""
        # vLLM drops its own flag when receiving fails, but the layers still hold what had arrived for them, and would
        # count it again in the next update.
        if self.weight_transfer_engine.is_loading:
            self.weight_transfer_engine.close_weight_update()
        self._weight_update_active = False
