"""The server's certificate, for both ports.

Owns reading and checking the PEM files, in words that name the setting, and taking in files that
were replaced: every RELOAD_S the files are looked at, and what is whole and valid serves from the
next handshake on; what is not is logged, and the old certificate goes on. It opens no port. The
files are read in a worker thread; gRPC asks for the certificate from threads of its own.
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, cast

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from heedful_server.errors import InvalidConfig
from heedful_server.setting_groups import TlsSettings

log = structlog.get_logger(__name__)

RELOAD_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Files:
    """PEM bytes that belong together."""

    chain: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """What both ports present, and whom the gRPC port believes."""

    def __init__(self, settings: TlsSettings) -> None:
        """Read and check the files; raises InvalidConfig."""
        self._settings = settings
        self._files = _read(settings)
        self.http_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.http_context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load_http()
        self._for_grpc = _configuration(self._files)
        self._given_to_grpc = self._for_grpc

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files; with client_ca_file callers need one too."""
        return grpc.dynamic_ssl_server_credentials(
            self._for_grpc,
            # grpc's types leave out the None that its documentation has for "no change".
            cast("Callable[[], grpc.ServerCertificateConfiguration]", self._next_for_grpc),
            require_client_authentication=self._files.client_ca is not None,
        )

    def refresh(self) -> bool:
        """Take in files that were replaced; return whether something changed."""
        try:
            files = _read(self._settings)
            if files == self._files:
                return False
            self._load_http()
        except (InvalidConfig, OSError) as error:
            log.warning("the old certificate stays in use", reason=str(error))
            return False
        self._files = files
        self._for_grpc = _configuration(files)
        log.info("a new certificate is in use")
        return True

    async def watch(self) -> None:
        """Look at the files now and then, until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_S)
            await asyncio.to_thread(self.refresh)

    def _load_http(self) -> None:
        self.http_context.load_cert_chain(self._settings.cert_file, self._settings.key_file)

    def _next_for_grpc(self) -> "grpc.ServerCertificateConfiguration | None":
        if self._given_to_grpc is self._for_grpc:
            return None
        self._given_to_grpc = self._for_grpc
        return self._given_to_grpc


def _configuration(files: _Files) -> "grpc.ServerCertificateConfiguration":
    pairs = [(files.key, files.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, files.client_ca)


def _read(settings: TlsSettings) -> _Files:
    files = _Files(
        chain=_bytes_of("tls.cert_file", settings.cert_file),
        key=_bytes_of("tls.key_file", settings.key_file),
        client_ca=_bytes_of("tls.client_ca_file", settings.client_ca_file)
        if settings.client_ca_file
        else None,
    )
    certificate = _certificates("tls.cert_file", settings.cert_file, files.chain)[0]
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        day = certificate.not_valid_after_utc.date().isoformat()
        raise InvalidConfig(f"tls.cert_file = {settings.cert_file!r}: expired on {day}")
    try:
        key = load_pem_private_key(files.key, password=None)
    except TypeError:
        raise InvalidConfig(
            f"tls.key_file = {settings.key_file!r}: is protected by a password; "
            "the server needs one that is not"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidConfig(
            f"tls.key_file = {settings.key_file!r}: holds no PEM private key"
        ) from None
    if key.public_key() != certificate.public_key():
        raise InvalidConfig(
            f"tls.key_file = {settings.key_file!r} is not the key of "
            f"tls.cert_file = {settings.cert_file!r}"
        )
    if files.client_ca is not None:
        _certificates("tls.client_ca_file", settings.client_ca_file, files.client_ca)
    return files


def _bytes_of(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{setting} = {path!r}: {error.strerror}") from None


def _certificates(setting: str, path: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidConfig(f"{setting} = {path!r}: holds no PEM certificate") from None
