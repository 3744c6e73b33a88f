"""The trainer's face of a rollout server: the four calls of a weight sync, on a port of their own, behind a token."""

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from retort.rollouts import Message
from retort.tokens import TokenRequired
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, TransferRequest
from services.rollout.weight_receiver import RefusedError, WeightReceiver

MSGPACK = "application/msgpack"
M = TypeVar("M", bound=Message)


def make_control_app(receiver: WeightReceiver, authorization: str) -> ASGIApp:
    """Routes: POST /weights/prepare, transfer, probe and commit, for callers that send this `Authorization` header."""
    app = FastAPI(title="Retort weight sync", docs_url=None, redoc_url=None, openapi_url=None)
    _route(app, "prepare", PrepareRequest, receiver.prepare)
    _route(app, "transfer", TransferRequest, receiver.transfer)
    _route(app, "probe", ProbeRequest, receiver.probe)
    _route(app, "commit", CommitRequest, receiver.commit)
    expected = authorization.encode()
    return TokenRequired(app, lambda shown: secrets.compare_digest(shown, expected), open_paths=frozenset())


def _route(app: FastAPI, name: str, request_type: type[M], act: Callable[[M], Awaitable[Message]]) -> None:
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
