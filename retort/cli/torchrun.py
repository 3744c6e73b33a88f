"""torchrun that ends with the exit code of the process that failed first; torchrun itself always says 1.

`python -m retort.cli.torchrun [torchrun's arguments]`. The launcher and a container's restart policy decide by this
code whether the trainer asked for an end (bad configuration, stalled, diverged) or died and is to be started again.
SIGUSR1, which makes every rank print its stacks, is passed on to them.
"""

import logging
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    signal.signal(signal.SIGUSR1, lambda *_: pass_on(signal.SIGUSR1))
    # The process that failed has said why; torchrun's account of it would bury that line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1
    except SignalException as stopped:
        # It was passed on to the ranks, which had time to save. As a shell counts: 143 after SIGTERM.
        return 128 + stopped.sigval
    return 0


def pass_on(number: signal.Signals) -> None:
    """Send a signal to every child of this process, whichever thread started it."""
    for file in Path("/proc/self/task").glob("*/children"):
        for child in file.read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main())
