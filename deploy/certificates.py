"""Keys to try a deployment with: `python -m deploy.certificates OUT --host superlink.example.org --sites 3`.

OUT receives a certificate authority (ca.crt, ca.key), the SuperLink's certificate (superlink.crt, superlink.key) and
one key pair for each SuperNode (site-0, site-0.pub, …). They are for tests and for a first walk through the documents:
here one person holds every key. In earnest each site makes its own pair (docs/deployment.md) and an authority that the
sites know signs the certificate. Private keys are readable by their owner only; no file is overwritten.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import FedloraError, InputError

CURVE = ec.SECP384R1  # P-384: what Flower documents for SuperNodes
CLOCK_SLACK = datetime.timedelta(
    hours=1
)  # a clock that is slow by less than this still takes a new certificate as valid
AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora test authority")])


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """Where the files of one folder lie."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        return self.folder / "superlink.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "superlink.key"

    def site_key(self, site: int) -> Path:
        """An OpenSSH private key, as `flower-supernode --auth-supernode-private-key` reads it."""
        return self.folder / f"site-{site}"

    def site_public_key(self, site: int) -> Path:
        """One OpenSSH line, as `flwr supernode register` reads it."""
        return self.folder / f"site-{site}.pub"


def make_certificates(folder: Path, *, hosts: Sequence[str], sites: int, days: int = 365) -> Certificates:
    """Make an authority, a server certificate for `hosts` and `sites` key pairs.

    Args:
        folder: made if need be; may hold other files.
        hosts: DNS names and IP addresses by which SuperNodes and submitters reach the SuperLink.
        sites: number of SuperNode key pairs, 0 where the sites make their own.
        days: how long authority and certificate are valid.

    Raises:
        InputError: a host, number or folder cannot be used, or one of the files is there already.
    """
    if not hosts:
        raise InputError("a server certificate needs at least one --host: the name or address SuperNodes connect to")
    if sites < 0 or days < 1:
        raise InputError(f"--sites {sites} --days {days}, wanted at least 0 and at least 1")
    names = [_subject_name(host) for host in hosts]
    files = Certificates(folder=folder)
    _check_free(files, sites)
    authority_key = ec.generate_private_key(CURVE())
    authority = _sign_authority(authority_key, days)
    server_key = ec.generate_private_key(CURVE())
    server = _sign_server(server_key.public_key(), names, authority, authority_key, days)
    _write(files.authority_key, _pem(authority_key), private=True)
    _write(files.authority, authority.public_bytes(Encoding.PEM))
    _write(files.server_key, _pem(server_key), private=True)
    _write(files.server, server.public_bytes(Encoding.PEM))
    for site in range(sites):
        key = ec.generate_private_key(CURVE())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        _write(files.site_key(site), private, private=True)
        _write(files.site_public_key(site), _public_line(key))
    return files


def _sign_authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """Self-signed, and good for signing servers only: no authority below it."""
    may_sign = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _dated(days)
        .subject_name(AUTHORITY_NAME)
        .issuer_name(AUTHORITY_NAME)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(may_sign, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _sign_server(
    key: ec.EllipticCurvePublicKey,
    names: Sequence[x509.GeneralName],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """Clients compare the subject alternative names; the subject is for people."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _dated(days)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora SuperLink")]))
        .issuer_name(authority.subject)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _dated(days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if host.isascii() and all(label and set(label) <= _LETTERS for label in labels):
        return x509.DNSName(host)
    raise InputError(f"--host {host!r} is neither a DNS name nor an IP address; give it without https:// and port")


_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_*")


def _public_line(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _check_free(files: Certificates, sites: int) -> None:
    """Before the first write, so that a refusal leaves the folder as it was."""
    pairs: Iterable[Path] = (
        path for site in range(sites) for path in (files.site_key(site), files.site_public_key(site))
    )
    wanted = (files.authority, files.authority_key, files.server, files.server_key, *pairs)
    if there := [path for path in wanted if path.exists()]:
        raise InputError(f"{there[0]} is there already; keys are never overwritten. Name another folder")
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {files.folder}: {error.strerror}") from error


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    """A new file, with its rights from the first moment on."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.certificates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the files")
    parser.add_argument("--host", action="append", default=[], help="name or address of the SuperLink; repeat for more")
    parser.add_argument("--sites", type=int, default=0, help="number of SuperNode key pairs")
    parser.add_argument("--days", type=int, default=365, help="how long the certificates are valid")
    chosen = parser.parse_args(arguments)
    try:
        files = make_certificates(chosen.out, hosts=chosen.host, sites=chosen.sites, days=chosen.days)
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{files.folder}: authority, certificate for {', '.join(chosen.host)}, {chosen.sites} SuperNode key pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
