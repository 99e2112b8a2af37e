// Token ids straight out of a JSON request: a decoder that makes a Python int of each took 0.65 ms for 32,768 of them,
// where the match takes 0.01. simdjson's own route to a buffer took 0.34 and flattens nested arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(KVINDEX_PORTABLE) && defined(__SSE2__)
#define KVINDEX_JSON_SSE2 1
#include <emmintrin.h>
#endif

namespace kvindex {

struct JsonTokens {
    size_t n = 0;      // tokens
    size_t begin = 0;  // the array's place in the text, brackets included
    size_t end = 0;    // 0: not found
};

namespace json_detail {

class Scanner {
public:
    Scanner(const char* p, size_t n) : p_(p), end_(p + n) {}

    const char* at() const { return p_; }

    bool done() const { return p_ == end_; }

    bool take(char c) {
        blanks();
        if (p_ == end_ || *p_ != c) return false;
        ++p_;
        return true;
    }

    bool at(char c) {
        blanks();
        return p_ != end_ && *p_ == c;
    }

    // A string without looking at its escapes; `text` is between the quotes.
    bool string(const char*& text, size_t& n) {
        if (!take('"')) return false;
        text = p_;
        for (; p_ != end_; ++p_) {
            if (*p_ == '"') {
                n = static_cast<size_t>(p_++ - text);
                return true;
            }
            if (*p_ != '\\') continue;
            ++p_;
            if (p_ == end_) return false;
        }
        return false;
    }

    // Past any value, by its brackets and strings alone: the decoder of the rest checks it.
    bool skip() {
        size_t depth = 0;
        const char* text = nullptr;
        size_t n = 0;
        for (blanks(); p_ != end_; ++p_) {
            switch (*p_) {
                case '"':
                    if (!string(text, n)) return false;
                    --p_;
                    break;
                case '[':
                case '{': ++depth; break;
                case ']':
                case '}':
                    if (depth == 0) return true;
                    --depth;
                    break;
                case ',':
                    if (depth == 0) return true;
                    break;
                default: break;
            }
        }
        return false;
    }

    // An array of integers of 0 .. 2^32-1, nothing else in it.
    bool tokens(uint32_t* out, size_t& n) {
        n = 0;
        if (!take('[')) return false;
        if (take(']')) return true;
        uint32_t* const first = out;
        do {
#ifdef KVINDEX_JSON_SSE2
            while (out != first && window(out)) {
            }
#endif
            blanks();
            if (!token(*out)) return false;
            ++out;
        } while (take(','));
        n = static_cast<size_t>(out - first);
        return take(']');
    }

private:
    void blanks() {
        while (p_ != end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
    }

#ifdef KVINDEX_JSON_SSE2
    // A bit for each byte that is not 0.
    static uint64_t bits_of(__m128i bytes) { return static_cast<uint32_t>(_mm_movemask_epi8(bytes)); }

    // The items before the last comma of the next 64 bytes: their places are bits, known before an item has been looked
    // at, so one does not wait for the other. Does nothing where there is anything but items of one to seven digits
    // with commas right behind them and one space between, if any. Not for the first item: eight bytes before an end
    // are read.
    bool window(uint32_t*& out) {
        if (end_ - p_ < 64) return false;
        uint64_t digits = 0, commas = 0, spaces = 0, zeros = 0;
        for (int i = 0; i < 64; i += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p_ + i));
            const __m128i value = _mm_sub_epi8(bytes, _mm_set1_epi8('0'));
            digits |= bits_of(_mm_cmpeq_epi8(_mm_min_epu8(value, _mm_set1_epi8(9)), value)) << i;
            commas |= bits_of(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(','))) << i;
            spaces |= bits_of(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(' '))) << i;
            zeros |= bits_of(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('0'))) << i;
        }
        if (commas == 0) return false;
        const int last = 63 - __builtin_clzll(commas);
        const uint64_t here = (uint64_t{2} << last) - 1;
        const uint64_t behind = commas << 1 | 1;
        uint64_t begins = digits & ~(digits << 1) & here;
        if (begins != (((behind & ~spaces) | (behind & spaces) << 1) & here) ||
            (digits << 1 & ~digits & here) != commas || (begins & zeros & ~(commas >> 1)) != 0)
            return false;
        uint64_t eight = digits & digits >> 1;
        eight &= eight >> 2;
        if ((eight & eight >> 4 & here) != 0) return false;
        for (uint64_t ends = commas; ends != 0; ends &= ends - 1, begins &= begins - 1) {
            const int begin = __builtin_ctzll(begins), end = __builtin_ctzll(ends);
            uint64_t bytes = 0;
            std::memcpy(&bytes, p_ + end - 8, 8);
            *out++ = number((bytes ^ kZeros) & kUpper[end - begin]);
        }
        p_ += last + 1;
        return true;
    }

    // The last bytes of eight.
    static constexpr uint64_t kUpper[8] = {0,
                                           ~uint64_t{0} << 56,
                                           ~uint64_t{0} << 48,
                                           ~uint64_t{0} << 40,
                                           ~uint64_t{0} << 32,
                                           ~uint64_t{0} << 24,
                                           ~uint64_t{0} << 16,
                                           ~uint64_t{0} << 8};
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    static constexpr uint64_t kZeros = 0x3030303030303030U;

    // Eight digits, added up in pairs.
    static uint32_t number(uint64_t digits) {
        digits = digits * 10 + (digits >> 8);
        return static_cast<uint32_t>(((digits & 0x000000FF000000FFU) * 0x000F424000000064U +
                                      ((digits >> 16) & 0x000000FF000000FFU) * 0x0000271000000001U) >>
                                     32);
    }
#endif

    bool token(uint32_t& out) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        if (end_ - p_ >= 8) {
            uint64_t bytes = 0;
            std::memcpy(&bytes, p_, 8);
            bytes ^= kZeros;
            const uint64_t other =
                (((bytes & 0x7F7F7F7F7F7F7F7FU) + 0x7676767676767676U) | bytes) & 0x8080808080808080U;
            const auto bits = other ? static_cast<unsigned>(__builtin_ctzll(other)) & ~7U : 64U;
            if (bits == 0) return false;
            if (bits < 64) {
                if ((bytes & 0xFF) == 0 && bits > 8) return false;
                out = number(bytes << (64 - bits));
                p_ += bits / 8;
                return true;
            }
        }
#endif
        const char* first = p_;
        uint64_t value = 0;
        for (; p_ != end_ && *p_ >= '0' && *p_ <= '9' && p_ - first < 10; ++p_)
            value = value * 10 + static_cast<uint64_t>(*p_ - '0');
        out = static_cast<uint32_t>(value);
        return p_ != first && value <= 0xFFFFFFFFU && (*first != '0' || p_ - first == 1);
    }

    const char* p_;
    const char* end_;
};

}  // namespace json_detail

// Finds the array of token ids that a JSON object has under `name`, and reads it into `out`, which has room for n / 2.
// Gives an end of 0 for anything else: no object, no array, another item in it, the name given
// twice. The text without the array still has to be decoded, and that reports its faults.
inline JsonTokens json_tokens(const char* p, size_t n, const char* name, size_t name_bytes, uint32_t* out) {
    json_detail::Scanner scan(p, n);
    JsonTokens found;
    if (!scan.take('{')) return {};
    do {
        const char* key = nullptr;
        size_t key_bytes = 0;
        if (!scan.string(key, key_bytes) || !scan.take(':')) return {};
        if (key_bytes != name_bytes || std::memcmp(key, name, name_bytes) != 0) {
            // An escaped name could be the same one.
            if (std::memchr(key, '\\', key_bytes) != nullptr || !scan.skip()) return {};
            continue;
        }
        if (found.end != 0 || !scan.at('[')) return {};
        found.begin = static_cast<size_t>(scan.at() - p);
        if (!scan.tokens(out, found.n)) return {};
        found.end = static_cast<size_t>(scan.at() - p);
    } while (scan.take(','));
    return found;
}

}  // namespace kvindex
