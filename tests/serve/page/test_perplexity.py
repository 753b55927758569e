"""The tab Perplexity, as a visitor uses it: the figures of `lm eval` and the map of a text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

import lm
from lm.corpora.text import decode_file
from lm.errors import CorpusError
from lm.evaluation.report import Report
from lm.evaluation.score_sums import Scores
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.byte import ByteOptions, ByteTokenizer
from lm.tokenizers.char import CharOptions, CharTokenizer
from lm.tokenizers.word import WordOptions, WordTokenizer
from serve.page.tabs.perplexity import _read_upload
from serve.page.text_analysis import MAX_POINTS, smoothed, token_ends, word_bounds
from tests.serve.conftest import CONTEXT, make_text
from tests.serve.page.conftest import OpenPage

SHORT = "the cat sat on a mat.\n"
LONG = make_text(3, seed=11)
WINDOWS = make_text(1, seed=2)[: CONTEXT + CONTEXT // 2]
"""One and a half times the Transformer's context: the last window ends with the text."""
NASTY = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> {{value}} ${1 + 1} &amp;"

slow = pytest.mark.slow


def measure(page: Page, text: str) -> None:
    paper(page).wait_for()
    # A component ignores keys before it is ready.
    page.wait_for_timeout(250)
    paper(page).fill(text)
    again(page)


def again(page: Page) -> None:
    """Press Measure, and wait for the end."""
    # A new verdict does not have this attribute.
    verdict = ":is(#measure-verdict, #measure-comparison) .verdict"
    page.evaluate(f"document.querySelectorAll('{verdict}').forEach(each => each.setAttribute('data-old', ''))")
    page.locator("#measure").click()
    expect(page.locator(f"{verdict}:not([data-old])")).to_be_visible()


def paper(page: Page) -> Locator:
    return page.locator("#measured-text textarea")


def marks(page: Page, kind: str = "") -> Locator:
    return page.locator(f"#measure-map .mark{kind}")


def choose(page: Page, label: str, name: str) -> None:
    page.get_by_role("combobox", name=label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=re.compile(rf"^{name}\b")).locator("visible=true").click()


def figures(page: Page, column: int = 0) -> dict[str, tuple[str, str]]:
    """Value and denominator of each figure in the table."""
    script = """rows => rows.map(row => {
      const [name, ...cells] = row.children, cell = cells[COLUMN];
      return [name.firstChild.data, cell.firstChild.data, cell.querySelector('small').innerText];
    })"""
    rows = page.locator("#measure-figures tbody tr").evaluate_all(script.replace("COLUMN", str(column)))
    return {name: (value, over) for name, value, over in rows}


def agree(shown: dict[str, tuple[str, str]], report: Report) -> None:
    """Compare to the shown digits, up to the rounding of the last one."""
    for name, value in {
        "loss, nats per token": report.loss, "bits per character": report.bits_per_char,
        "bits per byte": report.bits_per_byte,
    }.items():  # fmt: skip
        assert float(shown[name][0]) == pytest.approx(value, abs=1.1e-4)
    for name, value in {"perplexity": report.perplexity, "word perplexity": report.word_perplexity}.items():
        assert value is not None
        assert float(shown[name][0].replace(",", "")) == pytest.approx(value, rel=1e-3)
    assert shown["accuracy"] == (f"{report.accuracy:.2%}", f"of {report.tokens:,} tokens")
    assert shown["top-5 accuracy"][0] == f"{report.top5_accuracy:.2%}"
    assert shown["loss, nats per token"][1] == f"± {report.standard_error:.4f}, of {report.tokens:,} tokens"
    assert shown["word perplexity"][1] == f"of {report.words:,} words"
    assert shown["bits per character"][1] == f"of {report.characters:,} characters"
    assert shown["bits per byte"][1] == f"of {report.bytes:,} bytes"
    assert shown["unknown tokens"][0] == f"{report.unknown_tokens:,}"


@slow
def test_the_figures_are_those_of_the_library_and_each_token_is_a_mark(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Perplexity")
    expect(page.locator("#measure-note")).to_contain_text("press Measure")
    assert len(SHORT) <= CONTEXT
    for name, text in (("gru", LONG), ("transformer", SHORT), ("transformer", WINDOWS), ("words", LONG),
                       ("pieces", LONG)):  # fmt: skip
        choose(page, "Model", name)
        measure(page, text)
        report = lm.load(name, runs_dir=runs).evaluate(text=text)
        agree(figures(page), report)
        expect(marks(page)).to_have_count(report.tokens)
        expect(page.locator("#measure-verdict")).to_contain_text(f"{name} scores ")
        assert page.locator("#measure-map .marks").inner_text().replace("↵", "").replace("·", "") == text
        assert re.match(r"“.+”: .+% \(\d+\.\d\d nats\)", str(marks(page).nth(3).get_attribute("title")))
        rule = "the state is carried from the first token to the last"
        if name == "transformer":
            rule = f"{report.tokens} tokens fit into the model's window of {CONTEXT}"
            if text == WINDOWS:
                rule = f"at most {CONTEXT} tokens before the token: a full window drops its older half"
        expect(page.locator("#measure-figures")).to_contain_text(rule)
    words = page.locator("#measure-words tbody tr")
    expect(words).to_have_count(10)
    nats = [float(value) for value in words.locator("td:last-child").all_inner_texts()]
    assert nats == sorted(nats, reverse=True)


@slow
def test_unknown_symbols_are_listed_and_marked(open_page: OpenPage) -> None:
    page = open_page("Perplexity")
    measure(page, "the cat → saw ☃☃ its\n")
    expect(page.locator("#measure-verdict")).to_contain_text(
        "gru does not know “☃” (2×), “→”: read as the unknown token"
    )
    assert marks(page, ".unknown").all_inner_texts() == ["→", "☃", "☃"]
    assert figures(page)["unknown tokens"] == ("3", "14.29%")


@slow
def test_two_models_are_compared(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Perplexity")
    page.locator("#measure-two input").check()
    choose(page, "Second model", "transformer")
    measure(page, SHORT)
    reports = [lm.load(name, runs_dir=runs).evaluate(text=SHORT) for name in ("gru", "transformer")]
    for column, report in enumerate(reports):
        agree(figures(page, column), report)
    # The verdict, the difference and the places are those of lm.compare.
    found = lm.compare(["gru", "transformer"], text=SHORT, runs_dir=runs)
    comparison = page.locator("#measure-comparison")
    expect(comparison.locator(".verdict")).to_have_text(found.verdict.sentence)
    expect(comparison.locator(".result")).to_have_text(found.differences[0].sentence)
    places = found.differences[0].places
    expect(page.locator("#measure-differences td:first-child:not(.group)")).to_have_text([each.name for each in places])
    # Both are models of characters: token by token, orange and blue.
    expect(marks(page)).to_have_count(len(SHORT))
    assert marks(page, ".surprise").count() and marks(page, ".less").count()
    assert re.fullmatch(
        r"gru \d+\.\d\d nats, transformer \d+\.\d\d nats", str(marks(page).nth(4).get_attribute("title"))
    )
    expect(page.locator("#measure-plot li")).to_have_count(2)
    page.get_by_label("transformer", exact=True).locator("visible=true").check()
    expect(marks(page, ".less")).to_have_count(0)
    expect(page.locator("#measure-scale")).to_contain_text("expected")

    # Models with other tokens are compared word by word.
    choose(page, "Second model", "words")
    again(page)
    expect(marks(page)).to_have_count(len(SHORT.split()))
    expect(page.locator("#measure-scale")).to_contain_text("More surprised: words")


@slow
def test_a_text_longer_than_the_map_is_measured_whole(open_page: OpenPage, runs: Path) -> None:
    text = make_text(130, seed=3)
    assert len(text) > 5000
    page = open_page("Perplexity")
    measure(page, text)
    agree(figures(page), lm.load("gru", runs_dir=runs).evaluate(text=text))
    expect(marks(page)).to_have_count(5000)
    expect(page.locator("#measure-verdict")).to_contain_text(
        f"The map shows the first 5,000 tokens; the figures are of all {len(text):,}."
    )
    for length, limit in ((33_000, "32,768 tokens"), (600_000, "524,288 characters")):
        paper(page).fill("a" * length)
        page.locator("#measure").click()
        expect(page.get_by_test_id("toast-body").last).to_contain_text(
            f"The text has more than {limit}, the limit of this server. Measure a part of it."
        )


@slow
def test_a_dropped_file_becomes_the_text_and_a_binary_file_is_refused_in_a_sentence(open_page: OpenPage) -> None:
    page = open_page("Perplexity")
    page.wait_for_timeout(250)
    files = page.locator("#measure-file input[type=file]")
    files.set_input_files({"name": "../../é.txt", "mimeType": "text/plain", "buffer": b"\xef\xbb\xbf" + SHORT.encode()})
    expect(paper(page)).to_have_value(SHORT)
    again(page)
    expect(marks(page)).to_have_count(len(SHORT))
    toast = page.get_by_test_id("toast-body").last
    for data, message in (
        (b"ab\nc\xff", "is not UTF-8: byte 4 (line 2) is 0xff"), (b"a\0b", "looks like a binary file"),
        (b"a" * 600_000, "has more than 524,288 characters"),
    ):  # fmt: skip
        files.set_input_files({"name": "strange.txt", "mimeType": "text/plain", "buffer": data})
        expect(toast).to_contain_text(message)
    expect(paper(page)).to_have_value(SHORT)
    paper(page).fill("")
    page.locator("#measure").click()
    expect(toast).to_contain_text("The text is empty. Paste a text first.")


@slow
def test_a_script_in_a_text_is_a_text(open_page: OpenPage) -> None:
    page = open_page("Perplexity")
    measure(page, NASTY)
    assert page.locator("#measure-map .marks").inner_text() == NASTY
    inserted = page.locator("[id^=measure] script, #measure-map img, #measure-words img, #measure-verdict img")
    assert inserted.count() == 0
    assert page.evaluate("window.hit") is None
    # Also as a listed unknown symbol.
    expect(page.locator("#measure-verdict")).to_contain_text("“<”")


@slow
def test_a_phone_shows_it_without_scrolling_sideways(open_page: OpenPage) -> None:
    page = open_page("Perplexity", viewport={"width": 390, "height": 844}, query="?__theme=dark")
    page.locator("#measure-two input").check()
    measure(page, LONG)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    mark = marks(page).nth(7)
    mark.click()
    expect(page.locator("#measure-map .about")).to_have_text(str(mark.get_attribute("title")))


# -- parts -------------------------------------------------------------------------------------------


def parts(text: str, tokenizer: Tokenizer) -> list[str]:
    """The text of each token."""
    ends = token_ends(text, tokenizer, tokenizer.encode(text).tolist())
    return [text[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_a_characters_part_is_itself_also_if_it_is_unknown() -> None:
    assert parts("ab☃a", CharTokenizer(CharOptions(), "\nab")) == ["a", "b", "☃", "a"]


def test_a_skipped_character_belongs_to_the_one_before() -> None:
    assert parts("☃a☃☃b", CharTokenizer(CharOptions(unknown="skip"), "\nab")) == ["☃a☃☃", "b"]


def test_of_a_character_of_several_bytes_the_last_one_has_the_text() -> None:
    assert parts("a☃b", ByteTokenizer(ByteOptions())) == ["a", "", "", "☃", "b"]


@pytest.mark.parametrize(("unknown", "expected"), [
    ("replace", ["the", "  hen", " \n", "\ta", " cat "]), ("skip", ["the", "  hen \n", "\ta", " cat "]),
])  # fmt: skip
def test_a_word_takes_the_space_before_it(unknown: str, expected: list[str]) -> None:
    tokenizer = WordTokenizer(WordOptions(unknown=unknown), ["<eos>", "<unk>", "the", "a", "cat"])
    assert "".join(parts("the  hen \n\ta cat ", tokenizer)) == "the  hen \n\ta cat "
    assert parts("the  hen \n\ta cat ", tokenizer) == expected


def test_words_end_with_their_letters_and_cover_the_text() -> None:
    assert word_bounds("  a bc\n d \n").tolist() == [0, 3, 6, 11]
    assert word_bounds(" \n").tolist() == [0, 2]


def test_sums_made_of_tokens_are_those_of_the_scores() -> None:
    scores = Scores("all")
    scores.add([1.0, 2.0, 4.0], [0, 4, None])
    assert (scores.tokens, scores.nats, scores.squared_nats, scores.top1, scores.top5) == (3, 7.0, 21.0, 1, 2)


def test_a_files_bytes_are_read_as_the_library_reads_files(tmp_path: Path) -> None:
    assert decode_file(b"\xef\xbb\xbfa\r\n", "f") == "a\r\n"
    for data in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(CorpusError, match="f is empty"):
            decode_file(data, "f")
    assert decode_file("ab\r\n".encode("utf-16"), "f") == "ab\r\n"
    with pytest.raises(CorpusError, match=r"f looks like a binary file: byte 2 \(line 1\) is zero"):
        decode_file(b"ab\0", "f")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert _read_upload(str(tmp_path / "rows.jsonl"), 100) == ("one\ntwo", False)


def test_a_line_has_few_points_for_any_text_and_ends_with_it() -> None:
    for length in (1, 5, 30_000):
        places, values = smoothed(np.arange(length + 1, dtype=np.float64) / 2)
        assert places[0] == 0 and places[-1] == length and len(places) == min(length + 1, MAX_POINTS)
        assert values == pytest.approx([0.5] * len(places))
