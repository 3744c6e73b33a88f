"""The rules of the repository's layout, as assertions."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SERVICES = ("rollout", "reward", "trainer")
SHARED = (
    "config",
    "rollouts",
    "queues",
    "weight_sync",
    "lora",
    "telemetry",
    "identity",
    "tokens",
    "network",
    "unpickling",
    "proto",
)
"""What the services agree on. The rest of `retort/` is the command line and the client for outsiders."""

READ_OUTSIDE = ("questions", "metrics_file", "disk")
"""What one service and the command line share: the questions before a run, its metrics, and what a full disk means."""

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
BANNED_MODULES = {"utils", "util", "helpers", "common", "misc", "shared", "lib"}
BANNED_CLASS = re.compile(r"(Manager|Handler|Helper|Util|Utils|Wrapper)$")

COVERED_BY = {
    "retort/cli/interrupts.py": "tests/integration/test_launcher.py",
    "retort/cli/report/page.py": "tests/unit/cli/test_report.py",
    "retort/cli/checker.py": "tests/integration/test_reward_clients.py",
    "retort/cli/score.py": "tests/integration/test_reward_score.py",
    "retort/cli/version.py": "tests/unit/cli/test_main.py",
    "retort/client/calls.py": "tests/integration/test_reward_clients.py",
    "retort/client/messages.py": "tests/integration/test_reward_clients.py",
    "retort/config/errors.py": "tests/unit/test_config.py",
    "retort/config/loading.py": "tests/unit/test_config.py",
    "retort/config/tables.py": "tests/unit/test_config.py",
    "retort/queues/connection.py": "tests/integration/test_queue_servers.py",
    "retort/queues/replies.py": "tests/integration/test_queues.py",
    "retort/queues/rollout.py": "tests/integration/test_queues.py",
    "retort/queues/trainer.py": "tests/integration/test_queues.py",
    "retort/queues/view.py": "tests/integration/test_queues.py",
    "services/reward/__main__.py": "tests/integration/test_reward_service.py",
    "services/reward/http_limits.py": "tests/integration/test_reward_http.py",
    "services/reward/http_messages.py": "tests/integration/test_reward_http.py",
    "services/reward/isolation/nursery.py": "tests/integration/test_reward_hostile.py",
    "services/reward/serving.py": "tests/integration/test_reward_http.py",
    "services/reward/server.py": "tests/integration/test_reward_service.py",
    "services/trainer/broadcast.py": "tests/integration/test_weight_sender.py",
    "services/rollout/vllm_plugin.py": "tests/integration/test_vllm_engine.py",
    "simulation/command.py": "tests/integration/test_simulation.py",
    "simulation/trainer.py": "tests/integration/test_simulation.py",
    "services/trainer/__main__.py": "tests/e2e/test_run.py",
    "services/trainer/export.py": "tests/e2e/test_run.py",
    "services/trainer/metrics.py": "tests/e2e/test_run.py",
    "services/trainer/surrogates.py": "tests/unit/trainer/test_methods.py",
    "services/trainer/parts.py": "tests/chaos/test_replay.py",
    "services/trainer/weight_copy.py": "tests/unit/trainer/test_teacher.py",
    "services/trainer/ranks.py": "tests/e2e/test_run.py",
}
"""Source module -> the test that covers it, where none has its name or imports it."""


def sources(*folders: str) -> list[Path]:
    """Python files that people write; not the compiled protobuf."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if (ROOT / "retort" / "proto") not in path.parents)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    froms = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return froms | plain


def imports_of(paths: list[Path], *prefixes: str) -> dict[str, list[str]]:
    """Which of the files import a module of these packages."""
    inside = re.compile("|".join(f"{re.escape(prefix)}(\\.|$)" for prefix in prefixes))
    found = {relative(path): sorted(filter(inside.match, imported_modules(path))) for path in paths}
    return {path: modules for path, modules in found.items() if modules}


def repository_files(*endings: str) -> list[Path]:
    """Files that git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return [ROOT / name for name in names if name.endswith(endings) and (ROOT / name).exists()]


@pytest.mark.parametrize("service", SERVICES)
def test_services_do_not_import_each_other(service: str) -> None:
    others = [f"services.{other}" for other in SERVICES if other != service]
    assert imports_of(sources(f"services/{service}"), *others) == {}


def test_the_shared_package_does_not_know_the_services() -> None:
    assert imports_of(sources("retort"), "services") == {}


def test_services_do_not_import_the_command_line() -> None:
    assert imports_of(sources("services"), "retort.cli") == {}


def test_nobody_imports_the_simulation() -> None:
    assert imports_of(sources("retort", "services"), "simulation") == {}


def test_the_shared_modules_do_not_import_the_command_line() -> None:
    shared = [path for path in sources("retort") if "cli" not in path.relative_to(ROOT).parts]
    assert imports_of(shared, "retort.cli") == {}


def test_everything_shared_is_listed() -> None:
    names = {
        path.stem for path in (ROOT / "retort").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names - {"__init__", "cli", "client", *READ_OUTSIDE} == set(SHARED)


@pytest.mark.parametrize("module", SHARED)
def test_what_is_shared_is_used_by_two_services(module: str) -> None:
    users = [service for service in SERVICES if imports_of(sources(f"services/{service}"), f"retort.{module}")]
    assert len(users) >= 2, f"retort.{module} is used by {users} alone: it belongs there"


def test_protobuf_types_stop_at_the_border() -> None:
    border = {
        "services/reward/server.py",
        "services/rollout/reward_client.py",
        "retort/client/calls.py",
        "retort/client/messages.py",
    }
    assert set(imports_of(sources("retort", "services"), "retort.proto")) == border


@pytest.mark.parametrize("module", ["services.reward.server", "services.reward.__main__"])
def test_the_reward_service_starts_without_torch(module: str) -> None:
    code = f"import {module}, sys; print({{'torch', 'vllm', 'redis', 'transformers'}} & set(sys.modules))"
    heavy = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert heavy.stdout == "set()\n"


def test_no_file_is_long() -> None:
    lengths = {
        relative(path): len(path.read_text().splitlines())
        for path in sources("retort", "services", "simulation", "tests")
    }
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_long() -> None:
    lengths = {
        f"{relative(path)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in sources("retort", "services", "simulation")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_no_module_is_named_after_nothing() -> None:
    assert [relative(path) for path in sources("retort", "services", "tests") if path.stem in BANNED_MODULES] == []
    assert [folder for folder in BANNED_MODULES if [*ROOT.glob(f"services/**/{folder}/*.py")]] == []


def test_no_class_is_named_after_nothing() -> None:
    classes = [
        f"{relative(path)}: {node.name}"
        for path in sources("retort", "services")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and BANNED_CLASS.search(node.name)
    ]
    assert classes == []


def test_every_module_is_tested_by_name_by_import_or_as_listed() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    imported = {module for path in (ROOT / "tests").rglob("*.py") for module in imported_modules(path)}
    untested = []
    for path in sources("retort", "services", "simulation"):
        *package, name = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(package) if name == "__init__" else ".".join([*package, name])
        is_imported = any(f"{one}.".startswith(f"{module}.") for one in imported)
        is_tested = f"test_{name}" in tests or is_imported or relative(path) in COVERED_BY
        if path.read_text() and not is_tested:
            untested.append(relative(path))
    assert not untested, "\n".join(untested)


def test_the_list_of_tests_holds_nothing_that_is_gone() -> None:
    assert [path for pair in COVERED_BY.items() for path in pair if not (ROOT / path).exists()] == []


def test_compiling_the_protocol_again_changes_nothing(tmp_path: Path) -> None:
    options = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-Iretort/proto=proto", *options]
    subprocess.run([*protoc, "proto/reward/v1/reward.proto"], cwd=ROOT, check=True, timeout=60)
    stubs = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    assert len(stubs) == 3
    assert {path: (ROOT / path).read_bytes() for path in stubs} == stubs


def test_no_file_names_a_place_of_one_machine() -> None:
    places = re.compile("/" + "(work|tmp|root|home)" + "/[a-z]")
    found = [
        f"{relative(path)}, line {number}: {line.strip()}"
        for path in repository_files(".md", ".toml", ".py", ".txt", ".yml", "Makefile", ".ci/run")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if places.search(line)
    ]
    assert found == []


def test_requirements_name_no_index_but_pytorchs_own() -> None:
    for path in (ROOT / "requirements").iterdir():
        hosts = set(re.findall(r"://([^/\s]+)", path.read_text()))
        assert hosts <= {"download.pytorch.org"}, path


def needed_by(extra: str) -> list[Requirement]:
    """What the project with this extra installs, its own extras unfolded; torch comes from an index of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, todo = [*map(Requirement, project["dependencies"])], [extra]
    while todo:
        for requirement in map(Requirement, project["optional-dependencies"][todo.pop()]):
            if requirement.name == "retort":
                todo += requirement.extras
            else:
                needed.append(requirement)
    return [requirement for requirement in needed if requirement.name != "torch"]


@pytest.mark.parametrize(
    ("lock", "extra"),
    [
        ("cpu", "cpu"),
        ("cpu", "dev"),
        ("reward", "reward"),
        *((f"{service}-{kind}", service) for service in ("rollout", "trainer") for kind in ("cpu", "cuda")),
    ],
)
def test_the_lock_holds_what_the_project_needs(lock: str, extra: str) -> None:
    locked = {
        canonicalize_name(name): version
        for name, _, version in (
            line.partition("==") for line in (ROOT / "requirements" / f"{lock}.txt").read_text().split("\n")
        )
    }
    needed = needed_by(extra)
    lacking = [one for one in needed if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))]
    assert lacking == []


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda lock: lock.name)
def test_a_lock_names_one_version_of_each_package_and_nothing_else(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith(("#", "--extra-index-url"))]
    pins = [re.fullmatch(r"([\w.-]+)(==[\w.+!-]+|; sys_platform == \"never\")", line) for line in lines]
    assert [line for line, pin in zip(lines, pins, strict=True) if not pin] == []
    names = [canonicalize_name(pin[1]) for pin in pins if pin]
    assert [name for name in names if names.count(name) > 1] == []


def test_one_version_of_torch_is_named_everywhere() -> None:
    files = [ROOT / "pyproject.toml", ROOT / "Makefile", *(ROOT / "requirements").iterdir()]
    versions = {version for path in files for version in re.findall(r"\btorch==([\d.]+)", path.read_text())}
    assert len(versions) == 1


UNSAFE_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "os.system", "marshal.loads", "yaml.load"}
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
RUNS_CODE_ON_PURPOSE = {"services/reward/isolation/program.py"}
"""In a process that the kernel confines: docs/reward-security.md."""


def called_name(node: ast.Call) -> str:
    """`torch.load` of `torch.load(file)`; empty for what is no plain name."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def test_nothing_that_arrives_can_become_code() -> None:
    files = sources("retort", "services")
    assert imports_of(files, *UNSAFE_MODULES) == {}
    found = [
        f"{relative(path)}, line {node.lineno}: {ast.unparse(node)[:80]}"
        for path in files
        if relative(path) not in RUNS_CODE_ON_PURPOSE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            called_name(node) in UNSAFE_CALLS
            or any(keyword.arg in ("trust_remote_code", "shell", "allow_pickle") for keyword in node.keywords)
        )
    ]
    assert found == []


SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z0-9]{30}|\bAKIA[0-9A-Z]{16}"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}|\bsk-[A-Za-z0-9]{32}"
)


def test_no_file_holds_a_key_or_a_token() -> None:
    texts = {path: path.read_text(errors="replace") for path in repository_files("") if path.is_file()}
    assert [relative(path) for path, text in texts.items() if SECRETS.search(text)] == []
    assert SECRETS.search("token = hf_" + "a" * 34)
