// Token ids straight out of a JSON request. A decoder that makes a Python int of each took 0.65 ms for 32,768 ids,
// while the match takes 0.01. simdjson's own route to a buffer took 0.34, and it flattens nested arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(KVINDEX_PORTABLE) && defined(__GNUC__) && defined(__x86_64__)
#define KVINDEX_JSON_AVX2 1
#define KVINDEX_JSON_TARGET __attribute__((target("avx2,bmi,popcnt")))
#include <immintrin.h>
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

    // A string, without interpreting its escapes. `text` is the part between the quotes.
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

    // Steps over any value by its brackets and strings alone: the decoder of the rest verifies it.
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

    // An array that contains only integers of 0 .. 2^32-1.
    bool tokens(uint32_t* out, size_t& n) {
        n = 0;
        if (!take('[')) return false;
        if (take(']')) return true;
        uint32_t* const first = out;
        do {
#ifdef KVINDEX_JSON_AVX2
            if (out != first && has_avx2) out = windows(out);
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

#ifdef KVINDEX_JSON_AVX2
    inline static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("bmi") != 0;

    // A bit for each byte of 64 that is not 0.
    KVINDEX_JSON_TARGET static uint64_t bits_of(__m256i low, __m256i high) {
        return static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
               uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(high))} << 32;
    }

    KVINDEX_JSON_TARGET static __m128i two(const uint64_t* each) {
        return _mm_set_epi64x(static_cast<int64_t>(each[1]), static_cast<int64_t>(each[0]));
    }

    // Eight digits each of two numbers, as four pairs of four digits.
    KVINDEX_JSON_TARGET static __m128i fours(__m128i text, __m128i kept) {
        const __m128i digits = _mm_and_si128(_mm_xor_si128(text, _mm_set1_epi8('0')), kept);
        return _mm_madd_epi16(_mm_maddubs_epi16(digits, _mm_set1_epi16(0x010A)), _mm_set1_epi32(0x00010064));
    }

    // The items before the last comma of 64 bytes at a time. Their ends are bits, known before any item has been read,
    // so four items are computed at once and none waits for the digits of another. 32,768 ids of 234 kB take 58 us; one
    // at a time, they take 129. Stops at anything but items of one to seven digits that are directly followed by a
    // comma and preceded by at most one space. Not for the first item, since the eight bytes before an end are read. Up
    // to three places behind the items are written. The text has room for them: it has 64 bytes for at most 32 items.
    KVINDEX_JSON_TARGET uint32_t* windows(uint32_t* out) {
        while (end_ - p_ >= 64) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p_));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p_ + 32));
            const __m256i zero = _mm256_set1_epi8('0'), nine = _mm256_set1_epi8(9);
            const __m256i comma = _mm256_set1_epi8(','), space = _mm256_set1_epi8(' ');
            const __m256i from_low = _mm256_sub_epi8(low, zero), from_high = _mm256_sub_epi8(high, zero);
            const uint64_t digits = bits_of(_mm256_cmpeq_epi8(_mm256_min_epu8(from_low, nine), from_low),
                                            _mm256_cmpeq_epi8(_mm256_min_epu8(from_high, nine), from_high));
            const uint64_t zeros = bits_of(_mm256_cmpeq_epi8(low, zero), _mm256_cmpeq_epi8(high, zero));
            const uint64_t commas = bits_of(_mm256_cmpeq_epi8(low, comma), _mm256_cmpeq_epi8(high, comma));
            const uint64_t spaces = bits_of(_mm256_cmpeq_epi8(low, space), _mm256_cmpeq_epi8(high, space));
            if (commas == 0) break;
            const int last = 63 - __builtin_clzll(commas);
            const uint64_t here = (uint64_t{2} << last) - 1;
            const uint64_t behind = commas << 1 | 1;
            const int blank = *p_ == ' ';
            const uint64_t begins = behind << blank;
            uint64_t eight = digits & digits >> 1;
            eight &= eight >> 2;
            eight &= eight >> 4;
            const uint64_t wrong = ~(digits | commas | spaces) | (spaces ^ (blank ? behind : 0)) |
                                   (begins & (commas | (zeros & ~(commas >> 1)))) | eight;
            if ((wrong & here) != 0) break;
            const int items = __builtin_popcountll(commas);
            uint64_t ends = commas;
            for (int n = 0, begin = blank; n < items; n += 4) {
                uint64_t text[4], kept[4];
                for (int i = 0; i < 4; ++i) {
                    // 64 behind the last item, whose place is written but not kept.
                    const int end = static_cast<int>(_tzcnt_u64(ends));
                    ends = _blsr_u64(ends);
                    std::memcpy(&text[i], p_ + end - 8, 8);
                    kept[i] = kUpper[(end - begin) & 7];
                    begin = end + 1 + blank;
                }
                const __m128i all = _mm_packs_epi32(fours(two(text), two(kept)), fours(two(text + 2), two(kept + 2)));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + n), _mm_madd_epi16(all, _mm_set1_epi32(0x00012710)));
            }
            out += items;
            p_ += last + 1;
        }
        return out;
    }

    // Masks for the last bytes of eight.
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

    // The number that eight digits make, added up in pairs.
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
// Returns an end of 0 for anything else: no object, no array, another item in the array, or the name given twice. The
// text without the array must still be decoded, and the decoder reports its faults.
inline JsonTokens json_tokens(const char* p, size_t n, const char* name, size_t name_bytes, uint32_t* out) {
    json_detail::Scanner scan(p, n);
    JsonTokens found;
    if (!scan.take('{')) return {};
    do {
        const char* key = nullptr;
        size_t key_bytes = 0;
        if (!scan.string(key, key_bytes) || !scan.take(':')) return {};
        if (key_bytes != name_bytes || std::memcmp(key, name, name_bytes) != 0) {
            // An escaped name could be the same name.
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
