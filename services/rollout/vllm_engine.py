"""The vLLM engine behind the rollout server. Beside it `vllm_plugin`, `probe_scheduler` and `inference` import vllm."""

import asyncio
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import StatLoggerBase

from retort.config import RunConfig
from retort.rollouts import SamplingParameters
from retort.weight_sync import TransferRequest, WeightManifest
from services.rollout.engine import Sampled
from services.rollout.engine_sockets import make_socket_directory
from services.rollout.probe_scheduler import PROBE, AsyncProbeScheduler, ProbeScheduler
from services.rollout.seats import OUTSIDE_COMPLETIONS
from services.rollout.vllm_plugin import BACKEND, WorkerExtension

HEALTH_CHECK_S = 1.0
SILENT_CHECKS = 600
"""In so many checks in a row an engine that has work makes a step, or it hangs.

Checks and not seconds: where this process was stopped together with its engine, the time that passed is one check.
The longest step that is in order is a prefill on a CPU, of `max_num_batched_tokens`: by arithmetic five minutes for
8192 and a model of 1.7 billion parameters on one core. Without this a group would be held for `timeouts.stall_s`, half
an hour.
"""


class OrderlyLLM(AsyncLLM):
    """Ended by `shutdown`, and not a second time by the garbage collector.

    That came after the interpreter had taken vLLM's modules apart, and its traceback hid why the process had ended.
    """

    def __del__(self) -> None:
        pass


class StepListener(StatLoggerBase):
    """Calls `heard` at every step of the engine. vLLM tells it what it also tells its own metrics."""

    def __init__(self, heard: Callable[[], None]) -> None:
        self._heard = heard

    def record(self, *_: Any, **__: Any) -> None:
        self._heard()

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """What decides how an engine samples and how fast; benchmarks give vLLM's own server of batches the same."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.rollout.kv_cache_gib))
        # `enforce_eager` spares the model only: vLLM would still compile how it ranks log-probs, at the first
        # sample, with a C++ compiler, which a laptop may lack.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        workers = config.rollout.tensor_parallel
        os.environ["OMP_NUM_THREADS"] = str(engine_threads(config.rollout.replicas * workers))
        if workers > 1:
            # vLLM would want a NUMA node for each worker.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_length,
        "seed": config.seed,
        # The model's own top_k and top_p would be applied silently, and the log-probs would no longer be the policy's.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "gpu_memory_utilization": config.rollout.gpu_memory_utilization,
        "max_num_seqs": min(config.rollout.concurrent_groups * config.trainer.group_size, 512),
        # On a CPU, a request with a seed that is caught in a partial prefill ends the engine
        # ("CPU Generator does not use offset").
        "enable_chunked_prefill": False if on_cpu else None,
        "max_num_batched_tokens": max(config.model.max_length, 8192) if on_cpu else None,
        # The completions of a group share the whole blocks of their prompt. A CPU's blocks have 128 tokens unless told
        # otherwise; 32 is the least that its attention takes.
        "block_size": 32 if on_cpu else None,
        # On a CPU compiling gains nothing, costs up to a minute at every start (vLLM's cache of it does not
        # load there), and needs a C++ compiler.
        "enforce_eager": on_cpu,
        # As on one GPU. vLLM would give a CPU a process for the worker: 17 s more at every start, and both sides of
        # the queue between the two spin on a core each, for a second after the last message.
        "distributed_executor_backend": UniProcExecutor if on_cpu and config.rollout.tensor_parallel == 1 else None,
    }


def engine_threads(workers: int) -> int:
    """Of each engine worker of a host with CPUs: they share its cores, all but one, which is the trainer's."""
    return max(1, (len(os.sched_getaffinity(0)) - 1) // workers)


def sampling_parameters(sampling: SamplingParameters, seed: int) -> SamplingParams:
    """For one completion with the log-prob of each of its tokens."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_tokens=sampling.max_completion_tokens,
        seed=seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class VLLMEngine:
    """An `AsyncLLM` whose weights arrive by broadcast. See `services.rollout.engine.Engine`."""

    def __init__(self, config: RunConfig) -> None:
        on_cpu = not torch.cuda.is_available()
        scheduler = ProbeScheduler if on_cpu else AsyncProbeScheduler
        # Read by the plug-in: processes below this one die with it.
        os.environ["RETORT_ENGINE_PARENT"] = str(os.getpid())
        # With it vLLM's processes would unpickle what reaches their sockets.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
        self._sockets = make_socket_directory()
        os.environ["VLLM_RPC_BASE_PATH"] = str(self._sockets)
        settings = engine_settings(config)
        sequences = settings.pop("max_num_seqs") + OUTSIDE_COMPLETIONS
        self._silent_checks = 0
        self._is_frozen = False
        self.llm = OrderlyLLM.from_engine_args(
            AsyncEngineArgs(
                **settings,
                max_num_seqs=sequences + 1,  # the probe's place
                max_num_active_seqs=sequences,
                scheduling_policy="priority",
                scheduler_cls=f"{scheduler.__module__}.{scheduler.__name__}",
                async_scheduling=not on_cpu,  # vLLM's own choice; the scheduler has to be of the same kind
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
                enable_log_requests=False,
            ),
            stat_loggers=[lambda *_: StepListener(self._heard)],
        )
        self.num_workers = config.rollout.tensor_parallel
        self.kv_on_update = config.rollout.kv_on_update

    async def sample(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, seed: int, *, urgent: bool
    ) -> Sampled:
        """Sample one completion. The end-of-sequence token is part of it.

        Work from the queue is `urgent`; requests from outside wait behind it.
        """
        output = await self._generate(prompt_ids, sampling_parameters(sampling, seed), priority=0 if urgent else 1)
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        assert completion.logprobs is not None and completion.weight_versions is not None
        versions = [-1] * len(ids)
        for span in completion.weight_versions:
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
        assert -1 not in versions, f"vLLM says of no weights that they sampled tokens of a completion: {versions}"
        reason: Literal["stop", "length"] = "stop" if completion.finish_reason == "stop" else "length"
        positions = zip(completion.logprobs, ids, strict=True)
        logprobs = [position[token].logprob for position, token in positions if position]
        return Sampled(ids, logprobs, versions, reason)

    async def _generate(self, prompt_ids: Sequence[int], parameters: SamplingParams, priority: int) -> RequestOutput:
        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
        async for output in self.llm.generate(prompt, parameters, uuid.uuid4().hex, priority=priority):
            if output.finished:
                return output
        raise RuntimeError("vLLM ended a request without an answer")

    async def prepare(self) -> None:
        self._is_frozen = True
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        await self.llm.start_weight_update()

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        await self.llm.update_weights(
            WeightTransferUpdateRequest({"request": request.to_bytes(), "manifest": manifest.to_bytes()})
        )
        digests: list[list[int]] = await self.llm.collective_rpc("received_digests")
        return digests

    async def load(self, version: int) -> None:
        await self.llm.finish_weight_update(weight_version=str(version))
        # Either way nothing that old weights made is read by a request that begins under the new ones.
        await self.llm.reset_prefix_cache(reset_running_requests=self.kv_on_update == "recompute")

    async def probe(self, prompt_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token of the prompt but the first, under the weights in use; others stay frozen."""
        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._generate(prompt_ids, parameters, priority=PROBE)
        assert output.prompt_logprobs is not None
        positions = zip(output.prompt_logprobs[1:], prompt_ids[1:], strict=True)
        return [position[token].logprob for position, token in positions if position]

    async def resume(self) -> None:
        await self.llm.resume_generation()
        self._is_frozen = False

    async def abandon(self) -> None:
        await self.llm.collective_rpc("abandon_weight_update")

    async def wait_until_dead(self, silent_checks: int = SILENT_CHECKS) -> str:
        """Return, with the reason, when the engine's process is gone, or hangs while requests are under way.

        Frozen for an update it makes no step either; then the trainer, who has a deadline for every call, finds it out.
        """
        while not self.llm.errored:
            under_way = self.llm.get_num_unfinished_requests()
            self._silent_checks = self._silent_checks + 1 if under_way and not self._is_frozen else 0
            if self._silent_checks > silent_checks:
                silent_s = silent_checks * HEALTH_CHECK_S
                return f"the engine has made no token for {silent_s:g} s, with {under_way} requests under way"
            await asyncio.sleep(HEALTH_CHECK_S)
        return "the engine's process ended; its last words are above"

    def _heard(self) -> None:
        self._silent_checks = 0

    def shutdown(self) -> None:
        """Also of an engine that hangs or is stopped: vLLM kills what has not ended five seconds after SIGTERM."""
        self.llm.shutdown()
        shutil.rmtree(self._sockets, ignore_errors=True)
