"""Token ids of requests, equal to the engine's, and incremental for conversations that grow.

Matching a prompt takes microseconds; encoding its text takes milliseconds. A :class:`PromptEncoder` encodes each part
of a conversation once::

    from tokenizers import Tokenizer, models, pre_tokenizers
    from kvindex.text import PromptEncoder

    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))  # or Tokenizer.from_file
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>"])

    encoder = PromptEncoder(tokenizer)
    assert encoder.encode("hello<|end|>").tolist() == [0, 3]
    assert encoder.encode("hello<|end|>world").tolist() == [0, 3, 1]    # "hello<|end|>" is not encoded again

A :class:`RemoteEncoder` calls an engine instead. Both need the extra ``text`` (``pip install 'kvindex[text]'``) and
are thread-safe. In an event loop, use ``await asyncio.to_thread(encoder.encode_chat, messages)``.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from . import arguments
from .errors import InvalidTypeError, InvalidValueError, KVIndexError

__all__ = ["EncodeError", "PromptEncoder", "RemoteEncoder"]

_Ids: TypeAlias = npt.NDArray[np.uint32]

# Bytes of an entry in addition to its text and its ids: a slot, an array's header, a link.
_ENTRY: Final = 300
# A text with more parts is encoded as a whole: joining its parts would hold the interpreter lock.
_MOST_PARTS: Final = 4096
# The most bytes of an engine's answer: ids of a million tokens are about 8 MB of JSON.
_MOST_BYTES: Final = 64 << 20


class EncodeError(KVIndexError, RuntimeError):
    """A prompt could not be encoded: the chat template raised, or the engine gave no token ids."""


class _Cache:
    """An LRU cache of token ids by text, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = arguments.whole(max_bytes, "max_bytes", 0, 1 << 62)
        self.bytes = 0
        self._lock = Lock()
        self._entries: OrderedDict[str, _Ids] = OrderedDict()

    def get(self, keys: Iterable[str]) -> dict[str, _Ids | None]:
        with self._lock:
            found = {}
            for key in keys:
                ids = self._entries.get(key)
                if ids is not None:
                    self._entries.move_to_end(key)
                found[key] = ids
            return found

    def put(self, key: str, ids: _Ids) -> None:
        size = self._size(key, ids)
        if size > self.max_bytes:
            return
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = ids
            self.bytes += size
            while self.bytes > self.max_bytes:
                self.bytes -= self._size(*self._entries.popitem(last=False))

    @staticmethod
    def _size(key: str, ids: _Ids) -> int:
        return sys.getsizeof(key) + ids.nbytes + _ENTRY


class _Encoder:
    """The cache and the counters of both encoders."""

    def __init__(self, max_bytes: int) -> None:
        self._cache = _Cache(max_bytes)
        self._counts = Lock()
        self._calls = self._tokens = self._reused = self._fallbacks = 0

    def _count(self, ids: _Ids, reused: int, fallbacks: int = 0) -> _Ids:
        with self._counts:
            self._calls += 1
            self._tokens += len(ids)
            self._reused += reused
            self._fallbacks += fallbacks
        return ids

    def stats(self) -> dict[str, int]:
        """Returns counters since the encoder was created. O(1).

        Returns:
            ``calls``; ``tokens`` that were returned; ``tokens_reused``, those of them that came from the cache;
            ``bytes`` of the cache; ``fallbacks``, the texts that could have been cut but were encoded as a whole.
        """
        with self._counts:
            return {
                "calls": self._calls,
                "tokens": self._tokens,
                "tokens_reused": self._reused,
                "bytes": self._cache.bytes,
                "fallbacks": self._fallbacks,
            }

    def _remembered(self, key: str, make: Callable[[], _Ids]) -> _Ids:
        """Returns the ids of a text that cannot be cut, from the cache if they are there."""
        if (ids := self._cache.get([key])[key]) is not None:
            return self._count(ids, len(ids))
        ids = make()
        self._cache.put(key, ids)
        return self._count(ids, 0)


class PromptEncoder(_Encoder):
    """Token ids of texts and conversations, from a tokenizer of the model. Thread-safe.

    With a ``tokenizers`` tokenizer, or a fast one of ``transformers``, a text is cut at its special tokens. Parts that
    were encoded before, in any conversation, come from the cache. The others are encoded in one batch without the GIL.

    The ids equal those of the whole text. A special token ends all merging and normalization of the text before it.
    Its effects on its surroundings (``lstrip``, ``rstrip``, "first" schemes of Metaspace) are in the part that begins
    with it, because adjacent parts overlap at the token. A text is cut only at added tokens that guarantee this: not
    normalized, not ``single_word``, without white space at their ends, and not overlapping another added token. If the
    ids at a cut disagree, the text is encoded as a whole (``fallbacks``).

    ``mistral-common``'s tokenizers encode message by message, and the texts of messages come from the cache. A slow
    tokenizer of ``transformers`` encodes each text as a whole, unless the same text was encoded before.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, a ``transformers`` tokenizer, or mistral-common's ``MistralTokenizer``.
            It is copied if possible; later changes to it have no effect then. Truncation and padding are ignored.
        chat_template: A Jinja template, in place of the tokenizer's own. A ``tokenizers.Tokenizer`` has no template.
        max_bytes: Limit of the cache in bytes: texts, ids and overhead.
        part_separator: Separator of the text parts of a message, for templates that read contents as strings only: a
            newline in vLLM, a space in SGLang.

    Raises:
        InvalidTypeError: The tokenizer is of an unknown kind.
        InvalidValueError: ``chat_template`` is not a Jinja template, or is given with a tokenizer of mistral-common.
        ImportError: ``chat_template`` is given, and jinja2 is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        max_bytes: int = 64 << 20,
        part_separator: str = "\n",
    ) -> None:
        super().__init__(max_bytes)
        if chat_template is not None:
            arguments.utf8(chat_template, "chat_template")
        arguments.utf8(part_separator, "part_separator")
        self._separator = part_separator
        self._reads_parts: bool | None = None
        self._template: Callable[..., str] | None = None
        self._mistral: Any = None
        self._marks: dict[str, int] = {}
        self._mark: re.Pattern[str] | None = None
        self._encode_parts: Callable[[list[str]], list[_Ids]]
        if callable(getattr(tokenizer, "encode_chat_completion", None)):
            if chat_template is not None:
                raise InvalidValueError("chat_template is given, but mistral-common's tokenizers have no templates")
            self._mistral = self._remembering(tokenizer)
            base = tokenizer.instruct_tokenizer.tokenizer
            self._encode_parts = lambda texts: [_ids(base.encode(text, bos=False, eos=False)) for text in texts]
            return
        if callable(getattr(tokenizer, "apply_chat_template", None)):
            own = {} if chat_template is None else {"chat_template": chat_template}
            chat = tokenizer
            self._template = lambda messages, **options: chat.apply_chat_template(
                messages, tokenize=False, **own, **options
            )
            fast = getattr(tokenizer, "backend_tokenizer", None)
            if fast is None:
                self._encode_parts = lambda texts: [
                    _ids(chat(text, add_special_tokens=False)["input_ids"]) for text in texts
                ]
                return
            tokenizer = fast
        elif chat_template is not None:
            self._template = _compiled(chat_template)
        if not callable(getattr(tokenizer, "encode_batch_fast", None)):
            raise InvalidTypeError(
                f"tokenizer is {arguments.shown(tokenizer)}; it must be a tokenizers.Tokenizer (0.20 or later), a "
                "transformers tokenizer or mistral-common's MistralTokenizer"
            )
        fast = self._copied(tokenizer)
        self._encode_parts = lambda texts: [
            _ids(each.ids) for each in fast.encode_batch_fast(texts, add_special_tokens=False)
        ]
        if not fast.encode_special_tokens:
            self._marks = _marks(fast.get_added_tokens_decoder())
        if self._marks:
            self._mark = re.compile(_pattern(self._marks))

    def encode(self, text: str) -> _Ids:
        """Returns the ids of a text, without adding special tokens.

        O(characters), plus the tokenizer's time for the parts that are not in the cache.

        Args:
            text: The text. Special tokens in it are recognised.

        Returns:
            uint32 array, equal to the ids of ``tokenizer.encode(text, add_special_tokens=False)``.

        Raises:
            InvalidTypeError: ``text`` is not a str.
            InvalidValueError: ``text`` has a lone surrogate, which has no UTF-8 form. The message has its position.
            EncodeError: The tokenizer raised.
        """
        if not isinstance(text, str):
            raise InvalidTypeError(f"text is {arguments.shown(text)}; it must be a str")
        parts = self._cut(text)
        if parts is None or len(parts) < 2:
            return self._remembered(text, lambda: self._encoded([text])[0])
        # Each part begins with the token that ends the one before.
        keys = [text[begin:end] for begin, end, _ in parts]
        found = self._cache.get(keys)
        missing = [key for key, ids in found.items() if ids is None]
        if missing:
            for key, ids in zip(missing, self._encoded(missing), strict=True):
                self._cache.put(key, ids)
                found[key] = ids
        # Missing ones were filled in just now.
        pieces: list[_Ids] = [found[key] for key in keys]  # type: ignore[misc]
        new = set(missing)
        reused = sum(
            len(ids) - (at > 0) for at, (key, ids) in enumerate(zip(keys, pieces, strict=True)) if key not in new
        )
        for at in range(1, len(pieces)):
            mark = parts[at - 1][2]
            if not (len(pieces[at - 1]) and len(pieces[at]) and pieces[at - 1][-1] == mark == pieces[at][0]):
                return self._count(self._encoded([text])[0], 0, fallbacks=1)
        return self._count(np.concatenate([pieces[0], *(ids[1:] for ids in pieces[1:])]), reused)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> _Ids:
        """Returns the ids of a conversation, rendered by the chat template.

        Messages are passed to the template in the form that engines use: arguments of tool calls as objects, a missing
        content as an empty string, and text parts as one string if the template reads strings only::

            template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
            encoder = PromptEncoder(tokenizer, chat_template=template)
            assert encoder.encode_chat([{"role": "user", "content": "hello"}]).tolist() == [0, 3]

        Args:
            messages: As in an OpenAI request: ``[{"role": "user", "content": "..."}, ...]``.
            tools: As in an OpenAI request.
            add_generation_prompt: Whether to render the beginning of the answer, as engines do.
            template_kwargs: Further variables of the template, such as ``enable_thinking=False``. With a
                ``tokenizers.Tokenizer``, also ``bos_token="<s>"`` and the like if the template uses them.

        Returns:
            uint32 array.

        Raises:
            EncodeError: There is no template, or it raised, for example for an unknown role.
            InvalidTypeError: ``messages`` is not a list of objects with a role.
            InvalidValueError: As for :meth:`encode`.
        """
        messages = _messages(messages)
        if self._mistral is not None:
            return self._mistral_chat(messages, tools, template_kwargs)
        if self._template is None:
            raise EncodeError(
                "a tokenizers.Tokenizer has no chat template: give PromptEncoder(tokenizer, chat_template)"
            )
        try:
            read = [self._as_read(message) for message in messages]
            text = self._template(read, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs)
        except Exception as error:
            raise EncodeError(f"the chat template cannot render these messages: {error}") from error
        return self.encode(text)

    # ---- messages ---------------------------------------------------------------------------------------------------

    # Source: vLLM 0.33's renderers/chat_utils/chat_message.py, SGLang 0.5.23's openai/serving_chat.py.
    def _as_read(self, message: Any) -> Any:
        """Converts a message of an OpenAI request to the form in which engines pass it to a template."""
        if not isinstance(message, Mapping):
            return message
        read = dict(message)
        content, calls = read.get("content"), read.get("tool_calls")
        if content is None:
            read["content"] = ""
        elif isinstance(content, list) and (not (parts := self._parts_are_read()) or read.get("role") == "tool"):
            texts = [text for part in content if (text := _text(part)) is not None]
            # Images and the like are left to the template.
            if len(texts) == len(content):
                read["content"] = self._separator.join(text for text in texts if text or parts)
        if read.get("role") == "assistant" and isinstance(calls, list):
            del read["tool_calls"]
            if calls:
                read["tool_calls"] = [_called(call) for call in calls]
        return read

    def _parts_are_read(self) -> bool:
        """Whether the template renders a text and a list with that text as its part in the same way."""
        if self._reads_parts is None:
            assert self._template is not None
            text = "a text"
            found: list[str | None] = []
            for content in (text, [{"type": "text", "text": text}]):
                try:
                    message = {"role": "user", "content": content}
                    found.append(self._template([message], tools=None, add_generation_prompt=False))
                except Exception:
                    found.append(None)
            self._reads_parts = found[1] is not None and found[0] in (None, found[1])
        return self._reads_parts

    # ---- kinds of tokenizers ----------------------------------------------------------------------------------------

    def _encoded(self, texts: list[str]) -> list[_Ids]:
        try:
            return self._encode_parts(texts)
        except Exception as error:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as wrong:
                    raise InvalidValueError(
                        f"text has the lone surrogate {wrong.object[wrong.start]!r}, behind "
                        f"{arguments.shown(wrong.object[max(wrong.start - 20, 0) : wrong.start])}; it has no UTF-8 form"
                    ) from None
            raise EncodeError(f"the tokenizer cannot encode a text: {error}") from error

    @staticmethod
    def _copied(tokenizer: Any) -> Any:
        try:
            found = type(tokenizer).from_str(tokenizer.to_str())
        except Exception:
            # A tokenizer with parts in Python has no text form.
            return tokenizer
        found.encode_special_tokens = tokenizer.encode_special_tokens
        found.no_truncation()
        found.no_padding()
        return found

    def _cut(self, text: str) -> list[tuple[int, int, int]] | None:
        """Returns (begin, end, id of the token at its end) of each part, or None if there are too many."""
        if self._mark is None:
            return None
        parts, begin = [], 0
        for found in self._mark.finditer(text):
            parts.append((begin, found.end(), self._marks[found[0]]))
            if len(parts) > _MOST_PARTS:
                return None
            begin = found.start()
        # The last part ends with the text. If a token ends the text, this part would be only the
        # token, and is left out.
        if not parts or parts[-1][1] < len(text):
            parts.append((begin, len(text), -1))
        return parts

    def _remembering(self, tokenizer: Any) -> Any:
        """Returns copies of mistral-common's tokenizer that encode a text once. The user's own
        tokenizer stays as it is."""
        ours = copy.copy(tokenizer)
        ours.instruct_tokenizer = instruct = copy.copy(tokenizer.instruct_tokenizer)
        instruct.tokenizer = base = copy.copy(instruct.tokenizer)
        encode: Callable[..., list[int]] = type(base).encode

        def remembered(s: str, bos: bool, eos: bool) -> list[int]:
            # For short texts, a look-up costs more than encoding.
            if bos or eos or len(s) < 32:
                return encode(base, s, bos=bos, eos=eos)
            ids = self._cache.get([s])[s]
            if ids is None:
                ids = _ids(encode(base, s, bos=False, eos=False))
                self._cache.put(s, ids)
            else:
                with self._counts:
                    self._reused += len(ids)
            tokens: list[int] = ids.tolist()
            return tokens

        base.encode = remembered
        # The text of all ids is not needed here, and decoding it would take as long as encoding it.
        base.decode = lambda *_, **__: ""
        return ours

    def _mistral_chat(self, messages: Any, tools: Any, options: dict[str, Any]) -> _Ids:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            request = ChatCompletionRequest.from_openai(messages=messages, tools=tools, **options)
            tokens = self._mistral.encode_chat_completion(request).tokens
        except Exception as error:
            raise EncodeError(f"mistral-common cannot encode these messages: {error}") from error
        return self._count(_ids(tokens), 0)


class RemoteEncoder(_Encoder):
    """Token ids from the ``/tokenize`` endpoint of an engine (vLLM, SGLang), with its tokenizer and chat template.

    Thread-safe. Repeated requests are answered from a cache, and connections are reused.

    Args:
        url: URL of the server, such as ``http://10.0.0.1:8000``.
        model: Name of the model, for servers that require it in each request.
        timeout: Maximum time of a call in seconds, for connecting and reading together.
        max_bytes: Limit of the cache in bytes: requests, ids and overhead.
        headers: Headers of each request, such as ``{"Authorization": "Bearer ..."}``.

    Raises:
        InvalidValueError: The URL is malformed, or another argument is out of range.
        ImportError: urllib3 is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 5.0,
        max_bytes: int = 64 << 20,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(max_bytes)
        try:
            import urllib3
        except ImportError:
            raise ImportError("RemoteEncoder needs urllib3: pip install 'kvindex[text]'") from None
        arguments.utf8(url, "url")
        if not url.startswith(("http://", "https://")):
            raise InvalidValueError(f"url is {arguments.shown(url)}; it must be one such as http://10.0.0.1:8000")
        self._url = url.rstrip("/") + "/tokenize"
        self._model = {} if model is None else {"model": model}
        self._timeout = arguments.seconds(timeout, "timeout")
        self._errors = urllib3.exceptions.HTTPError
        self._wait = urllib3.Timeout
        self._http = urllib3.PoolManager(maxsize=32, headers={"Content-Type": "application/json", **(headers or {})})

    def encode(self, text: str) -> _Ids:
        """Returns the ids of a text, without adding special tokens. Blocks for one HTTP request.

        Args:
            text: The text.

        Returns:
            uint32 array.

        Raises:
            EncodeError: The server cannot be reached in time, or its answer has no token ids.
            InvalidTypeError: ``text`` is not a str.
            InvalidValueError: ``text`` has a lone surrogate, which has no UTF-8 form.
        """
        arguments.utf8(text, "text")
        return self._ask({"prompt": text, "add_special_tokens": False})

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> _Ids:
        """Returns the ids of a conversation, rendered by the engine's chat template. Blocks for one HTTP request.

        Args:
            messages: As for :meth:`PromptEncoder.encode_chat`.
            tools: As for :meth:`PromptEncoder.encode_chat`.
            add_generation_prompt: As for :meth:`PromptEncoder.encode_chat`.
            template_kwargs: As for :meth:`PromptEncoder.encode_chat`.

        Returns:
            uint32 array.

        Raises:
            EncodeError: The server cannot be reached in time, or its answer has no token ids.
            InvalidTypeError: ``messages`` is not a list of objects with a role, or the request has no JSON form.
        """
        messages = _messages(messages)
        more = {"tools": list(tools)} if tools is not None else {}
        if template_kwargs:
            more["chat_template_kwargs"] = template_kwargs  # type: ignore[assignment]
        return self._ask({"messages": messages, "add_generation_prompt": add_generation_prompt, **more})

    def close(self) -> None:
        """Closes idle connections."""
        self._http.clear()

    def _ask(self, request: dict[str, Any]) -> _Ids:
        try:
            body = json.dumps({**self._model, **request})
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(f"the request has no JSON form: {error}") from error
        return self._remembered(body, lambda: self._tokenized(body))

    def _tokenized(self, body: str) -> _Ids:
        ends = time.monotonic() + self._timeout
        answer, data = None, bytearray()
        try:
            answer = self._http.request(
                "POST", self._url, body=body.encode(), timeout=self._wait(self._timeout), retries=False,
                redirect=False, preload_content=False,
            )  # fmt: skip
            # In pieces, because a timeout applies to each read and a server may send a byte at a time.
            while piece := answer.read1(1 << 16):
                data += piece
                if len(data) > _MOST_BYTES:
                    raise EncodeError(f"{self._url} answered more than {_MOST_BYTES >> 20} MB")
                if time.monotonic() > ends:
                    raise EncodeError(f"{self._url} took more than {self._timeout} s")
            answer.release_conn()
        except (self._errors, OSError) as error:
            raise EncodeError(f"{self._url} returned no token ids: {error}") from error
        finally:
            # A connection whose answer was not read to its end cannot be used again.
            if answer is not None and sys.exc_info()[0] is not None:
                answer.close()
        if answer.status != 200:
            raise EncodeError(
                f"{self._url} answered {answer.status}: {arguments.shown(data[:200].decode(errors='replace'))}"
            )
        try:
            tokens = json.loads(data)["tokens"]
            ids = np.array(tokens if tokens else [], dtype=np.int64)
            if not isinstance(tokens, list) or ids.ndim != 1 or any(type(token) is not int for token in tokens):
                raise TypeError
            if ids.size and (ids.min() < 0 or ids.max() > 0xFFFFFFFF):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            shown = arguments.shown(data[:200].decode(errors="replace"))
            raise EncodeError(f"{self._url} answered {shown}, without a list of token ids in tokens") from None
        return ids.astype(np.uint32)


def _messages(messages: Any) -> list[Any]:
    """Returns the messages as a list. The errors have no content of messages, because logs contain errors."""
    if messages is None:
        raise InvalidTypeError("messages is missing")
    must = "must be a list of objects with role and content"
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidTypeError(f"messages {must}, not {type(messages).__name__}")
    found = list(messages)
    for at, message in enumerate(found):
        # Clients of OpenAI's packages append an answer's message, which is no map.
        role = message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)
        if not isinstance(role, str):
            raise InvalidTypeError(f"messages {must}: messages[{at}] ({type(message).__name__}) has no role")
    return found


def _text(part: Any) -> str | None:
    """The text of a message's part; None for another kind of part."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") in ("text", "input_text") else None
    return text if isinstance(text, str) else None


def _called(call: Any) -> Any:
    """A tool call with its arguments as an object. Arguments that are not a JSON object become an empty one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), Mapping):
        return call
    try:
        parsed = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        parsed = {}
    return {**call, "function": {**function, "arguments": parsed if isinstance(parsed, dict) else {}}}


def _ids(tokens: Sequence[int]) -> _Ids:
    ids = np.array(tokens, dtype=np.uint32)
    # The cache and all callers share it.
    ids.flags.writeable = False
    return ids


def _marks(added: Mapping[int, Any]) -> dict[str, int]:
    """Returns the added tokens at which a text may be cut, with their ids.

    Such a token is always recognised: the tokenizer looks for it before normalization and inside words, and no other
    added token can take a part of it.
    """
    contents = [token.content for token in added.values()]
    endings = {content[at:] for content in contents for at in range(1, len(content))}
    found = {}
    for number, token in added.items():
        content = token.content
        if token.normalized or token.single_word or not content or content != content.strip():
            continue
        if any(content[:end] in endings for end in range(1, len(content) + 1)):
            continue
        if any(content in other for other in contents if other != content):
            continue
        found[content] = number
    return found


def _pattern(words: Iterable[str]) -> str:
    """Returns a regular expression for any of the words, as a tree: a list of a thousand would be tried one by one."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}

    def written(node: dict[str, Any]) -> str:
        branches = [re.escape(letter) + written(below) for letter, below in node.items() if letter]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{joined})?" if "" in node else joined

    return written(tree)


def _compiled(template: str) -> Callable[..., str]:
    """Compiles a chat template as transformers does, with the filters and globals that templates use."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError("a chat_template needs jinja2: pip install 'kvindex[text]'") from None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, indent=None, ensure_ascii=False, separators=None, sort_keys=False: json.dumps(
        value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
    )
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = time.strftime
    try:
        compiled = env.from_string(template)
    except jinja2.TemplateError as error:
        raise InvalidValueError(f"chat_template is not a Jinja template: {error}") from error
    return lambda messages, **options: compiled.render(messages=messages, **options)
