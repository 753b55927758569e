"""Where a request was sent to, and where it comes from: the names and addresses in its headers.

Without keys, whoever reaches the server may ask. A web site reaches it too, through a visitor's browser, when it lets a
name of its own point to the server's address. So without keys the server answers only for names that no web site has.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence

from serve.settings import ServeOptions, parse_network

OF_PROXIES = (b"forwarded", b"via", b"x-real-ip")
"""Headers that proxies add, as they do X-Forwarded-For and others of that kind."""
LONGEST_HOST = 300
"""Bytes of a Host header; a name of the domain name system has at most 253."""
MOST_REMEMBERED = 1024
"""Host headers whose examination is kept."""


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


def is_address(host: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def name_check(options: ServeOptions) -> Callable[[bytes], bool]:
    """What says whether a Host header names this server, rather than a web site that points to it.

    That is any IP address, any name without a dot, which no web site has, the machine's own name, and what
    `--host` and `--allowed-host` name.
    """
    machine = socket.gethostname().lower()
    own = {host_name(name) for name in (options.host, machine, f"{machine}.local", *options.allowed_host)}

    @functools.lru_cache(MOST_REMEMBERED)
    def is_own(header: bytes) -> bool:
        name = host_name(header.decode("latin-1"))
        return "*" in own or name in own or "." not in name or is_loopback(name) or is_address(name)

    # A longer one is refused before it is remembered: many of them would fill the memory.
    return lambda header: len(header) <= LONGEST_HOST and is_own(header)


class Proxies:
    """The proxies that are trusted to say who asked them.

    Args:
        networks: addresses and networks; * is any.

    Raises:
        ValueError: one is neither.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        everywhere = ("0.0.0.0/0", "::/0") if "*" in networks else ()
        self._networks = [parse_network(each) for each in (*everywhere, *networks) if each != "*"]

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: str) -> str:
        """The address of the client of a request.

        Args:
            peer: the address at the other end of the connection.
            forwarded_for: the request's X-Forwarded-For, to which each proxy adds whom it was asked by.
        """
        client = peer
        for each in reversed(forwarded_for.split(",")):
            address = host_name(each)
            if client not in self or not is_address(address):
                break
            client = address
        return client


def is_local(peer: str, http_version: str, headers: Mapping[bytes, bytes], proxies: Proxies) -> bool:
    """Whether a browser's request comes from this machine, as far as can be seen, and through no proxy.

    A browser behind a proxy may be anywhere. A proxy says that it is one in a header, or is named by `--trusted-proxy`,
    or asks in HTTP/1.0, which no browser speaks. A proxy that does none of these cannot be recognized.
    """
    return (
        is_loopback(peer)
        and peer not in proxies
        and http_version != "1.0"
        and not any(name in OF_PROXIES or name.startswith(b"x-forwarded-") for name in headers)
    )


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
