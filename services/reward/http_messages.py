"""The JSON messages of the HTTP face: the fields of proto/reward/v1/reward.proto, a reward laid out flat."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from services.reward.checkers import Checker, Reward, is_encodable
from services.reward.requests import LONGEST_NAME, MAX_ENTRIES, MAX_ITEMS
from services.reward.scoring import Scored

EXAMPLE_ITEM: JsonDict = {"id": "1", "checker": "mcq", "completion": "Two protons. <answer>B</answer>", "answer": "B"}
EXAMPLE_REQUEST: JsonDict = {"items": [EXAMPLE_ITEM, {**EXAMPLE_ITEM, "id": "2", "checker": "mqc"}]}
EXAMPLE_RESPONSE: JsonDict = {
    "results": [
        {
            "id": "1",
            "reward": 1.0,
            "correct": True,
            "parsed": "B",
            "format_ok": True,
            "rule": "last_answer_tag",
            "explanation": "read 'B', the answer is 'B'",
            "checker": "mcq@1",
            "seconds": 0.000004,
        },
        {"id": "2", "unscorable": {"reason": "no checker 'mqc'; known: …"}, "checker": "", "seconds": 0.0},
    ]
}


def _encodable(text: str) -> str:
    if not is_encodable(text):
        raise ValueError("has a lone surrogate, which cannot be sent back")
    return text


def _few(value: object) -> object:
    """Before pydantic looks at the content: it would collect an error for each entry, in the event loop."""
    most = MAX_ITEMS if isinstance(value, list) else MAX_ENTRIES
    if isinstance(value, list | dict) and len(value) > most:
        numbers = {"count": len(value), "most": most}
        raise PydanticCustomError("too_many", "{count} entries are more than {most}", numbers)
    return value


Name = Annotated[str, AfterValidator(_encodable)]
Entries = Annotated[dict[Name, Name], BeforeValidator(_few)]
# For readers of the API page alone: `requests` refuses what is longer, in the words that both faces have.
NAME_LENGTH: JsonDict = {"minLength": 1, "maxLength": LONGEST_NAME}
FEW_ENTRIES: JsonDict = {"maxProperties": MAX_ENTRIES}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    _few_fields = model_validator(mode="before")(_few)


class ItemBody(_Message):
    """One completion to be scored."""

    id: Name = Field(json_schema_extra=NAME_LENGTH)
    """Comes back in the result; unique within a request."""
    checker: Name = Field(json_schema_extra={"maxLength": LONGEST_NAME})
    """Name of the checker; GET /v1/checkers lists them."""
    completion: str
    """What the model wrote, without special tokens."""
    answer: str = ""
    """The reference that the checker compares with."""
    metadata: Entries = Field(default_factory=dict, json_schema_extra=FEW_ENTRIES)
    """For logs and for the caller; checkers never see it."""
    options: Entries = Field(default_factory=dict, json_schema_extra=FEW_ENTRIES)
    """Settings of the checker for this item."""


class ScoreBody(_Message):
    """A batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_REQUEST]})

    items: Annotated[list[ItemBody], FailFast(), BeforeValidator(_few)] = Field(
        json_schema_extra={"minItems": 1, "maxItems": MAX_ITEMS}
    )


class UnscorableBody(_Message):
    """Why there is no reward."""

    reason: str


class ResultBody(_Message):
    """Either `reward` with its details, or `unscorable`; never both, never neither."""

    id: str
    reward: float | None = None
    correct: bool | None = None
    parsed: str | None = None
    format_ok: bool | None = None
    rule: str | None = None
    explanation: str | None = None
    unscorable: UnscorableBody | None = None
    checker: str
    """The checker that answered, as name@version; empty if it was not found."""
    seconds: float
    """Time in the checker."""


class ResultsBody(_Message):
    """As many results as items in the request, in the same order."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_RESPONSE]})

    results: list[ResultBody]


class ExampleBody(_Message):
    completion: str
    answer: str
    options: dict[str, str]
    reward: float


class CheckerBody(_Message):
    name: str
    version: str
    description: str
    accepts: str
    options: dict[str, str]
    examples: list[ExampleBody]


class CheckersBody(_Message):
    checkers: list[CheckerBody]


class ProblemBody(_Message):
    """What is wrong with the request and what to do."""

    error: str
    field: str = ""
    """Where in the request; empty if no field is to blame."""


def _number_as_text(value: object) -> object:
    # Not by a union: pydantic would make 1 of true, and name the field by its alternatives.
    return str(value) if type(value) in (int, float) else value


Label = Annotated[Name, BeforeValidator(_number_as_text, json_schema_input_type=str | int | float)]


class SlimeBody(BaseModel):
    """What slime's `--rm-type remote_rm` sends for one sample; other fields are ignored."""

    prompt: Any = None
    response: Name
    label: Label


class OpenRlhfBody(BaseModel):
    """What OpenRLHF's `--remote_rm_url` sends for a batch; other fields are ignored."""

    query: Annotated[list[str], FailFast(), BeforeValidator(_few)]
    """Prompt and response."""
    prompts: Annotated[list[str], FailFast(), BeforeValidator(_few)]
    labels: Annotated[list[Label], FailFast(), BeforeValidator(_few)]


def result_json(item_id: str, scored: Scored) -> dict[str, Any]:
    """A result as JSON; the fields of the other outcome are left out."""
    verdict = scored.verdict
    if isinstance(verdict, Reward):
        outcome: dict[str, Any] = {
            "reward": float(verdict.value),
            "correct": verdict.correct,
            "parsed": verdict.parsed,
            "format_ok": verdict.format_ok,
            "rule": verdict.rule,
            "explanation": verdict.explanation,
        }
    else:
        outcome = {"unscorable": {"reason": verdict.reason}}
    return {"id": item_id, **outcome, "checker": scored.checker, "seconds": scored.seconds}


def checker_json(checker: Checker) -> dict[str, Any]:
    """A checker as GET /v1/checkers lists it."""
    return {
        "name": checker.name,
        "version": checker.version,
        "description": checker.description,
        "accepts": checker.accepts,
        "options": dict(checker.options),
        "examples": [
            {
                "completion": one.completion,
                "answer": one.answer,
                "options": dict(one.options or {}),
                "reward": one.reward,
            }
            for one in checker.examples
        ],
    }
