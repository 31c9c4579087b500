"""Encryption of both ports, with certificates made here."""

import asyncio
import datetime
import ssl
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import grpc
import grpc.aio
import heedful
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from heedful_server.config import TlsSettings, load_config
from heedful_server.errors import InvalidConfig, PermissionDenied, Unauthenticated
from heedful_server.http.app import make_app
from heedful_server.metrics import Metrics
from heedful_server.security.certificates import Certificates
from heedful_server.serving import Server

NAME = "heedful.test"
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Authority:
    """Signs certificates and writes them to files."""

    directory: Path
    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    def issue(self, name: str, days: int = 30) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = certified(NAME, key, self.name, self.key, days)
        paths = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(PEM))
        paths[1].write_bytes(
            key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return paths


def certified(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), True)
        .add_extension(x509.SubjectAlternativeName(hosts), False)
        .sign(issuer_key, hashes.SHA256())
    )


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[[str], Authority]:
    def make(name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        authority = Authority(tmp_path, name, key, certified(name, key, name, key, 30))
        (tmp_path / f"{name}-ca.pem").write_bytes(authority.pem)
        return authority

    return make


@pytest.fixture
def authority(make_authority) -> Authority:
    return make_authority("ours")


@pytest.fixture
def serve(config, model, make_engine):
    """Run a server with TLS settings."""

    @asynccontextmanager
    async def run(tls: TlsSettings):
        server = Server(config.model_copy(update={"tls": tls}), model, make_engine)
        await server.start()
        try:
            await server.engine.wait_ready()
            yield server
        finally:
            await server.stop(0.0)

    return run


def settings(paths: tuple[Path, Path], client_ca: Path | str = "") -> TlsSettings:
    return TlsSettings(
        cert_file=str(paths[0]), key_file=str(paths[1]), client_ca_file=str(client_ca)
    )


async def is_served(server: Server, credentials: grpc.ChannelCredentials | None) -> bool:
    address = server.grpc_address
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), 1.0)
        except TimeoutError:
            return False
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_port_speaks_tls_only_and_only_its_authority_vouches(
    serve, authority, make_authority
):
    async with serve(settings(authority.issue("server"))) as server:
        assert await is_served(server, grpc.ssl_channel_credentials(authority.pem))
        assert not await is_served(server, None)
        stranger = make_authority("stranger")
        assert not await is_served(server, grpc.ssl_channel_credentials(stranger.pem))


async def test_mutual_tls_wants_a_certificate_of_the_named_authority(
    serve, authority, make_authority
):
    clients, strangers = make_authority("clients"), make_authority("strangers")
    ca_file = authority.directory / "clients-ca.pem"

    def credentials(issuer: Authority) -> grpc.ChannelCredentials:
        certificate, key = issuer.issue("client")
        return grpc.ssl_channel_credentials(
            authority.pem, key.read_bytes(), certificate.read_bytes()
        )

    async with serve(settings(authority.issue("server"), ca_file)) as server:
        assert await is_served(server, credentials(clients))
        assert not await is_served(server, credentials(strangers))
        assert not await is_served(server, grpc.ssl_channel_credentials(authority.pem))


async def test_our_client_generates_over_mutual_tls(serve, authority, make_authority):
    clients = make_authority("clients")
    ca_file = authority.directory / "clients-ca.pem"
    certificate, key = clients.issue("client")
    async with serve(settings(authority.issue("server"), ca_file)) as server:
        tls = heedful.TLS.from_files(
            authority.directory / "ours-ca.pem", key=key, certificate=certificate
        )
        async with heedful.AsyncClient(server.grpc_address, tls=tls) as client:
            answer = await client.generate("hello", max_tokens=3)
            assert answer.text == "[us"  # the prompt as a conversation, repeated by the toy


async def test_http_is_encrypted_too(serve, authority):
    trust = ssl.create_default_context(cadata=authority.pem.decode())
    async with (
        serve(settings(authority.issue("server"))) as server,
        httpx.AsyncClient(verify=trust) as client,
    ):
        reply = await client.get(f"https://{server.http_address}/healthz")
        assert reply.text == "ok\n"
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://{server.http_address}/healthz")


async def test_replaced_certificate_serves_new_connections(serve, authority, make_authority):
    paths = authority.issue("server")
    async with serve(settings(paths)) as server:
        assert await is_served(server, grpc.ssl_channel_credentials(authority.pem))
        assert not server.certificates.refresh()
        successor = make_authority("successor")
        assert successor.issue("server") == paths
        assert server.certificates.refresh()
        assert await is_served(server, grpc.ssl_channel_credentials(successor.pem))
        trust = ssl.create_default_context(cadata=successor.pem.decode())
        async with httpx.AsyncClient(verify=trust) as client:
            assert (await client.get(f"https://{server.http_address}/healthz")).text == "ok\n"
        # Half a replacement changes nothing.
        paths[1].write_bytes(b"")
        assert not server.certificates.refresh()
        assert await is_served(server, grpc.ssl_channel_credentials(successor.pem))


def test_unusable_files_are_refused_by_setting(authority, tmp_path):
    cert, key = authority.issue("server")
    other_key = authority.issue("other")[1]
    expired = authority.issue("expired", days=-1)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    for files, client_ca, words in [
        ((tmp_path / "none", key), "", "tls.cert_file.*No such file"),
        ((cert, tmp_path / "none"), "", "tls.key_file.*No such file"),
        ((key, key), "", "tls.cert_file.*no PEM certificate"),
        ((cert, cert), "", "tls.key_file.*no PEM private key"),
        ((cert, other_key), "", "tls.key_file.*not the key of tls.cert_file"),
        ((cert, locked), "", "tls.key_file.*password"),
        (expired, "", "tls.cert_file.*expired on"),
        ((cert, key), key, "tls.client_ca_file.*no PEM certificate"),
    ]:
        with pytest.raises(InvalidConfig, match=words):
            Certificates(settings(files, client_ca))


@pytest.mark.parametrize("given", ["cert_file", "key_file", "client_ca_file"])
def test_half_a_setting_is_refused(given):
    with pytest.raises(InvalidConfig, match=f"tls.{given} is given without"):
        load_config(None, {}, [(f"tls.{given}", "x.pem")])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("mode", ["auto", "none", "keys"])
@pytest.mark.parametrize("insecure", ["false", "true"])
def test_beyond_loopback_needs_encryption_and_keys_or_insecure(host, has_tls, mode, insecure):
    given = [("grpc.host", host), ("auth.mode", mode), ("insecure", insecure)]
    if has_tls:
        given += [("tls.cert_file", "c.pem"), ("tls.key_file", "k.pem")]
    if host == "127.0.0.1" or insecure == "true" or (has_tls and mode != "none"):
        config = load_config(None, {}, given)
        needs_keys = mode == "keys" or (mode == "auto" and host == "0.0.0.0")
        if insecure == "false":
            assert (config.key_rule == "always") is needs_keys
        return
    with pytest.raises(InvalidConfig, match=r"grpc\.host.*--insecure") as caught:
        load_config(None, {}, given)
    assert ("tls.cert_file" in str(caught.value)) is not has_tls
    assert ("auth.mode" in str(caught.value)) is (mode == "none")


@pytest.mark.parametrize(
    ("refusal", "status"), [(Unauthenticated("who?"), 401), (PermissionDenied("no"), 403)]
)
async def test_metrics_ask_who_looks(refusal, status):
    async def admit(request) -> None:
        if request.headers.get("x-api-key") != "good":
            raise refusal

    app = make_app(Metrics().registry, lambda: "", admit_metrics=admit)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/metrics")).status_code == status
        assert (await client.get("/metrics", headers={"x-api-key": "good"})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
