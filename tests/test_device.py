"""The number format of products on a GPU: the flags are torch's, which every build of it has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from lm.profiling.phases import Times

READ = """
import torch
from lm.device import computing
cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
def formats(): return [cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
def older():
    try: return [cuda.allow_tf32, cudnn.allow_tf32]
    except RuntimeError: return None
{host}
before = formats(), older()
for precision, format, allowed in (("fp32", "ieee", False), ("tf32", "tf32", True), ("bf16", "ieee", False)):
    with computing(torch.device("cuda"), precision, autocast=False):
        assert formats() == [format] * 3, (precision, formats())
        if before[1] is not None: assert older() == [allowed] * 2, (precision, older())
    assert (formats(), older()) == before, (precision, before, formats(), older())
"""


@pytest.mark.slow
def test_products_have_the_requested_format_whichever_interface_the_host_program_used() -> None:
    hosts = {
        "nothing": "",
        "the older one": "cuda.allow_tf32 = True; cudnn.allow_tf32 = False",
        "matmul": "torch.set_float32_matmul_precision('high')",
        "the newer one": "cuda.fp32_precision = 'tf32'",
        "the newer one, for all": "torch.backends.fp32_precision = 'tf32'",
        "the newer one, for recurrent layers": "cudnn.rnn.fp32_precision = 'ieee'",
        "both": "cuda.allow_tf32 = True; cudnn.rnn.fp32_precision = 'ieee'; cuda.fp32_precision = 'ieee'",
    }
    # The settings of a process cannot be brought back to where they began. One process, forked for each host.
    program = "import os, sys, torch, lm.device\n" + "\n".join(
        f"if os.fork() == 0:\n    exec({READ.format(host=host)!r})\n    os._exit(0)\n"
        f"if os.wait()[1]: sys.exit({name!r})"
        for name, host in hosts.items()
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams on which events are recorded, on a machine without a GPU."""
    streams: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self, stream: Any = "that of the current device") -> None:
            streams.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return streams


def test_times_of_a_second_gpu_are_taken_on_it(recorded: list[Any]) -> None:
    Times(torch.device("cuda:1")).on_phase("forward")
    assert recorded == ["stream of cuda:1"]
