"""OpenTelemetry: a trace for each group that was trained on, from its prompt to the policy version that came of it."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from retort.cli.trace import Group, groups_of, parts_of, trace_id
from retort.config import RunConfig
from retort.metrics_file import Metrics, is_validation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    Attribute = str | int | float | list[float] | list[int] | list[bool]

T = TypeVar("T")

SERVICE_OF = {
    "group": "trainer",
    "sample": "rollout",
    "score": "reward",
    "old_logprobs": "trainer",
    "teacher": "trainer",
    "update": "trainer",
    "weight_sync": "trainer",
}
"""The spans of a trace. The first holds the others; those of the trainer are parts of the step, which groups share."""


class OpenTelemetry:
    """OTLP over HTTP, to OTEL_EXPORTER_OTLP_ENDPOINT; the other variables of the SDK's exporter hold, too.

    Ids are functions of run, group and span, so that what is told twice is the same span.
    """

    def __init__(self, config: RunConfig) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource

        self._directory, self._run = config.directory, config.key_prefix
        self._exporter = OTLPSpanExporter()
        self._resources = {
            service: Resource.create({"service.name": service, "service.namespace": "retort", "retort.run": self._run})
            for service in set(SERVICE_OF.values())
        }

    def log(self, step: int, line: Metrics) -> None:
        """Export the traces of a step. Raises ConnectionError when they were not taken."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        if is_validation(line):
            return
        parts = parts_of(self._directory, step)
        for group in groups_of(self._directory, step):
            if self._exporter.export(list(self._trace(group, parts))) is not SpanExportResult.SUCCESS:
                raise ConnectionError(f"the OTLP receiver did not take the trace of group {group.group_id}")

    def close(self) -> None:
        self._exporter.shutdown()

    def _trace(self, group: Group, parts: Mapping[str, tuple[float, float]]) -> Iterator["ReadableSpan"]:
        times = {name: time for name, time in parts.items() if name in SERVICE_OF}
        if group.began:
            sampled = group.began + group.generate_seconds
            times |= {"sample": (group.began, sampled), "score": (sampled, sampled + group.score_seconds)}
        whole = min(start for start, _ in times.values()), max(end for _, end in times.values())
        attributes = {"group": _outcome(group), "sample": _sampling(group), "weight_sync": _version(group)}
        for name, (start, end) in {"group": whole, **times}.items():
            yield self._span(group, name, start, end, attributes.get(name, {}))

    def _span(
        self, group: Group, name: str, start: float, end: float, attributes: Mapping[str, "Attribute"]
    ) -> "ReadableSpan":
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, TraceFlags

        trace = int(trace_id(self._run, group.group_id), 16)

        def context(span: str) -> SpanContext:
            digest = hashlib.blake2b(f"{trace}/{span}".encode(), digest_size=8).digest()
            flags = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(trace, int.from_bytes(digest, "big"), is_remote=False, trace_flags=flags)

        return ReadableSpan(
            name,
            context(name),
            parent=None if name == "group" else context("group"),
            resource=self._resources[SERVICE_OF[name]],
            attributes=attributes,
            start_time=round(start * 1e9),
            end_time=round(end * 1e9),
        )


def _outcome(group: Group) -> Mapping[str, "Attribute"]:
    """What was asked, and what each sample came to, in their order; the words are those of `retort trace`."""
    samples = group.rollouts
    return {
        "retort.group": group.group_id,
        "retort.step": group.step,
        "retort.question": group.question,
        "retort.rewards": [sample.reward for sample in samples],
        "retort.advantages": _known(sample.advantage for sample in samples),
        "retort.updates": _known(sample.update for sample in samples),
        "retort.has_gradient": _known(sample.has_gradient for sample in samples),
    }


def _sampling(group: Group) -> Mapping[str, "Attribute"]:
    versions = {version for sample in group.rollouts for version in sample.policy_versions}
    tokens = sum(len(sample.policy_versions) for sample in group.rollouts)
    return {"retort.replica": group.sampled_by, "retort.policy_versions": sorted(versions), "retort.tokens": tokens}


def _version(group: Group) -> Mapping[str, "Attribute"]:
    return {"retort.policy_version": group.step}


def _known(values: Iterable[T | None]) -> list[T]:
    """Without what an older retort did not write."""
    return [value for value in values if value is not None]
