"""CONTRIBUTING.md rules words out: the code does not use them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULED_OUT = (
    "told", "beside", "by heart", "heeds", "kinder", "dear", "mend", "mends", "mended", "reckoned", "looks back",
    "goes on", "go on", "at hand", "bears", "anew", "slope", "slopes", "of its own",
)  # fmt: skip
PATTERN = re.compile(rf"\b({'|'.join(RULED_OUT)})\b", re.IGNORECASE)
SOURCES = {
    "lm": (".py", ".js", ".html", ".css", ".hpp", ".cpp", ".cmake"), "cli": (".py",),
    "serve": (".py", ".js", ".html", ".css"), "benchmarks": (".py",),
}  # fmt: skip
TEST = re.compile(r"def (test_\w+)")


def test_no_file_uses_a_word_that_is_ruled_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for room, kinds in SOURCES.items()
        for path in sorted((ROOT / room).rglob("*"))
        if path.suffix in kinds and not path.name.endswith(".min.js")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if (match := PATTERN.search(line))
    ]
    assert not found, "\n".join(["Use the word of CONTRIBUTING.md instead:", *found])


def test_no_test_s_name_has_a_word_that_is_ruled_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in TEST.findall(path.read_text("utf-8"))
        if PATTERN.search(name.replace("_", " "))
    ]
    assert not found, "\n".join(["Use the word of CONTRIBUTING.md instead:", *found])
