"""docker-compose.yml, built and run: a replica joins meanwhile, containers are killed, the run ends with 0."""

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from retort.client import Item, RewardClient
from tests.compose.stack import SERVICES, Stack, podman
from tests.e2e.test_run import check_training

MISSING = [program for program in ("podman", "podman-compose") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.compose,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

STEPS = 80


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with one rollout server, after its first steps. Paused, since a tiny model's run is over in no time."""
    settings = {"trainer.steps": STEPS, "checkpoint.every": 5}
    stack = Stack(f"retort-{uuid.uuid4().hex[:6]}", tmp_path_factory.mktemp("compose"), settings)
    stack.compose("build")
    try:
        stack.compose("up", "--detach")
        stack.until_step(2)
        assert stack.is_healthy("trainer")
        podman("pause", stack.containers("trainer")[0]["Id"])
        yield stack
    finally:
        stack.remove()


def samplers(stack: Stack) -> set[str]:
    """The replicas whose groups were trained on."""
    return {group["sampled_by"] for group in stack.run().groups()}


def test_every_service_says_that_it_is_healthy(stack: Stack) -> None:
    others = [service for service in SERVICES if service != "trainer"]  # which was asked before it was paused
    assert {service: stack.is_healthy(service) for service in others} == dict.fromkeys(others, True)


def test_no_service_runs_as_root_or_may_become_root(stack: Stack) -> None:
    # From what podman made of the files, which holds whether a container is running at this moment or not.
    for service in SERVICES:
        container = stack.containers(service)[0]
        user = container["Config"]["User"].partition(":")[0]
        assert user not in ("", "0", "root"), service
        assert not container["BoundingCaps"], service
        assert "no-new-privileges" in " ".join(container["HostConfig"]["SecurityOpt"]), service


def test_the_reward_image_is_smaller_than_200_mb_and_has_no_shell(stack: Stack) -> None:
    assert int(podman("image", "inspect", "--format", "{{.Size}}", "retort-reward")) < 200e6
    with pytest.raises(AssertionError, match='exec: "sh": executable file not found'):
        podman("exec", stack.containers("reward")[0]["Id"], "sh")


def test_the_reward_container_scores_an_item_over_grpc_and_over_http(stack: Stack) -> None:
    address = stack.address("reward")
    token = podman("exec", stack.containers("secrets")[0]["Id"], "cat", "/retort/secrets/reward/reward-token").strip()
    with RewardClient(f"{address}:50051", token=token) as client:
        [result] = client.score([Item(checker="math", completion="It is \\boxed{\\frac{1}{2}}.", answer="0.5")])
    assert result.reward == 1.0

    item = {"id": "1", "checker": "mcq", "completion": "<answer>A</answer>", "answer": "B"}
    call = ["curl", "--silent", "--fail", "--json", json.dumps({"items": [item]}), f"http://{address}:8081/v1/score"]
    call += ["--header", f"Authorization: Bearer {token}"]
    answer = json.loads(subprocess.run(call, check=True, capture_output=True).stdout)
    assert answer["results"][0]["reward"] == 0.0


def test_the_run_survives_what_happens_to_its_containers_and_ends_with_0(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "rollout=2", "rollout")
    second = stack.containers("rollout")[-1]["Id"]
    stack.until(lambda: "engine_loaded" in podman("logs", second), "the engine of a second replica", timeout_s=600)
    podman("unpause", stack.containers("trainer")[0]["Id"])
    stack.until(lambda: len(samplers(stack)) == 2, "groups of a second replica")
    for service in ("rollout", "reward", "trainer"):
        stack.kill(service)
        stack.until_step(stack.run().last_step() + 1)
    stack.until(lambda: stack.exit_code() == 0, "the end of the run", timeout_s=600)
    run = stack.run()
    check_training(run, STEPS)
    assert (run.directory / "hf" / "model.safetensors").exists()
