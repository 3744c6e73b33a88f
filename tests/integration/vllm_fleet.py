"""A replica with real vLLM, shared by the tests that need one because it takes half a minute to start."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from starlette.types import ASGIApp
from transformers import AutoModelForCausalLM

from retort.config import WeightSyncConfig, load_config
from retort.identity import Identity
from retort.queues import Evicted
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.rollout.weight_receiver import WeightReceiver
from services.trainer.weight_sender import Probe, WeightSender
from tests.integration.faulty_worker import FaultyWorker
from tests.integration.queue_run import Run
from tests.integration.replica import AUTHORIZATION, Replica
from tests.integration.torch_replica import prompt_logprobs

ROOT = Path(__file__).parents[2]
PROBE_IDS = list(range(20, 44))
SEQUENCES = 16
"""What the engine samples at the same time."""


class Fleet:
    """One replica with real vLLM, and the trainer's side of its weight syncs."""

    def __init__(self, run: Run, replica: Replica) -> None:
        self.run, self.replica = run, replica
        self.sender = self.new_sender(WeightSyncConfig(max_probe_gap=1e-3))
        self.model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny", dtype=torch.float32).eval()
        self._shipped = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.version = 0

    def new_sender(self, config: WeightSyncConfig) -> WeightSender:
        return WeightSender(
            self.run.trainer(), config, epoch=1, backend="gloo", authorization=AUTHORIZATION, identity=Identity()
        )

    def sync(self, change: float | None = None) -> int:
        """Publish weights of which none is as before, and say how many replicas serve them.

        `change`: standard deviation of what is added to every weight, by default about as much as there was.
        """
        self.replica.announce()
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        for name, parameter in self.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if change is not None:
                parameter.data = parameter.data + change * noise
            else:
                parameter.data = self._shipped[name] + noise * self._shipped[name].std().clamp(min=0.05)
        tensors = [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]
        specs = [TensorSpec(name=name, shape=list(tensor.shape), dtype="float32") for name, tensor in tensors]
        snapshot = Snapshot.take(self.version, WeightManifest.of(specs, bucket_bytes=2**19), tensors)
        self.sender.publish(snapshot, Probe(PROBE_IDS, prompt_logprobs(self.model, PROBE_IDS)))
        self.sender.sync()
        # The first probe of an engine can take longer than a silent member is believed to be alive.
        with suppress(Evicted):
            self.replica.announce()
        return self.sender.sync()

    def inject(self, fault: str) -> None:
        self.replica.wait(self.replica.engine.llm.collective_rpc("inject", args=(fault,)))

    def restart_replica(self) -> None:
        """What its supervisor does with an evicted one, without the wait for a new engine."""
        self.replica.incarnation = uuid.uuid4().hex


@contextmanager
def a_fleet(redis_url: str, *more_settings: str) -> Iterator[Fleet]:
    """The replica as a member of a run of its own. Its worker can be made to go wrong."""
    import services.rollout.vllm_engine as module
    from services.rollout.inference import make_inference

    torch.set_num_threads(1)
    settings = [f"model.path={ROOT / 'models' / 'tiny'}", f"rollout.concurrent_groups={SEQUENCES // 8}", *more_settings]
    config = load_config(ROOT / "configs" / "tiny-cpu.toml", settings, env={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WorkerExtension", FaultyWorker)
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # the engine turns the compiler off: not for the tests that follow
        engine = module.VLLMEngine(config)
    run = Run(redis_url, f"test-{uuid.uuid4().hex}")

    def inference(receiver: WeightReceiver) -> ASGIApp:
        return make_inference(engine, receiver, model_path=config.model.path, patience_s=5.0)

    try:
        with Replica(run, "rollout-0", engine, inference=inference) as replica:
            yield Fleet(run, replica)
    finally:
        engine.shutdown()
        run.close()
