"""From a run file, the environment and `--set` to one configuration, with errors that name file, key and value."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from retort.config.errors import ConfigError
from retort.config.tables import RunConfig

ENV_PREFIX = "RETORT_"
_IN_A_FILE = "_file"
"""`RETORT_REDIS__URL_FILE` names a file with what `RETORT_REDIS__URL` would hold: for secrets."""
_MISSPELT = 0.75
"""How alike a variable and a key are when one is meant to be the other. Less alike ones belong to somebody else."""


def load_config(path: Path | str, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ) -> RunConfig:
    """Read a run file and apply the environment and `--set` overrides.

    Raises ConfigError, naming file, key, value and the nearest right name.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file. Shipped ones are in configs/.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    origins: dict[str, str] = {}
    for key, text, origin in _overrides(overrides, env):
        _put(values, key, _parse(key, text), origin)
        origins[key] = origin
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path), origins)) from None


def secret(name: str, env: Mapping[str, str] = os.environ) -> str:
    """The variable `name`, or what is in the file that the variable `<name>_FILE` names; empty without both.

    Raises ConfigError for a file that cannot be read.
    """
    variable = name + _IN_A_FILE.upper()
    given, file = env.get(name, ""), env.get(variable, "")
    return _read(variable, file) if file and not given else given


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as TOML; `load_config` reads it back to an equal object."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def _overrides(overrides: Sequence[str], env: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    top_level = {*RunConfig.model_fields}
    plain = sorted(top_level - {key.partition(".")[0] for key, _ in _keys(RunConfig) if "." in key})
    for name, text in sorted(env.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
        if key.endswith(_IN_A_FILE):
            yield f"{section}.{key.removesuffix(_IN_A_FILE)}", _read(name, text), f"environment {name}"
        elif key:
            yield f"{section}.{key}", text, f"environment {name}"
        elif section in top_level or difflib.get_close_matches(section, plain, n=1, cutoff=_MISSPELT):
            yield section, text, f"environment {name}"
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected section.key=value, for example --set trainer.steps=5")
        yield key.strip(), text.strip(), f"--set {item}"


def _read(variable: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"environment {variable} = {file}: {error.strerror}.") from None


def _parse(key: str, text: str) -> Any:
    """A TOML value where the text is one, and a plain string otherwise."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    # A run may be called 2026 or 1e5: what is wanted as text stays as it was typed.
    wanted = dict(_keys(RunConfig)).get(key)
    return text if wanted is str and not isinstance(value, str) else value


def _put(values: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {table} is not a table")
    values[key] = value


def _explain(error: ValidationError, file: str, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        # A misspelt table, or an entry of a list, is reported as such, by whatever put something into it.
        where = next((origin for name, origin in origins.items() if _is_part(key, name) or _is_part(name, key)), file)
        if problem["type"] == "extra_forbidden":
            hint = _nearest(key)
            lines.append(f"{where}: unknown key {key}." + (f" Did you mean {hint}?" if hint else ""))
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing.")
        elif key:
            hint = _meant(problem)
            lines.append(f"{where}: {key} = {problem['input']!r}: {problem['msg']}.{hint}")
        else:
            what = problem["msg"].removeprefix("Value error, ")
            set_by = [origin for name, origin in origins.items() if f"{name} = " in what]
            lines.append(f"{', '.join(set_by) or file}: {what}.")
    return "\n".join(lines)


def _is_part(key: str, whole: str) -> bool:
    return f"{key}.".startswith(f"{whole}.")


def _meant(problem: ErrorDetails) -> str:
    """The word that is most like the one that was given, where only some words are right."""
    if problem["type"] != "literal_error":
        return ""
    words = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    matches = difflib.get_close_matches(str(problem["input"]), words, n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _nearest(key: str) -> str:
    known = sorted(name for name, _ in _keys(RunConfig))
    by_name = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    matches = by_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return matches[0] if matches else ""


def _keys(table: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of everything that a run file may hold, tables included."""
    for name, field in table.model_fields.items():
        yield prefix + name, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
