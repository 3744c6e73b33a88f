"""`python -m services.rollout --config FILE --name rollout-0`: one rollout server."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from starlette.types import ASGIApp

from retort.config import ConfigError, RunConfig, load_config, secret
from retort.identity import identity_of
from retort.network import address_of, family_of
from retort.queues import Evicted, RolloutQueue, connect_async
from retort.telemetry import log_event, log_with, start_logging
from retort.weight_sync import authorization
from services.rollout.app import make_app
from services.rollout.control import make_control_app
from services.rollout.engine import Engine
from services.rollout.presence import Presence
from services.rollout.reward_client import RewardClient
from services.rollout.sampler import Decoder, Sampler
from services.rollout.weight_receiver import WeightReceiver

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARM_UP_IDS = [0, 1]


class EngineDied(Exception):
    """The engine is gone or hangs; this server ends so that its supervisor starts a new one."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.rollout", description=__doc__)
    parser.add_argument("--config", required=True, help="the run file")
    parser.add_argument("--name", default=f"rollout-{socket.gethostname()}", help="unique among the run's replicas")
    parser.add_argument("--advertise", default="", help="host under which the trainer reaches this replica")
    parser.add_argument("--engine", choices=["vllm", "simulated"], default="vllm", help="simulated: for tests only")
    args = parser.parse_args()
    start_logging(args.name)
    try:
        config = load_config(args.config)
        log_with(run=config.key_prefix)
        uvloop.run(serve(config, args.name, args.advertise or config.rollout.host, args.engine))
    except ConfigError as error:
        log_event("bad_configuration", logging.ERROR, message=error)
        return error.exit_code
    except BaseExceptionGroup as group:
        expected, unexpected = group.split((Evicted, EngineDied))
        if unexpected is not None:
            raise unexpected from None
        log_event("ended", logging.ERROR, message=expected.exceptions[0] if expected else group)
        return 1
    return 0


async def serve(config: RunConfig, name: str, advertise: str, engine_name: str) -> None:
    """Load the engine, join the run, and sample until asked to drain (SIGTERM, SIGINT)."""
    draining = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, draining.set)
    control_header = authorization()
    public, control = listen(config.rollout.host, config.rollout.port), listen(config.rollout.host, 0)
    redis = await connect_async(config.redis.url or os.environ.get("REDIS_URL", ""))
    queue = RolloutQueue(redis, config.key_prefix, name, config.rollout.lease_s, config.rollout.max_deliveries)
    await queue.declare()
    presence = Presence(
        name,
        queue,
        http_url=f"http://{address_of(advertise, public.getsockname()[1])}",
        control_url=f"http://{address_of(advertise, control.getsockname()[1])}",
    )
    await presence.loading()

    engine, inference_of = _engine(config, engine_name)
    try:
        tokenizer = _tokenizer(config.model.path)
        reward = RewardClient(config.reward.address, deadline_s=config.reward.deadline_s, token=secret("REWARD_TOKEN"))
        receiver = WeightReceiver(engine, identity_of(config, tokenizer))
        sampler = Sampler(
            name=name,
            queue=queue,
            engine=engine,
            receiver=receiver,
            reward=reward,
            decode=_decoder(tokenizer),
            concurrent_groups=config.rollout.concurrent_groups,
            lease_s=config.rollout.lease_s,
            max_deliveries=config.rollout.max_deliveries,
        )
        faces: list[tuple[ASGIApp, socket.socket]] = [
            (make_app(receiver, inference_of(receiver)), public),
            (make_control_app(receiver, control_header), control),
        ]
        # An engine's first request takes seconds; in a weight sync the trainer and all replicas would wait for it.
        await engine.probe(WARM_UP_IDS)
        log_event("engine_loaded", url=presence.http_url)
        try:
            await run_until_drained(sampler, presence, engine, faces, draining)
        finally:
            # Also when the engine died: what was in hand is others' at once, and no failure of the work.
            await queue.leave()
        await reward.close()
    finally:
        engine.shutdown()
    await redis.aclose()


async def run_until_drained(
    sampler: Sampler,
    presence: Presence,
    engine: Engine,
    faces: Sequence[tuple[ASGIApp, socket.socket]],
    draining: asyncio.Event,
) -> None:
    servers = [_server(app) for app, _ in faces]
    # Before it announces itself: the trainer may call at once, and a refused connection would get it evicted.
    for _, listening in faces:
        listening.listen()
    async with asyncio.TaskGroup() as tasks:
        http = [
            tasks.create_task(server.serve([listening]), name="http")
            for server, (_, listening) in zip(servers, faces, strict=True)
        ]
        background = [
            tasks.create_task(presence.follow(sampler, draining), name="presence"),
            tasks.create_task(sampler.renew_leases(), name="renew-leases"),
            tasks.create_task(_end_with(engine), name="engine"),
        ]
        await sampler.run(draining)
        await _end_of_update(sampler)
        for task in background:
            task.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*http)


async def _end_of_update(sampler: Sampler) -> None:
    """Who leaves in the middle of a transfer makes all others wait for its part of it. No longer than for a lease."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(sampler.lease_s):
            while sampler.receiver.state == "updating":
                await sampler.receiver.wait_for_change(sampler.lease_s)


def _server(app: ASGIApp) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
    # uvicorn would take SIGTERM for itself and stop answering the trainer while groups are still in hand.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return server


async def _end_with(engine: Engine) -> None:
    raise EngineDied(await engine.wait_until_dead())


def _engine(config: RunConfig, name: str) -> tuple[Engine, Callable[[WeightReceiver], ASGIApp | None]]:
    """The engine, and what it offers to the public. Only the one that is used is imported; either takes seconds."""
    if name == "simulated":
        from services.rollout.simulated_model import SimulatedModel

        log_event("simulated_engine", logging.WARNING, message="completions are random letters; nothing is learned")
        return SimulatedModel(config), lambda _: None
    from services.rollout.inference import make_inference
    from services.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(config)
    patience_s = config.weight_sync.deadline_s
    return engine, partial(make_inference, engine, model_path=config.model.path, patience_s=patience_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve HTTP on; port 0 lets the system choose. Raises ConfigError when it is taken."""
    listening = socket.socket(family_of(host))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"rollout.host = {host!r}, rollout.port = {port}: {error.strerror}. Choose another, or 0."
        ) from None
    return listening


def _tokenizer(model: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _decoder(tokenizer: "PreTrainedTokenizerBase") -> Decoder:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return decode


if __name__ == "__main__":
    raise SystemExit(main())
