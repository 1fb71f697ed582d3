import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.engines.simulated import tokens


@given(st.binary(max_size=200))
def test_any_text_comes_back_from_its_ids(text: bytes) -> None:
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    assert len(ids) == tokens.token_count(text)
    assert all(0 <= token < tokens.VOCABULARY_SIZE for token in ids)


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_block_hashes_agree_exactly_as_far_as_the_text_does(
    common: bytes, one: bytes, other: bytes
) -> None:
    first = tokens.block_hashes(common + one, 4)
    second = tokens.block_hashes(common + other, 4)
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    one_text, other_text = common + one, common + other
    same = 0
    while same < min(len(one_text), len(other_text)) and one_text[same] == other_text[same]:
        same += 1
    assert shared == min(same // 16, len(first), len(second))


def test_a_conversation_that_goes_on_begins_with_what_it_was() -> None:
    first = tokens.render_chat([("user", "What is a tide?")])
    answer = b"the sea and now low "
    later = tokens.render_chat(
        [("user", "What is a tide?"), ("assistant", answer.decode()), ("user", "And an ebb?")]
    )
    assert later.startswith(first + answer)


def test_segments_are_whole_tokens_so_that_they_are_counted_one_by_one() -> None:
    alone = tokens.token_count(tokens.render_chat([("user", "abcde")]))
    twice = tokens.token_count(tokens.render_chat([("user", "abcde"), ("user", "abcde")]))
    assert twice - alone == 1 + 2 + 1  # marker, two tokens of text, end


@pytest.mark.parametrize("token", [-1, tokens.VOCABULARY_SIZE])
def test_an_id_outside_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(ValueError, match=str(token)):
        tokens.decode([token])
