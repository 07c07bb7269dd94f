"""Keys and certificates of one run: `SECURE=1 ./run.sh` lets nobody in but the clients that it has started.

    python security.py keys 3 192.0.2.7     # the same for several machines: a server at 192.0.2.7, and 3 clients
    python security.py keys 192.0.2.7       # whether that will do, by this machine's clock and for this address

A certificate authority is made, signs the server's certificate, and is forgotten: nobody can sign another one. Clients
trust that authority alone, so they talk to no other server, and nobody on the way can read along. Each client has a key
pair, and the server talks only to those whose public keys it was given. All keys are on the curve P-384.
"""

import datetime
import ipaddress
import os
import socket
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = datetime.timedelta(days=30)
SLACK = datetime.timedelta(hours=1)  # for clocks that don't agree
LOCAL = ("127.0.0.1", "localhost")  # where the SuperLink's own parts find it, wherever the clients are


def make_keys(folder: Path, clients: int, *addresses: str) -> None:
    """Write ca.crt, server.crt and server.key, and a pair client-N and client-N.pub for each client, into `folder`.

    `addresses` are host names and IP addresses under which clients on other machines know the server. Raises
    FileExistsError where the folder exists: keys are made once.
    """
    folder.mkdir(mode=0o700, parents=True)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = name("the run's certificate authority")
    certificate = certify(issuer, authority, issuer, authority, [], is_authority=True)
    write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    certificate = certify(issuer, authority, name("SuperLink"), server, [*LOCAL, *addresses], is_authority=False)
    write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    write(folder / "server.key", private(server, serialization.PrivateFormat.PKCS8))
    for number in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        write(folder / f"client-{number}", private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write(folder / f"client-{number}.pub", public, 0o644)


def check_keys(folder: Path, *addresses: str) -> None:
    """Raise ValueError where a certificate is not valid now, by this clock, or the server's is not for an address."""
    now = datetime.datetime.now(datetime.UTC)
    for path in sorted(folder.glob("*.crt")):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not since <= now <= until:
            raise ValueError(
                f"{path} is valid from {since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC, and this clock says "
                f"{now:%Y-%m-%d %H:%M}: set the clock (`date -u` shows it), or remove {folder} and make new keys"
            )
        if path.name == "server.crt":
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            for address in addresses:
                if alternative(address) not in names:
                    known = ", ".join(str(known.value) for known in names)
                    raise ValueError(f"{path} is for {known}, not for {address}: use one of those, or make new keys")
    for address in addresses:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            raise ValueError(f"{address} is not known here ({error.strerror}): add it to /etc/hosts") from error


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
    folder, *words = sys.argv[1:] or [""]
    if len(words) > 1 and words[0].isdecimal():
        make_keys(Path(folder), int(words[0]), *words[1:])
    elif len(words) == 1 and (Path(folder) / "ca.crt").is_file():
        try:
            check_keys(Path(folder), *words)
        except ValueError as error:
            sys.exit(f"error: {error}")
    else:
        sys.exit("usage: python security.py FOLDER CLIENTS ADDRESS [ADDRESS ...], or, of a folder with keys, ADDRESS")
