"""A simulated pod with an engine's API: it reports the numbers of its cache, which the index must predict."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack

import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvindex import EventManager, PodSource, PrefixIndex, StreamError
from kvindex.routing import EndpointPicker
from kvindex.sim import SimProcess
from kvindex.sim import tokenizer as sim_tokenizer
from kvindex.sim.tokenizer import chat_ids
from kvindex.text import EncodeError, PromptEncoder, RemoteEncoder

HTTP = urllib3.PoolManager()
ENCODER = PromptEncoder(sim_tokenizer.tokenizer(), sim_tokenizer.TEMPLATE)


@pytest.fixture(scope="module")
def pods():
    with ExitStack() as stack:
        yield {name: stack.enter_context(SimProcess(name=name, http=0, blocks=5000)) for name in "abcd"}
    HTTP.clear()


def post(url, path, **body):
    answer = HTTP.request("POST", url + path, json=body)
    return answer.status, answer.json()


def test_every_requests_cached_tokens_are_the_expected_ones(pods):
    index = PrefixIndex(block_size=16)
    rng = random.Random(3)
    with EventManager(index) as manager:
        for pod in pods.values():
            manager.add_pod(PodSource.from_vllm(pod.url, name=pod.name))
        assert manager.wait_until_exact(20.0) == {}
        picker = EndpointPicker(index, manager, speculative_ttl=0)
        encoder = RemoteEncoder(next(iter(pods.values())).url)
        chats = [[{"role": "system", "content": "You are kind. " * 20}] for _ in range(8)]
        cached = aligned = 0
        for turn in range(5):
            for chat in chats:
                content = "x" * rng.randint(1, 99)
                if turn % 2:  # a prompt that ends with a block
                    ids = encoder.encode_chat([*chat, {"role": "user", "content": content}])
                    content += "x" * (-len(ids) % 16)
                chat.append({"role": "user", "content": content})
                ids = encoder.encode_chat(chat)
                for _ in range(2):
                    choice = picker.pick(ids, model="sim")
                    status, answer = post(choice.address, "/v1/chat/completions", messages=chat, max_tokens=20)
                    assert status == 200
                    usage = answer["usage"]
                    assert usage["prompt_tokens"] == len(ids)
                    assert usage["prompt_tokens_details"]["cached_tokens"] == choice.cached_tokens
                    picker.finished(choice, usage["prompt_tokens_details"]["cached_tokens"])
                    cached += choice.cached_tokens
                    aligned += len(ids) % 16 == 0 and choice.cached_tokens == len(ids) - 16
                    applied(manager, pods)
                chat.append(answer["choices"][0]["message"])
        assert cached > 10_000
        assert aligned >= 16
        assert {row["reason"] for row in picker.stats()["pods"].values()} == {""}
        assert sum(row["over_tokens"] + row["under_tokens"] for row in picker.stats()["pods"].values()) == 0


def applied(manager, pods):
    """Wait until all published batches of the pods are in the index."""
    seqs = {name: pod.seqs() for name, pod in pods.items()}
    for _ in range(20_000):
        status = manager.status()
        if all((status[name].last_seq or 0) >= max(seqs[name].values()) - 1 for name in seqs):
            return
    raise AssertionError("events do not arrive")


def test_streams_completions_models_and_health(pods):
    url = pods["a"].url
    assert HTTP.request("GET", url + "/health").status == 200
    assert HTTP.request("GET", url + "/v1/models").json()["data"][0]["id"] == "sim"
    ids = list(range(100, 164))
    assert post(url, "/tokenize", prompt=ids)[1]["tokens"] == ids
    first = post(url, "/v1/completions", prompt=ids, max_tokens=3)[1]
    assert first["usage"] == {
        "prompt_tokens": 64,
        "completion_tokens": 3,
        "total_tokens": 67,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    # vLLM computes the last token.
    body = {"prompt": ids, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    lines = HTTP.request("POST", url + "/v1/completions", json=body).data.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == first["choices"][0]["text"]
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}
    salted = post(url, "/v1/completions", prompt=ids, max_tokens=3, cache_salt="s")[1]
    adapted = post(url, "/v1/completions", prompt=ids, max_tokens=3, model="adapter-1")[1]
    for answer in (salted, adapted):
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat_has_an_id_of_its_own_and_its_stream_begins_with_the_role(pods):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    first, second = (post(pods["a"].url, "/v1/chat/completions", **body)[1] for _ in range(2))
    assert first["choices"] == second["choices"]
    data = HTTP.request("POST", pods["a"].url + "/v1/chat/completions", json={**body, "stream": True}).data.decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in data.split("\n\n")[:-2]]
    (streamed,) = {chunk["id"] for chunk in chunks}
    assert len({first["id"], second["id"], streamed}) == 3
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta["content"] for delta in deltas) == first["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/v1/completions", {"prompt": 3}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"messages": []}, 400, "a completion a prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
        ("/v1/completions", {"prompt": "a" * 100_000}, 400, "does not fit"),
        ("/v1/chat/completions", {"messages": [{"role": "robot"}]}, 400, "no role 'robot'"),
        ("/v1/chat/completions", {"messages": 3}, 400, "messages must be"),
        ("/tokenize", {}, 400, "prompt must be"),
    ],
)
def test_what_an_engine_refuses_is_refused_by_name(pods, path, body, status, named):
    found, answer = post(pods["b"].url, path, **body)
    assert found == status
    assert named in answer["error"]["message"]
    assert post(pods["b"].url, "/v1/completions", prompt="still here")[0] == 200


def test_an_encoder_reads_its_tokens(pods):
    encoder = RemoteEncoder(pods["c"].url)
    chat = [{"role": "user", "content": "größe"}]
    assert encoder.encode_chat(chat).tolist() == chat_ids(chat)
    with pytest.raises(EncodeError, match="no role"):
        encoder.encode_chat([{"role": "robot", "content": ""}])


def test_an_engine_of_sglangs_form_is_asked_as_sglang_is():
    with SimProcess(name="s", form="sglang-0.5.22", http=0, ranks=2, window=64, window_blocks=100) as pod:
        source = PodSource.from_sglang(pod.url)
        assert source.workers() == pod.ranks
        assert (source.engine, source.hybrid, source.model, source.block_size) == ("sglang", True, "sim", 16)
        with pytest.raises(StreamError, match="404"):
            PodSource.from_vllm(pod.url)


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text)
contents = texts | st.lists(texts.map(lambda text: {"type": "text", "text": text}), max_size=3) | st.none()
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}), min_size=1
)


@given(chats, st.booleans())
@settings(max_examples=200)
def test_the_written_tokenizer_and_template_give_the_engines_ids(chat, opening):
    assert ENCODER.encode_chat(chat, add_generation_prompt=opening).tolist() == chat_ids(chat, opening)


def test_the_written_files_are_those_of_a_models_directory(tmp_path):
    subprocess.run([sys.executable, "-m", "kvindex.sim.tokenizer", tmp_path / "model"], check=True)
    made = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    encoder = PromptEncoder(made, (tmp_path / "model" / "chat_template.jinja").read_text())
    chat = [{"role": role, "content": "größe\n"} for role in ("system", "user", "assistant", "tool")]
    assert encoder.encode_chat(chat).tolist() == chat_ids(chat)
    with pytest.raises(EncodeError, match="no role robot"):
        encoder.encode_chat([{"role": "robot", "content": ""}])


def test_what_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "kvindex.sim.http", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'kvindex\[sim\]'"):
        import kvindex.sim.http  # noqa: F401
