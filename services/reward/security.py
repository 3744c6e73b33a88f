"""Who may call: bearer tokens, TLS, and no plain text beyond this machine."""

import hashlib
import hmac
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from retort.config import ConfigError

SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Tls:
    """Contents of PEM files, and their places for who reads them himself."""

    certificate: bytes
    key: bytes
    client_authority: bytes | None
    """Who signs the certificates of clients; None: clients need none."""
    certificate_file: Path
    key_file: Path
    client_authority_file: Path | None


@dataclass(frozen=True, slots=True)
class Security:
    """What a caller has to show."""

    tokens: frozenset[bytes] = frozenset()
    """SHA-256 of each token; none: no token is asked for."""
    tls: Tls | None = None

    def accepts(self, authorization: str | bytes) -> bool:
        """Whether the header `authorization` holds one of the tokens (always, if there are none)."""
        if not self.tokens:
            return True
        text = authorization.decode(errors="replace") if isinstance(authorization, bytes) else authorization
        scheme, _, token = text.partition(" ")
        digest = hashlib.sha256(token.strip().encode(errors="replace")).digest()
        # Compares every one, and in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self.tokens]
        return scheme.lower() == "bearer" and any(matches)


def read_security(
    *, token_file: str, tls_certificate: str, tls_key: str, tls_client_ca: str, hosts: list[str], allow_plaintext: bool
) -> Security:
    """Read the files that were named; an empty name is none.

    Raises ConfigError for a file that cannot be used, for half of a certificate, and for a host that others can
    reach without TLS, unless that is allowed.
    """
    if bool(tls_certificate) != bool(tls_key) or (tls_client_ca and not tls_certificate):
        raise ConfigError("TLS needs --tls-cert and --tls-key together; --tls-client-ca comes on top of them.")
    tls = None
    if tls_certificate:
        _check_pair(tls_certificate, tls_key, tls_client_ca)
        tls = Tls(
            certificate=_read(tls_certificate),
            key=_read(tls_key),
            client_authority=_read(tls_client_ca) if tls_client_ca else None,
            certificate_file=Path(tls_certificate),
            key_file=Path(tls_key),
            client_authority_file=Path(tls_client_ca) if tls_client_ca else None,
        )
    public = [host for host in hosts if not _is_loopback(host)]
    if public and tls is None and not allow_plaintext:
        raise ConfigError(
            f"{public[0]} can be reached from other machines and there is no TLS: completions, answers and tokens "
            "would travel in plain text. Give --tls-cert and --tls-key, or --allow-plaintext on a private network."
        )
    return Security(_tokens(token_file) if token_file else frozenset(), tls)


def _tokens(file: str) -> frozenset[bytes]:
    tokens = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not tokens or min(len(token) for token in tokens) < SHORTEST_TOKEN:
        raise ConfigError(f"{file}: needs one token a line, each of at least {SHORTEST_TOKEN} characters.")
    return frozenset(hashlib.sha256(token).digest() for token in tokens)


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.") from None


def _check_pair(certificate: str, key: str, client_authority: str) -> None:
    """Raises ConfigError for files that are no such thing: gRPC would only say that it cannot listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--tls-cert {certificate}, --tls-key {key}: not a PEM certificate and its unencrypted key: {error}."
        ) from None
    try:
        if client_authority:
            context.load_verify_locations(client_authority)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tls-client-ca {client_authority}: no PEM certificate: {error}.") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
