"""Chat templates, engines that tokenize, and refused input."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvindex import InvalidTypeError, InvalidValueError, KVIndexError
from kvindex.text import EncodeError, PromptEncoder, RemoteEncoder

TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("no role " ~ message.role) }}
    {%- endif %}
    {{- "<|start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|end|>\\n" }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ "<|start|>assistant\\n" }}{% endif %}
{%- if thinking %}{{ "think" }}{% endif %}"""
MESSAGES = [{"role": "user", "content": "hello"}]
RENDERED = "<|start|>user\nhello<|end|>\n<|start|>assistant\n"


def tokenizer():
    made = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|start|>", "<|end|>"])
    return made


def whole(text):
    return tokenizer().encode(text, add_special_tokens=False).ids


@pytest.fixture
def encoder():
    return PromptEncoder(tokenizer(), TEMPLATE)


def test_a_chat_is_its_template_encoded(encoder):
    assert encoder.encode_chat(MESSAGES).tolist() == whole(RENDERED)
    assert encoder.encode_chat(MESSAGES, add_generation_prompt=False).tolist() == whole("<|start|>user\nhello<|end|>\n")
    assert encoder.encode_chat(MESSAGES, thinking=True).tolist() == whole(RENDERED + "think")
    tools = [{"type": "function", "function": {"name": "größe"}}]
    written = json.dumps(tools, ensure_ascii=False)
    text = RENDERED.replace("<|end|>\n", f"<|end|>\n{written}")
    assert encoder.encode_chat(MESSAGES, tools).tolist() == whole(text)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is missing"),
        ("hello", "messages must be a list of objects with role and content, not str"),
        (MESSAGES[0], "not dict"),
        (3, "not int"),
        (["hello"], r"messages\[0\] \(str\) has no role"),
        ([*MESSAGES, {"content": "hello"}], r"messages\[1\] \(dict\) has no role"),
        ([{"role": None, "content": "hello"}], "has no role"),
    ],
)
def test_messages_of_another_form_are_refused_before_the_template(encoder, messages, reason):
    for each in (encoder, RemoteEncoder("http://127.0.0.1:1")):
        with pytest.raises(InvalidTypeError, match=reason) as raised:
            each.encode_chat(messages)
        assert "hello" not in str(raised.value)


def test_a_message_may_be_an_object(encoder):
    assert encoder.encode_chat([SimpleNamespace(**MESSAGES[0])]).tolist() == whole(RENDERED)


def test_a_template_that_raises_is_one_clear_error_and_others_are_served(encoder):
    with pytest.raises(EncodeError, match="cannot render these messages: no role tool") as raised:
        encoder.encode_chat([{"role": "tool", "content": ""}])
    assert isinstance(raised.value, KVIndexError)
    with pytest.raises(EncodeError, match="has no chat template"):
        PromptEncoder(tokenizer()).encode_chat(MESSAGES)
    with pytest.raises(InvalidValueError, match="chat_template is not a Jinja template"):
        PromptEncoder(tokenizer(), "{% if %}")
    assert encoder.encode_chat(MESSAGES).tolist() == whole(RENDERED)


def test_a_template_cannot_reach_what_is_outside():
    hostile = PromptEncoder(tokenizer(), "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(EncodeError):
        hostile.encode_chat(MESSAGES)


@pytest.mark.parametrize("text", ["abc\ud800def", "<|start|>a<|end|>\udfff"])
def test_a_lone_surrogate_is_named(encoder, text):
    with pytest.raises(InvalidValueError, match="lone surrogate"):
        encoder.encode(text)
    assert encoder.stats()["calls"] == 0
    assert encoder.encode("abc").tolist() == whole("abc")


@pytest.mark.parametrize("wrong", [None, b"abc", 3, ["a"]])
def test_what_is_no_text_is_refused(encoder, wrong):
    with pytest.raises(InvalidTypeError, match="text is"):
        encoder.encode(wrong)


@pytest.mark.parametrize("text", ["", "<|end|>", "<|end|><|end|>", "a<|end|>", "<|end|>a"])
def test_ends(encoder, text):
    for _ in range(2):
        assert encoder.encode(text).tolist() == whole(text)


def test_very_many_special_tokens_are_encoded_whole(encoder):
    text = "<|end|>" * 50_000
    assert encoder.encode(text).tolist() == whole(text)
    assert encoder._cache._entries.keys() == {text}


def test_ids_are_uint32_and_a_callers_own_or_read_only(encoder):
    for text in ("hello", RENDERED):
        first = encoder.encode(text)
        if first.flags.writeable:
            first[:] = 0
        assert encoder.encode(text).tolist() == whole(text)
        assert first.dtype == "uint32"


@pytest.mark.parametrize("max_bytes", [0, 1000, 3000])
def test_the_cache_is_bounded_and_the_oldest_goes(max_bytes):
    encoder = PromptEncoder(tokenizer(), max_bytes=max_bytes)
    for i in range(50):
        encoder.encode(f"{i} hello" * 3)
        assert encoder.stats()["bytes"] <= max_bytes
    before = encoder.stats()["tokens_reused"]
    encoder.encode("49 hello" * 3)
    assert (encoder.stats()["tokens_reused"] > before) == (max_bytes > 0)
    before = encoder.stats()["tokens_reused"]
    encoder.encode("0 hello" * 3)
    assert encoder.stats()["tokens_reused"] == before


def test_the_users_tokenizer_is_left_alone_and_changes_to_it_have_no_effect():
    theirs = tokenizer()
    theirs.enable_truncation(3)
    theirs.enable_padding(length=100)
    encoder = PromptEncoder(theirs)
    assert encoder.encode("hello world").tolist() == whole("hello world")
    assert theirs.truncation["max_length"] == 3
    theirs.add_special_tokens(["hello"])
    assert encoder.encode("hello").tolist() == whole("hello")


def test_an_id_that_is_not_the_tokens_at_a_cut_is_encoded_whole(encoder):
    # Simulates a tokenizer that treats a token differently from its kind.
    encoder._marks["<|end|>"] = 7
    assert encoder.encode(RENDERED).tolist() == whole(RENDERED)
    assert encoder.stats()["fallbacks"] == 1


AGENT = """{% for m in messages %}<|start|>{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"""


def agent(messages, template=AGENT, **options):
    """Return the ids of messages, to compare with those of the text that a template should make of them."""
    return PromptEncoder(tokenizer(), template, **options).encode_chat(messages).tolist()


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"at": "größe", "n": [1, 2.5, null]}', '{"at": "größe", "n": [1, 2.5, null]}'),
        ({"at": 1}, '{"at": 1}'),
        ("", "{}"),
        (None, "{}"),
        ("{", "{}"),
        ("[1]", "{}"),
        ("[" * 100_000, "{}"),
        (3, "{}"),
    ],
)
def test_arguments_of_tool_calls_are_objects_to_the_template_as_in_engines(arguments, given):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert agent([message]) == whole(f"<|start|>{given}<|end|>")
    # The caller's message must not change.
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_no_tool_calls_and_strange_ones_reach_the_template():
    assert agent([{"role": "assistant", "tool_calls": []}]) == whole("<|start|><|end|>")
    template = "{% for m in messages %}{{ 'calls' if 'tool_calls' in m else 'none' }}{% endfor %}"
    assert agent([{"role": "assistant", "content": "", "tool_calls": []}], template) == whole("none")
    for strange in ([3], [{}], [{"function": 3}], "x"):
        assert agent([{"role": "assistant", "content": "", "tool_calls": strange}], template) == whole("calls")


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
READS = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}
{%- for c in m.content %}{{ c.text or c.type }}{% endfor %}{% endif %}{% endfor %}"""


def test_text_parts_are_one_string_where_the_template_reads_strings_alone():
    message = {"role": "user", "content": PARTS}
    assert agent([message]) == whole("<|start|>a\nb<|end|>")
    assert agent([message], part_separator=" ") == whole("<|start|>a b<|end|>")
    assert agent([message], "{% for m in messages %}{{ m.content + '!' }}{% endfor %}") == whole("a\nb!")
    # The separator is the same as in vLLM.
    empty = {"type": "text", "text": ""}
    assert agent([{"role": "user", "content": [PARTS[0], empty, PARTS[1]]}]) == whole("<|start|>a\nb<|end|>")
    assert agent([{"role": "tool", "content": [PARTS[0], empty]}], READS) == whole("a\n")
    # A template that reads parts gets them.
    assert agent([message], READS) == whole("ab")
    image = {"role": "user", "content": [*PARTS, {"type": "image"}]}
    assert agent([image], READS) == whole("abimage")
    # Results of tools are an exception: most templates read them as strings.
    assert agent([{"role": "tool", "content": PARTS}], READS) == whole("a\nb")
    assert agent([{"role": "user"}, {"role": "user", "content": None}]) == whole("<|start|><|end|>" * 2)


class Transformers:
    """The interface of a transformers tokenizer, as far as the encoder uses it."""

    def __init__(self, fast=True):
        if fast:
            self.backend_tokenizer = tokenizer()

    def apply_chat_template(self, messages, *, tokenize, tools, add_generation_prompt, chat_template="T", **more):
        assert tokenize is False
        return f"{chat_template}<|start|>{messages[0]['content']}{tools}{add_generation_prompt}{more}"

    def __call__(self, text, *, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": whole(text)}


@pytest.mark.parametrize("fast", [True, False])
def test_transformers(fast):
    encoder = PromptEncoder(Transformers(fast))
    assert bool(encoder._marks) == fast
    for _ in range(2):
        assert encoder.encode_chat(MESSAGES, x=1).tolist() == whole("T<|start|>helloNoneTrue{'x': 1}")
    assert encoder.stats()["tokens_reused"] > 0
    other = PromptEncoder(Transformers(fast), "U")
    assert other.encode_chat(MESSAGES).tolist() == whole("U<|start|>helloNoneTrue{}")


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(InvalidTypeError, match=r"tokenizer is 3; it must be a tokenizers.Tokenizer"):
        PromptEncoder(3)
    with pytest.raises(InvalidTypeError, match="chat_template"):
        PromptEncoder(tokenizer(), 3)
    with pytest.raises(InvalidValueError, match="max_bytes"):
        PromptEncoder(tokenizer(), max_bytes=-1)


def test_mistral_refuses_what_it_does_not_know():
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.v3(is_tekken=True)
    encoder = PromptEncoder(mistral)
    with pytest.raises(EncodeError, match="mistral-common cannot encode these messages"):
        encoder.encode_chat([{"role": "robot", "content": "x"}])
    with pytest.raises(InvalidValueError, match="have no templates"):
        PromptEncoder(mistral, TEMPLATE)


# ---- an engine's /tokenize ------------------------------------------------------------------------------------------


class Engine(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.connections, self.answer = [], 0, None
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.stopped = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections += 1

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        answer = self.server.answer
        if callable(answer):
            return answer(self)
        if answer is None:
            text = body["prompt"] if "prompt" in body else json.dumps(body["messages"])
            answer = 200, json.dumps({"tokens": list(text.encode()), "count": len(text.encode())}).encode()
        status, data = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def test_an_engine_is_asked_once_for_the_same_over_one_connection(engine):
    encoder = RemoteEncoder(engine.url + "/", model="m", headers={"Authorization": "Bearer x"})
    for text in ("hello", "hello", "größe", ""):
        ids = encoder.encode(text)
        assert ids.tolist() == list(text.encode())
        assert ids.dtype == "uint32"
    assert [body["prompt"] for _, body, _ in engine.requests] == ["hello", "größe", ""]
    assert engine.requests[0] == (
        "/tokenize",
        {"model": "m", "prompt": "hello", "add_special_tokens": False},
        "Bearer x",
    )
    encoder.encode_chat(MESSAGES, [{"name": "f"}], enable_thinking=False)
    assert engine.requests[-1][1] == {
        "model": "m",
        "messages": MESSAGES,
        "add_generation_prompt": True,
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert engine.connections == 1
    assert encoder.stats()["tokens_reused"] == 5
    encoder.close()


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ((404, b"no such thing"), "answered 404: 'no such thing'"),
        ((500, b"\xff" * 1000), "answered 500"),
        ((302, b""), "answered 302"),
        ((200, b"<html>"), "answered '<html>', without a list of token ids"),
        ((200, b"[1, 2]"), "without a list of token ids"),
        ((200, b'{"tokens": 3}'), "without a list of token ids"),
        ((200, b'{"tokens": null}'), "without a list of token ids"),
        ((200, b'{"tokens": "abc"}'), "without a list of token ids"),
        ((200, b'{"tokens": [1, "2"]}'), "without a list of token ids"),
        ((200, b'{"tokens": [1, 2.5]}'), "without a list of token ids"),
        ((200, b'{"tokens": [true]}'), "without a list of token ids"),
        ((200, b'{"tokens": [[1]]}'), "without a list of token ids"),
        ((200, b'{"tokens": [-1]}'), "without a list of token ids"),
        ((200, b'{"tokens": [4294967296]}'), "without a list of token ids"),
        ((200, b'{"tokens": [' + b"9" * 400 + b"]}"), "without a list of token ids"),
        ((200, b"[" * 100_000), "without a list of token ids"),
        ((200, b""), "without a list of token ids"),
    ],
)
def test_nonsense_is_one_clear_error_and_is_not_kept(engine, answer, named):
    encoder = RemoteEncoder(engine.url)
    engine.answer = answer
    with pytest.raises(EncodeError, match=named):
        encoder.encode("hello")
    engine.answer = None
    assert encoder.encode("hello").tolist() == list(b"hello")
    encoder.close()


def drips(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.stopped.wait(0.01):
        try:
            handler.wfile.write(b"[")
            handler.wfile.flush()
        except OSError:
            return


def hangs(handler):
    handler.server.stopped.wait(30)


def cuts(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(b'{"tokens": [1')
    handler.close_connection = True


@pytest.mark.parametrize("answer", [drips, hangs, cuts])
def test_a_server_that_hangs_costs_no_more_than_the_time_out(engine, answer):
    encoder = RemoteEncoder(engine.url, timeout=0.2)
    engine.answer = answer
    with pytest.raises(EncodeError, match="tokenize"):
        encoder.encode("hello")
    engine.answer = None
    assert RemoteEncoder(engine.url).encode("hello").tolist() == list(b"hello")
    encoder.close()


def test_nobody_there_and_no_url():
    with pytest.raises(EncodeError, match="returned no token ids"):
        RemoteEncoder("http://127.0.0.1:1", timeout=1.0).encode("a")
    for wrong in ("127.0.0.1:8000", "tcp://a:1"):
        with pytest.raises(InvalidValueError, match="url is"):
            RemoteEncoder(wrong)
    with pytest.raises(InvalidTypeError, match="url is 3"):
        RemoteEncoder(3)
    encoder = RemoteEncoder("http://127.0.0.1:1")
    with pytest.raises(InvalidTypeError, match="no JSON form"):
        encoder.encode_chat([{"role": "user", "content": object()}])
    with pytest.raises(InvalidTypeError, match="text is"):
        encoder.encode(b"abc")


@pytest.mark.parametrize(
    ("module", "make"),
    [("urllib3", lambda: RemoteEncoder("http://a")), ("jinja2", lambda: PromptEncoder(tokenizer(), TEMPLATE))],
)
def test_what_is_not_installed_says_what_to_install(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'kvindex\[text\]'"):
        make()
