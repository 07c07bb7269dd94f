"""Makes and checks the keys of a run: SECURE=1 lets nobody in but the clients that the launcher has started.

    python security.py keys 3 192.0.2.7     # the same for several machines: a server at 192.0.2.7, and 3 clients
    python security.py keys 192.0.2.7       # whether that will do, by this machine's clock and for this address

A certificate authority is made, signs the server's certificate, and is forgotten: nobody can sign another one. Clients
trust that authority alone, so they talk to no other server, and nobody on the way can read along. Each client has a key
pair, and the server talks only to those whose public keys it was given. All keys are on the curve P-384.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat

from certificates import certify, check_address, check_dates, name

LOCAL = ("127.0.0.1", "localhost")  # where the SuperLink's own parts find it, wherever the clients are
USAGE = "usage: python security.py FOLDER CLIENTS ADDRESS [ADDRESS ...], or, of a folder with keys, FOLDER ADDRESS"


def make_keys(folder: Path, clients: int, *addresses: str) -> None:
    """Write ca.crt, server.crt and server.key, and a pair client-N and client-N.pub for each client, into `folder`.

    `addresses` are host names and IP addresses under which clients on other machines know the server. All is written
    or nothing. Raises FileExistsError where the folder exists, since keys are made once; ValueError for a bad address.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and keys in use are not overwritten: remove it, or name another")
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = name("the run's certificate authority")
    own = certify(issuer, authority, issuer, authority, [], is_authority=True)
    certificate = certify(issuer, authority, name("SuperLink"), server, [*LOCAL, *addresses], is_authority=False)
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    unfinished.mkdir(mode=0o700, parents=True)
    try:
        write(unfinished / "ca.crt", own.public_bytes(Encoding.PEM), 0o644)
        write(unfinished / "server.crt", certificate.public_bytes(Encoding.PEM), 0o644)
        write(unfinished / "server.key", private(server, PrivateFormat.PKCS8))
        for number in range(clients):
            key = ec.generate_private_key(ec.SECP384R1())
            write(unfinished / f"client-{number}", private(key, PrivateFormat.OpenSSH))
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            write(unfinished / f"client-{number}.pub", public, 0o644)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def check_keys(folder: Path, *addresses: str) -> None:
    """Raise ValueError where keys are missing or don't fit, a certificate isn't valid now, or isn't for an address.

    A server has ca.crt, server.crt and server.key, a client ca.crt and its own key.
    """
    clients = [path for path in folder.glob("client-*") if path.suffix != ".pub"]
    is_server = (folder / "server.crt").exists() or (folder / "server.key").exists()
    if not clients and not is_server:
        raise ValueError(f"{folder} has neither the server's keys nor a client's")
    path = folder
    try:
        authority = x509.load_pem_x509_certificate((path := folder / "ca.crt").read_bytes())
        check_dates(authority)
        if is_server:
            key = serialization.load_pem_private_key((path := folder / "server.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((path := folder / "server.crt").read_bytes())
            certificate.verify_directly_issued_by(authority)
            check_dates(certificate)
            if key.public_key() != certificate.public_key():
                raise ValueError("it is not for server.key")
            for address in addresses:
                check_address(certificate, address)
        for path in clients:
            serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: copy it here, or make new keys") from None
    except InvalidSignature:
        raise ValueError(f"{path} was signed by another authority than ca.crt: make new keys") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for address in addresses:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            raise ValueError(f"{address} is not known here ({error.strerror}): add it to /etc/hosts") from error


def private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, serialization.NoEncryption())


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file that was never readable for others than `mode` says."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def main(folder: str = "", *words: str) -> None:
    try:
        if len(words) > 1 and words[0].isdecimal():
            make_keys(Path(folder), int(words[0]), *words[1:])
        elif len(words) == 1 and Path(folder).is_dir():
            check_keys(Path(folder), *words)
        else:
            sys.exit(USAGE)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
