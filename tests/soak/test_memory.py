"""Preparing a text much longer than the memory it may take."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

pytestmark = pytest.mark.soak
TEXT_BYTES = 1_000_000_000
MEMORY_BYTES = 1 << 30
TIMEOUT_SECONDS = 1800

PREPARE = """
import json, resource, sys, time
from pathlib import Path
from lm.config import CorpusConfig, Section
from lm.corpora import open_corpus, prepare

source, cache, tokenizer = sys.argv[1:]
begun = time.perf_counter()
prepared = prepare(open_corpus(CorpusConfig(source=source)), Section(type=tokenizer), cache=Path(cache))
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = [split.counts for split in prepared.splits.values()]
print(json.dumps({
    "seconds": seconds,
    "memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    "text_bytes": sum(each.bytes for each in counts),
    "tokens": sum(each.tokens for each in counts),
    "token_file_bytes": sum(file.stat().st_size for file in Path(cache).rglob("*.bin")),
}))
"""


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text of TEXT_BYTES in which no line of numbers comes twice, so that its vocabulary of words grows too."""
    folder = tmp_path_factory.mktemp("long")
    prose = "\n\n".join(text.strip() for _, text in sorted(topics.items())).encode("utf-8")
    path = folder / "long.txt"
    with path.open("wb") as file:
        number = 0
        while file.tell() < TEXT_BYTES:
            file.write(b"\n\nChapter %d, of the year %d\n\n" % (number, 7919 * number))
            file.write(prose)
            number += 1
    yield path
    shutil.rmtree(folder)


@pytest.mark.parametrize("tokenizer", ["char", "word", "subword"])
def test_a_gigabyte_of_text_is_prepared_in_less_memory_than_it_takes(tokenizer, long_text, tmp_path, capsys):
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PREPARE, str(long_text), str(cache), tokenizer]
    try:
        # Linux counts the peak of the program that forked it into ru_maxrss: the shell's is small, pytest's may not be.
        ran = subprocess.run(
            ["sh", "-c", '"$@"; exit "$?"', "sh", *command], env={**os.environ, "INKLING_CACHE": str(cache)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(ran.stdout)
    speed = figures["text_bytes"] / 1e6 / figures["seconds"]
    with capsys.disabled():
        sys.stdout.write(f"\n{tokenizer}: {speed:,.1f} MB/s, peak {figures['memory_bytes'] / 2**20:,.0f} MiB ")
    assert figures["text_bytes"] == long_text.stat().st_size >= TEXT_BYTES
    assert figures["token_file_bytes"] >= figures["tokens"] > 0
    assert figures["memory_bytes"] < MEMORY_BYTES
