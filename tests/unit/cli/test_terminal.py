"""What is not our own terminal is left alone. The other case is in tests/integration/test_launcher.py."""

import io
import os
import termios

from retort.cli.terminal import silent_control_keys


def test_a_pipe_or_a_terminal_of_somebody_else_stays_as_it_is() -> None:
    keys, terminal = os.openpty()
    with os.fdopen(terminal, "w") as output, silent_control_keys(io.StringIO()), silent_control_keys(output):
        assert termios.tcgetattr(output)[3] & termios.ECHOCTL
    os.close(keys)
