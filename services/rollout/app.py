"""The HTTP face of a rollout server: health, metrics and the trainer's control calls."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from retort.rollouts import Message
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, TransferRequest
from services.rollout.weight_receiver import RefusedError, WeightReceiver

MSGPACK = "application/msgpack"
M = TypeVar("M", bound=Message)


def make_app(receiver: WeightReceiver) -> FastAPI:
    """Routes: /healthz (alive), /readyz (serves a verified policy), /metrics, and POST /weights/* for the trainer."""
    app = FastAPI(title="Retort rollout server", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    async def readyz() -> Response:
        ready = receiver.state == "serving"
        text = f"serving policy version {receiver.served_version}\n" if ready else f"{receiver.state}\n"
        return Response(text, status_code=200 if ready else 503, media_type="text/plain")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    _control(app, "prepare", PrepareRequest, receiver.prepare)
    _control(app, "transfer", TransferRequest, receiver.transfer)
    _control(app, "probe", ProbeRequest, receiver.probe)
    _control(app, "commit", CommitRequest, receiver.commit)
    return app


def _control(app: FastAPI, name: str, request_type: type[M], act: Callable[[M], Awaitable[Message]]) -> None:
    async def route(request: Request) -> Response:
        try:
            message = request_type.from_bytes(await request.body())
            reply = await act(message)
        except msgspec.DecodeError as error:
            return Response(f"{name}: {error}", status_code=422, media_type="text/plain")
        except RefusedError as error:
            return Response(f"{name}: {error}", status_code=409, media_type="text/plain")
        except Exception as error:
            # Whatever it is, the trainer's error must carry the words of the side that failed.
            logging.getLogger("retort").exception("weights_%s_failed", name)
            return Response(f"{name}: {type(error).__name__}: {error}", status_code=500, media_type="text/plain")
        return Response(reply.to_bytes(), media_type=MSGPACK)

    app.add_api_route(f"/weights/{name}", route, methods=["POST"])
