"""Snapshots: refused files, leftovers of failed writes, and the stored stream places."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import struct
import threading
from pathlib import Path
from random import Random

import pytest
import xxhash
from support import cleared, payload, removed, stored
from world import World, draw_setup, draw_step

import kvindex
from kvindex import InvalidTypeError, InvalidValueError, KVIndexError, PrefixIndex, SnapshotError

CHECKED_FROM = 32


def sealed(data: bytes) -> bytes:
    """Return the data with a matching checksum and size, so that only its contents can be wrong."""
    data = data[:16] + struct.pack("<Q", len(data)) + data[24:]
    return data[:24] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[CHECKED_FROM:])) + data[CHECKED_FROM:]


def saved(index: PrefixIndex, path: Path) -> bytes:
    index.save(path)
    return path.read_bytes()


def world(seed: int, steps: int = 40) -> World:
    rng = Random(seed)
    it = World(draw_setup(rng))
    for _ in range(steps):
        it.do(draw_step(rng))
    return it


def small() -> PrefixIndex:
    """Return an index with some data in every section of a snapshot."""
    index = PrefixIndex(4, max_parked=100)
    tokens = list(range(32))
    index.ingest("a", payload(stored([1, 2, 3, 4], tokens[:16], size=4)), seq=0)
    index.ingest("a", payload(stored([1], tokens[:4], size=4), stored([9], tokens[:4], size=4)), seq=1)
    index.ingest("a", payload(removed(2), stored([77], tokens[:4], parent=76, size=4)), seq=2)
    index.ingest("b", payload(stored([1, 5], tokens[:4] + [7] * 4, size=4, medium="cpu", group_idx=1)), seq=7)
    index.ingest("b", payload(stored([21, 22], tokens[:16], size=8, kv_cache_spec_kind="mamba")), model="m", dp_rank=1)
    index.configure_pod("b", presence="set", clear_media=["gpu", "Tape"], chunk_size=64)
    return index


def test_an_empty_index_is_loaded_as_one(tmp_path):
    index = PrefixIndex(32, hash_seed=5, presence="set", max_parked=3)
    index.save(tmp_path / "s")
    loaded = PrefixIndex.load(tmp_path / "s")
    assert (loaded.block_size, loaded.hash_seed) == (32, 5)
    assert loaded.stats() == index.stats()
    # A new pod takes over the options that the index was created with.
    batch = payload(stored([1], [0] * 32, size=32), stored([1], [0] * 32, size=32), removed(1))
    for it in (index, loaded):
        it.ingest("a", batch)
        assert it.match_prefix([0] * 32).tokens == {}
    assert loaded.ingest("a", payload(stored([5, 6, 7, 8], [0] * 128, size=32, parent=4))).reasons == {"parked_full": 4}
    wider = PrefixIndex.load(tmp_path / "s", max_parked=10)
    assert wider.ingest("a", payload(stored([5, 6, 7, 8], [0] * 128, size=32, parent=4))).parked == 4


def test_a_filter_made_for_one_index_is_right_for_the_one_that_takes_its_place(tmp_path):
    def made(pods: str) -> PrefixIndex:
        index = PrefixIndex()
        for pod in pods:
            index.ingest(pod, payload(stored([1], [1] * 16, size=16)))
        return index

    index = made("ab")
    ready = index.pod_set(["a"])
    assert index.match_prefix([1] * 16, ready_pods=ready).tokens == {"a": 16}
    made("ba").save(tmp_path / "snapshot")
    for other in (PrefixIndex.load(tmp_path / "snapshot"), made("ba"), index):
        assert other.match_prefix([1] * 16, ready_pods=ready).tokens == {"a": 16}


def test_what_does_not_fit_is_shed_while_loading(tmp_path):
    path, index = tmp_path / "snapshot", PrefixIndex()
    for pod in ("a", "b"):
        index.ingest(pod, payload(stored(range(1, 2001), range(32000), size=16)), seq=0)
    index.save(path)
    loaded = PrefixIndex.load(path, max_bytes=65536)
    loaded._check()
    figures = loaded.stats()
    assert figures["bytes"] <= 65536
    assert figures["blocks"] + figures["shed_blocks"] == 2000
    assert figures["blocks"] > 0
    tokens = loaded.match_prefix(range(32000)).tokens
    assert tokens == {"a": 16 * figures["blocks"], "b": 16 * figures["blocks"]}
    # Evicted blocks stay evicted, and the loss is recorded: the next file has it too.
    for pod in ("a", "b"):
        loaded.mark_worker(pod, 0, "exact")
        assert loaded.pod_state(pod) == "degraded"
    loaded.save(path)
    again = PrefixIndex.load(path)
    again._check()
    again.mark_worker("a", 0, "exact")
    assert again.pod_state("a") == "degraded"
    assert again.stats()["shed_blocks"] == figures["shed_blocks"]


def test_workers_alone_may_be_too_large(tmp_path):
    index = PrefixIndex()
    for pod in range(200):
        index.ingest(f"pod-{pod}", payload(stored([1], [1] * 16, size=16)))
    index.save(tmp_path / "snapshot")
    with pytest.raises(SnapshotError, match="does not fit into max_bytes"):
        PrefixIndex.load(tmp_path / "snapshot", max_bytes=32768)


def test_what_is_loaded_lives_as_long_as_what_comes_now(tmp_path):
    now, index = [1000.0], PrefixIndex()
    index.ingest("a", payload(stored([1], [1] * 16, size=16)))
    index.save(tmp_path / "snapshot")
    loaded = PrefixIndex.load(tmp_path / "snapshot", ttl=100.0, clock=lambda: now[0])
    assert loaded.match_prefix([1] * 16).tokens == {"a": 16}
    now[0] += 98.0
    assert loaded.match_prefix([2] * 16).tokens == {}
    assert loaded.stats()["blocks"] == 1
    now[0] += 3.0
    assert loaded.match_prefix([1] * 16).tokens == {}
    assert loaded.stats()["blocks"] == 0
    loaded._check()


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_damage_anywhere_is_refused(tmp_path, flip):
    path = tmp_path / "snapshot"
    whole = saved(small(), path)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match=r"at byte \d+$") as caught:
            PrefixIndex.load(path)
        assert str(caught.value).startswith(f"{path} is refused: "), at


def test_a_file_of_another_length_is_refused(tmp_path):
    path = tmp_path / "snapshot"
    whole = saved(small(), path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SnapshotError, match=rf"(cut short|within its header), seen at byte {size}$"):
            PrefixIndex.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError, match=f"follows its end, seen at byte {len(whole)}$"):
        PrefixIndex.load(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "ends within its header, seen at byte 0"),
        (b"kvin", "ends within its header, seen at byte 4"),
        (b"#!/bin/sh\n" * 50, "no snapshot of an index, seen at byte 0"),
        (bytes(4096), "no snapshot of an index, seen at byte 0"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, why):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(SnapshotError, match=why):
        PrefixIndex.load(tmp_path / "foreign")


def test_a_newer_version_is_refused_by_name(tmp_path):
    path = tmp_path / "snapshot"
    whole = saved(small(), path)
    assert sealed(whole) == whole
    path.write_bytes(sealed(whole[:8] + struct.pack("<I", 1000) + whole[12:]))
    with pytest.raises(SnapshotError, match="newer version of kvindex, seen at byte 8"):
        PrefixIndex.load(path)


@pytest.mark.parametrize("where", ["missing/snapshot", "", "folder"])
def test_what_cannot_be_opened_is_named(tmp_path, where):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SnapshotError, match=str(tmp_path)) as caught:
        PrefixIndex.load(tmp_path / where)
    assert caught.value.errno in (errno.ENOENT, errno.EISDIR)
    with pytest.raises(SnapshotError, match="a previous file is unchanged") as caught:
        PrefixIndex().save(tmp_path / where)
    assert caught.value.errno in (errno.ENOENT, errno.EISDIR)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def accept(data: bytes, path: Path) -> PrefixIndex | None:
    """Load a file and return the index after checking its structure, or None if the file is refused."""
    path.write_bytes(data)
    try:
        index = PrefixIndex.load(path)
    except SnapshotError:
        return None
    index._check()
    return index


def use(index: PrefixIndex) -> None:
    """Use a loaded index: the values in the file must not cause an error later either."""
    tokens = list(range(32))
    for model in ("", "m"):
        index.match_prefix(tokens, model=model)
        for pod in ("a", "b", "new"):
            batch = payload(stored([1, 2, 3, 4], tokens[:16], size=4), removed(1, 9), stored([76], [1] * 4, size=4))
            index.ingest(pod, batch, model=model)
            index._check()
    index.match_prefix(tokens).best()
    for pod in ("a", "b"):
        for rank in (0, 1):
            index.clear_worker(pod, rank)
        index._check()


def test_contradictions_are_refused_or_harmless(tmp_path):
    """Change every number in a small file, with a matching checksum: intentional damage."""
    path = tmp_path / "snapshot"
    whole = saved(small(), path)
    accepted = 0
    for at in range(CHECKED_FROM, len(whole) - 3, 4):
        before = struct.unpack_from("<I", whole, at)[0]
        for value in (0xFFFFFFFF, 0x7FFFFFFF, 0, 1, before + 1 & 0xFFFFFFFF, before - 1 & 0xFFFFFFFF, before ^ 0x10000):
            data = whole[:at] + struct.pack("<I", value) + whole[at + 4 :]
            if value != before and (index := accept(sealed(data), path)) is not None:
                use(index)
                accepted += 1
    # Any value is valid for the hash of a block, but not for its parent or its holders.
    assert 0 < accepted < len(whole)


@pytest.mark.parametrize("seed", range(6))
def test_mutations_are_refused_or_harmless(tmp_path, seed):
    rng, path = Random(seed), tmp_path / "snapshot"
    whole = saved(world(seed).index, path)
    other = saved(world(seed + 100).index, path)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, n = rng.randrange(CHECKED_FROM, len(data)), rng.choice((1, 4, 8, 24, 64))
            kind = rng.randrange(5)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + n] = data[(other_at := rng.randrange(len(data))) : other_at + n]
            elif kind == 2:
                data[at : at + n] = b""
            elif kind == 3:
                data[at:at] = other[(other_at := rng.randrange(len(other))) : other_at + n]
            else:
                data[at : at + 4] = rng.choice((0, 1, 2, 3, 0xFFFFFFFF)).to_bytes(4, "little")
        index = accept(sealed(bytes(data)), path)
        refused += index is None
        if index is not None:
            use(index)
    assert refused


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_disk_that_is_full_leaves_the_old_snapshot_and_nothing_else(tmp_path):
    path = tmp_path / "snapshot"
    before = saved(small(), path)
    index = PrefixIndex()
    index.ingest("a", payload(stored(range(1, 2001), range(32000), size=16)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SnapshotError, match="a previous file is unchanged") as caught:
            index.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["snapshot"]
    index.save(path)
    assert PrefixIndex.load(path).stats()["blocks"] == 2000


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there" / "snapshot")
    small().save(tmp_path / "here")
    assert (tmp_path / "here").is_symlink()
    assert PrefixIndex.load(tmp_path / "there" / "snapshot").stats()["pods"] == 2


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "snapshot"
    small().save(path)
    path.chmod(mode)
    small().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_the_process_gives(tmp_path):
    before = os.umask(0o027)
    try:
        small().save(tmp_path / "snapshot")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "snapshot").stat().st_mode) == 0o640


def test_only_a_regular_file_is_replaced_or_read(tmp_path):
    """A pipe stays a pipe, and no call waits for its other end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for name in ("pipe", "directory", "link", "socket"):
            before = os.lstat(tmp_path / name)
            for call in (small().save, PrefixIndex.load):
                with pytest.raises(SnapshotError, match=name) as caught:
                    call(tmp_path / name)
                assert caught.value.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO)
            assert os.lstat(tmp_path / name)[:3] == before[:3]
    assert sorted(os.listdir(tmp_path)) == ["directory", "link", "pipe", "socket"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127, ".", "..", "a b\nc"])
def test_every_legal_name_will_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.strip("."):
        small().save(name)
        assert os.listdir() == [name]
        assert PrefixIndex.load(name).stats()["pods"] == 2
    else:
        with pytest.raises(SnapshotError, match="directory"):
            small().save(name)


def test_a_path_may_be_as_long_as_the_system_allows(tmp_path, monkeypatch):
    folder = tmp_path
    while len(str(folder)) + 201 < 4096 - 10:
        folder = folder / ("d" * 200)
    folder.mkdir(parents=True)
    path = folder / ("f" * (4095 - len(str(folder)) - 1))
    small().save(path)
    assert PrefixIndex.load(path).stats()["pods"] == 2


@pytest.mark.parametrize("path", [None, 3, b"snapshot", 1.5, ["snapshot"]])
def test_what_is_no_path_is_refused(path):
    for call in (small().save, PrefixIndex.load):
        with pytest.raises(InvalidTypeError, match="path"):
            call(path)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800"])
def test_what_no_file_can_be_called_is_refused(path):
    for call in (small().save, PrefixIndex.load):
        with pytest.raises(InvalidValueError, match="path"):
            call(path)


def test_what_is_there_already_is_not_said_to_be_missing(tmp_path, monkeypatch):
    """On a file system that cannot sync a folder, the snapshot is in its place, and the message reports this."""
    path, fsync = tmp_path / "snapshot", os.fsync
    before = saved(small(), path)

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    index = small()
    index.ingest("more", payload(stored([1], range(16), size=16)))
    with pytest.raises(SnapshotError, match="is there, and may be gone after a power failure") as caught:
        index.save(path)
    assert "as it was" not in str(caught.value)
    assert path.read_bytes() != before
    assert PrefixIndex.load(path).stats()["pods"] == 3


def test_a_snapshot_has_whole_batches_only(tmp_path):
    """Several threads apply batches so large that the lock is released in the middle, while snapshots are taken."""
    index, blocks, pods = PrefixIndex(4), 40, ("a", "b")
    stop, begun = threading.Event(), threading.Barrier(len(pods) + 1)

    def stream(pod: str) -> None:
        seq = 0
        while not stop.is_set():
            if seq == 1:
                begun.wait(timeout=60)
            first = 1 + seq * 10 * blocks
            events = (
                stored(range(at, at + blocks), [at] * 4 * blocks, size=4)
                for at in range(first, first + 10 * blocks, blocks)
            )
            index.ingest(pod, payload(*events, ts=float(seq)), seq=seq)
            seq += 1

    threads = [threading.Thread(target=stream, args=(pod,)) for pod in pods]
    for thread in threads:
        thread.start()
    try:
        begun.wait(timeout=60)
        for turn in range(8):
            index.save(tmp_path / str(turn))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for turn in range(8):
        loaded = PrefixIndex.load(tmp_path / str(turn))
        loaded._check()
        for pod in pods:
            figures = loaded.worker_stats(pod)[0]
            assert figures["blocks"] == (figures["last_seq"] + 1) * 10 * blocks


# ------------------------------------------------------------------------------------------------------------- places


def batch(n: int) -> bytes:
    return payload(stored([n + 1], [n] * 16, size=16), ts=float(n))


def test_a_place_is_the_last_batch_of_its_stream():
    index = PrefixIndex()
    for seq in range(3):
        index.ingest("a", batch(seq), seq=seq, model="m")
    index.ingest("a", batch(9), seq=4, dp_rank=2)
    places = index.stream_places("a")
    assert places == {
        0: (2, 2.0, xxhash.xxh3_64_intdigest(batch(2)), True, "m"),
        2: (4, 9.0, xxhash.xxh3_64_intdigest(batch(9)), False, ""),
    }
    assert {rank: figures["last_seq"] for rank, figures in index.worker_stats("a").items()} == {0: 2, 2: 4}


@pytest.mark.parametrize(("seqs", "whole"), [((0, 1, 2), True), ((0, 2), False), ((1,), False), ((0, 2, 3), False)])
def test_a_place_is_whole_when_nothing_is_left_out(seqs, whole):
    index = PrefixIndex()
    for seq in seqs:
        index.ingest("a", batch(seq), seq=seq)
    assert index.stream_places("a")[0].whole is whole


def test_a_clear_heals_a_place_and_a_lost_batch_spoils_it():
    index = PrefixIndex()
    index.ingest("a", batch(5), seq=5)
    index.ingest("a", payload(cleared()), seq=6)
    assert index.stream_places("a")[0].whole
    with pytest.raises(kvindex.EventDecodeError):
        index.ingest("a", b"\xc1", seq=7)
    assert index.stream_places("a")[0] == (7, 0.0, xxhash.xxh3_64_intdigest(b"\xc1"), False, "")
    # A clear that leaves other media alone heals nothing.
    index.configure_pod("a", clear_media=["GPU"])
    index.ingest("a", payload(cleared()), seq=8)
    assert not index.stream_places("a")[0].whole


def test_what_comes_without_a_number_loses_the_place():
    index = PrefixIndex()

    def numbered() -> None:
        index.ingest("a", batch(0), seq=0)
        assert 0 in index.stream_places("a")

    for lose in (
        lambda: index.ingest("a", batch(1)),
        lambda: index.process_block_stored(
            kvindex.BlockStored(pod="a", block_hashes=[5], token_ids=[1] * 16, block_size=16)
        ),
        lambda: index.process_all_blocks_cleared(kvindex.AllBlocksCleared(pod="a")),
        lambda: index.clear_worker("a"),
        lambda: (index.remove_pod("a"), index.configure_pod("a")),
    ):
        numbered()
        lose()
        assert index.stream_places("a") == {}


@pytest.mark.parametrize("seq", [-1, 1 << 63, "0", 1.5])
def test_numbers_that_are_none_are_refused(seq):
    index = PrefixIndex()
    with pytest.raises(KVIndexError, match="seq"):
        index.ingest("a", batch(0), seq=seq)
    assert index.stats()["pods"] == 0


def test_a_big_batch_moves_the_place_once_it_is_whole():
    index = PrefixIndex(4)
    events = [stored([i + 1], [i] * 4, size=4) for i in range(1000)]
    index.ingest("a", payload(*events, ts=3.5), seq=0)
    assert index.stream_places("a")[0][:2] == (0, 3.5)
    assert index.worker_stats("a")[0]["blocks"] == 1000


def tokens_with_hash(wanted: int) -> list[int]:
    """Find two tokens whose block has this hash. XXH3 is a bijection for eight bytes, so it can be inverted."""
    word, prime = (1 << 64) - 1, 0x9FB21C651E98DF25

    def turned(value: int, by: int) -> int:
        return ((value << by) | (value >> (64 - by))) & word

    def back(value: int) -> int:
        value ^= value >> 28 ^ value >> 56
        value = value * pow(prime, -1, 1 << 64) & word
        value ^= (value >> 35) + 8
        value = value * pow(prime, -1, 1 << 64) & word
        # Applying x ^ x<<<49 ^ x<<<24 another 63 times inverts it.
        for _ in range(63):
            value ^= turned(value, 49) ^ turned(value, 24)
        return value

    flip = back(int(kvindex.local_hashes([0, 0], block_size=2)[0]))
    mixed = back(wanted) ^ flip
    return [mixed >> 32, mixed & 0xFFFFFFFF]


def test_content_whose_prefix_hashes_collide_is_read_back(tmp_path) -> None:
    """Two chains begin with the same hash: the first block of a prompt and the second block of another one.

    The chance is 2**-64, but a client that knows the seed can construct it. Then no snapshot could be loaded.
    """
    fork = [1, 1, 3, 3]
    alike = tokens_with_hash(int(kvindex.prefix_hashes(fork, block_size=2)[1]))
    assert kvindex.prefix_hashes(alike, block_size=2)[0] == kvindex.prefix_hashes(fork, block_size=2)[1]
    prompts = {"a": [1, 1, 2, 2], "b": fork, "c": [*alike, 5, 5]}
    for order in ("abc", "acb"):
        index = PrefixIndex(2)
        for pod in order:
            index.ingest(pod, payload(stored([1, 2], prompts[pod], size=2)))
        index._check()
        index.save(tmp_path / order)
        again = PrefixIndex.load(tmp_path / order)
        again._check()
        for pod, prompt in prompts.items():
            assert again.match_prefix(prompt).tokens == index.match_prefix(prompt).tokens
            assert again.match_prefix(prompt).tokens[pod] == 4
