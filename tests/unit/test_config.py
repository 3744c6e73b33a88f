"""The run file: what is refused and in which words, which source wins, and that nothing is lost on the way to disk."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from retort.config import ConfigError, MissingDependencyError, RunConfig, dump_config, load_config, secret

ROOT = Path(__file__).parents[2]
SMALLEST = """\
name = "small"
[model]
path = "models/tiny"
[data]
train = "train.jsonl"
validation = "validation.jsonl"
[trainer]
steps = 3
"""
MOST_FIELDS = 90


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALLEST)
    return path


def refusal(run_file: Path, *overrides: str, env: dict[str, str] | None = None) -> str:
    """The words with which a configuration is refused, the file's directory left out."""
    with pytest.raises(ConfigError) as raised:
        load_config(run_file, overrides, env or {})
    assert raised.value.exit_code == 2
    return str(raised.value).replace(f"{run_file.parent}/", "")


def fields(table: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of every key that a run file may hold."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def test_the_smallest_run_file_gets_the_defaults(run_file: Path) -> None:
    config = load_config(run_file, env={})
    assert (config.name, config.seed, config.trainer.steps, config.trainer.group_size) == ("small", 0, 3, 8)
    assert config.sampling.temperature == 1.0
    assert config.directory == Path("runs/small")
    assert config.key_prefix == "small"


def test_the_run_id_prefixes_the_keys_and_run_dir_names_the_directory(run_file: Path) -> None:
    config = load_config(run_file, env={"RETORT_RUN_ID": "small-7f3a", "RETORT_RUN_DIR": "elsewhere/small"})
    assert config.key_prefix == "small-7f3a"
    assert config.directory == Path("elsewhere/small")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "trainer.lerning_rate=1",
            "--set trainer.lerning_rate=1: unknown key trainer.lerning_rate. Did you mean trainer.learning_rate?",
        ),
        (
            "rollout.group_size=4",
            "--set rollout.group_size=4: unknown key rollout.group_size. Did you mean trainer.group_size?",
        ),
        ("trainr.steps=1", "--set trainr.steps=1: unknown key trainr. Did you mean trainer?"),
        ("qqqq=1", "--set qqqq=1: unknown key qqqq."),
        (
            "trainer.steps=many",
            "--set trainer.steps=many: trainer.steps = 'many': "
            "Input should be a valid integer, unable to parse string as an integer.",
        ),
        (
            "reward.port=70000",
            "--set reward.port=70000: reward.port = 70000: Input should be less than or equal to 65535.",
        ),
        ("trainer.steps=0", "--set trainer.steps=0: trainer.steps = 0: Input should be greater than 0."),
        (
            "model.dtype=int8",
            "--set model.dtype=int8: model.dtype = 'int8': Input should be 'float32' or 'bfloat16'.",
        ),
        (
            'trackers=["wandbb"]',
            "--set trackers=[\"wandbb\"]: trackers.0 = 'wandbb': Input should be 'wandb', 'tensorboard', 'mlflow', "
            "'trackio' or 'otel'. Did you mean 'wandb'?",
        ),
        ("trainer.steps", "--set trainer.steps: expected section.key=value, for example --set trainer.steps=5"),
        ("name.first=x", "--set name.first=x: name is not a table"),
        (
            "trainer.groups_per_update=3",
            "--set trainer.groups_per_update=3: trainer.groups_per_step = 256 is not a multiple of "
            "trainer.groups_per_update = 3.",
        ),
        (
            "trainer.deterministic=true",
            "--set trainer.deterministic=true: trainer.deterministic = true needs another trainer.update_order "
            "than 'arrival', which depends on time.",
        ),
        (
            "model.max_length=8192",
            "--set model.max_length=8192: sampling.max_completion_tokens = 8192 leaves no room for a prompt "
            "in model.max_length = 8192.",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_its_origin_and_the_nearest_right_name(
    run_file: Path, override: str, said: str
) -> None:
    assert refusal(run_file, override) == said


def test_an_unknown_key_is_named_with_its_file(run_file: Path) -> None:
    run_file.write_text(SMALLEST + "group_sise = 4\n")
    assert refusal(run_file) == "small.toml: unknown key trainer.group_sise. Did you mean trainer.group_size?"


def test_an_unknown_key_in_the_environment_is_named_with_its_variable(run_file: Path) -> None:
    said = refusal(run_file, env={"RETORT_TRAINER__STEP": "3"})
    assert said == "environment RETORT_TRAINER__STEP: unknown key trainer.step. Did you mean trainer.steps?"


def test_a_misspelt_variable_of_a_top_level_key_is_refused_with_the_right_name(run_file: Path) -> None:
    assert refusal(run_file, env={"RETORT_SED": "4"}) == "environment RETORT_SED: unknown key sed. Did you mean seed?"
    assert refusal(run_file, env={"RETORT_RUNDIR": "x"}).endswith("unknown key rundir. Did you mean run_dir?")


def test_keys_that_do_not_fit_together_are_blamed_on_the_file_only_if_it_holds_them(run_file: Path) -> None:
    both = ["trainer.groups_per_step=10", "trainer.groups_per_update=4"]
    assert refusal(run_file, *both).startswith(f"--set {both[0]}, --set {both[1]}: trainer.groups_per_step = 10 is not")
    run_file.write_text(SMALLEST + "groups_per_update = 3\n")
    assert refusal(run_file).startswith("small.toml: trainer.groups_per_step = 256 is not")


def test_a_deterministic_run_compiles_no_code_that_depends_on_what_came_first(run_file: Path) -> None:
    deterministic = ["trainer.deterministic=true", "trainer.update_order=group"]
    said = refusal(run_file, *deterministic, "trainer.compile=inductor")
    assert said == (
        "--set trainer.deterministic=true: trainer.deterministic = true needs another trainer.compile than 'inductor', "
        "whose code depends on the micro-batch that came first."
    )
    load_config(run_file, [*deterministic, "trainer.compile=aot_eager"], {})


def test_all_mistakes_are_told_at_once(run_file: Path) -> None:
    run_file.write_text('name = "small"\n[model]\npath = "models/tiny"\n[data]\ntrain = "t"\n[trainer]\nsteps = -1\n')
    assert refusal(run_file).splitlines() == [
        "small.toml: data.validation is missing.",
        "small.toml: trainer.steps = -1: Input should be greater than 0.",
    ]


@pytest.mark.parametrize("text", ["name = ", "name = 'a'\nname = 'b'\n"])
def test_a_file_that_is_not_toml_is_refused_with_its_name(run_file: Path, text: str) -> None:
    run_file.write_text(text)
    assert refusal(run_file).startswith("small.toml: ")


def test_a_directory_is_not_a_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, env={})


def test_a_missing_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    said = refusal(tmp_path / "no.toml")
    assert said == "no.toml: no such run file. Shipped ones are in configs/."


def test_a_missing_dependency_has_an_exit_code_of_its_own() -> None:
    assert issubclass(MissingDependencyError, ConfigError)
    assert MissingDependencyError.exit_code == 3


def test_the_command_line_beats_the_environment_and_that_the_file_and_that_the_defaults(run_file: Path) -> None:
    env = {"RETORT_TRAINER__STEPS": "5", "RETORT_TRAINER__RANKS": "2", "RETORT_SEED": "9"}
    config = load_config(run_file, ["trainer.steps=7", "seed = 11"], env)
    assert (config.trainer.steps, config.trainer.ranks, config.seed) == (7, 2, 11)
    config = load_config(run_file, [], env)
    assert (config.trainer.steps, config.trainer.ranks, config.seed) == (5, 2, 9)
    assert config.trainer.group_size == 8


def test_a_secret_may_lie_in_a_file_that_a_variable_names(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://trainer:secret@redis:6379/0\n")
    env = {"RETORT_REDIS__URL_FILE": str(tmp_path / "url"), "CONTROL_TOKEN_FILE": str(tmp_path / "url")}
    assert load_config(run_file, env=env).redis.url == "redis://trainer:secret@redis:6379/0"
    assert secret("CONTROL_TOKEN", env) == "redis://trainer:secret@redis:6379/0"
    assert secret("CONTROL_TOKEN", env | {"CONTROL_TOKEN": "given"}) == "given"
    assert secret("REWARD_TOKEN", env) == ""
    with pytest.raises(ConfigError, match=r"RETORT_REDIS__URL_FILE = \S*gone: No such file or directory"):
        load_config(run_file, env={"RETORT_REDIS__URL_FILE": str(tmp_path / "gone")})


def test_variables_of_others_in_our_name_space_are_left_alone(run_file: Path) -> None:
    ours = "LAUNCHER_PID ENGINE_PARENT VECTORS CHAOS_SEED REWARD_SERVICE REWARD_SERVICE_HOST REDIS_PORT RUN SCIKNOWEVAL"
    load_config(run_file, env={f"RETORT_{name}": "1" for name in ours.split()} | {"PATH": "/bin"})


@pytest.mark.parametrize(
    ("override", "value"), [("name=2026", "2026"), ("name=1e5", "1e5"), ("model.path=7", "7"), ("name='a'", "a")]
)
def test_a_text_that_looks_like_a_number_stays_a_text(run_file: Path, override: str, value: str) -> None:
    config = load_config(run_file, [override], {})
    assert value in (config.name, config.model.path)


def test_values_are_frozen(run_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(run_file, env={}).trainer.steps = 4  # type: ignore[misc]


@settings(deadline=None)
@given(
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    rate=st.floats(min_value=1e-30, max_value=1e30),
    top_p=st.floats(min_value=0, max_value=1, exclude_min=True),
    path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30),
    deterministic=st.booleans(),
    method=st.sampled_from(["rlsd", "grpo"]),
)
def test_a_dumped_configuration_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rate: float,
    top_p: float,
    path: str,
    deterministic: bool,
    method: str,
) -> None:
    values: dict[str, Any] = tomllib.loads(SMALLEST)
    values["seed"] = seed
    values["model"]["path"] = path
    values["trainer"] |= {"learning_rate": rate, "deterministic": deterministic, "update_order": "group"}
    values["sampling"] = {"top_p": top_p}
    values["method"] = {"name": method}
    config = RunConfig.model_validate(values)
    file = tmp_path_factory.mktemp("dumped") / "config.toml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file, env={}) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_run_file_loads_and_is_called_after_its_run(file: Path) -> None:
    assert load_config(file, env={}).name == file.stem


def test_every_key_is_documented_where_it_stands() -> None:
    assert [name for name, docstring in fields(RunConfig) if not docstring.strip()] == []


def test_there_are_few_keys() -> None:
    assert len(list(fields(RunConfig))) <= MOST_FIELDS
