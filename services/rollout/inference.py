"""The policy for people and programs: OpenAI's API through vLLM's own routes, and token ids in, token ids out.

Requests have seats of their own in the engine, beside those of the work from the queue, and wait for them here in order
of arrival. They are answered while a verified version is served, wait while the next one is being brought in, and see
no token of a version that was not committed.
"""

import secrets
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models import api_router as model_routes
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams

from retort.rollouts import SamplingParameters
from services.rollout.engine import Sampled
from services.rollout.seats import OUTSIDE_COMPLETIONS, Seats
from services.rollout.vllm_engine import VLLMEngine
from services.rollout.weight_receiver import WeightReceiver

POLICY = "policy"
VERSION_HEADER = "x-policy-version"
SAMPLED_BY = ContextVar[set[int]]("sampled_by")
"""The versions that have sampled the answer to the request at hand."""
BEHIND_TRAINING = 1
"""vLLM's priority: work from the queue has 0. The smaller number goes first, and keeps its place in a full KV cache."""


class GenerateRequest(BaseModel):
    """What POST /generate takes; answered by `Sampled` as JSON."""

    prompt_ids: list[int] = Field(min_length=1)
    max_completion_tokens: int = Field(gt=0)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=0, lt=2**63)


def make_inference(engine: VLLMEngine, receiver: WeightReceiver, *, model_path: str, patience_s: float) -> ASGIApp:
    """Routes: /v1/models, /v1/chat/completions, /v1/completions, /generate.

    A request that finds no version served waits for one up to `patience_s` seconds.
    """
    app = FastAPI(title="Retort policy", docs_url=None, redoc_url=None, openapi_url=None)
    init_exception_handler(app)
    app.state.args = Namespace(log_error_stack=False)  # what vLLM's error routes look up
    names = [BaseModelPath(POLICY, model_path)]
    seats = Seats(OUTSIDE_COMPLETIONS)
    _serve_openai(app, OutsideClient(engine, receiver, seats, patience_s), names)

    @app.post("/generate", response_model=None)
    @with_cancellation  # type: ignore[untyped-decorator]
    async def generate(request: GenerateRequest, raw_request: Request) -> Sampled:
        """Token ids in, token ids out; nothing is tokenised. Every token says which version sampled it."""
        sampling = SamplingParameters(
            temperature=request.temperature, top_p=request.top_p, max_completion_tokens=request.max_completion_tokens
        )
        async with seats.taken(1):
            if not await receiver.wait_until_serving(0, patience_s):
                raise HTTPException(503, f"no policy version is served: {receiver.state}")
            epoch = receiver.epoch
            sampled = await engine.sample(request.prompt_ids, sampling, request.seed, urgent=False)
        SAMPLED_BY.get().update(sampled.policy_versions)
        if not await receiver.wait_until_committed(max(sampled.policy_versions, default=0), epoch, patience_s):
            raise HTTPException(503, "the version that sampled this was not committed; ask again")
        return sampled

    return WhileServing(app, receiver, names, patience_s)


class WhileServing:
    """Lets requests in while a version is served, tells vLLM its name, and says which it was in the answer."""

    def __init__(self, app: FastAPI, receiver: WeightReceiver, names: list[BaseModelPath], patience_s: float) -> None:
        self.app = app
        self._receiver = receiver
        self._names = names
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await self._receiver.wait_until_serving(0, self._patience_s):
            error = {"message": f"no policy version is served: {self._receiver.state}", "code": 503}
            refusal = JSONResponse({"error": error}, status_code=503)
            return await refusal(scope, receive, send)
        name = f"{POLICY}@{self._receiver.served_version}"
        self._names[1:] = [BaseModelPath(name, self._names[0].model_path)]

        sampled_by: set[int] = set()
        SAMPLED_BY.set(sampled_by)

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The newest that has sampled any of it. A stream begins before anything is sampled.
                version = max(sampled_by, default=self._receiver.last_served_version)
                MutableHeaders(scope=message)[VERSION_HEADER] = str(version)
            await send(message)

        await self.app(scope, receive, send_with_version)
        return None


def _serve_openai(app: FastAPI, client: "OutsideClient", names: list[BaseModelPath]) -> None:
    """Three of vLLM's routes and what they need. None of its routes for development, adapters or profiling."""
    wanted = {"/v1/models", "/v1/chat/completions", "/v1/completions"}
    for module in (model_routes, chat_routes, completion_routes):
        app.include_router(APIRouter(routes=[route for route in module.router.routes if _path(route) in wanted]))
    models = OpenAIServingModels(client, names)  # type: ignore[arg-type]
    renderer = OnlineRenderer(
        client.model_config,
        client.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    common: dict[str, Any] = {
        "engine_client": client,
        "models": models,
        "online_renderer": renderer,
        "request_logger": None,
    }
    app.state.openai_serving_models = models
    app.state.openai_serving_completion = Completions(**common)
    app.state.openai_serving_chat = Chat(
        **common, response_role="assistant", chat_template=None, chat_template_content_format="auto"
    )


def _path(route: BaseRoute) -> str:
    return route.path if isinstance(route, APIRoute) else ""


class OutsideClient:
    """The engine as vLLM's serving classes use it, for requests that come second to training."""

    def __init__(self, engine: VLLMEngine, receiver: WeightReceiver, seats: Seats, patience_s: float) -> None:
        self._engine = engine
        self._receiver = receiver
        self._seats = seats
        self._patience_s = patience_s
        self.model = ContextVar[str | None]("model", default=None)
        """What the request at hand asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.llm, name)

    def generate(
        self, prompt: Mapping[str, Any], sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        # Not a generator itself: the context of the request is this call's, and need not be that of the iteration.
        count, limit = sampling_params.n, self._seats.number
        if count > limit:
            raise VLLMValidationError(f"n is {count}, and at most {limit} are sampled at a time", parameter="n")
        options["priority"] = BEHIND_TRAINING
        outputs = self._engine.llm.generate(prompt, sampling_params, request_id, **options)  # type: ignore[arg-type]
        return self._committed(outputs, count, self.model.get() or POLICY, SAMPLED_BY.get())

    async def _committed(
        self, outputs: AsyncGenerator[RequestOutput], count: int, model: str, sampled_by: set[int]
    ) -> AsyncIterator[RequestOutput]:
        """Pass on what a committed version sampled; a request for one version ends when another is served."""
        receiver, patience_s = self._receiver, self._patience_s
        async with self._seats.taken(count), aclosing(outputs):
            if not await receiver.wait_until_serving(0, patience_s):
                raise VLLMNotFoundError(f"no policy version is served: {receiver.state}")
            epoch = receiver.epoch
            async for output in outputs:
                # vLLM says of a finished output alone who sampled it. Any of the others the newest version may have.
                versions = {int(span.version) for one in output.outputs for span in one.weight_versions or ()}
                may_leave = (
                    receiver.wait_until_committed(max(versions), epoch, patience_s)
                    if versions
                    else receiver.wait_until_serving(0, patience_s)
                )
                if not await may_leave or receiver.epoch != epoch:
                    raise VLLMNotFoundError("the version that sampled this was not committed; ask again")
                served = f"{POLICY}@{receiver.last_served_version}"
                names = {f"{POLICY}@{version}" for version in versions} or {served}
                if model != POLICY and names != {model}:
                    raise VLLMNotFoundError(f"The model `{model}` is not served any more, `{served}` is.")
                sampled_by |= versions
                yield output


class NotingModel:
    """Tells the client below which model the request at hand asked for."""

    engine_client: Any

    async def _check_model(self, request: Any) -> Any:
        self.engine_client.model.set(request.model)
        return await super()._check_model(request)  # type: ignore[misc]


class Completions(NotingModel, OpenAIServingCompletion):
    """vLLM's own /v1/completions."""


class Chat(NotingModel, OpenAIServingChat):
    """vLLM's own /v1/chat/completions."""
