// Token ids from Python's own objects. Separate from _native, which does not depend on Python.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>

namespace kvindex {

// Whether another thread may change a list while no Python code runs in this one.
#ifdef Py_GIL_DISABLED
inline constexpr bool kListsMayChange = true;
#else
inline constexpr bool kListsMayChange = false;
#endif

// Reads ints straight from their objects. Stops at the first item that is not
// exactly an int of 0 .. 2^32-1 and returns its index, or n. PyLong_AsLong costs 5
// ns an item, which is as much as hashing; the digits lie open, and stable, in 3.11.
inline Py_ssize_t read_tokens(PyObject* const* items, Py_ssize_t n, uint32_t* out) {
    for (Py_ssize_t i = 0; i < n; ++i) {
        PyObject* o = items[i];
        if (!PyLong_CheckExact(o)) return i;
#if PY_VERSION_HEX < 0x030C0000
        const digit* d = reinterpret_cast<PyLongObject*>(o)->ob_digit;
        switch (Py_SIZE(o)) {
            case 0: out[i] = 0; continue;
            case 1: out[i] = d[0]; continue;
            case 2:
                if (d[1] >> (32 - PyLong_SHIFT)) return i;
                out[i] = d[0] | (d[1] << PyLong_SHIFT);
                continue;
            default: return i;
        }
#else
        if (PyUnstable_Long_IsCompact(reinterpret_cast<PyLongObject*>(o))) {
            const Py_ssize_t v = PyUnstable_Long_CompactValue(reinterpret_cast<PyLongObject*>(o));
            if (v < 0 || static_cast<std::size_t>(v) > 0xFFFFFFFFu) return i;
            out[i] = static_cast<uint32_t>(v);
            continue;
        }
        int overflow = 0;
        const long long v = PyLong_AsLongLongAndOverflow(o, &overflow);
        if (overflow || v < 0 || v > 0xFFFFFFFFll) return i;
        out[i] = static_cast<uint32_t>(v);
#endif
    }
    return n;
}

// Bytes of each item if a buffer has native integers of four or eight, else 0.
inline int int_width(const Py_buffer* view, bool* is_signed) {
    const char* f = view->format ? view->format : "B";
    if (*f == '@' || *f == '=' || *f == '<') ++f;
    *is_signed = *f && std::strchr("ilq", *f);
    return *f && !f[1] && std::strchr("ilqILQ", *f) ? static_cast<int>(view->itemsize) : 0;
}

// The same for arrays of 4- or 8-byte integers, `stride` bytes apart.
// Returns the index of the first value out of range, or n.
inline Py_ssize_t narrow_tokens(const char* p, Py_ssize_t n, Py_ssize_t stride, int width, bool is_signed,
                                uint32_t* out) {
    for (Py_ssize_t i = 0; i < n; ++i, p += stride) {
        if (width == 4) {
            uint32_t v;
            std::memcpy(&v, p, 4);
            if (is_signed && (v >> 31)) return i;
            out[i] = v;
        } else {
            // A negative 64-bit value is larger than any u32 when read as unsigned, so one test serves both.
            uint64_t v;
            std::memcpy(&v, p, 8);
            if (v >> 32) return i;
            out[i] = static_cast<uint32_t>(v);
        }
    }
    return n;
}

// Whether all of a contiguous int32 array may be read as u32; the index of the first value that may not, or n.
inline Py_ssize_t first_negative(const int32_t* p, Py_ssize_t n) {
    int32_t all = 0;
    for (Py_ssize_t i = 0; i < n; ++i) all |= p[i];
    if (all >= 0) return n;
    for (Py_ssize_t i = 0;; ++i)
        if (p[i] < 0) return i;
}

}  // namespace kvindex
