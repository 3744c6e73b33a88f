"""Finds the checkers: the built-in ones and those that installed packages declare.

A package adds a checker, without a fork, by two lines in its pyproject.toml:

    [project.entry-points."retort.checkers"]
    my_checker = "my_package.my_module:MyChecker"
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint

from retort.config import ConfigError
from services.reward.checkers import Checker, Example, Limits

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
    # Foreign code, which may also end its process while it is imported.
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{origin} does not load: {problem}. Mend or uninstall its package.") from error
    if not isinstance(checker, Checker):
        raise ConfigError(f"{origin} does not derive from services.reward.checkers.Checker.")
    if problem := _wrong_attribute(checker):
        raise ConfigError(f"{origin} needs {problem}.")
    if checker.name != point.name:
        raise ConfigError(f"{origin} calls itself {checker.name!r}. Give class and entry point one name.")
    return checker


def _wrong_attribute(checker: Checker) -> str:
    """What the service would stumble over when it is asked; empty if nothing is."""
    for attribute in ("name", "version", "description", "accepts"):
        if not isinstance(getattr(checker, attribute, None), str):
            return f"the text {attribute}"
    if not _are_texts(checker.options):
        return "options that map texts to texts"
    if not isinstance(checker.limits, Limits):
        return "limits of the type services.reward.checkers.Limits"
    if not isinstance(checker.examples, list | tuple) or not all(_is_example(one) for one in checker.examples):
        return "examples that are a list of services.reward.checkers.Example: texts, and a reward"
    return ""


def _is_example(one: object) -> bool:
    return (
        isinstance(one, Example)
        and isinstance(one.completion, str)
        and isinstance(one.answer, str)
        and isinstance(one.reward, int | float)
        and (one.options is None or _are_texts(one.options))
    )


def _are_texts(options: object) -> bool:
    return isinstance(options, Mapping) and all(isinstance(text, str) for pair in options.items() for text in pair)
