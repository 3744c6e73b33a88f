"""What a command line answers when a run cannot be what the user asked for."""


class ConfigError(Exception):
    """The user asked for something that cannot run. The command line prints the text and exits with 2."""

    exit_code = 2


class MissingDependencyError(ConfigError):
    """Something that the run needs is not installed or not there. Exits with 3."""

    exit_code = 3
