// A reader of msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md) over a buffer that may contain anything.
//
// It never reads past the end, never throws, never recurses and never allocates. It returns either one scalar or the
// header of a container, whose items the caller then reads one after the other. Every length is compared with the rest
// of the buffer before it is returned. An item takes at least one byte, so a container that declares more items than
// there are bytes left is refused while it is still only a number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define KVINDEX_MSGPACK_SSSE3 1
#include <tmmintrin.h>
#endif

#if defined(__GNUC__)
#define KVINDEX_MSGPACK_NOINLINE __attribute__((noinline))
#else
#define KVINDEX_MSGPACK_NOINLINE
#endif

namespace kvindex {

// Written with shifts, because compilers turn that into one load and one byte swap on every target.
inline uint16_t load_be16(const uint8_t* p) { return static_cast<uint16_t>(p[0] << 8 | p[1]); }

inline uint32_t load_be32(const uint8_t* p) {
    return static_cast<uint32_t>(p[0]) << 24 | static_cast<uint32_t>(p[1]) << 16 | static_cast<uint32_t>(p[2]) << 8 |
           static_cast<uint32_t>(p[3]);
}

inline uint64_t load_be64(const uint8_t* p) { return static_cast<uint64_t>(load_be32(p)) << 32 | load_be32(p + 4); }

// The kind of a value, not its format: an integer of a signed format that is not negative is `uint`.
enum class MsgType : uint8_t { nil, boolean, uint, negative, real, str, bin, array, map, ext };

struct MsgValue {
    MsgType type = MsgType::nil;
    uint32_t n = 0;                 // str, bin, ext: bytes; array: items; map: pairs
    uint64_t u = 0;                 // boolean, uint; negative: two's complement
    double d = 0.0;                 // real
    const uint8_t* data = nullptr;  // str, bin, ext: the bytes

    bool is_nil() const { return type == MsgType::nil; }
    bool is_uint() const { return type == MsgType::uint; }

    // Items that follow the header and belong to this value.
    uint64_t children() const {
        if (type == MsgType::array) return n;
        if (type == MsgType::map) return 2 * static_cast<uint64_t>(n);
        return 0;
    }
};

struct MsgReader {
    const uint8_t* begin;
    const uint8_t* p;
    const uint8_t* end;
    const char* fault = nullptr;  // set by the first failure, with the place of the value that could not be read
    const uint8_t* fault_at = nullptr;

    MsgReader(const uint8_t* data, size_t n) : begin(data), p(data), end(data + n) {}

    size_t left() const { return static_cast<size_t>(end - p); }

    bool fail(const char* what, const uint8_t* at) {
        fault = what;
        fault_at = at;
        return false;
    }

    // Steps over a nil, if there is one.
    bool take_nil() {
        if (p == end || *p != 0xc0) return false;
        ++p;
        return true;
    }

    // Reads one scalar, or the header of one container.
    bool next(MsgValue& v) {
        const uint8_t* const at = p;
        if (p == end) return fail("the payload ends where a value should start", at);
        const uint8_t t = *p++;
        if (t < 0x80) return set(v, MsgType::uint, t);
        if (t < 0xc0) {
            if (t < 0x90) return container(v, MsgType::map, t & 0x0fu, at);
            if (t < 0xa0) return container(v, MsgType::array, t & 0x0fu, at);
            return bytes(v, MsgType::str, t & 0x1fu, at);
        }
        return next_long(v, t, at);
    }

    // Steps over this many values, with everything inside them. Depth is a number here, not a stack: only the number of
    // remaining items matters, so any depth is safe.
    bool skip(uint64_t items) {
        MsgValue v;
        while (items != 0) {
            const uint8_t* const at = p;
            if (!next(v)) return false;
            items += v.children();
            --items;
            if (items > left()) return fail("more items are declared than there are bytes left", at);
        }
        return true;
    }

private:
    // Kept out of line: with the switch inlined into every caller, a field of an event costs 1.2 times as much.
    KVINDEX_MSGPACK_NOINLINE bool next_long(MsgValue& v, uint8_t t, const uint8_t* at) {
        if (t >= 0xe0) return set(v, MsgType::negative, static_cast<uint64_t>(static_cast<int64_t>(t) - 256));
        switch (t) {
            case 0xc0: return set(v, MsgType::nil, 0);
            case 0xc2: return set(v, MsgType::boolean, 0);
            case 0xc3: return set(v, MsgType::boolean, 1);
            case 0xc4: return has(1, at) && bytes(v, MsgType::bin, take8(), at);
            case 0xc5: return has(2, at) && bytes(v, MsgType::bin, take16(), at);
            case 0xc6: return has(4, at) && bytes(v, MsgType::bin, take32(), at);
            case 0xc7: return has(1, at) && ext(v, take8(), at);
            case 0xc8: return has(2, at) && ext(v, take16(), at);
            case 0xc9: return has(4, at) && ext(v, take32(), at);
            case 0xca: {
                if (!has(4, at)) return false;
                const uint32_t bits = take32();
                float f;
                std::memcpy(&f, &bits, sizeof f);
                v.d = static_cast<double>(f);
                return set(v, MsgType::real, 0);
            }
            case 0xcb: {
                if (!has(8, at)) return false;
                const uint64_t bits = take64();
                std::memcpy(&v.d, &bits, sizeof v.d);
                return set(v, MsgType::real, 0);
            }
            case 0xcc: return has(1, at) && set(v, MsgType::uint, take8());
            case 0xcd: return has(2, at) && set(v, MsgType::uint, take16());
            case 0xce: return has(4, at) && set(v, MsgType::uint, take32());
            case 0xcf: return has(8, at) && set(v, MsgType::uint, take64());
            case 0xd0: return has(1, at) && set_signed(v, static_cast<int8_t>(take8()));
            case 0xd1: return has(2, at) && set_signed(v, static_cast<int16_t>(take16()));
            case 0xd2: return has(4, at) && set_signed(v, static_cast<int32_t>(take32()));
            case 0xd3: return has(8, at) && set_signed(v, static_cast<int64_t>(take64()));
            case 0xd4: return ext(v, 1, at);
            case 0xd5: return ext(v, 2, at);
            case 0xd6: return ext(v, 4, at);
            case 0xd7: return ext(v, 8, at);
            case 0xd8: return ext(v, 16, at);
            case 0xd9: return has(1, at) && bytes(v, MsgType::str, take8(), at);
            case 0xda: return has(2, at) && bytes(v, MsgType::str, take16(), at);
            case 0xdb: return has(4, at) && bytes(v, MsgType::str, take32(), at);
            case 0xdc: return has(2, at) && container(v, MsgType::array, take16(), at);
            case 0xdd: return has(4, at) && container(v, MsgType::array, take32(), at);
            case 0xde: return has(2, at) && container(v, MsgType::map, take16(), at);
            case 0xdf: return has(4, at) && container(v, MsgType::map, take32(), at);
            default: return fail("0xc1 starts no msgpack value", at);
        }
    }

    uint8_t take8() { return *p++; }
    uint16_t take16() {
        const uint16_t x = load_be16(p);
        p += 2;
        return x;
    }
    uint32_t take32() {
        const uint32_t x = load_be32(p);
        p += 4;
        return x;
    }
    uint64_t take64() {
        const uint64_t x = load_be64(p);
        p += 8;
        return x;
    }

    bool has(size_t n, const uint8_t* at) { return left() >= n || fail("a value is cut short", at); }

    static bool set(MsgValue& v, MsgType type, uint64_t u) {
        v.type = type;
        v.u = u;
        return true;
    }

    static bool set_signed(MsgValue& v, int64_t i) {
        return set(v, i < 0 ? MsgType::negative : MsgType::uint, static_cast<uint64_t>(i));
    }

    bool bytes(MsgValue& v, MsgType type, uint32_t n, const uint8_t* at) {
        if (left() < n) return fail("a value is longer than what is left of the payload", at);
        v.type = type;
        v.n = n;
        v.data = p;
        p += n;
        return true;
    }

    bool ext(MsgValue& v, uint32_t n, const uint8_t* at) {
        if (!has(1, at)) return false;
        ++p;
        return bytes(v, MsgType::ext, n, at);
    }

    bool container(MsgValue& v, MsgType type, uint32_t n, const uint8_t* at) {
        v.type = type;
        v.n = n;
        if (v.children() > left()) return fail("more items are declared than there are bytes left", at);
        return true;
    }
};

// The number of nils at p, among the first n bytes. vLLM >= 0.23 sends one nil per block for every plain text request,
// so almost every extra_keys list consists of nils.
inline size_t nil_run(const uint8_t* p, size_t n) {
    constexpr uint64_t eight_nils = 0xc0c0c0c0c0c0c0c0u;
    size_t i = 0;
    for (uint64_t x; i + sizeof x <= n; i += sizeof x) {
        std::memcpy(&x, p + i, sizeof x);
        if (x != eight_nils) break;
    }
    while (i < n && p[i] == 0xc0) ++i;
    return i;
}

namespace msgpack_detail {

// The bytes that an unsigned integer of at most 32 bits takes, by its first byte. 0: another value starts here.
struct LengthTable {
    uint8_t at[256];
    constexpr LengthTable() : at() {
        for (int i = 0; i < 0x80; ++i) at[i] = 1;
        at[0xcc] = 2;
        at[0xcd] = 3;
        at[0xce] = 5;
    }
};
inline constexpr LengthTable u32_length{};

// The part of an integer's last four bytes that is its value, by its length; a fixint's first byte is its value.
inline constexpr uint32_t u32_mask[6] = {0, 0xffu, 0xffu, 0xffffu, 0, 0xffffffffu};

#ifdef KVINDEX_MSGPACK_SSSE3

inline const bool has_ssse3 = __builtin_cpu_supports("ssse3") != 0;

// The length of the integer that would start at each of 16 bytes. A shuffle looks up the low four bits of an index and
// gives 0 if its top bit is set. The saturating addition sets that bit for every byte outside 0xc0..0xcf.
__attribute__((target("ssse3"), always_inline)) inline __m128i lengths_at(const uint8_t* p) {
    const __m128i table = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 5, 0);
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i from_c0 = _mm_sub_epi8(x, _mm_set1_epi8(static_cast<char>(0xc0)));
    const __m128i tagged = _mm_shuffle_epi8(table, _mm_adds_epu8(from_c0, _mm_set1_epi8(0x70)));
    return _mm_sub_epi8(tagged, _mm_cmpgt_epi8(x, _mm_set1_epi8(-1)));
}

// step[i] + step[i + step[i]] for 16 positions, where `after` holds the 16 positions that follow `step`.
__attribute__((target("ssse3"), always_inline)) inline __m128i two_steps(__m128i step, __m128i after) {
    const __m128i iota = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i to = _mm_add_epi8(iota, step);
    const __m128i here = _mm_shuffle_epi8(step, _mm_adds_epu8(to, _mm_set1_epi8(0x70)));
    const __m128i there = _mm_shuffle_epi8(after, _mm_sub_epi8(to, _mm_set1_epi8(16)));
    return _mm_add_epi8(step, _mm_or_si128(here, there));
}

// The start of an integer is known only when the integer before it has been read. One at a time, that is a chain of two
// dependent loads and an addition for each (2.3 ns a token). With branches, it is a misprediction for every second
// token (3.5-5 ns for ids drawn from a vocabulary of 152 thousand). Here, the step over *four* integers is computed for
// every byte of a stretch at once, whether or not an integer starts there. So the chain is one load for four integers
// (0.97 ns a token for any ids; all measured on Zen 5). Three bytes before p must be readable.
__attribute__((target("ssse3"))) inline size_t read_u32s_ssse3(const uint8_t*& p, const uint8_t* end, uint32_t* out,
                                                               size_t n) {
    constexpr size_t stretch = 64;  // integers at a time: their at most 320 bytes are whole vectors
    constexpr size_t slack = 48;    // the last vectors start before the integers end, and reach beyond them
    alignas(16) uint8_t one[5 * stretch];
    alignas(16) uint8_t four[5 * stretch];
    size_t done = 0;
    while (n - done >= 4) {
        const size_t left = static_cast<size_t>(end - p);
        if (left < size_t{4} * 5 + slack) break;
        size_t m = (left - slack) / 5;
        if (m > stretch) m = stretch;
        if (m > n - done) m = n - done;
        m &= ~static_cast<size_t>(3);

        __m128i a = lengths_at(p);
        __m128i b = lengths_at(p + 16);
        __m128i a2 = two_steps(a, b);
        for (size_t i = 0; i < 5 * m; i += 16) {
            const __m128i c = lengths_at(p + i + 32);
            const __m128i b2 = two_steps(b, c);
            _mm_store_si128(reinterpret_cast<__m128i*>(one + i), a);
            _mm_store_si128(reinterpret_cast<__m128i*>(four + i), two_steps(a2, b2));
            a = b;
            b = c;
            a2 = b2;
        }

        size_t at = 0;
        for (size_t k = 0; k < m; k += 4) {
            const size_t l0 = one[at], e0 = at + l0;
            const size_t l1 = one[e0], e1 = e0 + l1;
            const size_t l2 = one[e1], e2 = e1 + l2;
            const size_t l3 = one[e2], e3 = e2 + l3;
            if (l3 == 0) {  // a length of 0 stays where it is, so the fourth length shows it for all
                p += at;
                return done + k;
            }
            uint32_t* const o = out + done + k;
            o[0] = load_be32(p + e0 - 4) & u32_mask[l0];
            o[1] = load_be32(p + e1 - 4) & u32_mask[l1];
            o[2] = load_be32(p + e2 - 4) & u32_mask[l2];
            o[3] = load_be32(p + e3 - 4) & u32_mask[l3];
            at += four[at];
        }
        p += at;
        done += m;
    }
    return done;
}

#endif

}  // namespace msgpack_detail

// Reads up to n unsigned integers of at most 32 bits, as engines write token ids. Stops early at the first value that
// is anything else or is cut short (which MsgReader::next then reads or refuses). Returns the number of integers read.
inline size_t read_u32s(const uint8_t*& p, const uint8_t* begin, const uint8_t* end, uint32_t* out, size_t n) {
    size_t done = 0;
    if (p - begin >= 3) {
#ifdef KVINDEX_MSGPACK_SSSE3
        if (msgpack_detail::has_ssse3) done = msgpack_detail::read_u32s_ssse3(p, end, out, n);
#endif
        for (; done < n && end - p >= 5; ++done) {
            const size_t length = msgpack_detail::u32_length.at[*p];
            if (length == 0) return done;
            p += length;
            out[done] = load_be32(p - 4) & msgpack_detail::u32_mask[length];
        }
    }
    for (; done < n && p != end; ++done) {
        const size_t length = msgpack_detail::u32_length.at[*p];
        if (length == 0 || static_cast<size_t>(end - p) < length) break;
        uint32_t x = length == 1 ? *p : 0;
        for (size_t i = 1; i < length; ++i) x = x << 8 | p[i];
        out[done] = x;
        p += length;
    }
    return done;
}

}  // namespace kvindex
