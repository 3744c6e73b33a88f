"""From the sharded policy to what replicas serve: gather, snapshot, probe, send."""

import time
from collections.abc import Sequence
from dataclasses import replace

from retort.config import RunConfig, TrainerConfig
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.policy import Policy
from services.trainer.weight_sender import Probe, SyncReport, WeightSender


class WeightPublisher:
    """Publishes policy versions. `publish` is a collective; rank 0 alone has a sender."""

    def __init__(
        self, sender: WeightSender | None, config: RunConfig, policy: Policy, *, probe_ids: Sequence[int]
    ) -> None:
        self._sender = sender
        self._settings = config.trainer
        self.report = SyncReport()
        """Of the sync that `publish` waited for: its version's or, with training beside that, of the one before."""
        specs = [TensorSpec(name=name, shape=shape, dtype=config.model.dtype) for name, shape in policy.specs]
        self._adapters = policy.adapters
        lora_base = policy.adapters.base if policy.adapters else None
        self._manifest = WeightManifest.of(specs, int(config.weight_sync.bucket_mib * 2**20), lora_base)
        self._probe_ids = list(probe_ids)

    @property
    def snapshot(self) -> Snapshot | None:
        """The published weights, in the type that is served; None if not rank 0."""
        return self._sender.snapshot if self._sender else None

    def close(self) -> None:
        """Let a sync that goes on come to its end."""
        if self._sender:
            self._sender.close()

    def publish(self, policy: Policy) -> None:
        """Make the policy the version to serve, and bring every replica that is there to it.

        The snapshot is complete before anything is sent, and written over the last one, when that is no longer sent.
        Where the next step may be sampled by older versions, it is trained while this one is being sent.
        """
        start = time.perf_counter()
        probe = Probe(self._probe_ids, policy.score_prompt(self._probe_ids))
        probe_seconds = time.perf_counter() - start
        tensors = policy.full_tensors()
        if self._sender is None:
            for _ in tensors:
                pass  # takes this rank's part in gathering each tensor
            return
        base_digest = self._adapters.base_digest if self._adapters else None
        memory = self._sender.take_back()
        start = time.perf_counter()
        snapshot = Snapshot.take(policy.version, self._manifest, tensors, memory=memory, base_digest=base_digest)
        snapshot_seconds = probe_seconds + time.perf_counter() - start
        before = self._sender.publish(snapshot, probe)
        if may_overlap(self._settings, policy.version):
            self._sender.start_sync()
            self.report = replace(before, snapshot_seconds=snapshot_seconds)
        else:
            self._sender.sync()
            self.report = replace(self._sender.report, snapshot_seconds=snapshot_seconds)
            if self._settings.max_staleness:
                # That of the version before stands in no other line.
                self.report.probe_gap = max(before.probe_gap, self.report.probe_gap)


def may_overlap(settings: TrainerConfig, version: int) -> bool:
    """Whether the step after `version` may be trained while the version is being sent: older ones may sample it."""
    return settings.max_staleness > 0 and version < settings.steps
