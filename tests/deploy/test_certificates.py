"""The keys of a deployment are what TLS and Flower take, are nobody else's to read, and are never overwritten."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from deploy.certificates import Certificates, main, make_certificates
from fedlora.errors import InputError

HOSTS = ["localhost", "superlink.example.org", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("keys"), hosts=HOSTS, sites=2)


def test_a_strict_reader_takes_the_server_certificate_for_every_host_and_for_no_other(made: Certificates) -> None:
    authority, server = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (made.authority, made.server))
    builder = PolicyBuilder().store(Store([authority]))
    chain = builder.build_server_verifier(x509.DNSName("superlink.example.org")).verify(server, [])
    assert chain == [server, authority]
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("example.org")).verify(server, [])


@pytest.mark.parametrize(("host", "taken"), [("127.0.0.1", True), ("localhost", True), ("127.0.0.2", False)])
def test_tls_with_it(made: Certificates, host: str, taken: bool) -> None:
    assert handshake(made, made.authority, host) is taken


def test_another_authority_is_not_taken(made: Certificates, tmp_path: Path) -> None:
    other = make_certificates(tmp_path, hosts=HOSTS, sites=0)
    assert not handshake(made, other.authority, "localhost")


def handshake(made: Certificates, authority: Path, host: str) -> bool:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.server, made.server_key)
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(far, server_side=True).close()
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(near, server_hostname=host).close()
    except ssl.SSLCertVerificationError:
        return False
    finally:
        near.close()
        thread.join()
    return True


def test_flower_reads_the_pairs_and_they_belong_together(made: Certificates) -> None:
    register = pytest.importorskip("flwr.cli.supernode.register")
    keys = set()
    for site in range(2):
        private = serialization.load_ssh_private_key(made.site_key(site).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        public = register.try_load_public_key(made.site_public_key(site))
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        assert public == private.public_key().public_bytes(encoding, form)
        keys.add(public)
    assert len(keys) == 2


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "new" / "folder", hosts=["localhost"], sites=1)
    private = {made.authority_key, made.server_key, made.site_key(0)}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir()}
    assert {path for path, mode in modes.items() if mode == 0o600} == private
    assert all(mode & 0o077 == 0 for path, mode in modes.items() if path in private)


def test_nothing_is_overwritten_or_added(made: Certificates, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in made.folder.iterdir()}
    assert main([str(made.folder), "--host", "localhost", "--sites", "9"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in made.folder.iterdir()} == before


def test_one_key_that_is_there_keeps_all_others_out(tmp_path: Path) -> None:
    (tmp_path / "site-1.pub").write_text("somebody's")
    with pytest.raises(InputError, match=r"site-1\.pub"):
        make_certificates(tmp_path, hosts=["localhost"], sites=2)
    assert [path.name for path in tmp_path.iterdir()] == ["site-1.pub"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--host"),
        (["--host", "https://a.org"], "without https://"),
        (["--host", "a.org:9092"], "without https://"),
        (["--host", ""], "neither"),
        (["--host", "a.org", "--sites", "-1"], "--sites -1"),
        (["--host", "a.org", "--days", "0"], "--days 0"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert main([str(tmp_path / "out"), "--host", "localhost"]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
