"""The tracker `otel`: what a receiver of OTLP is sent is one trace a group, whose ids `retort trace` shows, too."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from retort.cli.__main__ import main
from tests.finished_run import a_config, write_run

SECOND = 10**9


class Receiver:
    """OTLP over HTTP: keeps what it is sent. With a `status` other than 200 it takes nothing."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.status = 200
        receiver = self

        class Post(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.status == 200:
                    receiver.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on stderr."""

        self.server = HTTPServer(("127.0.0.1", 0), Post)

    def spans(self) -> list[tuple[str, str, Span]]:
        """(service, run, span) of everything that was received."""
        return [
            (attributes["service.name"], attributes["retort.run"], span)
            for request in self.requests
            for resource in request.resource_spans
            for attributes in [{one.key: one.value.string_value for one in resource.resource.attributes}]
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server.server_port}")
    serving = threading.Thread(target=receiver.server.serve_forever)
    serving.start()
    yield receiver
    receiver.server.shutdown()
    serving.join()
    receiver.server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 1 with one group of two samples: sampled from 100 to 102, scored until 102.5, published at 110."""
    directory = write_run(tmp_path / "run", a_config(tmp_path / "run"), [0.5, 0.75])
    samples = [
        {"policy_versions": [0, 0], "finish_reason": "stop", "reward": reward, "parsed": "B"}
        | {"advantage": reward - 0.5, "update": update, "has_gradient": True}
        for reward, update in ((1.0, 2), (0.0, 1))
    ]
    group = {"group_id": "0-000007", "step": 1, "data_index": 7, "data_source": "letters", "question": "Which letter?"}
    group |= {"answer": "B", "sampled_by": "rollout-1", "generate_seconds": 2.0, "score_seconds": 0.5}
    (directory / "rollouts").mkdir()
    line = json.dumps(group | {"began": 100.0, "rollouts": samples})
    (directory / "rollouts/step-000001.jsonl").write_text(line + "\n")
    times = [("update", 106.0, 1.0), ("update", 108.0, 1.5), ("weight_sync", 110.0, 0.5), ("checkpoint", 111.0, 0.5)]
    spans = [{"part": part, "step": 1, "end": end, "seconds": seconds} for part, end, seconds in times]
    (directory / "timeline.jsonl").write_text("".join(json.dumps(span) + "\n" for span in spans))
    return directory


def value(attribute: AnyValue) -> object:
    kind = attribute.WhichOneof("value")
    found = getattr(attribute, str(kind))
    return [value(one) for one in found.values] if kind == "array_value" else found


def test_a_group_is_one_trace_from_its_prompt_to_the_version_that_came_of_it(
    run: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", str(run), "--to", "otel"]) == 0
    found = {span.name: (service, span) for service, _, span in receiver.spans()}
    assert {run for _, run, _ in receiver.spans()} == {"letters"}
    times = {
        name: (service, span.start_time_unix_nano / SECOND, span.end_time_unix_nano / SECOND)
        for name, (service, span) in found.items()
    }
    assert times == {
        "group": ("trainer", 100.0, 110.0),
        "sample": ("rollout", 100.0, 102.0),
        "score": ("reward", 102.0, 102.5),
        "update": ("trainer", 105.0, 108.0),
        "weight_sync": ("trainer", 109.5, 110.0),
    }
    spans = {name: span for name, (_, span) in found.items()}
    assert main(["trace", "0-000007", str(run), "--json"]) == 0
    assert {span.trace_id.hex() for span in spans.values()} == {json.loads(capsys.readouterr().out)["trace_id"]}
    root = spans.pop("group")
    assert root.parent_span_id == b""
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    assert {one.key: value(one.value) for one in root.attributes} == {
        "retort.group": "0-000007",
        "retort.step": 1,
        "retort.question": "Which letter?",
        "retort.rewards": [1.0, 0.0],
        "retort.advantages": [0.5, -0.5],
        "retort.updates": [2, 1],
        "retort.has_gradient": [True, True],
    }
    [version] = spans["weight_sync"].attributes
    assert (version.key, value(version.value)) == ("retort.policy_version", 1)


def test_what_was_told_is_not_told_again_and_would_be_the_same_spans(run: Path, receiver: Receiver) -> None:
    assert main(["track", str(run), "--to", "otel"]) == 0
    assert main(["track", str(run), "--to", "otel"]) == 0
    assert len(receiver.spans()) == 5
    (run / "trackers" / "otel.json").unlink()
    assert main(["track", str(run), "--to", "otel"]) == 0
    assert len(receiver.spans()) == 10
    assert len({(span.trace_id, span.span_id) for _, _, span in receiver.spans()}) == 5


def test_a_step_that_was_not_taken_is_told_later(run: Path, receiver: Receiver) -> None:
    receiver.status = 400
    with pytest.raises(ConnectionError, match="did not take the trace of group 0-000007"):
        main(["track", str(run), "--to", "otel"])
    receiver.status = 200
    assert main(["track", str(run), "--to", "otel"]) == 0
    assert len(receiver.spans()) == 5


def test_a_group_of_an_older_retort_has_the_spans_whose_times_are_known(run: Path, receiver: Receiver) -> None:
    file = run / "rollouts/step-000001.jsonl"
    file.write_text(file.read_text().replace('"began": 100.0, ', ""))
    assert main(["track", str(run), "--to", "otel"]) == 0
    assert {span.name for _, _, span in receiver.spans()} == {"group", "update", "weight_sync"}
