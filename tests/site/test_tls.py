"""The second way in, over TLS on loopback: certificates on both sides, and no more rights than at the socket."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.certificates import Certificates, make_certificates
from deploy.loopback import free_port
from fedlora.errors import ConfigError, DaemonUnreachable
from fedlora.site.connection import DaemonAddress
from fedlora.site.daemon import Daemon
from fedlora.site.desk import Desk
from fedlora.site.protocol import Request
from tests.site.conftest import Asking, SiteFolder, update_in
from tests.site.test_daemon import serving

STATUS = Request(ask="status")


def courier_certificate(keys: Certificates, folder: Path) -> tuple[Path, Path]:
    """Signed by the authority of `keys`, good for clients."""
    folder.mkdir(exist_ok=True)
    authority = x509.load_pem_x509_certificate(keys.authority.read_bytes())
    signer = load_pem_private_key(keys.authority_key.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "courier")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    (folder / "courier.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "courier.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "courier.crt", folder / "courier.key"


@pytest.fixture
def keys(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "keys", hosts=["127.0.0.1"], sites=0)


@pytest.fixture
def address(site_folder: SiteFolder, keys: Certificates, tmp_path: Path) -> Iterator[DaemonAddress]:
    """Of a daemon that is serving, with the right certificate."""
    certificate, key = courier_certificate(keys, tmp_path / "courier")
    place = f"127.0.0.1:{free_port()}"
    with_tls(site_folder, keys, place)
    with serving(site_folder):
        yield DaemonAddress(place=place, authority=str(keys.authority), certificate=str(certificate), key=str(key))


def with_tls(folder: SiteFolder, keys: Certificates, place: str) -> None:
    folder.write_policy()
    text = folder.settings.read_text()
    folder.settings.write_text(
        f'{text}[tls]\naddress = "{place}"\ncertificate = "{keys.server}"\nkey = "{keys.server_key}"\n'
        f'couriers = "{keys.authority}"\n'
    )


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_with_the_right_certificates_a_round_is_done(address: DaemonAddress, asking: Asking) -> None:
    update_in(address.ask(asking.round(), limit=60.0))


def test_status_is_told_to_nobody_there(address: DaemonAddress) -> None:
    """Of who asks over TLS the system knows no user."""
    answer = address.ask(STATUS, limit=60.0)
    assert (answer.code, answer.facts) == ("refused", {})


def test_a_courier_with_another_authority_is_refused(
    address: DaemonAddress, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = make_certificates(tmp_path / "theirs", hosts=["127.0.0.1"], sites=0)
    certificate, key = courier_certificate(theirs, tmp_path / "stranger")
    with pytest.raises(DaemonUnreachable):
        replace(address, certificate=str(certificate), key=str(key)).ask(STATUS, limit=60.0)
    assert address.ask(STATUS, limit=60.0).code == "refused", "and others are still answered"
    assert lines(caplog) == ["a connection over TLS was refused: CERTIFICATE_VERIFY_FAILED"]


def test_a_daemon_with_another_authority_is_not_spoken_to(
    address: DaemonAddress, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = make_certificates(tmp_path / "theirs", hosts=["127.0.0.1"], sites=0)
    with pytest.raises(DaemonUnreachable, match=r"(?i)certificate.verify.failed"):
        replace(address, authority=str(theirs.authority)).ask(STATUS, limit=60.0)
    assert address.ask(STATUS, limit=60.0).code == "refused"
    assert lines(caplog) == ["a connection over TLS was refused: TLSV1_ALERT_UNKNOWN_CA"]


def test_without_a_certificate_nobody_is_answered(
    address: DaemonAddress, keys: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    host, _, port = address.place.rpartition(":")
    context = ssl.create_default_context(cafile=str(keys.authority))
    with (
        socket.create_connection((host, int(port)), 30) as line,
        context.wrap_socket(line, server_hostname=host) as safe,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        safe.recv(1)
    assert address.ask(STATUS, limit=60.0).code == "refused"
    assert lines(caplog) == ["a connection over TLS was refused: PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_a_servers_certificate_makes_no_courier(
    address: DaemonAddress, keys: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DaemonUnreachable):
        replace(address, certificate=str(keys.server), key=str(keys.server_key)).ask(STATUS, limit=60.0)
    assert address.ask(STATUS, limit=60.0).code == "refused"
    assert lines(caplog) == ["a connection over TLS was refused: CERTIFICATE_VERIFY_FAILED"]


@pytest.mark.parametrize("sent", [STATUS.encode(), b"GET / HTTP/1.1\r\n\r\n"], ids=["a request", "HTTP"])
def test_plain_bytes_are_refused(address: DaemonAddress, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    host, _, port = address.place.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as line:
        line.sendall(sent)
        heard = b""
        while part := line.recv(1000):
            heard += part
    assert b"fedlora" not in heard
    assert address.ask(STATUS, limit=60.0).code == "refused"
    (said,) = lines(caplog)
    assert said in (f"a connection over TLS was refused: {why}" for why in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"))


def test_old_tls_is_refused(address: DaemonAddress, keys: Certificates) -> None:
    host, _, port = address.place.rpartition(":")
    context = ssl.create_default_context(cafile=str(keys.authority))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(address.certificate, address.key)
    with socket.create_connection((host, int(port)), 30) as line, pytest.raises(ssl.SSLError):
        context.wrap_socket(line, server_hostname=host)


@pytest.mark.parametrize("place", ["0.0.0.0:7443", "192.0.2.1:7443", "localhost:7443", "127.0.0.1", "127.0.0.1:port"])
def test_only_loopback_is_listened_on(site_folder: SiteFolder, keys: Certificates, place: str) -> None:
    with_tls(site_folder, keys, place)
    desk = Desk(site_folder.settings)
    with pytest.raises(ConfigError, match="wanted a loopback address and a port"):
        Daemon(desk)
    desk.close()
    assert not site_folder.socket.exists()


def test_files_that_are_no_certificates_are_named(
    site_folder: SiteFolder, keys: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    with_tls(site_folder, replace(keys, folder=site_folder.path), "127.0.0.1:7443")
    desk = Desk(site_folder.settings)
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match=r"\[tls\] in .* cannot be used"):
        Daemon(desk)
    desk.close()


def test_it_ends_though_a_handshake_was_begun_and_not_ended(site_folder: SiteFolder, keys: Certificates) -> None:
    place = ("127.0.0.1", free_port())
    with_tls(site_folder, keys, f"{place[0]}:{place[1]}")
    with serving(site_folder):
        line = socket.create_connection(place, 30)
        line.sendall(b"\x16\x03\x01\x02\x00\x01")
    with line:
        assert line.recv(1) == b""
