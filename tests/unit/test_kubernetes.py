"""deploy/k8s: every resource is valid, and what it names is there, in the other resources and in the code."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from retort.cli.process_table import TRAINER_ENDS
from retort.config import ENV_PREFIX
from retort.queues.protocol import CONSUMER_GROUP, Keys
from tests.unit.test_deploy import is_key_of_the_run_file

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("tiny", "gpu", "nodes")
KUBERNETES = "1.32"
Resource = dict[str, Any]

# What of KEDA's resources is used here, and nothing else: a misspelt key is refused, as KEDA's own schema would.
INTEGER = {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def exactly(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": [*properties]}


KEDA = {
    "ScaledObject": exactly(
        scaleTargetRef=exactly(name={"type": "string"}),
        minReplicaCount=INTEGER,
        maxReplicaCount=INTEGER,
        pollingInterval=INTEGER,
        cooldownPeriod=INTEGER,
        advanced=exactly(
            horizontalPodAutoscalerConfig=exactly(
                behavior=exactly(scaleDown=exactly(stabilizationWindowSeconds={"type": "integer", "maximum": 3600}))
            )
        ),
        fallback=exactly(
            failureThreshold={"type": "integer"}, replicas={"type": "integer"}, behavior={"const": "currentReplicas"}
        ),
        triggers={
            "type": "array",
            "items": exactly(
                type={"const": "redis-streams"}, metadata=TEXTS, authenticationRef=exactly(name={"type": "string"})
            ),
        },
    ),
    "TriggerAuthentication": exactly(secretTargetRef={"type": "array", "items": TEXTS}),
}


@pytest.fixture(params=["files", *OVERLAYS], scope="module")
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    """What is applied: an overlay as kustomize builds it. Without kustomize the files of which it is built."""
    if request.param == "files":
        files = [*K8S.glob("base/[!k]*.yaml"), K8S / "components" / "valkey" / "valkey.yaml", K8S / "files.yaml"]
        return [resource for file in sorted(files) for resource in yaml.safe_load_all(file.read_text())]
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which includes kustomize, is not installed")
    build = ["kubectl", "kustomize", str(K8S / "overlays" / request.param)]
    built = subprocess.run(build, capture_output=True, text=True, check=True, timeout=60)
    return [*yaml.safe_load_all(built.stdout)]


def of_kind(resources: list[Resource], *kinds: str) -> dict[str, Resource]:
    return {one["metadata"]["name"]: one for one in resources if one["kind"] in kinds}


def pods(resources: list[Resource]) -> dict[str, Resource]:
    owners = of_kind(resources, "Deployment", "Job", "StatefulSet")
    return {name: owner["spec"]["template"] for name, owner in owners.items()}


def containers(resources: list[Resource]) -> dict[str, Resource]:
    return {name: pod["spec"]["containers"][0] for name, pod in pods(resources).items()}


def environment(container: Resource) -> dict[str, str | None]:
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def selectors(resource: Any) -> Iterator[Resource]:
    """Every pod selector anywhere below."""
    if isinstance(resource, dict):
        for key, value in resource.items():
            if key in ("podSelector", "labelSelector") or (key == "selector" and "app" not in value):
                yield value
            elif key == "selector":
                yield {"matchLabels": value}
            else:
                yield from selectors(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from selectors(value)


def apps_of(selector: Resource) -> set[str]:
    named = {app for match in selector.get("matchExpressions", []) for app in match["values"]}
    return named | {*selector.get("matchLabels", {}).values()}


def test_every_resource_follows_the_schema_of_its_kind(resources: list[Resource]) -> None:
    for resource in resources:
        if resource["apiVersion"].startswith("keda.sh/"):
            jsonschema.validate(resource["spec"], KEDA[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_a_key_that_kubernetes_does_not_know_is_refused() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)


def test_every_variable_is_a_key_of_the_run_file(resources: list[Resource]) -> None:
    variables = {name for container in containers(resources).values() for name in environment(container)}
    ours = {name for name in variables if name.startswith(ENV_PREFIX)}
    assert len(ours) >= 9
    assert {name for name in ours if not is_key_of_the_run_file(name)} == set()


def test_every_selector_finds_a_pod(resources: list[Resource]) -> None:
    apps = {pod["metadata"]["labels"]["app"] for pod in pods(resources).values()}
    chosen = {app for selector in selectors(resources) for app in apps_of(selector)}
    assert chosen == apps
    assert of_kind(resources, "ScaledObject")["rollout"]["spec"]["scaleTargetRef"]["name"] in pods(resources)


def test_only_rollout_servers_reach_the_reward_service_and_it_calls_nobody(
    resources: list[Resource],
) -> None:
    policy = of_kind(resources, "NetworkPolicy")["reward"]["spec"]
    assert "Egress" in policy["policyTypes"]
    assert "egress" not in policy
    [rule] = policy["ingress"]
    assert [apps_of(source["podSelector"]) for source in rule["from"]] == [{"rollout"}]


def test_services_meet_at_the_ports_where_they_listen(resources: list[Resource]) -> None:
    listening = {name: {port["containerPort"] for port in one["ports"]} for name, one in containers(resources).items()}
    of = {name: environment(one) for name, one in containers(resources).items()}
    assert listening["reward"] == {int(of["reward"]["RETORT_REWARD__PORT"] or 0), 8081}
    assert of["rollout"]["RETORT_REWARD__ADDRESS"] == "reward:50051"
    assert listening["rollout"] == {int(of["rollout"]["RETORT_ROLLOUT__PORT"] or 0)}
    assert listening["trainer"] == {int(of["trainer"]["RETORT_TRAINER__METRICS_PORT"] or 0), 29400}
    for service, resource in of_kind(resources, "Service").items():
        assert {port["port"] for port in resource["spec"]["ports"]} <= listening[service]
    for name, pod in pods(resources).items():
        scraped = pod["metadata"].get("annotations", {}).get("prometheus.io/port")
        assert scraped is None or int(scraped) in listening[name]


def test_keda_reads_the_stream_that_the_rollout_servers_read(resources: list[Resource]) -> None:
    runs = {environment(containers(resources)[name])["RETORT_RUN_ID"] for name in ("rollout", "trainer")}
    [run] = runs
    [trigger] = of_kind(resources, "ScaledObject")["rollout"]["spec"]["triggers"]
    assert trigger["metadata"]["stream"] == Keys(str(run)).work("train")
    assert trigger["metadata"]["consumerGroup"] == CONSUMER_GROUP


def test_the_trainer_has_a_pod_for_each_node_and_a_gpu_for_each_rank(resources: list[Resource]) -> None:
    job, container = of_kind(resources, "Job")["trainer"]["spec"], containers(resources)["trainer"]
    variables = environment(container)
    nodes, ranks = int(variables["NODES"] or 0), int(variables["RANKS_PER_NODE"] or 0)
    assert job["completions"] == job["parallelism"] == nodes
    assert int(variables["RETORT_TRAINER__RANKS"] or 0) == nodes * ranks
    assert int(container["resources"]["limits"].get("nvidia.com/gpu", ranks)) == ranks
    assert "--rdzv-endpoint=trainer-0.trainer:29400" in container["args"]


def test_an_end_that_would_come_again_fails_the_job(resources: list[Resource]) -> None:
    rule = of_kind(resources, "Job")["trainer"]["spec"]["podFailurePolicy"]["rules"][0]
    assert set(rule["onExitCodes"]["values"]) == TRAINER_ENDS - {0, 130}


def test_no_pod_may_do_more_than_it_needs(resources: list[Resource]) -> None:
    for name, pod in pods(resources).items():
        assert pod["spec"]["securityContext"]["runAsNonRoot"], name
        assert not pod["spec"]["automountServiceAccountToken"], name
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert not container["securityContext"]["allowPrivilegeEscalation"], name
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert "memory" in container["resources"]["limits"], name


def test_the_slurm_script_sets_keys_of_the_run_file_and_is_bash() -> None:
    script = ROOT / "deploy" / "slurm" / "retort.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    names = {word.partition("=")[0] for word in script.read_text().split() if word.startswith(ENV_PREFIX)}
    assert len(names) >= 3
    assert {name for name in names if not is_key_of_the_run_file(name)} == set()
