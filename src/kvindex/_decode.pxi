# Events as objects, for tools and tests: the fields of the decoder, and fields that only the payload has in full.

cdef object _shown(const StrRef& text): return None if text.p == NULL else text.p[:text.n].decode("utf-8", "surrogateescape")


cdef object _written(_Ints payload, const Event& e, bytes name):
    cdef StrRef found = event_field(<const uint8_t*>payload.data + e.offset, e.bytes, e.kind, name, len(name))
    return None if found.p == NULL else arguments.unpacked(found.p[:found.n])


cdef StrRef _text_of(_Ints payload, const Event& e, bytes name):
    return event_text(<const uint8_t*>payload.data + e.offset, e.bytes, e.kind, name, len(name))


cdef dict _removed(_Ints payload, const Batch& batch, const Event& e):
    remaining = _written(payload, e, b"remaining_copy_counts")
    return {
        "block_hashes": [batch.hashes[e.hash_at + i] for i in range(e.n_hashes)],
        "medium": _shown(e.medium),
        "group_idx": None if e.group < 0 else e.group,
        "remaining_copy_counts": None if remaining is None else list(remaining),
    }


cdef dict _stored(_Ints payload, const Batch& batch, const Event& e):
    cdef uint32_t i, j
    cdef size_t behind = <size_t>e.token_at + e.n_tokens
    cdef uint32_t[::1] view
    tokens = np.empty(e.n_tokens, dtype=np.uint32)
    if e.n_tokens:
        view = tokens
        memcpy(&view[0], batch.tokens.data() + e.token_at, <size_t>e.n_tokens * sizeof(uint32_t))
    if e.lookahead:
        ahead = [[batch.tokens[behind + <size_t>i * e.lookahead + j] for j in range(e.lookahead)] for i in range(e.n_hashes)]
    elif (ahead := _written(payload, e, b"lookahead_token_ids")) is not None:
        ahead = [list(each) for each in ahead]
    keys = None if e.extra_keys == NULL else arguments.unpacked((<const char*>e.extra_keys)[:e.extra_keys_bytes])
    return {
        "block_hashes": [batch.hashes[e.hash_at + i] for i in range(e.n_hashes)],
        "parent_block_hash": e.parent if e.has_parent else None,
        "token_ids": tokens,
        "block_size": e.block_size or _written(payload, e, b"block_size"),
        "lora_id": _shown(e.lora_id_name) if e.lora_id_name.p != NULL else e.lora_id or _written(payload, e, b"lora_id"),
        "medium": _shown(e.medium),
        "lora_name": _shown(e.lora_name),
        "extra_keys": None if keys is None else [each if each is None else list(each) for each in keys],
        "group_idx": None if e.group < 0 else e.group,
        "kv_cache_spec_kind": _shown(e.spec_kind),
        "kv_cache_spec_sliding_window": e.window or _written(payload, e, b"kv_cache_spec_sliding_window"),
        "cache_salt": _shown(e.cache_salt),
        "session_id": _shown(_text_of(payload, e, b"session_id")),
        "lookahead_token_ids": ahead,
    }


def decode_events(payload):
    """Returns ``(ts, dp_rank, [(kind, reason, fields), ...])``. An event that cannot be applied has the reason, and
    only the name of its type as fields."""
    cdef _Ints b = _payload(payload)
    cdef Batch batch
    cdef DecodeFault fault
    cdef Event e
    if not decode_batch(<const uint8_t*>b.data, b.n, batch, fault):
        raise _no_batch(b, fault)
    found = []
    for e in batch.events:
        kind, reason = _KINDS[<int>e.kind], reason_name(e.bad).decode() if <int>e.bad else None
        try:
            if reason is not None:
                fields = {"type": _shown(_text_of(b, e, b"type"))}
            elif e.kind == CLEARED:
                fields = {"medium": _shown(e.medium)}
            else:
                fields = _stored(b, batch, e) if e.kind == STORED else _removed(b, batch, e)
        except arguments.TooDeep:
            reason, fields = "bad_event", {"type": None}
        found.append((kind, reason, fields))
    return batch.ts, None if batch.dp_rank < 0 else batch.dp_rank, found


def lift_tokens(bytes body, bytes name):
    """Returns ``(token ids as uint32, the JSON object with an empty array in their place)``, or None if the object has
    anything but an array of token ids under ``name``."""
    cdef Py_ssize_t size = len(body)
    tokens = np.empty(size // 2 + 1, dtype=np.uint32)
    cdef uint32_t[::1] out = tokens
    cdef const char* text = body
    cdef const char* wanted = name
    cdef size_t n = len(name)
    cdef JsonTokens found
    with nogil: found = json_tokens(text, size, wanted, n, &out[0])
    return (tokens[:found.n], body[:found.begin] + b"[]" + body[found.end:]) if found.end else None
