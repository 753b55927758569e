"""Named states on disk, and conversations that keep one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.errors import ConfigError, CorruptRunError, RunError, RunNotFoundError
from lm.generation.conversation import Conversation
from lm.generation.decoder import Snapshot
from lm.generation.engine import Request
from lm.generation.options import SamplingOptions
from lm.generation.snapshots import NamedSnapshot, Snapshots
from tests.generation.house import TEXT, House, finish


def state_after(house: House, text: str) -> NamedSnapshot:
    engine = house.engine()
    prompt = house.request(text).prompt
    generation = engine.submit(Request(prompt[:-1], SamplingOptions(max_tokens=0), keep_state=True))
    finish(engine, generation)
    assert generation.state is not None
    return NamedSnapshot(prompt[-1:], len(prompt), generation.state)


def test_a_state_comes_back_from_its_file_bit_for_bit(house: House, tmp_path: Path) -> None:
    states, state = Snapshots(tmp_path / "states", "a", weights_sha256="w"), state_after(house, TEXT)
    states.save("chapter", state, text="chapter.txt")
    again = states.read("chapter")
    assert (again.unread, again.tokens, again.snapshot.window) == (state.unread, state.tokens, state.snapshot.window)
    assert again.snapshot.growing == state.snapshot.growing
    assert again.snapshot.arrays.keys() == state.snapshot.arrays.keys()
    for name, array in state.snapshot.arrays.items():
        np.testing.assert_array_equal(again.snapshot.arrays[name], array)
        assert again.snapshot.arrays[name].dtype == array.dtype
    engine = house.engine()
    options = house.request().options
    (one,), (two,) = finish(
        engine, *[engine.submit(Request(each.unread, options, state=each.snapshot)) for each in (state, again)]
    )
    assert one.facts == two.facts and one.text == house.text(TEXT)


def test_states_are_listed_and_deleted_by_name(gru: House, tmp_path: Path) -> None:
    states = Snapshots(tmp_path / "states", "a", weights_sha256="w")
    assert states.names() == []
    for name in ("b", "a"):
        states.save(name, state_after(gru, "the"), text="x.txt")
    facts = states.facts("a")
    assert states.names() == ["a", "b"]
    assert (facts["tokens"], facts["text"], facts["usable"]) == (4, "x.txt", True)
    assert facts["bytes"] == (tmp_path / "states" / "a.safetensors").stat().st_size < 4000
    states.delete("a")
    assert states.names() == ["b"]


def test_a_state_of_other_weights_is_refused(gru: House, tmp_path: Path) -> None:
    Snapshots(tmp_path / "states", "a", weights_sha256="old", tokenizer_sha256="t").save("a", state_after(gru, "the"))
    states = Snapshots(tmp_path / "states", "a", weights_sha256="new", tokenizer_sha256="t")
    assert not states.facts("a")["usable"]
    with pytest.raises(RunError, match="Snapshot 'a' was made with other weights"):
        states.read("a")


def test_a_missing_snapshot_is_an_error_that_lists_the_others(gru: House, tmp_path: Path) -> None:
    states = Snapshots(tmp_path / "states", "a")
    with pytest.raises(RunNotFoundError, match="has no snapshot 'chapter'. It has none yet"):
        states.read("chapter")
    states.save("chapter", state_after(gru, "the"))
    with pytest.raises(RunNotFoundError, match="Did you mean 'chapter'"):
        states.delete("chaptr")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/tmp/a", ".hidden", "a b", "a\\b", "ä", "x" * 101, "a\n"]
)
def test_a_name_is_no_path(gru: House, tmp_path: Path, name: str) -> None:
    for use in (
        Snapshots(tmp_path / "states", "a").read,
        Snapshots(tmp_path / "states", "a").delete,
        Snapshots(tmp_path / "states", "a").facts,
    ):
        with pytest.raises(ConfigError, match="use letters"):
            use(name)
    with pytest.raises(ConfigError, match="use letters"):
        Snapshots(tmp_path / "states", "a").save(name, NamedSnapshot((0,), 1))


def test_a_damaged_state_is_refused(gru: House, tmp_path: Path) -> None:
    states = Snapshots(tmp_path / "states", "a")
    path = states.save("a", state_after(gru, "the"))
    data = path.read_bytes()
    for damage in (data[: len(data) // 2], data[:-4] + b"\0\0\0\1"):
        path.write_bytes(damage)
        with pytest.raises(CorruptRunError, match="a.safetensors"):
            states.read("a")
    path.write_bytes(damage)
    assert states.names() == ["a"]


def test_an_empty_state_is_a_state_too(tmp_path: Path) -> None:
    states = Snapshots(tmp_path / "states", "a")
    states.save("a", NamedSnapshot((3,), 1))
    assert states.read("a") == NamedSnapshot((3,), 1, Snapshot())


# -- conversations ----------------------------------------------------------------------------------


def conversation(house: House, **options: Any) -> Conversation:
    settings = house.request(**{"max_tokens": 8, **options}).options
    begin = NamedSnapshot((house.tokenizer.start_id,), 1)
    return Conversation(house.engine(), settings, begin, after_reply=house.tokenizer.encode("\n").tolist())


def say(house: House, talk: Conversation, line: str) -> str:
    return "".join(event.text for event in talk.say(house.tokenizer.encode(line).tolist()))


def test_a_reply_continues_from_the_whole_conversation(house: House) -> None:
    talk = conversation(house, temperature=0)
    first = say(house, talk, "the quick ")
    second = say(house, talk, "brown ")
    assert first == house.text("the quick ", temperature=0, max_tokens=8)
    assert second == house.text(f"the quick {first}\nbrown ", temperature=0, max_tokens=8)
    assert talk.state.tokens == 1 + len(f"the quick {first}\nbrown {second}\n")


def test_undoing_goes_back_to_the_state_before(house: House) -> None:
    talk = conversation(house, logprobs=1)
    say(house, talk, "the ")
    before = talk.state
    second = say(house, talk, "fox ")
    assert len(talk.scores) == 8
    assert talk.undo() and talk.state is before and talk.scores == ()
    assert say(house, talk, "fox ") == second
    assert talk.undo() and talk.undo() and not talk.undo()


def test_replies_have_different_randomness(gru: House) -> None:
    talk = conversation(gru, max_tokens=30, seed=5)
    replies = [say(gru, talk, "the ") for _ in range(3)]
    assert len(set(replies)) == 3
    talk.reset()
    assert [say(gru, talk, "the ") for _ in range(3)] == replies


def test_a_reply_that_is_broken_off_stays_as_far_as_it_came(house: House) -> None:
    talk = conversation(house, max_tokens=100, temperature=0)
    events = talk.say(house.tokenizer.encode("the ").tolist())
    taken = next(events).text + next(events).text
    events.close()
    assert talk.state.tokens == 1 + len("the ") + len(taken) + 1
    following = say(house, talk, "fox")
    assert following == house.text(f"the {taken}\nfox", temperature=0, max_tokens=100)
