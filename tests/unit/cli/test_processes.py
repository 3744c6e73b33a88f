from pathlib import Path

from retort.cli.processes import Ending, Program, RestartPolicy, describe_exit, last_lines

POLICY = RestartPolicy(max_restarts=5)


def test_the_delay_doubles_with_every_recent_death() -> None:
    assert POLICY.delay([0.0], now=0.0) == 0.5
    assert POLICY.delay([0.0, 1.0], now=1.0) == 1.0
    assert POLICY.delay([0.0, 1.0, 3.0, 6.0, 11.0], now=11.0) == 8.0


def test_the_delay_has_an_upper_bound() -> None:
    assert RestartPolicy(max_restarts=50).delay([0.0] * 20, now=0.0) == 30.0


def test_one_death_more_than_the_limit_gives_up() -> None:
    assert POLICY.delay([0.0] * 5, now=0.0) is not None
    assert POLICY.delay([0.0] * 6, now=0.0) is None


def test_a_death_is_forgotten_after_ten_minutes() -> None:
    assert POLICY.delay([*[0.0] * 6, 600.0], now=600.0) == 0.5


def test_no_restarts_allowed_means_the_first_death_ends_the_run() -> None:
    assert RestartPolicy(max_restarts=0).delay([0.0], now=0.0) is None


def test_an_exit_is_told_in_words() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    ending = Ending(Program("rollout-0", ["true"], Path("log")), exit_code=-11, gave_up=True)
    assert ending.cause == "rollout-0 was killed by SIGSEGV"


def test_the_last_lines_of_a_log_leave_out_empty_ones(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_bytes(b"one\n\ntwo\xff\n   \nthree")
    assert last_lines(log, 2) == ["two\ufffd", "three"]
