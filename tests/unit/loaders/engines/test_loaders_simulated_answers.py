import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.engines.simulated.api.answers import Sampling, Speaker, instance_of, structured
from loaders.engines.simulated.tokens import token_count

SPEAKER = Speaker(mean_tokens=100, spread_fraction=0.5, seed=0)


@given(st.binary(max_size=50), st.integers(1, 20_000), st.booleans())
def test_the_text_is_exactly_the_tokens_that_are_counted(
    prompt: bytes, most: int, ignore_eos: bool
) -> None:
    answer = SPEAKER.answer(prompt, Sampling(max_tokens=most, ignore_eos=ignore_eos))
    assert token_count(answer.text) == answer.tokens <= most
    assert answer.text.isascii()
    if ignore_eos:
        assert (answer.tokens, answer.finish_reason) == (most, "length")
    else:
        assert answer.tokens == most or (50 <= answer.tokens <= 150)
        assert answer.finish_reason == ("stop" if answer.tokens < most else answer.finish_reason)


def test_the_same_request_gets_the_same_words_and_another_others() -> None:
    limits = Sampling(max_tokens=50)
    assert SPEAKER.answer(b"a", limits) == SPEAKER.answer(b"a", limits)
    texts = {
        SPEAKER.answer(b"a", limits).text,
        SPEAKER.answer(b"b", limits).text,
        SPEAKER.answer(b"a", limits, choice=1).text,
        SPEAKER.answer(b"a", Sampling(max_tokens=50, seed=5)).text,
        Speaker(mean_tokens=100, spread_fraction=0.5, seed=1).answer(b"a", limits).text,
    }
    assert len(texts) == 5


def test_answers_start_with_a_word_and_end_by_themselves_with_a_full_stop_or_a_word() -> None:
    answer = SPEAKER.answer(b"x", Sampling(max_tokens=1000))
    assert answer.finish_reason == "stop"
    words = answer.text.decode().rstrip(".").split()
    assert all(len(word) in (3, 7) for word in words[:-1])


def test_min_tokens_puts_the_end_off() -> None:
    answer = SPEAKER.answer(b"x", Sampling(max_tokens=1000, min_tokens=400))
    assert answer.tokens == 400


def test_a_stop_string_cuts_the_text_and_counts_what_was_generated() -> None:
    whole = SPEAKER.answer(b"x", Sampling(max_tokens=50, ignore_eos=True)).text.decode()
    stop = whole.split()[5]
    at = whole.index(stop)
    cut = SPEAKER.answer(b"x", Sampling(max_tokens=50, ignore_eos=True, stop=("zzzz", stop)))
    assert cut.text.decode() == whole[:at]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.tokens == token_count(whole[: at + len(stop)].encode())
    kept = SPEAKER.answer(
        b"x", Sampling(max_tokens=50, ignore_eos=True, stop=(stop,), include_stop=True)
    )
    assert kept.text.decode() == whole[: at + len(stop)]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "simulated"),
        ({"type": "integer", "minimum": 3}, 3),
        ({"type": ["boolean", "null"]}, True),
        ({"enum": ["c", "f"]}, "c"),
        ({"const": 4}, 4),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2}, [1, 1]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        (
            {
                "properties": {"a": {"type": "string"}, "b": {"$ref": "#/$defs/B"}},
                "required": ["b"],
                "$defs": {"B": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
            },
            {"b": {"x": True}},
        ),
        ("nonsense", None),
    ],
)
def test_a_value_that_fits_a_schema(schema: object, expected: object) -> None:
    assert instance_of(schema) == expected


def test_a_schema_that_contains_itself_ends() -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert "next" in instance_of(schema)


def test_a_tool_call_is_its_arguments_as_json() -> None:
    call = structured({"city": "København"}, Sampling(max_tokens=100), tool="weather")
    assert json.loads(call.text) == {"city": "København"}
    assert (call.finish_reason, call.tool) == ("tool_calls", "weather")
    short = structured({"city": "København"}, Sampling(max_tokens=2), tool="weather")
    assert (len(short.text), short.tokens, short.finish_reason) == (8, 2, "length")
