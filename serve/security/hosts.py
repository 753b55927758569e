"""The host that a request names, its client, and its origin, from its headers.

Without keys, any client may send requests. A web site can do so through a user's browser, if the site's name points to
the server's address (DNS rebinding). So without keys the server answers only to names that no web site can have.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence

from serve.settings import ServeOptions, parse_network

PROXY_HEADERS = (b"forwarded", b"via", b"x-real-ip")
"""Headers of proxies, apart from X-Forwarded-*."""
MAX_HOST_BYTES = 300
"""Bytes of a Host header. A domain name has at most 253."""
MAX_CACHED = 1024
"""Host headers in the cache of `name_check`."""


def host_name(header: str) -> str:
    """The name in a Host header, in lower case, without the port and the brackets of an IPv6 address."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    # An IPv6 address without brackets has no port.
    name = header if header.count(":") > 1 else header.partition(":")[0]
    return name.rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is always this machine."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def name_check(options: ServeOptions) -> Callable[[bytes], bool]:
    """A function: whether a Host header names this server, and not a web site that points to it.

    True for an IP address, a name without a dot, the name of the machine, `--host` and `--allowed-host`.
    """
    machine = socket.gethostname().lower()
    own = {host_name(name) for name in (options.host, machine, f"{machine}.local", *options.allowed_host)}

    @functools.lru_cache(MAX_CACHED)
    def is_own(header: bytes) -> bool:
        name = host_name(header.decode("latin-1"))
        return "*" in own or name in own or "." not in name or is_loopback(name) or _address(name) is not None

    # A longer header is not cached: many of them would fill the memory.
    return lambda header: len(header) <= MAX_HOST_BYTES and is_own(header)


class Proxies:
    """The trusted proxies: the server believes their X-Forwarded-For.

    Args:
        networks: addresses and networks; * is all.

    Raises:
        ValueError: an entry is neither.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        everywhere = ("0.0.0.0/0", "::/0") if "*" in networks else ()
        self._networks = [parse_network(each) for each in (*everywhere, *networks) if each != "*"]

    def __contains__(self, address: str) -> bool:
        parsed = _address(address) if self._networks else None
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: str) -> str:
        """The address of the client of a request.

        Args:
            peer: the address of the connection.
            forwarded_for: X-Forwarded-For, where each proxy appends its client.
        """
        client = peer
        for each in reversed(forwarded_for.split(",")):
            address = host_name(each)
            if client not in self or _address(address) is None:
                break
            client = address
        return client


def is_local(peer: str, http_version: str, headers: Mapping[bytes, bytes], proxies: Proxies) -> bool:
    """Whether a browser's request comes from this machine without a proxy.

    A proxy shows by its headers, by `--trusted-proxy`, or by HTTP/1.0, which no browser uses. Any other proxy is not
    recognized.
    """
    return (
        is_loopback(peer)
        and peer not in proxies
        and http_version != "1.0"
        and not any(name in PROXY_HEADERS or name.startswith(b"x-forwarded-") for name in headers)
    )


def from_same_site(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request comes from a page of this server, or not from a browser.

    A page cannot choose Origin and Sec-Fetch-Site; other programs send neither. X-Forwarded-Host is ignored, because a
    client can choose it: a proxy must pass Host on.
    """
    if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
        return False
    origin = headers.get(b"origin")
    if origin is None:
        return True
    scheme, _, origin_host = origin.lower().partition(b"://")
    # Browsers leave the default port out of Origin; a proxy may add it to Host.
    default_port = {b"http": b":80", b"https": b":443"}.get(scheme, b"")
    return bool(origin_host) and origin_host == headers.get(b"host", b"").lower().removesuffix(default_port)
