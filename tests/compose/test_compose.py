"""docker-compose.yml, built and run: a replica joins meanwhile, containers are killed, the run ends with 0."""

import shutil
import uuid
from collections.abc import Iterator

import pytest

from tests.compose.stack import SERVICES, Stack, podman
from tests.e2e.test_run import check_training

MISSING = [program for program in ("podman", "podman-compose") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.compose,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

STEPS = 40
PYTHON_IMAGE = "docker.io/library/python:3.11-slim"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack with one rollout server, after its first two steps."""
    settings = {"trainer.steps": STEPS, "checkpoint.every": 5}
    stack = Stack(f"retort-{uuid.uuid4().hex[:6]}", tmp_path_factory.mktemp("compose"), settings)
    stack.compose("build")
    try:
        stack.compose("up", "--detach")
        stack.until_step(2)
        yield stack
    finally:
        stack.remove()


def samplers(stack: Stack) -> set[str]:
    """The replicas whose groups were trained on."""
    return {group["sampled_by"] for group in stack.run().groups()}


def test_every_service_says_that_it_is_healthy(stack: Stack) -> None:
    assert {service: stack.is_healthy(service) for service in SERVICES} == dict.fromkeys(SERVICES, True)


def test_no_service_runs_as_root_or_may_become_root(stack: Stack) -> None:
    # From what podman made of the files, which holds whether a container is running at this moment or not.
    for service in SERVICES:
        container = stack.containers(service)[0]
        user = container["Config"]["User"].partition(":")[0]
        assert user not in ("", "0", "root"), service
        assert not container["BoundingCaps"], service
        assert "no-new-privileges" in " ".join(container["HostConfig"]["SecurityOpt"]), service


def test_the_reward_image_adds_less_than_200_mb_to_python(stack: Stack) -> None:
    reward, python = (
        int(podman("image", "inspect", "--format", "{{.Size}}", image)) for image in ("retort-reward", PYTHON_IMAGE)
    )
    assert reward - python < 200e6


def test_the_run_survives_what_happens_to_its_containers_and_ends_with_0(stack: Stack) -> None:
    # Paused, because loading an engine takes longer than all the steps of the tiny model.
    [trainer] = stack.containers("trainer")
    podman("pause", trainer["Id"])
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "rollout=2")
    second = stack.containers("rollout")[-1]["Id"]
    stack.until(lambda: "engine_loaded" in podman("logs", second), "the engine of a second replica", timeout_s=600)
    podman("unpause", trainer["Id"])
    stack.until(lambda: len(samplers(stack)) == 2, "groups of a second replica")
    for service in ("rollout", "reward", "trainer"):
        stack.kill(service)
        stack.until_step(stack.run().last_step() + 1)
    stack.until(lambda: stack.exit_code() == 0, "the end of the run", timeout_s=600)
    run = stack.run()
    check_training(run, STEPS)
    assert (run.directory / "hf" / "model.safetensors").exists()
