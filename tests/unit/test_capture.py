"""The capture format: round trips, the recorded captures, and every kind of invalid file."""

import gzip
import io
import random

import msgpack
import numpy as np
import pytest

from kvindex import CaptureError, InvalidValueError
from kvindex.capture import FORMAT, CaptureWriter, Forget, Message, Query, read_capture

HEADER = {"engine": "vllm", "version": "0.33.0", "block_size": 16, "pods": ["a", "b"], "model": "m"}


def sample_records(n=200, seed=7):
    rng = random.Random(seed)
    records = []
    for i in range(n):
        kind = rng.random()
        if kind < 0.1:
            records.append(Forget("b", rng.randrange(8), rng.choice([None, 1.7e9 + i])))
        elif kind < 0.2:
            at, rank = rng.choice([(None, 3), (1.7e9 + i, None), (1.7e9 + i, 0)])
            records.append(Message("b", "kv@b@m", i, rng.randbytes(rng.randrange(400)), at, rank))
        elif kind < 0.6:
            records.append(Message("a", "kv@a@m", i, rng.randbytes(rng.randrange(400))))
        else:
            tokens = np.array([rng.randrange(1 << 32) for _ in range(rng.randrange(300))], dtype=np.uint32)
            salt = rng.choice([None, "tenant-a"])
            keys = rng.choice([None, [None, [["image-1", 3]], ["text", b"\x00\xff", 7]]])
            records.append(Query(f"q{i}", tokens, {"a": 16, "b": 0}, "adapter", 2, salt, keys))
    return records


def plain(item):
    if isinstance(item, Query):
        assert item.tokens.dtype == np.uint32
        return ("query", item._replace(tokens=item.tokens.tolist()))
    return (type(item).__name__, item)


def written(records):
    buffer = io.BytesIO()
    with CaptureWriter(buffer, HEADER) as writer:
        for record in records:
            writer.write(record)
    return buffer.getvalue()


def packed(*items):
    return gzip.compress(b"".join(msgpack.packb(item) for item in items))


def read_until_error(data):
    """Return the items of a capture before its error, and the error."""
    got = []
    with pytest.raises(CaptureError) as caught:
        for item in read_capture(io.BytesIO(data)):
            got.append(item)
    return got, caught.value


def test_what_is_written_is_read_back():
    records = sample_records()
    header, *got = read_capture(io.BytesIO(written(records)))
    assert header == {**HEADER, "format": FORMAT}
    assert [plain(r) for r in got] == [plain(r) for r in records]


def test_the_same_records_give_the_same_bytes():
    assert written(sample_records()) == written(sample_records())


def test_a_path_works_like_a_file(tmp_path):
    records = sample_records(20)
    path = tmp_path / "x.msgpack.gz"
    writer = CaptureWriter(path, HEADER)
    for record in records:
        writer.write(record)
    writer.close()
    writer.close()
    assert [plain(r) for r in list(read_capture(path))[1:]] == [plain(r) for r in records]
    assert [plain(r) for r in list(read_capture(str(path)))[1:]] == [plain(r) for r in records]


def test_the_file_given_is_left_open():
    file = io.BytesIO(written(sample_records(3)))
    list(read_capture(file))
    assert not file.closed


def test_the_recorded_captures_read_like_a_plain_unpacker_reads_them(shared):
    paths = sorted((shared / "captures").glob("*.gz"))
    assert paths
    for path in paths:
        header, *expected = msgpack.Unpacker(io.BytesIO(gzip.decompress(path.read_bytes())))
        got_header, *got = read_capture(path)
        assert got_header == header
        assert len(got) == len(expected)
        for record, raw in zip(got, expected, strict=True):
            if raw[0] == "msg":
                assert ["msg", *record] == [*raw, None, None]
            else:
                assert record.id == raw[1]
                assert record.tokens.astype("<u4").tobytes() == raw[2]
                assert {k: getattr(record, k) for k in raw[3]} == raw[3]
                assert record.hits == raw[4]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.77, 0.999])
def test_a_file_that_is_cut_off_gives_what_came_before_and_says_at_which_byte(fraction):
    records = sample_records()
    data = written(records)
    data = data[: int(len(data) * fraction)]
    stream = gzip.GzipFile(fileobj=io.BytesIO(data))
    whole = b""
    with pytest.raises(EOFError):
        while piece := stream.read1(100):
            whole += piece
    counter = msgpack.Unpacker(io.BytesIO(whole))
    complete = sum(1 for _ in counter)

    got, error = read_until_error(data)
    assert error.offset == len(whole)
    assert f"cut off at byte {len(whole)}" in str(error)
    assert len(got) == complete
    assert [plain(r) for r in got[1:]] == [plain(r) for r in records[: max(complete - 1, 0)]]


def test_a_missing_end_of_the_gzip_stream_is_told_even_after_the_last_whole_record():
    records = sample_records(5)
    got, error = read_until_error(written(records)[:-8])
    assert len(got) == 6
    assert "after a whole record" in str(error)


def test_a_record_that_ends_too_early_inside_a_good_gzip_stream():
    raw = gzip.decompress(written(sample_records(5)))
    got, error = read_until_error(gzip.compress(raw[:-1]))
    assert len(got) == 5
    assert error.offset == len(raw) - 1


NO_CAPTURES = {
    "empty": (b"", "cut off at byte 0"),
    "no-gzip": (b"not gzip at all", "is not a gzip file"),
    "empty-gzip": (gzip.compress(b""), "cut off at byte 0"),
    "no-header": (packed([1, 2]), "starts with a header map"),
    "no-format": (packed({"engine": "vllm"}), "starts with a header map"),
    "other-format": (
        packed({"format": "kvindex-capture/9", "block_size": 16}),
        "this version reads 'kvindex-capture/1'",
    ),
    "no-block-size": (packed({"format": FORMAT}), "block_size must be a positive number"),
    "block-size-0": (packed({"format": FORMAT, "block_size": 0}), "block_size must be a positive number"),
    "block-size-text": (packed({"format": FORMAT, "block_size": "16"}), "block_size must be a positive number"),
    "no-msgpack": (gzip.compress(b"\xc1"), "no msgpack object"),
    "no-utf8": (gzip.compress(b"\xa2\xff\xff"), "no msgpack object"),
}


@pytest.mark.parametrize("kind", NO_CAPTURES)
def test_a_file_that_is_no_capture(kind):
    data, message = NO_CAPTURES[kind]
    got, error = read_until_error(data)
    assert got == []
    assert message in str(error)
    assert error.offset == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["note", 1], "unknown kind of record 'note'"),
        ({"type": "msg"}, "a record is an array"),
        ([], "a record is an array"),
        (5, "a record is an array"),
        (["msg", "a", "t", 0], "'msg' record has other fields"),
        (["msg", "a", "t", 0, "text"], "'msg' record has other fields"),
        (["msg", "a", "t", 0, b"", 1.5], "'msg' record has other fields"),
        (["msg", "a", "t", 0, b"", 1.5, -1], "'msg' record has other fields"),
        (["msg", "a", "t", 0, b"", "now", 0], "'msg' record has other fields"),
        (["forget", "a"], "'forget' record has other fields"),
        (["forget", "a", -1, None], "'forget' record has other fields"),
        (["query", "q", [1, 2], {}, {}], "'query' record has other fields"),
        (["query", "q", b"\0" * 5, {}, {}], "5 bytes of tokens"),
        (["query", "q", b"\0" * 4, {}, {"a": "16"}], "must map pods to numbers of tokens"),
    ],
)
def test_a_bad_record_is_named_and_what_came_before_counts(record, message):
    header = {"format": FORMAT, "block_size": 16}
    good = ["msg", "a", "", 0, b"payload"]
    got, error = read_until_error(packed(header, good, record, good))
    assert got == [header, Message("a", "", 0, b"payload")]
    assert message in str(error)
    assert error.offset == len(msgpack.packb(header)) + len(msgpack.packb(good))


def test_damage_in_the_middle_is_told_with_the_byte_up_to_which_it_was_good():
    records = sample_records(400)
    data = bytearray(written(records))
    data[len(data) // 2] ^= 0xFF
    got, error = read_until_error(bytes(data))
    # Deflate detects damage some way after it, so records near the damage are not guaranteed. Earlier ones are.
    quarter = len(records) // 4
    assert [plain(r) for r in got[1 : quarter + 1]] == [plain(r) for r in records[:quarter]]
    assert error.offset > 0


def test_a_writer_refuses_a_header_without_a_block_size():
    with pytest.raises(InvalidValueError, match="block_size"):
        CaptureWriter(io.BytesIO(), {"engine": "vllm"})


def test_a_message_without_a_time_is_written_as_it_always_was():
    plain_one = ["msg", "a", "kv@a@m", 3, b"payload"]
    assert gzip.decompress(written([Message(*plain_one[1:])])).endswith(msgpack.packb(plain_one))


@pytest.mark.parametrize("level", [1, 9])
def test_what_was_flushed_is_there_whatever_becomes_of_the_writer(level):
    records = sample_records(60)
    buffer = io.BytesIO()
    writer = CaptureWriter(buffer, HEADER, level=level)
    for record in records[:40]:
        writer.write(record)
    writer.flush()
    killed = buffer.getvalue()
    for record in records[40:]:
        writer.write(record)
    writer.close()
    got, error = read_until_error(killed)
    assert [plain(r) for r in got[1:]] == [plain(r) for r in records[:40]]
    assert "after a whole record" in str(error)
    assert [plain(r) for r in list(read_capture(io.BytesIO(buffer.getvalue())))[1:]] == [plain(r) for r in records]
