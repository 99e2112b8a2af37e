"""Token ids from JSON, compared with the standard library's decoder: the ids, the rest, and the rejected texts."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from kvindex._core import lift_tokens

BLANKS = st.text(" \t\r\n", max_size=2)
NUMBERS = st.one_of(
    st.integers(0, 200_000).map(str),
    st.sampled_from(["0", "9", "4294967295", "9999999", "10000000", "99999999", "1234567890"]),
)
NO_TOKENS = st.sampled_from(
    [
        "-1",
        "-0",
        "00",
        "01",
        "1.0",
        "1e3",
        "4294967296",
        "99999999999",
        "1" * 30,
        "true",
        "null",
        '"1"',
        "[1]",
        "{}",
        "",
        "NaN",
    ]
)
OTHERS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["tokens", '"', "\\", "],", "\u00e9"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("tokens"), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def arrays(draw, numbers=NUMBERS):
    items = [draw(BLANKS) + number + draw(BLANKS) for number in draw(st.lists(numbers, max_size=12))]
    return "[" + (",".join(items) or draw(BLANKS)) + "]"


@st.composite
def objects(draw, array):
    fields = [
        (json.dumps(name), json.dumps(value, ensure_ascii=draw(st.booleans())))
        for name, value in draw(
            st.dictionaries(st.text(max_size=4).filter(lambda s: s != "tokens"), OTHERS, max_size=3)
        ).items()
    ]
    fields.insert(draw(st.integers(0, len(fields))), ('"tokens"', draw(array)))
    spaced = [f"{draw(BLANKS)}{name}{draw(BLANKS)}:{draw(BLANKS)}{value}{draw(BLANKS)}" for name, value in fields]
    return draw(BLANKS) + "{" + ",".join(spaced) + "}" + draw(BLANKS)


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def agrees(body):
    lifted = lift_tokens(body, b"tokens")
    whole = parsed(body)
    if lifted is None:
        return None
    tokens, rest = lifted
    if whole is None:
        assert parsed(rest) is None, "what is unsound stays so"
    else:
        assert tokens.tolist() == whole["tokens"]
        assert parsed(rest) == {**whole, "tokens": []}
    return tokens


@given(objects(arrays()))
def test_every_array_of_token_ids_is_taken(text) -> None:
    escaped = any("\\" in json.dumps(name) for name in json.loads(text))
    assert agrees(text.encode()) is not None or escaped


@given(objects(arrays(NUMBERS | NO_TOKENS)))
def test_what_is_no_array_of_token_ids_is_left_to_the_decoder(text) -> None:
    agrees(text.encode())


@given(objects(arrays(NUMBERS | NO_TOKENS)).map(str.encode), st.data())
@example(b'{"tokens":[1],"tokens":[2]}', None)
@example(b'{"tok\\u0065ns":[1],"tokens":[2]}', None)
@example(b'{"tokens":[[1]]}', None)
@example(b'[{"tokens":[1]}]', None)
@example(b'{"tokens":[1', None)
@example(b'{"tokens":[12345678', None)
@example(b'{"tokens":[1],', None)
@example(b'{"a":"\\', None)
@example(b"", None)
def test_a_damaged_text_is_never_taken_for_a_sound_one(body, data) -> None:
    if data is not None:
        at = data.draw(st.integers(0, len(body)))
        body = body[:at] + data.draw(st.binary(max_size=3)) + body[at + data.draw(st.integers(0, 3)) :]
    agrees(body)


@given(
    st.lists(
        st.integers(0, 200_000) | st.sampled_from([0, 9_999_999, 10_000_000, 4_294_967_295]), min_size=20, max_size=300
    ),
    st.sampled_from([", ", ",", ",\n", ",  "]),
    st.data(),
)
def test_long_arrays_whole_and_with_one_byte_that_is_another(tokens, between, data) -> None:
    """The arrays are longer than one step of the scanner, in the formats that encoders write."""
    body = json.dumps({"tokens": tokens, "model": "m"}, separators=(between, ": ")).encode()
    assert agrees(body).tolist() == tokens
    at = data.draw(st.integers(body.index(b"["), body.index(b"]")))
    agrees(
        body[:at]
        + data.draw(st.sampled_from([bytes([each]) for each in b' ,0]["-.e\n/:']) | st.just(b""))
        + body[at + 1 :]
    )
