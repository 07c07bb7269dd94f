"""Signs the certificates of a run, and names the addresses that they are for (RFC 5280)."""

import datetime
import ipaddress
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = datetime.timedelta(days=30)
SLACK = datetime.timedelta(hours=1)  # for clocks that don't agree
LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME = re.compile(rf"(?i)({LABEL}\.)*(?!\d+$){LABEL}")  # the last part is no number, or it would be an IP address


def certify(
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    subject_key: ec.EllipticCurvePrivateKey,
    addresses: list[str],
    is_authority: bool,
) -> x509.Certificate:
    """Sign a certificate of the subject's public key, for these addresses. Raises ValueError where one is none."""
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


def check_dates(certificate: x509.Certificate) -> None:
    """Raise ValueError where a certificate is not valid now, by this machine's clock."""
    now = datetime.datetime.now(datetime.UTC)
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not since <= now <= until:
        raise ValueError(
            f"it is valid from {since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC, and this clock says "
            f"{now:%Y-%m-%d %H:%M}: set the clock (`date -u` shows it), or make new keys"
        )


def check_address(certificate: x509.Certificate, address: str) -> None:
    """Raise ValueError where a certificate is not for this address."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if alternative(address) not in names:
        known = ", ".join(str(name.value) for name in names)
        raise ValueError(f"it is for {known}, not for {address}: use one of those, or make new keys")


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def alternative(address: str) -> x509.GeneralName:
    """Return an IP address, or else a host name. Raises ValueError where it is neither, such as one with a port."""
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        if not HOST_NAME.fullmatch(address):
            raise ValueError(f"{address!r} is neither an IP address nor a host name, such as 192.0.2.7") from None
        return x509.DNSName(address)
