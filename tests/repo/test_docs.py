"""The site of docs/ builds strictly, needs no other host, and its pages keep the house's rules."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path != DOCS / "reference" / "options.md")
RECORDS = sorted((DOCS / "decisions").glob("0*.md"))
COLUMNS = 100
MAX_WORDS = 14_300
"""Of all pages but the decisions, the lessons and the generated options."""


class Assets(HTMLParser):
    """Collects what a browser loads for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(values.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found.append(values.get("src", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_and_every_link_leads_somewhere(site):
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES} <= pages


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        assets = Assets()
        assets.feed(page.read_text("utf-8"))
        assert assets.found or page.name == "shakespeare-gru.html"
        assert not [url for url in assets.found if re.match(r"\w+:|//", url) and not url.startswith("data:")], page
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")]+)", sheet.read_text("utf-8"))
        assert not [url for url in urls if re.match(r"https?:|//", url)], sheet


@pytest.mark.slow
def test_the_site_has_the_page_of_the_shipped_run(site):
    page = (site / "shakespeare-gru.html").read_text("utf-8")
    assert 'id="prompt"' in page and len(page) > 1_000_000
    assert 'href="../shakespeare-gru.html"' in (site / "how-to" / "export.html").read_text("utf-8")


@pytest.mark.slow
def test_the_api_pages_have_the_docstrings(site):
    text = (site / "reference" / "api" / "runs.html").read_text("utf-8")
    assert all(f'id="{name}"' in text for name in ("lm.train", "lm.resume", "lm.load", "lm.Run", "lm.Run.sample"))
    assert 'id="lm.errors.LMError"' in (site / "reference" / "api" / "errors.html").read_text("utf-8")


def test_lines_of_prose_fit_in_100_columns():
    for path in PAGES:
        text = re.sub(r"^(```+).*?^\1\s*$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
        assert not [line for line in lines if len(line) > COLUMNS], path


def test_the_pages_stay_short():
    pages = [path for path in PAGES if not {DOCS / "decisions", DOCS / "lessons"} & set(path.parents)]
    words = sum(len(path.read_text("utf-8").split()) for path in pages)
    assert words <= MAX_WORDS


def test_the_index_of_decisions_names_every_record():
    index = (DOCS / "decisions" / "index.md").read_text("utf-8")
    assert re.findall(r"\]\((0.+?\.md)\)", index) == [path.name for path in RECORDS]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/how-to/extend.md"])
def test_the_files_of_the_code_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:tests|lm|cli|serve)/[\w/.-]+)`", (ROOT / page).read_text("utf-8"))
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
