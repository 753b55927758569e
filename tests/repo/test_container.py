"""Containerfile: what it names is there. Whether it builds is seen where there is a container engine."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

from serve.settings import ServeOptions
from tests.conftest import SHIPPED

ROOT = Path(__file__).parents[2]
# Without comments, one instruction a line.
INSTRUCTIONS = re.sub(
    r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Containerfile").read_text("utf-8"), flags=re.MULTILINE)
).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def having(instruction: str) -> list[str]:
    return [line.removeprefix(instruction).strip() for line in INSTRUCTIONS if line.startswith(f"{instruction} ")]


def sources() -> list[str]:
    """What is copied from the repository."""
    copies = [line.split() for line in having("COPY") if not line.startswith("--from")]
    return [source for *found, _ in copies for source in found]


def test_what_is_copied_is_there_and_not_ignored():
    # As builders read the file: the last pattern that fits decides, and a folder stands for what is in it.
    patterns = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    for source in sources():
        assert (ROOT / source).exists(), source
        ignored = False
        for pattern in patterns:
            keep, glob = pattern.startswith("!"), pattern.removeprefix("!")
            prefixes = ["/".join(source.split("/")[:end]) for end in range(1, source.count("/") + 2)]
            if any(fnmatch.fnmatchcase(prefix, glob) and prefix.count("/") == glob.count("/") for prefix in prefixes):
                ignored = not keep
        assert not ignored, source


def test_what_the_wheel_is_made_of_is_copied():
    copied = sources()
    packages = [*PROJECT["tool"]["scikit-build"]["wheel"]["packages"], *(f"checkpoints/{name}" for name in SHIPPED)]
    named = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "CMakeLists.txt"]
    assert {*packages, *named} <= set(copied)


def test_extras_python_and_torch_are_those_of_the_project():
    text = "\n".join(INSTRUCTIONS)
    extras = re.findall(r"inkling_lm-\*\.whl\)\[([\w,]+)\]", text)
    assert extras and set(extras[0].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", text, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == f">={python}", "the tested versions are tested on the oldest Python"
    assert len(re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)) == 1


def test_it_runs_lm_serve_on_the_port_that_it_opens_and_checks_as_no_root():
    (entry,) = having("ENTRYPOINT")
    name, command, *flags = json.loads(entry)
    assert name in PROJECT["project"]["scripts"] and command == "serve"
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert {flag.removeprefix("--").replace("-", "_") for flag in given} <= ServeOptions.model_fields.keys()
    (port,), (check,) = having("EXPOSE"), having("HEALTHCHECK")
    assert given["--host"] == "0.0.0.0" and given["--port"] == port and f":{port}/health'" in check
    python, option, code = json.loads(check[check.index("[") :])
    assert (python, option) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    (user,) = having("USER")
    assert int(user) > 0 and f"--uid {user}" in "\n".join(INSTRUCTIONS)
