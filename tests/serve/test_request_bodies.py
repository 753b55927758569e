"""JSON read and written in parts is the JSON of the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api import request_bodies, response_formats
from serve.api.request_bodies import read_body
from serve.api.requests import CompletionRequest, DetokenizeRequest
from serve.http_errors import RequestError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(st.integers(), min_size=5),
    max_leaves=15,
)


@pytest.fixture(scope="module", autouse=True)
def _short_parts() -> Iterator[None]:
    """Parts so short that small values have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_bodies, "PART", 8)
        patch.setattr(response_formats, "MAX_NUMBERS", 3)
        patch.setattr(response_formats, "MAX_ENTRIES", 2)
        yield


@settings(max_examples=50)
@given(VALUES, st.sampled_from([None, 1]))
def test_what_is_read_in_parts_is_what_json_reads(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert request_bodies._Reader().decode(text) == json.loads(text)


@settings(max_examples=50)
@given(VALUES, st.integers(0, 200), st.sampled_from(["", ",", "]", "[", '"', "1", "}", "x", " "]))
def test_what_json_refuses_is_refused(value: object, place: int, sign: str) -> None:
    text = json.dumps(value)
    text = text[:place] + sign + text[place + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011
            request_bodies._Reader().decode(text)
    else:
        assert repr(request_bodies._Reader().decode(text)) == repr(expected)


@settings(max_examples=50)
@given(VALUES)
def test_what_is_written_in_parts_is_what_json_writes(value: object) -> None:
    # A lone surrogate is "?" on the wire.
    expected = json.loads(response_formats.encode(value).encode("utf-8", "replace"))
    assert json.loads(b"".join(response_formats.blocks(response_formats.encode_in_parts(value)))) == expected


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7])
def test_an_iterator_and_an_array_are_written_as_a_list(size: int) -> None:
    entries = [{"a": [number] * 5} for number in range(size)]
    assert "".join(response_formats.encode_in_parts({"x": iter(entries), "y": 1})) == response_formats.encode(
        {"x": entries, "y": 1}
    )
    numbers = np.arange(size, dtype=np.uint16)
    assert "".join(response_formats.encode_in_parts({"x": numbers})) == response_formats.encode({"x": numbers.tolist()})


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 50_000])
def test_long_lists_of_ids_are_checked_in_parts_to_the_same_tuples(size: int) -> None:
    ids = [random.Random(size).randrange(2**31) for _ in range(size)]
    for prompt in (ids, [ids, [1]]):
        body = read_body(json.dumps({"prompt": prompt}).encode(), CompletionRequest)
        assert isinstance(body, CompletionRequest)
        assert body.prompts == ([tuple(ids)] if prompt is ids else [tuple(ids), (1,)])
    tokens = read_body(json.dumps({"tokens": ids}).encode(), DetokenizeRequest)
    assert isinstance(tokens, DetokenizeRequest) and tokens.tokens == tuple(ids)
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        read_body(json.dumps({"tokens": [*ids, -1]}).encode(), DetokenizeRequest)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_a_body_is_decoded_in_parts_as_json_decodes_the_whole(encoding: str) -> None:
    text = json.dumps("aé☂😀\ud800\udfff!" * 9, ensure_ascii=False)
    body = text.encode(encoding, "surrogatepass")
    assert json.loads(request_bodies._decode(body)) == json.loads(body)


@pytest.mark.parametrize("body", [b'"\xff"', b'"\xed\xa0"', b'"aaaaaaaa\xe2\x98', b'"\xc0\x80"'])
def test_what_is_no_text_is_no_json(body: bytes) -> None:
    with pytest.raises(RequestError, match="The body is not JSON"):
        read_body(body, CompletionRequest)


def test_a_body_of_too_many_lists_is_one_sentence() -> None:
    with pytest.raises(RequestError, match="more than 20,000 lists and objects: send less at a time"):
        read_body(b'{"prompt": [' + b"[1]," * 19_999 + b"[1]]}", CompletionRequest)


@pytest.mark.parametrize("field", ["prediction", "metadata", "messages"])
def test_an_object_of_too_many_fields_is_one_sentence(field: str) -> None:
    fields = ",".join(f'"{number:05}":""' for number in range(10_000))
    value = read_body(f'{{"prompt": "", "prediction": {{{fields}}}}}'.encode(), CompletionRequest)
    assert isinstance(value, CompletionRequest) and value.prediction is not None and len(value.prediction) == 10_000
    for text in (f'{{"{field}": {{{fields},"more":1}}}}', f'{{{fields},"more":1}}'):
        with pytest.raises(RequestError, match="An object of the body has more than 10,000 fields: send less"):
            read_body(text.encode(), CompletionRequest)
