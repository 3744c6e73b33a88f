"""The public face of a rollout server: health, metrics, and what people and programs may ask of the policy."""

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp

from retort.tokens import PROBES, TokenRequired
from services.rollout.weight_receiver import WeightReceiver

POLICY_PATHS = frozenset({"/v1/models", "/v1/chat/completions", "/v1/completions", "/generate"})
"""What `inference` offers to everybody who reaches the port."""


def make_app(receiver: WeightReceiver, inference: ASGIApp | None = None) -> ASGIApp:
    """Routes: /healthz (alive), /readyz (serves a verified policy), /metrics, and those of the policy.

    Any other path answers 401, should a library bring one along: nobody has a token for it.
    """
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

    if inference is not None:
        app.mount("/", inference)
    return TokenRequired(app, lambda shown: False, PROBES | POLICY_PATHS)
