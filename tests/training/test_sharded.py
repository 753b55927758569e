"""A model that two processes share (FSDP2): its device, a skipped step, and the memory of saving and loading."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.training import sharded
from tests.training.conftest import make_text
from tests.training.test_distributed import TIMEOUT_SECONDS, TORCHRUN, job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "words.txt").write_text(make_text(), "utf-8")
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", sharded.__file__]
    with job(folder, *command, str(folder / "words.txt"), str(folder), text=False) as started:
        code = started.wait(TIMEOUT_SECONDS)
    assert code == 0, (folder / "log").read_text("utf-8")
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text("utf-8"))
    return found


def test_a_run_on_the_cpu_stays_there_on_a_machine_with_a_gpu(facts: dict[str, Any]) -> None:
    assert facts["devices"] == facts["other"]["devices"] == ["cpu"]


def test_a_skipped_step_leaves_no_gradients_of_its_earlier_parts(facts: dict[str, Any]) -> None:
    assert facts["skipped"] == "the loss is nan"
    assert facts["after a skip"] == facts["straight"]


def test_only_the_first_process_gathers_whole_weights_and_moments_to_save(facts: dict[str, Any]) -> None:
    other = facts["other"]
    assert facts["saving"] > other["whole"] and facts["arrays"] > 0
    # Its own half, and little else.
    assert other["saving"] < 0.6 * other["whole"] and other["arrays"] == 0


def test_a_process_loads_its_own_shards_alone(facts: dict[str, Any]) -> None:
    assert facts["other"]["loading"] < 0.6 * facts["whole"]
    assert facts["restored"] and facts["other"]["restored"]
