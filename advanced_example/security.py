"""Keys and certificates of one run: `SECURE=1 ./run.sh` lets nobody in but the clients that it has started.

    python security.py KEYS 3 192.0.2.7     # the same for several machines: a server at 192.0.2.7, and 3 clients

A certificate authority is made, signs the server's certificate, and is forgotten: nobody can sign another one. Clients
trust that authority alone, so they talk to no other server, and nobody on the way can read along. Each client has a key
pair, and the server talks only to those whose public keys it was given. All keys are on the curve P-384.
"""

import datetime
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = datetime.timedelta(days=30)
SLACK = datetime.timedelta(hours=1)  # for clocks that don't agree


def make_keys(folder: Path, clients: int, *addresses: str) -> None:
    """Write ca.crt, server.crt and server.key, and a pair client-N and client-N.pub for each client, into `folder`.

    `addresses` are host names and IP addresses under which clients know the server. Raises FileExistsError where the
    folder exists: keys are made once.
    """
    folder.mkdir(mode=0o700, parents=True)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = name("the run's certificate authority")
    certificate = certify(issuer, authority, issuer, authority, [], is_authority=True)
    write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    certificate = certify(issuer, authority, name("SuperLink"), server, list(addresses), is_authority=False)
    write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    write(folder / "server.key", private(server, serialization.PrivateFormat.PKCS8))
    for number in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        write(folder / f"client-{number}", private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write(folder / f"client-{number}.pub", public, 0o644)


def certify(
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    subject_key: ec.EllipticCurvePrivateKey,
    addresses: list[str],
    is_authority: bool,
) -> x509.Certificate:
    """Sign a certificate of the subject's public key, for these addresses (RFC 5280)."""
    now = datetime.datetime.now(datetime.UTC)
    public = subject_key.public_key()
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if addresses:
        names = x509.SubjectAlternativeName([alternative(address) for address in addresses])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA384())


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def alternative(address: str) -> x509.GeneralName:
    """An IP address, or else a host name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file that was never readable for others than `mode` says."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


if __name__ == "__main__":
    if len(sys.argv) < 4 or not sys.argv[2].isdecimal():
        sys.exit("usage: python security.py FOLDER CLIENTS ADDRESS [ADDRESS ...]")
    make_keys(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
