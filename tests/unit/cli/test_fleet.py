from pathlib import Path

import msgspec
import pytest

from retort.cli.__main__ import main
from retort.cli.fleet import fleet_lines
from retort.cli.status import write_status
from tests.integration.queue_run import a_member


def test_the_list_says_what_a_replica_serves_has_in_hand_and_finished_last() -> None:
    busy = msgspec.structs.replace(
        a_member("rollout-1", updated=999.0),
        state="serving",
        policy_version=7,
        groups_in_hand=3,
        groups_finished=128,
        tokens_generated=41234,
        last_finished=990.0,
        http_url="http://10.0.0.2:8000",
    )
    assert fleet_lines([busy, a_member("rollout-0", updated=940.0)], now=1000.0) == [
        "replica    state    version  in hand  finished  tokens  last finished  heard of  address",
        "rollout-0  loading  -        0        0         0       -              60 s ago  http://127.0.0.1:2",
        "rollout-1  serving  7        3        128       41,234  10 s ago       1 s ago   http://10.0.0.2:8000",
    ]


def test_a_run_that_ended_has_no_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(tmp_path, {"exit_code": 0})
    assert main(["fleet", "--run-dir", str(tmp_path)]) == 2
    assert "the run has ended (exit code 0), its replicas are gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"), [(["drain"], "needs the NAME of one"), (["list", "rollout-0"], "takes no NAME")]
)
def test_a_command_that_makes_no_sense_says_what_it_lacks(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fleet", *words]) == 2
    assert said in capsys.readouterr().err
