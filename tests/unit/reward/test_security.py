from pathlib import Path

import pytest

from retort.config import ConfigError
from services.reward.security import Security, read_security

TOKEN = "sixteen-letters!"


def read(*, token_file: str = "", certificate: str = "", host: str = "127.0.0.1", plain: bool = False) -> Security:
    return read_security(
        token_file=token_file,
        tls_certificate=certificate,
        tls_key=certificate,
        tls_client_ca="",
        hosts=[host],
        allow_plaintext=plain,
    )


def test_without_tokens_everybody_may_call() -> None:
    assert read().accepts("")


def test_with_tokens_one_of_them_has_to_be_shown(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\nanother-{TOKEN}\n")
    security = read(token_file=str(tmp_path / "tokens"))
    assert security.accepts(f"Bearer {TOKEN}")
    assert security.accepts(f"bearer another-{TOKEN}".encode())
    for wrong in ("", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ", b"\xff\xfe"):
        assert not security.accepts(wrong)


def test_a_short_token_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    for content in ("short\n", "\n"):
        (tmp_path / "tokens").write_text(content)
        with pytest.raises(ConfigError, match="at least 16 characters"):
            read(token_file=str(tmp_path / "tokens"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_plain_text_stays_on_this_machine(host: str) -> None:
    assert read(host=host).tls is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "reward.example", ""])
def test_and_beyond_it_has_to_be_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match="plain text"):
        read(host=host)
    assert read(host=host, plain=True).tls is None
