"""Access to the page, its headers and files, and the limits and counts of its requests."""

from __future__ import annotations

import contextlib
import gzip
import hmac
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.serve.conftest import Serve, Server, until
from tests.serve.page.conftest import PATIENCE, OpenPage

pytestmark = pytest.mark.slow

KEYS = ("first-key", "schlüssel")
ENDPOINTS = """
import json, gradio
from gradio.routes import App
with gradio.Blocks(analytics_enabled=False) as blocks:
    pass
paths = App.create_app(blocks).openapi()["paths"]
print(json.dumps([(method.upper(), path) for path, methods in paths.items() for method in methods]))
"""
"""Prints the routes of Gradio."""


def cookie_of(key: str) -> str:
    return f"inkling_page={hmac.new(key.encode(), b'inkling page', sha256).hexdigest()}"


def log_in(server: Server, key: str, **headers: str) -> tuple[int, dict[str, str], str]:
    form = f"key={''.join(f'%{byte:02x}' for byte in key.encode())}".encode()
    given = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    return server.request("POST", "/login", form, headers=given)


def refused(answer: tuple[int, dict[str, str], object]) -> str:
    """The code of an error in OpenAI's form."""
    body = answer[2]
    assert isinstance(body, dict), answer
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    return f"{answer[0]} {body['error']['code']}"


@pytest.fixture(scope="module")
def closed(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys and short time limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS), "utf-8")
    with serve(
        "gru", "--api-key-file", str(keys), "--max-upload", "200000", "--max-body", "50000", "--stall-seconds", "2",
        "--max-requests", "8", "--trusted-proxy", "127.0.0.1", page=True,
    ) as server:  # fmt: skip
        yield server


# -- without keys -----------------------------------------------------------------------------------


def test_the_root_leads_to_the_page_and_the_start_message_names_it(site: Server):
    status, headers, _ = site.request("GET", "/")
    assert (status, headers["location"]) == (303, "/page/")
    assert f"{site.url}/page/" in site.said
    status, headers, text = site.request("GET", "/page/")
    assert status == 200 and "Inkling" in text
    # Without keys there is no login.
    for method in ("GET", "POST"):
        status, headers, _ = site.request(method, "/login", None if method == "GET" else b"key=x")
        assert (status, headers["location"]) == (303, "/page/")
    assert site.request("GET", "/favicon.ico")[1]["content-type"] == "image/svg+xml"


@pytest.mark.parametrize(
    "path", ["/page/", "/page/config", "/page/theme.css", "/page/nowhere", "/page/gradio_api/nowhere"]
)
def test_every_answer_forbids_the_browser_to_load_from_other_sites(site: Server, path):
    # Gradio allows every site to read its answers.
    _, headers, _ = site.request("GET", path, headers={"Origin": "http://example.com", "Host": "192.0.2.1"})
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["connect-src"] == policy["form-action"] == policy["base-uri"] == "'self'"
    assert policy["frame-ancestors"] == "'self'" and "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "path", ["/page/gradio_api/queue/join", "/page/gradio_api/upload", "/page/nowhere", "/login", "/logout"]
)
def test_another_site_cannot_change_anything_though_no_key_is_set(site: Server, path):
    own = {"Origin": site.url, "Sec-Fetch-Site": "same-origin"}
    for foreign in (
        {"Origin": "http://example.com"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {**own, "Origin": "http://example.com"},
        {**own, "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://example.com", "X-Forwarded-Host": "example.com"},
    ):
        for method in ("POST", "PUT", "DELETE"):
            assert refused(site.request(method, path, b"{}", headers=foreign)) == "403 cross_site", foreign
    for fine in (own, {"Origin": site.url}, {"Sec-Fetch-Site": "none"}, {}):
        assert site.request("POST", path, b"{}", headers=fine)[0] != 403
    # Links from other sites work.
    assert site.request("GET", "/page/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_the_page_serves_no_files_of_the_machine(site: Server, runs):
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../a.txt"\r\n\r\nmine\r\n--x--\r\n'
    status, _, kept = site.request(
        "POST", "/page/gradio_api/upload", upload, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert status == 200 and site.request("GET", f"/page/gradio_api/file={kept[0]}")[2] == "mine"
    folder = str(runs / "gru")
    up = "/".join([".."] * 12)
    for path in (
        "/etc/passwd", f"{folder}/config.json", f"{folder}/model.safetensors", str(runs / "text.txt"), "text.txt",
        "./text.txt", "gru/config.json", f"{up}/etc/passwd", f"{kept[0]}/{up}/etc/passwd",
        "file:///etc/passwd", "//etc/passwd", f"/proc/{site.process.pid}/environ", "/proc/self/environ",
    ):  # fmt: skip
        for form in (path, path.replace("..", "%2e%2e"), path.replace("/", "%2f"), path.replace("/", "%5c")):
            for address in (f"/page/gradio_api/file={form}", f"/page/gradio_api/file/{form}"):
                status, _, answer = site.request("GET", address)
                assert status in (403, 404), (address, answer)
        for address in (f"/page/static/{path}", f"/page/assets/{path}", f"/page/svelte/{path}", f"/page/{path}"):
            status, _, answer = site.request("GET", address.replace("..", "%2e%2e"))
            assert status >= 400, (address, answer)


def test_a_visitor_may_name_only_uploaded_files(site: Server, runs):
    handlers = site.request("GET", "/page/config")[2]
    kinds = {component["id"]: component["type"] for component in handlers["components"]}
    takes_files = [each for each in handlers["dependencies"] if "file" in {kinds[id_] for id_ in each["inputs"]}]
    assert takes_files
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nmine\r\n--x--\r\n'
    given = {"Content-Type": "multipart/form-data; boundary=x"}
    kept = site.request("POST", "/page/gradio_api/upload", form, headers=given)[2][0]

    def join(handler: dict[str, Any], path: str) -> int:
        file = {"path": path, "url": path, "orig_name": "a.txt", "meta": {"_type": "gradio.FileData"}}
        data = [file if kinds[id_] == "file" else None for id_ in handler["inputs"]]
        body = {"data": data, "fn_index": handler["id"], "session_hash": "visitor"}
        return site.request("POST", "/page/gradio_api/queue/join", body)[0]

    for handler in takes_files:
        for path in (
            "/etc/passwd", str(runs / "gru" / "config.json"), "text.txt", f"{kept}/../../../../../etc/passwd", "", "\0",
            "http://127.0.0.1:1/x", "https://example.com/x", "file:///etc/passwd",
        ):  # fmt: skip
            assert join(handler, path) == 403, path
        assert join(handler, kept) == 200


@pytest.mark.parametrize(
    "path",
    [
        "file=http://127.0.0.1:{port}/health", "file=https://example.com/x", "file=%20http://127.0.0.1:{port}/health",
        "FILE=HTTP://127.0.0.1:{port}/health", "file=HTTP://127.0.0.1:{port}/health", "proxy=http://127.0.0.1:{port}/",
        "run-history/buckets", "runs", "vibe-code", "monitoring", "deep_link", "openapi.json", "dev/reload",
        "custom_component/a/client/b/c.js",
    ],
)  # fmt: skip
def test_the_server_fetches_nothing_for_a_visitor_and_has_no_more_addresses_than_the_page_needs(site: Server, path):
    status, _, answer = site.request("GET", f"/page/gradio_api/{path.format(port=site.port)}")
    assert status in (403, 404) and "ok" not in answer, answer


def test_a_request_of_the_page_is_logged_if_it_failed_and_counted_under_one_name(site: Server):
    before = len(site.log())
    counted = site.metric("inkling_requests_total")
    for _ in range(5):
        assert site.request("GET", "/page/theme.css")[0] == 200
    assert site.request("GET", "/page/gradio_api/nowhere")[0] == 404
    lines = [line for line in site.log()[before:] if line.get("path", "").startswith("/page")]
    assert [line["path"] for line in lines] == ["/page/gradio_api/nowhere"]
    figures = site.request("GET", "/metrics")[2]
    assert set(re.findall(r'route="(/page[^"]*)"', figures)) == {"/page"}
    until(lambda: site.metric("inkling_requests_total") >= counted + 6)


def test_without_the_page_its_addresses_do_not_exist(serve: Serve):
    with serve("gru") as server:
        assert "/page/" not in server.said
        for path in ("/", "/page/", "/page", "/login", "/page/gradio_api/queue/join"):
            assert server.request("GET", path)[0] == 404
        assert server.request("POST", "/logout", b"")[0] == 404


def test_the_document_is_compressed_and_files_that_never_change_are_kept(site: Server):
    plain = site.request("GET", "/page/")
    assert "content-encoding" not in plain[1] and "gradio_config" in plain[2]
    zipped = site.request("GET", "/page/", headers={"Accept-Encoding": "gzip"})
    assert zipped[1]["content-encoding"] == "gzip" and zipped[1]["cache-control"] == "no-cache"
    assert gzip.decompress(zipped[2]).decode() == plain[2]
    assert len(zipped[2]) < len(plain[2]) / 4
    files = re.findall(r'(?:src|href)="\./(assets/[^"]+)"', plain[2])
    assert len(files) == 2
    for file in files:
        _, headers, _ = site.request("GET", f"/page/{file}", headers={"Accept-Encoding": "br"})
        assert headers["cache-control"] == "private, max-age=31536000, immutable"
        assert headers["content-encoding"] == "br"
    for path in ("/page/theme.css", "/page/assets/nothing.js", "/page/config"):
        assert "immutable" not in site.request("GET", path)[1].get("cache-control", "")
    # The masthead comes before Gradio's configuration, and nothing names another host.
    assert plain[2].index("<h1>") < plain[2].index("gradio_config") and "gradio.app" not in plain[2]


# -- with keys --------------------------------------------------------------------------------------


def test_everything_that_gradio_answers_needs_the_key(closed: Server):
    done = subprocess.run([sys.executable, "-c", ENDPOINTS], capture_output=True, text=True, timeout=60, check=True)
    endpoints = json.loads(done.stdout)
    paths = {path for _, path in endpoints}
    assert len(endpoints) > 60
    for name in ("/config", "/monitoring", *(f"/gradio_api/{each}" for each in (
        "info", "upload", "queue/join", "queue/data", "heartbeat/{session_hash}", "component_server", "deep_link",
    ))):  # fmt: skip
        assert name in paths
    for method, path in endpoints:
        if path in ("", "/"):
            continue
        address = f"/page{re.sub(r'{[^}]*}', 'x', path)}"
        for headers in ({}, {"Cookie": "inkling_page=" + "0" * 64}, {"Authorization": "Bearer guess"}):
            status, headers_sent, answer = closed.request(
                method, address, b"{}" if method == "POST" else None, headers=headers
            )
            # Repeated wrong keys are refused without a check.
            code = {401: "invalid_api_key", 429: "rate_limit_exceeded"}[status]
            assert status == 401 or headers, (method, address)
            assert headers_sent["content-security-policy"]
            assert method == "HEAD" or answer["error"]["code"] == code
    # The browser's preflight request too.
    assert closed.request("OPTIONS", "/page/config")[0] == 401


def test_a_browser_without_the_key_is_sent_to_the_form(closed: Server):
    for path in ("/page/", "/page", "/page/?__theme=dark"):
        for given in ({}, {"Authorization": "Basic of-a-proxy"}):
            status, headers, _ = closed.request("GET", path, headers=given)
            assert (status, headers["location"]) == (303, "/login")
    assert closed.request("GET", "/")[1]["location"] == "/page/"
    status, headers, form = closed.request("GET", "/login")
    assert status == 200 and headers["content-security-policy"]
    assert '<label for="key">' in form and 'type="password"' in form and "<script" not in form
    assert not re.search(r"https?:|url\(|@import", form)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_the_page_and_nothing_else(closed: Server, key):
    status, headers, _ = log_in(closed, f" {key}\n", Origin=closed.url)
    assert (status, headers["location"]) == (303, "/page/")
    value, *flags = headers["set-cookie"].split("; ")
    assert value == cookie_of(key) and key not in headers["set-cookie"]
    assert {flag.lower() for flag in flags} == {"httponly", "samesite=strict", "path=/page"}
    for cookie in (value, f"other=1; {value}", f"inkling_page={'0' * 64}; {value}; inkling_page=x"):
        given = {"Cookie": cookie}
        assert closed.request("GET", "/page/", headers=given)[0] == 200
        assert closed.request("GET", "/page/config", headers=given)[0] == 200
        # The API needs the key itself: with a cookie, another site could send requests for a visitor.
        for path in ("/v1/models", "/metrics"):
            assert refused(closed.request("GET", path, headers=given)) == "401 invalid_api_key"
    for cookie in (f"x{value}", f"{value}0", value.upper(), value.replace("inkling_page", "inkling"), f'"{value}"'):
        assert closed.request("GET", "/page/config", headers={"Cookie": cookie})[0] == 401


def test_the_page_accepts_the_key_in_the_header_as_the_api_does(closed: Server):
    for path in ("/page/", "/page/config", "/v1/models"):
        assert closed.request("GET", path, headers={"Authorization": f"Bearer {KEYS[0]}"})[0] == 200
        assert closed.request("GET", path, headers={"Authorization": "Bearer x"})[0] == 401


def test_the_cookie_is_secure_behind_tls(closed: Server):
    cookie = log_in(closed, KEYS[0], **{"X-Forwarded-Proto": "https"})[1]["set-cookie"]
    assert "Secure" in cookie


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"key=",
        b"key=wrong",
        b"key=first-ke",
        b"key=%ff%00",
        b"\xff\xfe",
        b"a=1&" * 5000,
        b"key[]=first-key",
        b"key=first-key" + b"%20" * 10_000,
    ],
)
def test_the_form_reports_a_wrong_key(closed: Server, body):
    status, headers, form = closed.request("POST", "/login", body)
    assert status == 401 and "set-cookie" not in headers
    assert '<p role="alert">That is not a key of this server.</p>' in form and 'name="key"' in form
    assert headers["content-security-policy"]


def test_many_wrong_keys_in_the_form_have_to_wait(closed: Server):
    there, elsewhere = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
    for number in range(10):
        assert log_in(closed, f"guess {number}", **there)[0] == 401
    status, headers, form = log_in(closed, KEYS[0], **there)
    assert (status, headers["retry-after"]) == (429, "1") and "set-cookie" not in headers
    assert "Too many wrong keys came from your address: wait 1 second." in form
    assert log_in(closed, KEYS[0], **elsewhere)[0] == 303
    time.sleep(1)
    assert log_in(closed, KEYS[0], **there)[0] == 303


def test_logging_out_takes_the_cookie_away(closed: Server):
    status, headers, _ = closed.request("POST", "/logout", b"", headers={"Cookie": cookie_of(KEYS[0])})
    assert (status, headers["location"]) == (303, "/login")
    assert headers["set-cookie"].startswith('inkling_page=""') and "Max-Age=0" in headers["set-cookie"]
    assert "Path=/page" in headers["set-cookie"]
    assert closed.request("GET", "/logout")[0] == 405


# -- limits ----------------------------------------------------------------------------------------


def test_a_text_may_be_longer_than_a_request_but_not_endless(closed: Server):
    given = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "multipart/form-data; boundary=x"}

    def upload(size: int) -> tuple[int, dict[str, str], object]:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        return closed.request("POST", "/page/gradio_api/upload", head + b"a" * size + b"\r\n--x--\r\n", headers=given)

    assert upload(200_000)[0] == 200
    assert upload(200_001)[0] == 413
    assert refused(upload(2_000_000)) == "413 request_too_large"
    # A pasted text is part of a request to queue/join, with a higher limit; other requests keep the usual one.
    for path, status in (("queue/join", 422), ("cancel", 413)):
        assert closed.request("POST", f"/page/gradio_api/{path}", b"a" * 50_001, headers=given)[0] == status


def test_an_upload_may_last_while_it_makes_progress(closed: Server):
    head = (
        f"POST /page/gradio_api/upload HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
    ).encode()
    end = b"\r\n--x--\r\n"
    with socket.create_connection(("127.0.0.1", closed.port), timeout=30) as connection:
        connection.sendall(head)
        left = 1000 - (len(head) - head.index(b"\r\n\r\n") - 4) - len(end)
        for _ in range(5):
            time.sleep(0.7)
            connection.sendall(b"a" * (left // 5))
        connection.sendall(b"a" * (left - left // 5 * 5) + end)
        assert b" 200 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", closed.port), timeout=30) as connection:
        begun = time.monotonic()
        connection.sendall(head)
        assert b" 408 " in connection.recv(4096)
        assert time.monotonic() - begun > 1.5


def test_open_pages_do_not_use_up_the_request_limit(closed: Server):
    with contextlib.ExitStack() as stack:
        for number in range(8):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", closed.port), timeout=10))
            connection.sendall(
                f"GET /page/gradio_api/heartbeat/h{number} HTTP/1.1\r\nHost: a\r\n"
                f"Cookie: {cookie_of(KEYS[1])}\r\n\r\n".encode()
            )
            assert b" 200 " in connection.recv(4096)
        for _ in range(3):
            assert closed.request("GET", "/page/config", headers={"Cookie": cookie_of(KEYS[0])})[0] == 200
        # Open pages have a limit of the same size.
        given = {"Cookie": cookie_of(KEYS[0])}
        assert refused(closed.request("GET", "/page/gradio_api/heartbeat/more", headers=given)).startswith("429")
        assert closed.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}"})[0] == 200


# -- in a browser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_form_fits_a_phone(browser: Browser, closed: Server, scheme):
    with contextlib.closing(browser.new_context(viewport={"width": 390, "height": 700}, color_scheme=scheme)) as visit:
        page = visit.new_page()
        page.goto(f"{closed.url}/page/")
        box = page.get_by_label("API key").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 40
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # The field has the focus.
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That is not a key of this server.")


def test_a_visitor_logs_in_and_the_server_ends_at_once_though_the_page_is_open(browser: Browser, serve: Serve):
    with (
        serve("gru", key="open sesame", page=True) as server,
        contextlib.closing(browser.new_context()) as visit,
    ):
        page = visit.new_page()
        page.set_default_timeout(PATIENCE)
        console: list[str] = []
        page.on("console", lambda message: console.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        assert page.url == f"{server.url}/login"
        page.get_by_label("API key").fill("open sesame")
        # This request stays open until the visitor leaves.
        with page.expect_request("**/heartbeat/*"):
            page.get_by_role("button", name="Log in").click()
        page.get_by_role("tab", name="Write").wait_for()
        assert page.url == f"{server.url}/page/"
        assert [cookie["name"] for cookie in visit.cookies()] == ["inkling_page"]
        assert not console
        begun = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begun < 15


AXE = Path(__file__).with_name("axe") / "axe.min.js"
_FAULTS = """async (rules) => {
  const options = {resultTypes: ["violations"], preload: false, ...(rules && {runOnly: rules})};
  return (await axe.run(options)).violations;
}"""
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def test_no_tab_has_a_fault_for_screen_readers_or_a_pale_text_or_a_part_outside_a_phone(
    open_page: OpenPage, site: Server
):
    page = open_page()
    page.evaluate(f"{AXE.read_text('utf-8')};0")
    page.add_style_tag(content="* { transition: none !important; }")
    names = [tab.inner_text() for tab in page.get_by_role("tab").all()]
    faults = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            expect(page.locator("html.in-dark body.dark")).to_have_count(1 if scheme == "dark" else 0)
            for name in names:
                # Every tab can be seen and pressed: none is in a menu.
                page.get_by_role("tab", name=name, exact=True).click()
                page.get_by_role("tabpanel", name=name, exact=True).wait_for()
                # In the dark only colours are different.
                rules = ["color-contrast"] if scheme == "dark" else None
                found = page.evaluate(_FAULTS, rules)
                faults += [
                    f"{name}, {scheme}, {size}: {fault['help']}: {node['html'][:200]}"
                    for fault in found for node in fault["nodes"]
                ]  # fmt: skip
                wide = page.evaluate("document.documentElement.scrollWidth")
                if wide > width:
                    faults.append(f"{name}, {size}: the page is {wide} pixels wide")
    assert not faults, "\n".join(faults)
    # One level-1 heading, and a status that screen readers hear when it rests.
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["Inkling"]
    page.get_by_role("tab", name="Write").click()
    page.get_by_role("button", name="Write", exact=True).locator("visible=true").first.click()
    expect(page.locator("#announcer")).to_contain_text("tokens")


def test_a_link_restores_tab_model_prompt_and_seed_and_never_replaces_a_text_by_itself(
    open_page: OpenPage, site: Server
):
    page = open_page(query="#tab=write&model=words&seed=77&prompt=the+cat%0A")
    text = page.locator("#paper textarea")
    expect(text).to_have_value("the cat\n")
    expect(page.get_by_label("Seed").first).to_have_value("77")
    expect(page.get_by_label("Model").first).to_have_value(re.compile("^words"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#notice")).to_contain_text("Link copied.")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{site.url}/page/#tab=write&")
    assert {"model=words", "seed=77", "prompt=the+cat%0A"} <= set(link.partition("#")[2].split("&"))
    # A long text is left out, and the page says so.
    text.fill("long " * 500)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#notice")).to_contain_text("It leaves the text out: the text has 2,500 characters")
    assert "prompt" not in page.evaluate("navigator.clipboard.readText()")
    # A link with a text does not replace the visitor's own one.
    text.fill("my own text")
    page.evaluate("link => { location.href = link; }", link)
    page.get_by_role("button", name="Replace my text").wait_for()
    expect(text).to_have_value("my own text")
    page.get_by_role("button", name="Replace my text").click()
    expect(text).to_have_value("the cat\n")
    # Back and forward move between tabs, and so do the arrow keys.
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("tab", name="Train").press("ArrowRight")
    expect(page.get_by_role("tab", name="Runs")).to_be_focused()
    assert page.url == f"{site.url}/page/#tab=runs"
    page.keyboard.press("Home")
    expect(page.get_by_role("tab", name="Write", selected=True)).to_be_focused()
    page.go_back()
    page.go_back()
    expect(page.get_by_role("tab", name="Train", selected=True)).to_be_visible()
    page.go_forward()
    expect(page.get_by_role("tab", name="Runs", selected=True)).to_be_visible()
    # The server never sees the part of an address after #.
    assert not [line for line in site.log() if "cat" in str(line.get("path"))]
    # Projector mode is remembered.
    size = "parseFloat(getComputedStyle(document.querySelector('[role=tab]')).fontSize)"
    small = page.evaluate(size)
    page.get_by_role("button", name="Projector").click()
    page.reload()
    expect(page.get_by_role("button", name="Projector", pressed=True)).to_be_visible()
    page.get_by_role("tab", name="Runs").wait_for()
    assert page.evaluate(size) >= 1.4 * small
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_something_is_visible_within_a_second_on_a_slow_network(browser: Browser, site: Server):
    with contextlib.closing(browser.new_context()) as visit:
        page = visit.new_page()
        network = visit.new_cdp_session(page)
        slow = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}
        network.send("Network.emulateNetworkConditions", slow)
        page.goto(f"{site.url}/page/", wait_until="commit")
        page.get_by_role("heading", name="Inkling").wait_for()
        page.wait_for_function("performance.getEntriesByType('paint').length > 0")
        assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 1000
        assert not page.get_by_role("tab").count()
