"""From the sharded policy to what replicas serve: gather, snapshot, probe, send."""

from collections.abc import Sequence

from retort.config import RunConfig
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.policy import Policy
from services.trainer.weight_sender import Probe, SyncReport, WeightSender


class WeightPublisher:
    """Publishes policy versions. `publish` is a collective; rank 0 alone has a sender."""

    def __init__(
        self, sender: WeightSender | None, config: RunConfig, policy: Policy, *, probe_ids: Sequence[int]
    ) -> None:
        self._sender = sender
        specs = [TensorSpec(name=name, shape=shape, dtype=config.model.dtype) for name, shape in policy.specs]
        self._adapters = policy.adapters
        lora_base = policy.adapters.base if policy.adapters else None
        self._manifest = WeightManifest.of(specs, int(config.weight_sync.bucket_mib * 2**20), lora_base)
        self._probe_ids = list(probe_ids)

    @property
    def report(self) -> SyncReport:
        """What the last version's sync took so far."""
        return self._sender.report if self._sender else SyncReport()

    @property
    def snapshot(self) -> Snapshot | None:
        """The published weights, in the type that is served; None if not rank 0."""
        return self._sender.snapshot if self._sender else None

    def publish(self, policy: Policy) -> None:
        """Make the policy the version to serve, and bring every replica that is there to it.

        The snapshot is complete before anything is sent: no collective of the trainer waits for a replica.
        """
        probe = Probe(self._probe_ids, policy.score_prompt(self._probe_ids))
        tensors = policy.full_tensors()
        if self._sender is None:
            for _ in tensors:
                pass  # takes this rank's part in gathering each tensor
            return
        base_digest = self._adapters.base_digest if self._adapters else None
        snapshot = Snapshot.take(policy.version, self._manifest, tensors, base_digest=base_digest)
        self._sender.publish(snapshot, probe)
        self._sender.sync()
