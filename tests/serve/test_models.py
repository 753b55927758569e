"""Several runs in one server: found, loaded, evicted, trained again."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lm
from lm.errors import ConfigError, CorruptRunError
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.runs.run_folder import RunFolder
from serve.engines.available_runs import AvailableRun, find_runs
from serve.engines.model_pool import Model, ModelPool
from serve.engines.worker import EngineDeadError
from serve.http_errors import RequestError
from serve.settings import ServeOptions
from tests.conftest import SHIPPED
from tests.serve.conftest import MODELS, Serve, refusal, train, until

pytestmark = pytest.mark.slow


def loaded(server) -> list[str]:
    return [card["id"] for card in server.request("GET", "/v1/models")[2]["data"] if card["loaded"]]


def test_without_names_every_run_is_offered_and_loaded_at_its_first_request(serve: Serve):
    with serve() as server:
        names = [card.id for card in server.openai.models.list()]
        assert set(names) == {*MODELS, *SHIPPED} and names[-len(SHIPPED) :] == list(SHIPPED)
        assert loaded(server) == []
        server.post("/v1/completions", model="words", prompt="the", max_tokens=1)
        assert loaded(server) == ["words"]
        # Without a name, the first: the newest run.
        assert server.post("/v1/completions", prompt="the", max_tokens=1)["model"] == names[0]
        card = server.openai.models.retrieve("gru")
        assert (card.id, card.object, card.owned_by) == ("gru", "model", "inkling") and card.created > 0


@pytest.mark.parametrize("name", ["grue", "../gru", "gru/", "gru@last", "/etc/passwd", "..", "", "\x00", "%2e%2e/gru"])
def test_a_name_that_is_not_offered_is_404_whatever_lies_on_the_disk(server, name):
    status, error = refusal(server, {"model": name, "prompt": "the"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    if name == "grue":
        assert "Did you mean 'gru'?" in error["message"]


def test_adapters_are_offered_next_to_their_base_and_skipped_without_it(tmp_path: Path):
    train(tmp_path, "transformer")
    base, options = lm.load("transformer", runs_dir=tmp_path), {"training.lora": 2, "training.max_steps": 2}
    lm.train(str(tmp_path / "text.txt"), init=base, name="mine", runs_dir=tmp_path, overrides=options)
    served = ServeOptions(runs_dir=tmp_path)
    models = ModelPool(served)
    assert {"transformer", "mine"} <= models.available_runs.keys()
    assert models.resolve("mine") == models.resolve("transformer+mine") == "mine"
    with pytest.raises(RequestError, match="does not exist"):
        models.resolve("mine+transformer")
    run = models.available_runs["mine"]
    whole = models.available_runs["transformer"]
    assert run.memory_bytes(served) > whole.memory_bytes(served)
    assert whole.files[-1] in run.files
    pairs = ServeOptions(runs_dir=tmp_path, runs=("transformer", "transformer+mine"))
    assert [*find_runs(pairs).runs] == ["transformer", "transformer+mine"]
    shutil.rmtree(tmp_path / "transformer")
    found = find_runs(served)
    assert "mine" not in found.runs and "an adapter of the run 'transformer'" in found.skipped["mine"]


def test_a_kept_state_is_offered_under_its_own_name(serve: Serve, runs):
    with serve("gru", "gru@last") as server:
        assert [card.id for card in server.openai.models.list()] == ["gru", "gru@last"]
        ask = {"prompt": "the", "max_tokens": 30, "seed": 4}
        text = server.post("/v1/completions", model="gru@last", **ask)["choices"][0]["text"]
        assert text == lm.load("gru@last", runs_dir=runs).sample("the", max_tokens=30, seed=4)


def test_the_least_recently_used_idle_model_makes_room(serve: Serve, runs):
    options = ServeOptions(runs_dir=runs, prefix_cache="1MB", max_batch=2)
    sizes = {name: find_runs(options).runs[name].memory_bytes(options) for name in MODELS}
    room = sizes["gru"] + sizes["words"] + max(sizes.values()) // 2
    with serve("--prefix-cache", "1MB", "--max-batch", "2", "--max-memory", f"{room}B") as server:
        ask = {"prompt": "the", "max_tokens": 5, "seed": 1}
        first = server.post("/v1/completions", model="gru", **ask)
        server.post("/v1/completions", model="words", **ask)
        assert set(loaded(server)) == {"gru", "words"}
        server.post("/v1/completions", model="gru", **ask)
        server.post("/v1/completions", model="pieces", **ask)
        assert "words" not in loaded(server) and server.metric("inkling_model_evictions_total") >= 1
        assert server.post("/v1/completions", model="gru", **ask)["choices"] == first["choices"]


def test_a_model_in_use_is_not_evicted_and_another_has_to_wait(serve: Serve, runs):
    options = ServeOptions(runs_dir=runs, prefix_cache="1MB", max_batch=2)
    room = max(find_runs(options).runs[name].memory_bytes(options) for name in MODELS)
    with serve(
        "gru", "words", "--prefix-cache", "1MB", "--max-batch", "2", "--max-memory", f"{room}B",
        "--max-completion-tokens", "10000000",
    ) as server:  # fmt: skip
        stream = server.openai.completions.create(model="gru", prompt="the", max_tokens=10_000_000, stream=True)
        next(iter(stream))
        status, headers, answer = server.request("POST", "/v1/completions", {"model": "words", "prompt": "the"})
        assert (
            status == 429 and headers["retry-after"] and "no memory for the model 'words'" in answer["error"]["message"]
        )
        stream.close()
        server.wait_idle()
        assert server.post("/v1/completions", model="words", prompt="the", max_tokens=1)


def crowd(runs, *, clients: int, requests: int) -> Counter[str]:
    """What became of the requests of many clients to three models, of which two have room."""
    names = ("gru", "words", "pieces")
    options = ServeOptions(runs=names, runs_dir=runs, prefix_cache="1MB", max_batch=2)
    sizes = sorted(offer.memory_bytes(options) for offer in find_runs(options).runs.values())
    models = ModelPool(options.model_copy(update={"max_memory": sum(sizes[1:])}))
    outcomes: Counter[str] = Counter()

    async def client(dice: random.Random) -> None:
        for _ in range(requests):
            try:
                lease = await models.lease(dice.choice(names))
            except RequestError as error:
                outcomes[str(error.status_code)] += 1
                await asyncio.sleep(0.001)
                continue
            sampling = SamplingOptions(max_tokens=3)
            job = lease.model.worker.start([Request((lease.model.tokenizer.start_id,), sampling)], live=False)
            try:
                async with asyncio.timeout(20):
                    while not job.done:
                        await job.wait()
                outcomes["done"] += 1
            finally:
                job.close()
                lease.close()

    async def run() -> None:
        await asyncio.gather(*(client(random.Random(number)) for number in range(clients)))

    asyncio.run(run())
    outcomes["evictions"] = models.evictions
    models.close()
    return outcomes


@pytest.mark.soak
def test_no_request_is_lost_where_models_make_room_for_each_other(runs):
    outcomes = crowd(runs, clients=12, requests=40)
    assert outcomes.keys() == {"done", "429", "evictions"} and outcomes["evictions"] > 3
    assert outcomes["done"] + outcomes["429"] == 480 and outcomes["done"] > 100


@pytest.mark.soak
def test_no_request_of_many_is_lost_where_models_make_room_for_each_other(runs):
    assert crowd(runs, clients=24, requests=4000).keys() == {"done", "429", "evictions"}


def test_a_stopped_engine_takes_no_request_and_ends_those_it_has(runs):
    models = ModelPool(ServeOptions(runs=("gru",), runs_dir=runs))
    models.preload()

    async def run() -> None:
        worker = (await models.lease("gru")).model.worker
        job = worker.start([Request((1,), SamplingOptions(max_tokens=10_000_000))], live=False)
        worker.stop()
        with pytest.raises(EngineDeadError):
            async with asyncio.timeout(10):
                await job.wait()
        with pytest.raises(EngineDeadError):
            worker.start([Request((1,), SamplingOptions())], live=False)

    asyncio.run(run())
    models.close()


def test_a_damaged_run_is_a_500_without_a_path_and_does_not_affect_other_runs(serve: Serve, runs, tmp_path):
    for name in ("gru", "words"):
        shutil.copytree(runs / name, tmp_path / name)
    with serve("gru", runs_dir=tmp_path) as server:
        pass
    weights = tmp_path / "words" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with serve(runs_dir=tmp_path) as server:
        status, error = refusal(server, {"model": "words", "prompt": "the"})
        assert status == 500 and str(tmp_path) not in error["message"] and "See the server's log" in error["message"]
        assert server.post("/v1/completions", model="gru", prompt="the", max_tokens=1)
        status, _, health = server.request("GET", "/health")
        assert (status, health) == (200, {"status": "ok", "dead": [], "skipped": ["words"]})
        (skipped,) = server.request("GET", "/v1/models")[2]["skipped"]
        assert skipped["id"] == "words" and skipped["reason"].startswith("model.safetensors fails its hash")
        assert any("words" in line["event"] and line["level"] == "error" for line in server.log())


def change_record(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit config.json so that its hash is right."""
    record = RunFolder(run).read_record()
    change(record)
    RunFolder(run).write_record(record)


def put_nan(run: Path) -> None:
    """One weight becomes NaN, and the file's hash is right."""
    arrays, facts = RunFolder(run).read_weights()
    name = next(iter(arrays))
    RunFolder(run).write_best({**arrays, name: np.where(np.arange(arrays[name].size).reshape(arrays[name].shape) == 3,
                                                        np.float32("nan"), arrays[name])}, **facts)  # fmt: skip


@pytest.fixture
def copies(runs, tmp_path) -> Callable[..., None]:
    """Copies of the run `gru` under other names, in tmp_path."""

    def copy(*names: str) -> None:
        for name in names:
            shutil.copytree(runs / "gru", tmp_path / name)

    return copy


BROKEN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "half-copied": (lambda run, _: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no-weights": (lambda run, _: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut-weights": (lambda run, _: os.truncate(run / "model.safetensors", 5000), "model.safetensors is damaged"),
    "cut-config": (lambda run, _: os.truncate(run / "config.json", 300), "config.json is damaged"),
    "odd-config": (
        lambda run, _: change_record(run, lambda record: record["config"]["model"].update(hidden_size="wide")),
        "ValueError: invalid literal",
    ),
    "other-tokenizer": (
        lambda run, runs: shutil.copy(runs / "words" / "tokenizer.json", run), "is not the tokenizer that the model"
    ),
}  # fmt: skip


def test_runs_that_cannot_be_loaded_are_skipped_with_the_reason_and_the_others_are_offered(runs, copies, tmp_path):
    copies("whole", "in-training", *BROKEN)
    for name, (damage, _) in BROKEN.items():
        damage(tmp_path / name, runs)
    (tmp_path / "in-training" / "model.safetensors").unlink()
    with RunFolder(tmp_path / "in-training").lock():
        found = find_runs(ServeOptions(runs_dir=tmp_path))
    assert set(found.runs) == {"whole", *SHIPPED}
    expected = {**{name: reason for name, (_, reason) in BROKEN.items()}, "in-training": "the run is being trained"}
    assert found.skipped.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found.skipped[name] and str(tmp_path) not in found.skipped[name]
    # One that was asked for by name is not left out in silence.
    with pytest.raises(ConfigError, match=r"Run 'half-copied' cannot be served: .*tokenizer\.json is missing"):
        find_runs(ServeOptions(runs=("whole", "half-copied"), runs_dir=tmp_path))


@pytest.mark.parametrize("named", [True, False])
def test_a_broken_run_keeps_no_other_from_being_reloaded_and_serves_on_with_its_old_weights(
    runs, copies, tmp_path, named
):
    copies("whole", *BROKEN)
    models = ModelPool(ServeOptions(runs=("whole", *BROKEN) if named else (), runs_dir=tmp_path))

    async def story() -> None:
        for name in ("whole", *BROKEN):
            (await models.lease(name)).close()
        for name, (damage, _) in BROKEN.items():
            damage(tmp_path / name, runs)
        weights = tmp_path / "whole" / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        assert await models.reload() == {"whole": "reloaded", **dict.fromkeys(BROKEN, "failed")}
        assert models.skipped.keys() == BROKEN.keys() and not models.dead
        for name in BROKEN:
            (await models.lease(name)).close()

    asyncio.run(story())
    models.close()


def test_a_model_that_makes_room_while_it_is_reloaded_leaves_no_engine(runs, copies, tmp_path):
    copies("one", "other")
    options = ServeOptions(runs_dir=tmp_path)
    size = find_runs(options).runs["one"].memory_bytes(options)
    models = ModelPool(options.model_copy(update={"max_memory": 2 * size}))
    opened, go_on = threading.Event(), threading.Event()
    open_at_once = models.open

    def open_slowly(offer: AvailableRun) -> Model:
        model = open_at_once(offer)
        opened.set()
        assert go_on.wait(10)
        return model

    async def story() -> None:
        (await models.lease("one")).close()
        weights = tmp_path / "one" / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        models.open = open_slowly
        reloading = asyncio.create_task(models.reload())
        assert await asyncio.to_thread(opened.wait, 10)
        models.open = open_at_once
        for name in ("other", "one"):
            (await models.lease(name)).close()
        newest = models.loaded["one"]
        go_on.set()
        assert await reloading == {"one": "reloaded"}
        assert dict(models.loaded) == {"one": newest} and models.memory_bytes == size

    asyncio.run(story())
    models.close()
    until(lambda: not {"engine one", "engine other"} & {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize("trained_again", [True, False])
def test_a_run_that_is_deleted_or_trained_again_while_it_is_loaded_is_not_kept_as_it_was(
    copies, tmp_path, trained_again
):
    copies("one", "other")
    models = ModelPool(ServeOptions(runs_dir=tmp_path))
    opened, go_on = threading.Event(), threading.Event()
    open_at_once = models.open

    def open_slowly(offer: AvailableRun) -> Model:
        model = open_at_once(offer)
        opened.set()
        assert go_on.wait(30)
        return model

    async def story() -> None:
        models.open = open_slowly
        leasing = asyncio.create_task(models.lease("one"))
        assert await asyncio.to_thread(opened.wait, 30)
        models.open = open_at_once
        weights = tmp_path / "one" / "model.safetensors"
        if trained_again:
            weights.write_bytes(weights.read_bytes())
        else:
            shutil.rmtree(tmp_path / "one")
        assert await models.reload() == {}
        go_on.set()
        if trained_again:
            lease = await leasing
            assert lease.model.fingerprint == models.available_runs["one"].fingerprint()
            lease.close()
        else:
            with pytest.raises(RequestError, match="'one' does not exist"):
                await leasing
            assert not models.loaded and models.memory_bytes == 0

    asyncio.run(story())
    models.close()
    until(lambda: "engine one" not in {thread.name for thread in threading.enumerate()})


def test_a_reload_keeps_to_the_memory_for_models(copies, tmp_path):
    copies("one", "other")
    options = ServeOptions(runs_dir=tmp_path)
    size = find_runs(options).runs["one"].memory_bytes(options)
    models = ModelPool(options.model_copy(update={"max_memory": 2 * size}))
    most: list[int] = []
    open_at_once = models.open

    def open_counted(offer: AvailableRun) -> Model:
        most.append(models.memory_bytes)
        return open_at_once(offer)

    models.open = open_counted

    def train_again(name: str) -> None:
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes())

    async def story() -> None:
        one, other = await models.lease("one"), await models.lease("other")
        train_again("one")
        # Both are in use: there is no room for a second copy, and the old one stays.
        assert await models.reload() == {"one": "failed", "other": "unchanged"}
        assert "no memory for the model 'one'" in models.skipped["one"] and models.loaded["one"] is one.model
        # The other can make room.
        other.close()
        assert await models.reload() == {"one": "reloaded", "other": "unchanged"}
        assert set(models.loaded) == {"one"} and models.evictions == 1
        one.close()
        (await models.lease("other")).close()
        # The old model is idle: it is unloaded first, and the next request loads the new files.
        train_again("one")
        assert await models.reload() == {"one": "reloaded", "other": "unchanged"}
        assert set(models.loaded) == {"other"}
        (await models.lease("one")).close()
        assert set(models.loaded) == {"one", "other"} and not models.skipped
        assert max(most) == 2 * size

    asyncio.run(story())
    models.close()


def test_weights_that_are_not_finite_are_refused_until_they_are_whole_again(runs, copies, tmp_path):
    copies("broken", "gone")
    put_nan(tmp_path / "broken")
    with pytest.raises(CorruptRunError, match=r"'broken': the weights .* not finite .*broken@step-N"):
        lm.load("broken", runs_dir=tmp_path).sample("the")
    models = ModelPool(ServeOptions(runs_dir=tmp_path))

    async def story() -> None:
        shutil.rmtree(tmp_path / "gone")
        for name in ("broken", "gone"):
            with pytest.raises(RequestError, match="cannot be loaded"):
                await models.lease(name)
        assert set(models.skipped) == {"broken", "gone"} and "not finite" in models.skipped["broken"]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine ")]
        shutil.copy(runs / "gru" / "model.safetensors", tmp_path / "broken")
        (await models.lease("broken")).close()
        assert set(models.skipped) == {"gone"}

    asyncio.run(story())
    models.close()


@pytest.mark.parametrize("way", ["signal", "request"])
def test_a_retrained_run_is_swapped_in_and_streams_continue(serve: Serve, runs, tmp_path, way):
    shutil.copytree(runs / "gru", tmp_path / "gru")
    shutil.copy(runs / "text.txt", tmp_path / "text.txt")
    ask = {"model": "gru", "prompt": "the", "max_tokens": 30_000, "seed": 5}
    whole = {"max_tokens": 30_000, "seed": 5}
    before = lm.load("gru", runs_dir=tmp_path).sample("the", **whole)
    with serve("gru", "--max-completion-tokens", "30000", "--max-batch", "1", runs_dir=tmp_path, key="k") as server:
        got: list[str] = []
        started = threading.Event()

        def read() -> None:
            for chunk in server.openai.completions.create(stream=True, **ask):
                got.append(chunk.choices[0].text)
                started.set()

        reader = threading.Thread(target=read)
        train(tmp_path, "new", kind="gru", seed=2)
        reader.start()
        started.wait(10)
        shutil.rmtree(tmp_path / "gru")
        (tmp_path / "new").rename(tmp_path / "gru")
        if way == "signal":
            server.process.send_signal(signal.SIGHUP)
            until(lambda: any(line["event"] == "Reloaded." for line in server.log()))
        else:
            assert server.post("/admin/reload") == {"models": {"gru": "reloaded"}}
        after = lm.load("gru", runs_dir=tmp_path).sample("the", **whole)
        assert after != before
        assert server.post("/v1/completions", **ask)["choices"][0]["text"] == after
        reader.join(60)
        assert "".join(got) == before
        assert server.post("/admin/reload") == {"models": {"gru": "unchanged"}}


def test_a_run_that_cannot_be_read_leaves_the_old_one_in_service(serve: Serve, runs, tmp_path):
    shutil.copytree(runs / "gru", tmp_path / "gru")
    with serve("gru", runs_dir=tmp_path, key="k") as server:
        ask = {"prompt": "the", "max_tokens": 5, "seed": 1}
        before = server.post("/v1/completions", **ask)["choices"]
        (tmp_path / "gru" / "model.safetensors").write_bytes(b"nothing")
        assert server.post("/admin/reload") == {"models": {"gru": "failed"}}
        assert server.post("/v1/completions", **ask)["choices"] == before
        server.key = None
        assert server.request("POST", "/admin/reload")[0] == 401


def test_reloading_over_http_needs_a_key_to_be_set(server):
    status, _, answer = server.request("POST", "/admin/reload")
    assert status == 403 and "SIGHUP" in answer["error"]["message"]


def test_two_runs_of_one_name_are_refused(runs, tmp_path):
    shutil.copytree(runs / "gru", tmp_path / "gru")
    with pytest.raises(ConfigError, match="Two runs have the name 'gru'"):
        ModelPool(ServeOptions(runs=("gru", str(tmp_path / "gru")), runs_dir=runs))


def test_an_engine_serves_several_loops_one_after_the_other(runs):
    """An app that is mounted next to the API uses the same models."""
    models = ModelPool(ServeOptions(runs=("gru",), runs_dir=runs))
    models.preload()

    async def write() -> str:
        lease = await models.lease("gru")
        ids = lease.model.tokens.read_from("the")
        job = lease.model.worker.start([Request(ids, SamplingOptions(max_tokens=20, seed=3))], live=True)
        parts = []
        done = False
        while not done:
            await job.wait()
            done = job.done
            parts += [event.text for event in job.generations[0].take()]
        job.close()
        lease.close()
        return "".join(parts)

    expected = lm.load("gru", runs_dir=runs).sample("the", max_tokens=20, seed=3)
    assert [asyncio.run(write()) for _ in range(2)] == [expected] * 2
    models.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_run_made_since_is_offered_and_a_deleted_one_is_gone_while_the_others_serve_on(runs, tmp_path, named):
    for name in ("gru", "words"):
        shutil.copytree(runs / name, tmp_path / name)
    options = ServeOptions(runs=("gru", "words") if named else (), runs_dir=tmp_path)
    models = ModelPool(options)

    async def story() -> None:
        for name in ("gru", "words"):
            (await models.lease(name)).close()
        shutil.copytree(runs / "pieces", tmp_path / "pieces")
        await models.include("pieces")
        (await models.lease("pieces")).close()
        assert set(models.available_runs) - set(SHIPPED) == {"gru", "words", "pieces"} == set(models.loaded)
        RunFolder(tmp_path / "words").delete()
        assert await models.reload() == {"gru": "unchanged", "words": "gone", "pieces": "unchanged"}
        with pytest.raises(RequestError, match="does not exist"):
            await models.lease("words")
        (await models.lease("gru")).close()
        for name in ("gru", "pieces"):
            RunFolder(tmp_path / name).delete()
        assert await models.reload() == {"gru": "gone", "pieces": "gone"} and not models.loaded
        assert set(models.available_runs) == (set() if named else set(SHIPPED))
        if named:
            with pytest.raises(RequestError, match="no model yet"):
                await models.lease(None)
        # A run of a name that was given is offered again.
        shutil.copytree(runs / "words", tmp_path / "words")
        await models.include("words")
        assert next(iter(models.available_runs)) == "words"

    asyncio.run(story())
    models.close()


def test_a_run_that_cannot_be_offered_leaves_the_others_as_they_were(runs, tmp_path):
    shutil.copytree(runs / "gru", tmp_path / "gru")
    shutil.copytree(runs / "words", tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").unlink()
    models = ModelPool(ServeOptions(runs=("gru",), runs_dir=tmp_path))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"tokenizer.json is missing"):
            asyncio.run(models.include("words"))
        assert list(models.available_runs) == ["gru"]
    assert asyncio.run(models.reload()) == {}
    assert list(models.available_runs) == ["gru"]


def test_a_run_that_was_used_during_its_training_is_reloaded_after_it(runs, tmp_path):
    shutil.copytree(runs / "gru", tmp_path / "gru")
    models = ModelPool(ServeOptions(runs_dir=tmp_path))

    async def story() -> None:
        early = await models.lease("gru")
        weights = tmp_path / "gru" / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        await models.include("gru")
        late = await models.lease("gru")
        assert late.model is not early.model and early.model.retired
        early.close()
        late.close()

    asyncio.run(story())
    models.close()
