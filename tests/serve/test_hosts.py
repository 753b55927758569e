"""Whether a request was meant for this server, from its headers."""

import pytest

from lm.config import validate
from lm.errors import ConfigError
from serve.security.hosts import MAX_HOST_BYTES, Proxies, from_same_site, host_name, is_local, is_loopback, name_check
from serve.security.login import Backoff, Keys, TooManyGuessesError
from serve.settings import ServeOptions


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


def test_a_host_header_longer_than_a_name_can_be_is_refused():
    is_own = name_check(ServeOptions(allowed_host=("*",)))
    assert is_own(b"a" * MAX_HOST_BYTES) and not is_own(b"a" * (MAX_HOST_BYTES + 1))


def test_a_request_without_browser_headers_passes():
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
def test_sec_fetch_site_decides(site):
    assert not asked(sec_fetch_site=site)
    assert not asked(origin="http://a:1", host="a:1", sec_fetch_site=site)


def test_headers_of_a_proxy_change_nothing():
    assert not asked(origin="http://example.com", host="127.0.0.1:8000", x_forwarded_host="example.com")


def test_the_client_is_the_one_that_the_last_trusted_proxy_names():
    proxies = Proxies(["10.0.0.0/8", "::1"])
    assert proxies.client("10.1.2.3", "198.51.100.1") == "198.51.100.1"
    # Whoever asks can write the beginning of the list.
    assert proxies.client("10.1.2.3", "127.0.0.1, 198.51.100.1, 10.9.9.9") == "198.51.100.1"
    assert proxies.client("::1", "[2001:db8::5]:4711") == "2001:db8::5"
    assert proxies.client("192.0.2.1", "198.51.100.1") == "192.0.2.1"
    assert proxies.client("10.1.2.3", "unknown, 10.7.7.7") == "10.7.7.7"
    assert proxies.client("10.1.2.3", "") == "10.1.2.3"
    assert Proxies(["*"]).client("192.0.2.1", "198.51.100.1, 198.51.100.2") == "198.51.100.1"
    assert "192.0.2.1" not in Proxies([]) and "no address" not in proxies


@pytest.mark.parametrize(
    ("peer", "version", "header", "local"),
    [
        ("127.0.0.1", "1.1", "", True),
        ("::1", "2", "", True),
        ("192.0.2.1", "1.1", "", False),
        ("127.0.0.1", "1.0", "", False),
        ("127.0.0.9", "1.1", "", False),
        *(("127.0.0.1", "1.1", name, False) for name in ("via", "forwarded", "x-real-ip", "x-forwarded-server")),
    ],
)
def test_a_browser_that_may_be_behind_a_proxy_is_not_taken_for_one_on_this_machine(peer, version, header, local):
    headers = {b"host": b"localhost", header.encode(): b"x"}
    assert is_local(peer, version, headers, Proxies(["127.0.0.9"])) == local


KEYS = (b"first", b"second")


def test_an_address_that_guesses_waits_twice_as_long_each_time(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("serve.security.login.time.monotonic", lambda: now[0])
    keys = Keys(KEYS)
    assert keys.accept(b"first", "192.0.2.1")
    for number in range(10):
        assert not keys.accept(b"%d" % number, "192.0.2.1")
    for wait in (1, 2, 4, 8, 16, 32, 60, 60):
        for key in (b"guess", b"second"):
            with pytest.raises(TooManyGuessesError, match=f"wait {wait} second"):
                keys.accept(key, "192.0.2.1")
        # Others, and what was accepted from there before, do not wait.
        assert keys.accept(b"first", "192.0.2.1") and keys.accept(b"second", "192.0.2.2")
        now[0] += wait
        assert not keys.accept(b"guess after %d, %d" % (wait, now[0]), "192.0.2.1")
    now[0] += 901
    assert keys.accept(b"second", "192.0.2.1") and not keys.accept(b"x", "192.0.2.1")
    assert not keys.accept(b"y", "192.0.2.1")


def test_one_wrong_key_that_is_sent_without_end_blocks_no_other_client():
    keys = Keys(KEYS)
    for _ in range(10):
        assert not keys.accept(b"old", "192.0.2.1")
    with pytest.raises(TooManyGuessesError):
        keys.accept(b"old", "192.0.2.1")
    assert keys.accept(b"first", "192.0.2.1")


def test_an_ipv6_network_counts_as_one_client_and_the_number_of_entries_is_limited():
    keys = Keys(KEYS)
    for number in range(10):
        assert not keys.accept(b"%d" % number, f"2001:db8::{number}")
    with pytest.raises(TooManyGuessesError):
        keys.accept(b"first", "2001:db8::ffff")
    assert keys.accept(b"first", "2001:db8:0:1::1")
    backoff = Backoff()
    for number in range(3 * Backoff.MAX_ENTRIES):
        backoff.fail(number)
    assert len(backoff) == Backoff.MAX_ENTRIES


def test_guesses_at_the_cookie_are_guesses():
    keys = Keys(KEYS)
    for number in range(10):
        assert not keys.accept_cookie(b"inkling_page=%064x" % number, "192.0.2.1")
    with pytest.raises(TooManyGuessesError):
        keys.accept(b"first", "192.0.2.1")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": ""}, "must not be empty: 0.0.0.0 is all addresses"),
        ({"host": " "}, "must not be empty"),
        ({"trusted_proxy": ("proxy.example",)}, "give addresses or networks, such as 127.0.0.1 or 10.0.0.0/8"),
        ({"allowed_host": ("",)}, "must not be empty"),
    ],
)
def test_an_option_that_says_nothing_clear_is_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        validate(ServeOptions, options)
