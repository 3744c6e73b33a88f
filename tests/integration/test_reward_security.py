"""Tokens, TLS, and the refusal of plain text beyond this machine."""

import datetime
import ipaddress
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.routing import Route

from retort.client import Item, RewardClient, RewardServiceError
from retort.config import ConfigError
from retort.proto.reward.v1 import reward_pb2
from services.reward.__main__ import main
from services.reward.app import make_app
from services.reward.security import Security, read_security
from tests.reward_service import ROOT, Service, reward_service

pytestmark = pytest.mark.timeout(60)

GOOD = Item("mcq", "B", "B")
TOKEN = "a-token-of-twenty-letters"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "retort test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def secured(certificate: tuple[Path, Path]) -> Iterator[Service]:
    cert, key = certificate
    tokens = cert.parent / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    with reward_service(
        "--http-port", "0", "--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens)
    ) as running:  # fmt: skip
        yield running


def test_grpc_takes_the_token_over_tls_and_nothing_else(secured: Service, certificate: tuple[Path, Path]) -> None:
    cert = certificate[0]
    with RewardClient(secured.address, token=TOKEN, ca_file=cert) as client:
        assert client.score([GOOD])[0].reward == 1.0
    with (
        RewardClient(secured.address, token="another-token-of-that-size", ca_file=cert) as client,
        pytest.raises(RewardServiceError, match="UNAUTHENTICATED: send a token"),
    ):
        client.score([GOOD])
    with (
        RewardClient(secured.address, token=TOKEN, timeout_s=1) as client,
        pytest.raises(RewardServiceError, match=r"no results within 1 s \(UNAVAILABLE"),
    ):
        client.score([GOOD])


def test_health_needs_no_token(secured: Service, certificate: tuple[Path, Path]) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    credentials = grpc.ssl_channel_credentials(certificate[0].read_bytes())
    with grpc.secure_channel(secured.address, credentials) as channel:
        request = health_pb2.HealthCheckRequest(service="reward.v1.RewardService")
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status == 1


def test_http_takes_the_token_over_tls_and_nothing_else(secured: Service, certificate: tuple[Path, Path]) -> None:
    import ssl

    body = {"items": [{"id": "1", "checker": "mcq", "completion": "B", "answer": "B"}]}
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(base_url=secured.http, verify=context) as client:
        assert client.get("/readyz").status_code == 200
        refused = client.post("/v1/score", json=body)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        allowed = client.post("/v1/score", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
        assert allowed.json()["results"][0]["reward"] == 1.0


def test_every_route_but_probes_and_metrics_wants_a_token(secured: Service, certificate: tuple[Path, Path]) -> None:
    import ssl

    # Listed from the application itself, so that a route that is added is asked too. Scoring is not reached.
    routes = [route for route in make_app(None, Security()).routes if isinstance(route, Route)]  # type: ignore[arg-type]
    asked = [(method, route.path.replace("{checker}", "mcq")) for route in routes for method in route.methods or ()]
    assert len(asked) > 8
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(base_url=secured.http, verify=context) as client:
        answers = {(method, path): client.request(method, path).status_code for method, path in asked}
        assert client.get("/no/such/route").status_code == 401
    assert {path for (_, path), status in answers.items() if status != 401} == {"/healthz", "/readyz", "/metrics"}


def test_every_rpc_but_health_wants_a_token(secured: Service, certificate: tuple[Path, Path]) -> None:
    service = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    names = [f"/{service.full_name}/{method.name}" for method in service.methods]
    names.append("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    credentials = grpc.ssl_channel_credentials(certificate[0].read_bytes())
    with grpc.secure_channel(secured.address, credentials) as channel:
        for name in names:
            # On the wire a call with one message is a stream with one message.
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.stream_stream(name)(iter([b""]), timeout=20))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name


def test_mutual_tls_takes_only_clients_with_a_certificate(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    arguments = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(cert)]
    with reward_service(*arguments) as service:
        with (
            RewardClient(service.address, ca_file=cert, timeout_s=1) as client,
            pytest.raises(RewardServiceError),
        ):
            client.score([GOOD])
        with RewardClient(service.address, ca_file=cert, client_files=(cert, key)) as client:
            assert client.score([GOOD])[0].reward == 1.0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines and there is no TLS"),
        (["--tls-cert", "a.pem"], "TLS needs --tls-cert and --tls-key together"),
        (["--token-file", "none"], "none: No such file or directory."),
        (["--tls-cert", "README.md", "--tls-key", "README.md"], "--tls-cert README.md, --tls-key README.md: not a PEM"),
        (["--shadow", "mcq=mqc"], "--shadow mcq=mqc: give two checkers as NAME=SHADOW"),
    ],
)
def test_what_would_be_unsafe_ends_the_start_with_2(arguments: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "services.reward", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(problem)


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_a_port_that_is_none_is_refused(option: str, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([option, port])
    assert ended.value.code == 2
    assert f"{option}: {port} is no port" in capsys.readouterr().err.replace("/--port", "")


def test_a_key_of_another_certificate_and_an_authority_that_is_none_are_named(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = map(str, certificate)
    encoding, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for name, encryption in (
        ("other", serialization.NoEncryption()),
        ("locked", serialization.BestAvailableEncryption(b"a")),
    ):
        other = ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, kind, encryption)
        (tmp_path / name).write_bytes(other)
        with pytest.raises(ConfigError, match=f"--tls-key {tmp_path / name}: not a PEM certificate and its"):
            read_tls(cert, str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"--tls-client-ca {key}: no PEM certificate"):
        read_tls(cert, key, key)


def read_tls(certificate: str, key: str, client_authority: str = "") -> Security:
    return read_security(
        token_file="",
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=client_authority,
        hosts=["127.0.0.1"],
        allow_plaintext=False,
    )


def test_plain_text_beyond_this_machine_can_be_allowed() -> None:
    with reward_service("--host", "0.0.0.0", "--allow-plaintext") as service, RewardClient(service.address) as client:
        assert client.score([GOOD])[0].reward == 1.0
