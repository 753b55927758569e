"""A chat template of a stranger ends soon, fills no memory, and reaches nothing."""

from __future__ import annotations

import pytest

from lm.errors import TokenizerError
from lm.tokenizers.chat_template import render_chat

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize("template", [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) }}{% endmacro %}{{ m(3) }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ 64**64**64 }}", "{{ 'a'.center(10**10) }}", "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}", "{{ 'aaa'.replace('a', 'b' * 9000000) }}", "{{ ''.__class__.__mro__ }}",
    "{{ lipsum(n=10**7) }}",
])  # fmt: skip
def test_a_template_without_end_or_limit_is_refused(template: str) -> None:
    with pytest.raises(TokenizerError, match="The chat template of the model"):
        render_chat(template, MESSAGES, tokens={})


def test_a_template_within_the_limits_is_rendered() -> None:
    template = "{% for m in messages %}{{ '=' * 2 ~ m.content.replace('h', 'k') + ['a', 'b']|join('-') }}{% endfor %}"
    assert render_chat(template, MESSAGES, tokens={}) == "==kia-b==yoa-b"
