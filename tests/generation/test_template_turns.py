"""Conversations by a chat template: the model reads what the whole conversation would give."""

from __future__ import annotations

from typing import Any

import pytest

from lm.generation.conversation import Conversation
from lm.generation.snapshots import NamedSnapshot
from lm.generation.template_turns import TemplateTurns
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.generation.house import House, gather
from tests.tokenizers.tiny_pretrained import CHAT_TEMPLATE, CONFIG, byte_level

THINKS = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('!')[-1]")
"""Removes a part of earlier replies, as templates of reasoning models do."""


def tokenizer(template: str = CHAT_TEMPLATE) -> PretrainedTokenizer:
    return PretrainedTokenizer.from_json(byte_level(), {**CONFIG, "chat_template": template})


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_turns_one_after_the_other_are_the_whole_conversation():
    ours = tokenizer()
    turns = TemplateTurns(ours)
    read = [*turns.user("The cat").ids, *ours.encode("sat"), *turns.reply("sat")]
    second = turns.user("on <|im_end|>")
    assert not second.from_begin
    assert [*read, *second.ids] == ours.encode_chat(chat("The cat", "sat", "on <|im_end|>")).tolist()
    turns.reply("the mat")
    turns.undo()
    assert turns.user("on <|im_end|>") == second


def test_a_conversation_whose_earlier_turns_change_is_read_again():
    ours = tokenizer(THINKS)
    turns = TemplateTurns(ours)
    turns.user("a")
    turns.reply("thought!said")
    second = turns.user("b")
    assert second.from_begin
    assert list(second.ids) == ours.encode_chat(chat("a", "thought!said", "b")).tolist()


def test_a_conversation_after_unknown_turns_adds_only_its_own():
    ours = tokenizer("{{ bos_token }}SYSTEM" + CHAT_TEMPLATE)
    turns = TemplateTurns(ours, continues=True)
    expected = tokenizer().encode_chat(chat("The cat")).tolist()
    for _ in range(2):
        turn = turns.user("The cat")
        assert (list(turn.ids), turn.from_begin) == (expected, False)
        turns.reset()


@pytest.fixture(scope="module")
def house() -> House:
    return House("transformer", tokenizer=tokenizer())


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKS])
def test_a_reply_is_the_one_to_the_whole_conversation(house: House, template: str) -> None:
    ours = tokenizer(template)
    turns = TemplateTurns(ours)
    options = house.request(temperature=0, max_tokens=6, ignore_eos=True).options
    talk = Conversation(house.engine(), options, NamedSnapshot((), 0), after_reply=turns.reply)

    def say(line: str) -> list[Any]:
        ids, from_begin = turns.user(line)
        return gather(talk.say(ids, from_begin=from_begin))

    def answer(*ids: int) -> Any:
        request = house.request(temperature=0, max_tokens=6, ignore_eos=True)
        request = type(request)(ids, request.options)
        return gather(house.engine().run(request))[0].tokens

    first = say("The")[0]
    assert first.tokens == answer(*ours.encode_chat(chat("The")).tolist())
    second = say("cat")[0]
    whole = ours.encode_chat(chat("The")).tolist() + first.tokens + turns_end(ours)
    if template is CHAT_TEMPLATE:
        rest = ours.encode_rendered(CHAT_TURN.format("cat")).tolist()
        assert second.tokens == answer(*whole, *rest)
    assert talk.undo()
    turns.undo()
    assert say("cat")[0].tokens == second.tokens


CHAT_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def turns_end(ours: PretrainedTokenizer) -> list[int]:
    return ours.encode_rendered("<|im_end|>\n").tolist()
