"""No function of one instruction set stands in for that of another."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "lm" / "kernels" / "native" / "check_symbols.cmake"
INLINE = "#include <vector>\nvoid {name}(std::vector<float>& v) {{ v.resize(v.size() + 3); }}\n"


def checked(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The check of the build, on two objects that use one template."""
    if any(shutil.which(tool) is None for tool in ("cmake", "c++", "nm")):
        pytest.skip("needs cmake, c++ and nm")
    objects = []
    for name in ("one", "two"):
        source, made = folder / f"{name}.cpp", folder / f"{name}.o"
        source.write_text(INLINE.format(name=name), "utf-8")
        subprocess.run(["c++", "-O0", *flags, "-c", str(source), "-o", str(made)], check=True, capture_output=True)
        objects.append(str(made))
    command = ["cmake", "-DNM=nm", f"-DOBJECTS={','.join(objects)}", "-P", str(CHECK)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_the_build_stops_if_two_instruction_sets_share_a_weak_symbol(tmp_path: Path) -> None:
    ran = checked(tmp_path)
    assert ran.returncode != 0
    assert "both define the weak" in " ".join(ran.stderr.split())


@pytest.mark.slow
def test_symbols_that_are_local_pass(tmp_path: Path) -> None:
    ran = checked(tmp_path, "-fno-weak", "-w")
    assert ran.returncode == 0, ran.stderr
