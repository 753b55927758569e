"""The kernels for ARM: cross-compiled, and run on emulated processors against loops in double.

`native/check.cpp` is the program, for one instruction set at a time. It is proved on this machine's own processor too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {
    # The oldest that has each instruction set, or all that the emulator knows.
    "plain": "cortex-a53",
    "neon_dotprod": "neoverse-n1",
    "neon_bf16": "max",
}


def flags(isa: str) -> list[str]:
    """The compiler's flags for an instruction set, as in CMakeLists.txt."""
    found = re.search(rf"add_isa\({isa}\b ?(.*)\)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert found is not None
    return found[1].split()


def compile_check(compiler: str, isa: str, folder: Path) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}: a compiler of this name")
    program = folder / f"check_{isa}"
    command = [
        compiler, "-std=c++20", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread",
        "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-DINKLING_ISA=inkling_{isa}", *flags(isa),
        # The emulator then needs no libraries of the other processor.
        *(["-static"] if compiler == CROSS else []),
        str(Path(__file__).with_name("native") / "check.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def emulated(processor: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {EMULATOR}")
    command = [EMULATOR, "-cpu", processor, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aarch64")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return compile_check(CROSS, "plain", folder)


def assert_right(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0 and ran.stdout.endswith("\n0 failed\n"), ran.stdout + ran.stderr


def test_the_plain_kernels_are_right_on_an_arm_processor_without_newer_instructions(plain: Path) -> None:
    assert_right(emulated(PROCESSORS["plain"], plain))


@pytest.mark.parametrize("isa", [pytest.param("neon_dotprod", marks=pytest.mark.soak), "neon_bf16"])
def test_the_kernels_of_newer_arm_processors_are_right(isa: str, folder: Path) -> None:
    assert_right(emulated(PROCESSORS[isa], compile_check(CROSS, isa, folder)))


@pytest.mark.parametrize("isa", PROCESSORS)
def test_the_instruction_sets_of_an_arm_processor_are_found(isa: str, plain: Path) -> None:
    found = emulated(PROCESSORS[isa], plain, "features").stdout.split()
    assert found == list(PROCESSORS)[1 : list(PROCESSORS).index(isa) + 1]


@pytest.mark.soak
def test_the_same_program_is_right_on_this_processor(tmp_path: Path) -> None:
    program = compile_check("c++", "plain", tmp_path)
    assert_right(subprocess.run([program], capture_output=True, text=True, check=False))
