"""The HTTP/JSON face of the reward service, and the bodies that other trainers send."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from retort.tokens import TokenRequired
from services.reward.admission import FullError
from services.reward.checkers import Reward
from services.reward.http_limits import BodyLimit
from services.reward.http_messages import (
    CheckersBody,
    OpenRlhfBody,
    ProblemBody,
    ResultsBody,
    ScoreBody,
    SlimeBody,
    checker_json,
    result_json,
)
from services.reward.requests import malformed, too_large
from services.reward.scorer import Scorer
from services.reward.scoring import Item, Scored
from services.reward.security import Security

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": ProblemBody, "description": "The body is no JSON."},
    401: {"model": ProblemBody, "description": "The service has tokens and the request shows none of them."},
    408: {"model": ProblemBody, "description": "The body did not come in time."},
    413: {"model": ProblemBody, "description": "The body is too large."},
    422: {"model": ProblemBody, "description": "A field is wrong, and which."},
    429: {"model": ProblemBody, "description": "The service is full. Retry-After says when to try again."},
    503: {"model": ProblemBody, "description": "The service was stopped before it had finished."},
}


class _State:
    """Whether the service takes calls; false while it drains."""

    ready = True


class RefusedError(Exception):
    """A request that gets a status of its own and the reason."""

    def __init__(self, status: int, error: str, field: str = "") -> None:
        super().__init__(error)
        self.status, self.field = status, field


def make_app(scorer: Scorer, security: Security) -> FastAPI:
    """Routes: /v1/score, /v1/checkers, /compat/* for other trainers, /healthz, /readyz, /metrics, /docs."""
    app = FastAPI(
        title="Retort reward service",
        version="1",
        description="Completions in; for each, one reward or one reason why there is none.",
    )
    app.state.service = _State()
    app.add_middleware(BodyLimit)
    app.add_middleware(TokenRequired, accepts=security.accepts)
    _add_problems(app)
    _add_probes(app)
    _add_scoring(app, scorer)
    _add_compatible(app, scorer)
    return app


def _add_scoring(app: FastAPI, scorer: Scorer) -> None:
    @app.post("/v1/score", response_model=ResultsBody, responses=PROBLEMS)
    async def score(body: ScoreBody, request: Request) -> Response:
        """Score a batch. Results come in the order of the items; one bad item costs only its own reward."""
        for index, one in enumerate(body.items):
            if problem := too_large(one.checker, one.metadata, one.options):
                _refuse(f"items[{index}].{problem}")
        items = [Item(one.id, one.checker, one.completion, one.answer, one.options) for one in body.items]
        if problem := malformed(items):
            _refuse(problem)
        scored = await _score_while_connected(scorer, items, request)
        return _json({"results": [result_json(item.id, one) for item, one in zip(items, scored, strict=True)]})

    @app.get("/v1/checkers", response_model=CheckersBody, responses={401: PROBLEMS[401]})
    async def checkers() -> Response:
        """The checkers that this service can run: what they accept, their options, examples."""
        return _json({"checkers": [checker_json(checker) for checker in scorer.checkers.values()]})


def _add_compatible(app: FastAPI, scorer: Scorer) -> None:
    checker_name = Path(description="Name of the checker.", examples=["mcq"], max_length=256)

    @app.post("/compat/slime/{checker}", responses=PROBLEMS)
    async def slime(body: SlimeBody, request: Request, checker: str = checker_name) -> float:
        """For `--rm-type remote_rm --rm-url …/compat/slime/mcq`: the reward as a number."""
        item = Item("0", checker, body.response, body.label)
        (scored,) = await _score_while_connected(scorer, [item], request)
        return _reward_or_refuse(scored, "response")

    @app.post("/compat/openrlhf/{checker}", responses=PROBLEMS)
    async def openrlhf(body: OpenRlhfBody, request: Request, checker: str = checker_name) -> Response:
        """For `--remote_rm_url …/compat/openrlhf/mcq`: the rewards of a batch, under the names it looks for."""
        if not len(body.query) == len(body.prompts) == len(body.labels):
            lengths = f"{len(body.query)} queries, {len(body.prompts)} prompts, {len(body.labels)} labels"
            raise RefusedError(422, f"{lengths}; send as many of each", "query")
        items = [
            Item(str(index), checker, query.removeprefix(prompt), label)
            for index, (query, prompt, label) in enumerate(zip(body.query, body.prompts, body.labels, strict=True))
        ]
        if problem := malformed(items):
            _refuse(problem.replace("items", "query"))
        scored = await _score_while_connected(scorer, items, request)
        rewards = [_reward_or_refuse(one, f"query[{index}]") for index, one in enumerate(scored)]
        return _json({"rewards": rewards, "scores": rewards, "extra_logs": {}})


def _add_probes(app: FastAPI) -> None:
    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Whether the process is alive."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", response_class=Response, responses={503: {"description": "It drains."}})
    async def readyz() -> Response:
        """Whether the service takes requests."""
        ready = app.state.service.ready
        return Response(
            "ready\n" if ready else "draining\n", status_code=200 if ready else 503, media_type="text/plain"
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return _problem(error.status, str(error), error.field)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(FullError)
    async def full(request: Request, error: FullError) -> Response:
        # The header counts in whole seconds.
        return _problem(429, str(error), headers={"Retry-After": str(math.ceil(error.retry_after_s))})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Not the framework's own answer: that repeats the input, which may hold NaN and lone surrogates.
        if "json" not in request.headers.get("content-type", "").lower():
            return _problem(422, "the body was not read as JSON; send the header Content-Type: application/json")
        first = error.errors()[0]
        place = [part for part in first["loc"] if part != "body"]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        is_json = first["type"] != "json_invalid"
        return _problem(422 if is_json else 400, first["msg"], field if is_json else "")


def _refuse(problem: str) -> NoReturn:
    """422 for a problem that begins with its field."""
    field, _, error = problem.partition(": ")
    raise RefusedError(422, error, field)


async def _score_while_connected(scorer: Scorer, items: Sequence[Item], request: Request) -> list[Scored]:
    """Scores; stops, with no one to answer to, when the client has gone."""
    scoring = asyncio.create_task(scorer.score(items))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([scoring, gone], return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise RefusedError(499, "the client has closed the connection")
        return scoring.result()
    except asyncio.CancelledError:
        # Nobody else cancels a request.
        raise RefusedError(503, "the service is being stopped and could not finish this; send it again") from None
    finally:
        scoring.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _reward_or_refuse(scored: Scored, field: str) -> float:
    # These bodies have no place for a reason, and a missing reward must never look like one.
    if isinstance(scored.verdict, Reward):
        return float(scored.verdict.value)
    raise RefusedError(422, f"unscorable: {scored.verdict.reason}", field)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _problem(status: int, error: str, field: str = "", headers: dict[str, str] | None = None) -> Response:
    texts = {"error": error, "field": field}
    safe = {key: text.encode(errors="backslashreplace").decode() for key, text in texts.items()}
    return _json(safe, status, headers)
