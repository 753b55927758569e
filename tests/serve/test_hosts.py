"""Whether a request was meant for this server, from its headers."""

import pytest

from serve.hosts import from_same_site, host_name, is_loopback


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:8000", "localhost"),
        ("LocalHost", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("example.com.:80", "example.com"),
        (" example.com ", "example.com"),
        ("user@127.0.0.1:80", "user@127.0.0.1"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name


@pytest.mark.parametrize("host", ["localhost", "page.localhost", "127.0.0.1", "127.8.9.10", "::1"])
def test_these_names_mean_the_machine_itself(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "", "0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example.com", "notlocalhost", "127.0.0.1.nip.io",
        "127.1", "0x7f000001", "2130706433", "user@127.0.0.1",
    ],
)  # fmt: skip
def test_these_names_can_mean_others(host):
    assert not is_loopback(host)


def asked(**headers: str) -> bool:
    return from_same_site({name.replace("_", "-").encode(): value.encode() for name, value in headers.items()})


def test_what_is_no_browser_passes():
    assert asked(host="127.0.0.1:8000") and asked()


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://LOCALHOST:8000", "localhost:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://example.com", "example.com"),
        ("https://example.com", "example.com:443"),
        ("http://example.com", "example.com:80"),
    ],
)
def test_a_page_of_this_server_passes(origin, host):
    assert asked(origin=origin, host=host) and asked(origin=origin, host=host, sec_fetch_site="same-origin")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://example.com", "127.0.0.1:8000"),
        ("http://127.0.0.1:9000", "127.0.0.1:8000"),
        ("http://localhost:8000", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000.example.com", "127.0.0.1:8000"),
        ("https://example.com", "example.com:80"),
        ("null", "127.0.0.1:8000"),
        ("", ""),
        ("http://", ""),
    ],
)
def test_a_page_of_another_server_does_not(origin, host):
    assert not asked(origin=origin, host=host)
    assert not asked(origin=origin, host=host, sec_fetch_site="same-origin")


@pytest.mark.parametrize("site", ["cross-site", "same-site", ""])
def test_what_the_browser_says_itself_decides(site):
    assert not asked(sec_fetch_site=site)
    assert not asked(origin="http://a:1", host="a:1", sec_fetch_site=site)


def test_what_a_proxy_adds_changes_nothing():
    assert not asked(origin="http://example.com", host="127.0.0.1:8000", x_forwarded_host="example.com")
