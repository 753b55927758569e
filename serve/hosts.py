"""What a request says of where it was sent to, and from where: the names in its headers."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping


def host_name(header: str) -> str:
    """The name in a Host header: in lower case, without its port and the brackets of an IPv6 address."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    # An IPv6 address that stands by itself has no port.
    name = header if header.count(":") > 1 else header.partition(":")[0]
    return name.rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only mean the machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def from_same_site(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser that sent these headers did so for a page of this server.

    Browsers do not let a page choose Origin and Sec-Fetch-Site; what other programs send has neither and passes. Only
    Host counts, not X-Forwarded-Host, which whoever asks could choose: a proxy has to pass Host on.
    """
    if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
        return False
    origin = headers.get(b"origin")
    if origin is None:
        return True
    scheme, _, asked_from = origin.lower().partition(b"://")
    # A browser leaves the usual port out of Origin; a proxy may write it into Host.
    usual = {b"http": b":80", b"https": b":443"}.get(scheme, b"")
    return bool(asked_from) and asked_from == headers.get(b"host", b"").lower().removesuffix(usual)
