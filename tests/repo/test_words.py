"""CONTRIBUTING.md rules words out: the code does not use them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULED_OUT = (
    "told", "beside", "by heart", "heeds", "kinder", "dear", "mend", "mends", "mended", "reckoned", "looks back",
    "goes on", "go on", "at hand", "bears", "anew", "slope", "slopes", "of its own",
)  # fmt: skip
PATTERN = re.compile(rf"\b({'|'.join(RULED_OUT)})\b", re.IGNORECASE)


def test_no_file_uses_a_word_that_is_ruled_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for room in ("lm", "cli", "serve")
        for path in sorted((ROOT / room).rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if (match := PATTERN.search(line))
    ]
    assert not found, "\n".join(["Use the word of CONTRIBUTING.md instead:", *found])
