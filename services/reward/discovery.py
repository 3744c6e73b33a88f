"""Finds the checkers: the built-in ones and those that installed packages declare.

A package adds a checker, without a fork, by two lines in its pyproject.toml:

    [project.entry-points."retort.checkers"]
    my_checker = "my_package.my_module:MyChecker"
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint

from retort.config import ConfigError
from services.reward.checkers import Checker

GROUP = "retort.checkers"

BUILT_IN = tuple(
    EntryPoint(name, f"services.reward.checkers.{name}:{type_}", GROUP)
    for name, type_ in (
        ("composite", "Composite"),
        ("exact_match", "ExactMatch"),
        ("json_schema", "JsonSchema"),
        ("math", "Math"),
        ("mcq", "MultipleChoice"),
        ("mcq_lenient", "LenientMultipleChoice"),
        ("numeric", "Numeric"),
        ("python_tests", "PythonTests"),
        ("regex", "Regex"),
    )
)


def load_checkers(installed: Iterable[EntryPoint]) -> Mapping[str, Checker]:
    """The built-in and the `installed` checkers by name, in the order of their names.

    Raises ConfigError for one that does not load or is none, and for two with the same name.
    """
    points: dict[str, EntryPoint] = {}
    for point in (*BUILT_IN, *installed):
        known = points.setdefault(point.name, point)
        if known.value != point.value:
            raise ConfigError(
                f"two checkers are named {point.name!r}: {known.value} and {point.value}. "
                f"Rename one in its package's entry points ({GROUP}), or uninstall that package."
            )
    return {name: _load(points[name]) for name in sorted(points)}


def _load(point: EntryPoint) -> Checker:
    origin = f"checker {point.name!r} ({point.value})"
    try:
        checker = point.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"{origin} does not load: {error}. Mend or uninstall its package.") from error
    if not isinstance(checker, Checker):
        raise ConfigError(f"{origin} does not derive from services.reward.checkers.Checker.")
    for attribute in ("name", "version", "description"):
        if not isinstance(getattr(checker, attribute, None), str):
            raise ConfigError(f"{origin} needs the text {attribute}.")
    if checker.name != point.name:
        raise ConfigError(f"{origin} calls itself {checker.name!r}. Give class and entry point one name.")
    return checker
