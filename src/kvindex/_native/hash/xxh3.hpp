// XXH3-64 and the block hashes built on it.
//
// Written from the published description (xxHash fast digest algorithm, section "XXH3"): an index that installs with
// nothing but a compiler can neither vendor the reference header nor require a system package. Everything here is
// reentrant: no mutable globals, no allocation, no exceptions. A BlockHasher is immutable once built and may be shared
// by any number of threads.
//
// KVINDEX_PORTABLE, when defined, leaves out every intrinsic and the 128-bit integer type, so that one machine can test
// the code of all others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if !defined(KVINDEX_PORTABLE) && (defined(__x86_64__) || defined(_M_X64))
#define KVINDEX_XXH3_SSE2 1
#include <emmintrin.h>
#if defined(__GNUC__)
#define KVINDEX_XXH3_AVX2 1
#include <immintrin.h>
#endif
#endif

#if !defined(KVINDEX_PORTABLE) && defined(__SIZEOF_INT128__)
#define KVINDEX_XXH3_INT128 1
#elif !defined(KVINDEX_PORTABLE) && defined(_M_X64)
#include <intrin.h>
#endif

#if defined(__GNUC__)
#define KVINDEX_XXH3_INLINE inline __attribute__((always_inline))
// A kernel's calls must all land in the one function that carries the instruction set; see kernel_one below.
#define KVINDEX_XXH3_FLATTEN __attribute__((flatten))
#else
#define KVINDEX_XXH3_INLINE inline
#define KVINDEX_XXH3_FLATTEN
#endif

// Without unrolling, -O2 keeps the accumulators of the long form in memory (GCC 12, SSE2: 16 ns for 256 bytes instead
// of 8).
#if defined(__GNUC__) && !defined(__clang__)
#define KVINDEX_XXH3_UNROLL _Pragma("GCC unroll 8")
#else
#define KVINDEX_XXH3_UNROLL
#endif

namespace kvindex {

/// The code path for inputs over 240 bytes (blocks of more than 60 tokens). Shorter inputs need 64 x 64 -> 128 bit
/// multiplications, which these vector units do not have, and take the same scalar code everywhere. Architectures other
/// than x86-64 are always `portable`. All paths give the same hashes.
enum class Isa : std::uint8_t { portable, sse2, avx2 };

/// The best path that this build can use on this processor. The processor is queried once.
inline Isa best_isa() noexcept {
#if defined(KVINDEX_XXH3_AVX2)
    static const Isa best = __builtin_cpu_supports("avx2") ? Isa::avx2 : Isa::sse2;
    return best;
#elif defined(KVINDEX_XXH3_SSE2)
    return Isa::sse2;
#else
    return Isa::portable;
#endif
}

inline Isa at_most_best(Isa isa) noexcept { return isa <= best_isa() ? isa : best_isa(); }

namespace xxh3 {

using Byte = unsigned char;

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie, little-endian");
#endif
static_assert(sizeof(std::uint32_t) == 4 && sizeof(std::uint64_t) == 8, "XXH3 is defined over octets");

inline constexpr std::uint64_t PRIME32_1 = 0x9E3779B1U;
inline constexpr std::uint64_t PRIME32_2 = 0x85EBCA77U;
inline constexpr std::uint64_t PRIME32_3 = 0xC2B2AE3DU;
inline constexpr std::uint64_t PRIME64_1 = 0x9E3779B185EBCA87ULL;
inline constexpr std::uint64_t PRIME64_2 = 0xC2B2AE3D27D4EB4FULL;
inline constexpr std::uint64_t PRIME64_3 = 0x165667B19E3779F9ULL;
inline constexpr std::uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63ULL;
inline constexpr std::uint64_t PRIME64_5 = 0x27D4EB2F165667C5ULL;
inline constexpr std::uint64_t PRIME_MX1 = 0x165667919E3779F9ULL;
inline constexpr std::uint64_t PRIME_MX2 = 0x9FB21C651E98DF25ULL;

inline constexpr std::size_t SECRET_BYTES = 192;
inline constexpr std::size_t STRIPE_BYTES = 64;
inline constexpr std::size_t ROUND_STRIPES = (SECRET_BYTES - STRIPE_BYTES) / 8;
inline constexpr std::size_t ROUND_BYTES = ROUND_STRIPES * STRIPE_BYTES;
inline constexpr std::size_t SHORT_MAX = 240;
inline constexpr std::size_t SCRAMBLE_AT = SECRET_BYTES - STRIPE_BYTES;
inline constexpr std::size_t LAST_STRIPE_AT = SECRET_BYTES - 71;
inline constexpr std::size_t MERGE_AT = 11;

// clang-format off
alignas(64) inline constexpr Byte SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
// clang-format on

alignas(32) inline constexpr std::uint64_t INITIAL[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                                         PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

// memcpy instead of a cast: token buffers and the secret's odd offsets are unaligned, and compilers turn the copy into
// one load.
KVINDEX_XXH3_INLINE std::uint64_t load64(const Byte* p) noexcept {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

KVINDEX_XXH3_INLINE std::uint32_t load32(const Byte* p) noexcept {
    std::uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

KVINDEX_XXH3_INLINE std::uint64_t swap_bytes(std::uint64_t x) noexcept {
#if defined(__GNUC__) && !defined(KVINDEX_PORTABLE)
    return __builtin_bswap64(x);
#else
    x = ((x & 0x00FF00FF00FF00FFULL) << 8) | ((x >> 8) & 0x00FF00FF00FF00FFULL);
    x = ((x & 0x0000FFFF0000FFFFULL) << 16) | ((x >> 16) & 0x0000FFFF0000FFFFULL);
    return (x << 32) | (x >> 32);
#endif
}

KVINDEX_XXH3_INLINE std::uint64_t rotate_left(std::uint64_t x, unsigned by) noexcept {
    return (x << by) | (x >> (64 - by));
}

// Makes the compiler hold x as a finished value here: it can neither reorder a sum that x is part of nor fetch the
// target of a pointer x ahead of time.
template <class T>
KVINDEX_XXH3_INLINE T settle(T x) noexcept {
#if defined(__GNUC__) && !defined(KVINDEX_PORTABLE)
    __asm__("" : "+r"(x));
#endif
    return x;
}

KVINDEX_XXH3_INLINE std::uint64_t multiply_fold(std::uint64_t a, std::uint64_t b) noexcept {
#if defined(KVINDEX_XXH3_INT128)
    __extension__ typedef unsigned __int128 Wide;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
#elif !defined(KVINDEX_PORTABLE) && defined(_M_X64)
    std::uint64_t high;
    const std::uint64_t low = _umul128(a, b, &high);
    return low ^ high;
#else
    const std::uint64_t a_low = a & 0xFFFFFFFFU, a_high = a >> 32, b_low = b & 0xFFFFFFFFU, b_high = b >> 32;
    const std::uint64_t low = a_low * b_low;
    const std::uint64_t cross = a_high * b_low + (low >> 32);  // (2^32-1)^2 + 2^32-1 still fits 64 bits
    const std::uint64_t middle = a_low * b_high + (cross & 0xFFFFFFFFU);
    const std::uint64_t high = a_high * b_high + (cross >> 32) + (middle >> 32);
    return ((middle << 32) | (low & 0xFFFFFFFFU)) ^ high;
#endif
}

KVINDEX_XXH3_INLINE std::uint64_t avalanche(std::uint64_t x) noexcept {
    x ^= x >> 37;
    x *= PRIME_MX1;
    return x ^ (x >> 32);
}

KVINDEX_XXH3_INLINE std::uint64_t avalanche_xxh64(std::uint64_t x) noexcept {
    x ^= x >> 33;
    x *= PRIME64_2;
    x ^= x >> 29;
    x *= PRIME64_3;
    return x ^ (x >> 32);
}

KVINDEX_XXH3_INLINE std::uint64_t mix16(const Byte* p, std::uint64_t secret_0, std::uint64_t secret_1) noexcept {
    return multiply_fold(load64(p) ^ secret_0, load64(p + 8) ^ secret_1);
}

KVINDEX_XXH3_INLINE std::uint64_t mix16_seeded(const Byte* p, std::size_t secret_at, std::uint64_t seed) noexcept {
    return mix16(p, load64(SECRET + secret_at) + seed, load64(SECRET + secret_at + 8) - seed);
}

inline std::uint64_t hash_0_to_16(const Byte* p, std::size_t n, std::uint64_t seed) noexcept {
    if (n > 8) {
        const std::uint64_t low = ((load64(SECRET + 24) ^ load64(SECRET + 32)) + seed) ^ load64(p);
        const std::uint64_t high = ((load64(SECRET + 40) ^ load64(SECRET + 48)) - seed) ^ load64(p + n - 8);
        return avalanche(n + swap_bytes(low) + high + multiply_fold(low, high));
    }
    if (n >= 4) {
        // Reversing all eight bytes of a word whose upper half is zero leaves its reversed lower half on top, where the
        // description has it.
        const std::uint64_t modified = seed ^ swap_bytes(seed & 0xFFFFFFFFU);
        const std::uint64_t combined = load32(p + n - 4) | (static_cast<std::uint64_t>(load32(p)) << 32);
        std::uint64_t x = ((load64(SECRET + 8) ^ load64(SECRET + 16)) - modified) ^ combined;
        x ^= rotate_left(x, 49) ^ rotate_left(x, 24);
        x *= PRIME_MX2;
        x ^= (x >> 35) + n;
        x *= PRIME_MX2;
        return x ^ (x >> 28);
    }
    if (n > 0) {
        const std::uint64_t combined = p[n - 1] | (static_cast<std::uint64_t>(n) << 8) |
                                       (static_cast<std::uint64_t>(p[0]) << 16) |
                                       (static_cast<std::uint64_t>(p[n >> 1]) << 24);
        return avalanche_xxh64((static_cast<std::uint64_t>(load32(SECRET) ^ load32(SECRET + 4)) + seed) ^ combined);
    }
    return avalanche_xxh64(seed ^ load64(SECRET + 56) ^ load64(SECRET + 64));
}

inline std::uint64_t hash_17_to_240(const Byte* p, std::size_t n, std::uint64_t seed) noexcept {
    std::uint64_t acc = n * PRIME64_1;
    if (n <= 128) {
        const std::size_t rounds = ((n - 1) >> 5) + 1;
        for (std::size_t i = 0; i < rounds; ++i) {
            acc += mix16_seeded(p + 16 * i, 32 * i, seed);
            acc += mix16_seeded(p + n - 16 * i - 16, 32 * i + 16, seed);
        }
        return avalanche(acc);
    }
    const std::size_t chunks = n >> 4;
    for (std::size_t i = 0; i < 8; ++i) acc += mix16_seeded(p + 16 * i, 16 * i, seed);
    acc = avalanche(acc);
    for (std::size_t i = 8; i < chunks; ++i) acc += mix16_seeded(p + 16 * i, 16 * (i - 8) + 3, seed);
    return avalanche(acc + mix16_seeded(p + n - 16, 119, seed));
}

/// The 192 bytes of secret that a seed gives. In 16-byte steps they are also, word for word, the seeded secret for
/// inputs of 17 to 128 bytes, so one copy serves every block size.
struct Secret {
    alignas(64) std::uint64_t words[SECRET_BYTES / 8];

    explicit Secret(std::uint64_t seed) noexcept {
        for (std::size_t i = 0; i < SECRET_BYTES / 8; i += 2) {
            words[i] = load64(SECRET + 8 * i) + seed;
            words[i + 1] = load64(SECRET + 8 * i + 8) - seed;
        }
    }

    const Byte* bytes() const noexcept { return reinterpret_cast<const Byte*>(words); }
};

// The eight accumulators of the long form, once per instruction set. The description adds each input word to its
// neighbour's accumulator. Sums commute, so the words are summed where they lie and cross over once, before the
// accumulators are next looked at (scramble, finish): one shuffle less per stripe and register.

struct LanesPortable {
    std::uint64_t acc[8], sum[8];

    KVINDEX_XXH3_INLINE void start() noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 8; ++i) {
            acc[i] = INITIAL[i];
            sum[i] = 0;
        }
    }

    KVINDEX_XXH3_INLINE void stripe(const Byte* p, const Byte* secret) noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint64_t word = load64(p + 8 * i);
            const std::uint64_t keyed = word ^ load64(secret + 8 * i);
            sum[i] += word;
            acc[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
        }
    }

    KVINDEX_XXH3_INLINE void scramble(const Byte* secret) noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint64_t x = acc[i] + sum[i ^ 1];
            acc[i] = (x ^ (x >> 47) ^ load64(secret + 8 * i)) * PRIME32_1;
        }
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 8; ++i) sum[i] = 0;
    }

    KVINDEX_XXH3_INLINE void finish(const Byte* secret, std::uint64_t* keyed) const noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 8; ++i) keyed[i] = (acc[i] + sum[i ^ 1]) ^ load64(secret + 8 * i);
    }
};

#if defined(KVINDEX_XXH3_SSE2)
struct LanesSse2 {
    __m128i acc[4], sum[4];

    static KVINDEX_XXH3_INLINE __m128i load(const Byte* p, std::size_t i) noexcept {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    }

    KVINDEX_XXH3_INLINE __m128i settled(std::size_t i) const noexcept {
        return _mm_add_epi64(acc[i], _mm_shuffle_epi32(sum[i], _MM_SHUFFLE(1, 0, 3, 2)));
    }

    KVINDEX_XXH3_INLINE void start() noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 4; ++i) {
            acc[i] = load(reinterpret_cast<const Byte*>(INITIAL), i);
            sum[i] = _mm_setzero_si128();
        }
    }

    KVINDEX_XXH3_INLINE void stripe(const Byte* p, const Byte* secret) noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 4; ++i) {
            const __m128i words = load(p, i);
            const __m128i keyed = _mm_xor_si128(words, load(secret, i));
            sum[i] = _mm_add_epi64(sum[i], words);
            const __m128i high = _mm_shuffle_epi32(keyed, _MM_SHUFFLE(3, 3, 1, 1));
            acc[i] = _mm_add_epi64(acc[i], _mm_mul_epu32(keyed, high));
        }
    }

    KVINDEX_XXH3_INLINE void scramble(const Byte* secret) noexcept {
        const __m128i prime = _mm_set1_epi64x(static_cast<long long>(PRIME32_1));
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 4; ++i) {
            const __m128i x = settled(i);
            const __m128i keyed = _mm_xor_si128(_mm_xor_si128(x, _mm_srli_epi64(x, 47)), load(secret, i));
            const __m128i high = _mm_mul_epu32(_mm_srli_epi64(keyed, 32), prime);
            acc[i] = _mm_add_epi64(_mm_mul_epu32(keyed, prime), _mm_slli_epi64(high, 32));
            sum[i] = _mm_setzero_si128();
        }
    }

    KVINDEX_XXH3_INLINE void finish(const Byte* secret, std::uint64_t* keyed) const noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 4; ++i)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(keyed) + i, _mm_xor_si128(settled(i), load(secret, i)));
    }
};
#endif

#if defined(KVINDEX_XXH3_AVX2)
#define KVINDEX_XXH3_TARGET __attribute__((target("avx2")))
// Not always_inline, and vectors are passed by reference only. Compilers also look at a call from kernel_one in
// isolation, where AVX2 is not switched on. There they would refuse a forced inlining or warn about a vector argument.
struct LanesAvx2 {
    __m256i acc[2], sum[2];

    KVINDEX_XXH3_TARGET inline void start() noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 2; ++i) {
            acc[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(INITIAL) + i);
            sum[i] = _mm256_setzero_si256();
        }
    }

    KVINDEX_XXH3_TARGET inline void stripe(const Byte* p, const Byte* secret) noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 2; ++i) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
            const __m256i keyed =
                _mm256_xor_si256(words, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
            sum[i] = _mm256_add_epi64(sum[i], words);
            const __m256i high = _mm256_shuffle_epi32(keyed, _MM_SHUFFLE(3, 3, 1, 1));
            acc[i] = _mm256_add_epi64(acc[i], _mm256_mul_epu32(keyed, high));
        }
    }

    KVINDEX_XXH3_TARGET inline void scramble(const Byte* secret) noexcept {
        const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(PRIME32_1));
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 2; ++i) {
            const __m256i x = _mm256_add_epi64(acc[i], _mm256_shuffle_epi32(sum[i], _MM_SHUFFLE(1, 0, 3, 2)));
            const __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, 47)),
                                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
            acc[i] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
            sum[i] = _mm256_setzero_si256();
        }
    }

    KVINDEX_XXH3_TARGET inline void finish(const Byte* secret, std::uint64_t* keyed) const noexcept {
        KVINDEX_XXH3_UNROLL
        for (std::size_t i = 0; i < 2; ++i) {
            const __m256i x = _mm256_add_epi64(acc[i], _mm256_shuffle_epi32(sum[i], _MM_SHUFFLE(1, 0, 3, 2)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(keyed) + i,
                                _mm256_xor_si256(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i)));
        }
    }
};
#endif

// A pack instead of a loop: -O2 does not unroll a loop of seven, and the offsets of the secret must be constants.
template <class Lanes, std::size_t... I>
KVINDEX_XXH3_INLINE void stripes(Lanes& lanes, const Byte* p, const Byte* secret, std::index_sequence<I...>) noexcept {
    (lanes.stripe(p + STRIPE_BYTES * I, secret + 8 * I), ...);
}

/// The long form (over 240 bytes) for any instruction set. BYTES = 0 takes the length from `bytes`. One source serves
/// all of them because it is forced into the function below that carries the instruction set and is flattened: only
/// there do the functions of the lanes fit, and only there are they inlined.
template <class Lanes, std::size_t BYTES>
KVINDEX_XXH3_INLINE std::uint64_t kernel_one(const Byte* p, std::size_t bytes, const Byte* secret) noexcept {
    static_assert(BYTES == 0 || (BYTES > SHORT_MAX && BYTES <= ROUND_BYTES && BYTES % STRIPE_BYTES == 0),
                  "a length known in advance is one round of whole stripes");
    Lanes lanes;
    lanes.start();
    if constexpr (BYTES != 0) {
        stripes(lanes, p, secret, std::make_index_sequence<BYTES / STRIPE_BYTES - 1>{});
        lanes.stripe(p + BYTES - STRIPE_BYTES, secret + LAST_STRIPE_AT);
        bytes = BYTES;
    } else {
        std::size_t left = bytes;
        for (; left > ROUND_BYTES; left -= ROUND_BYTES, p += ROUND_BYTES) {
            stripes(lanes, p, secret, std::make_index_sequence<ROUND_STRIPES>{});
            lanes.scramble(secret + SCRAMBLE_AT);
        }
        const std::size_t whole = (left - 1) / STRIPE_BYTES;
        for (std::size_t i = 0; i < whole; ++i) lanes.stripe(p + STRIPE_BYTES * i, secret + 8 * i);
        // After whole rounds this may reach back before p, into bytes of the input that a round has already taken.
        lanes.stripe(p + left - STRIPE_BYTES, secret + LAST_STRIPE_AT);
    }
    alignas(32) std::uint64_t keyed[8];
    lanes.finish(secret + MERGE_AT, keyed);
    std::uint64_t result = bytes * PRIME64_1;
    KVINDEX_XXH3_UNROLL
    for (std::size_t i = 0; i < 8; i += 2) result += multiply_fold(keyed[i], keyed[i + 1]);
    return avalanche(result);
}

// The loop over blocks lies inside the function of the instruction set, so the choice is made once per call. Since no
// block waits for another, the processor overlaps one block's final multiplications with the next block's stripes.
template <class Lanes, std::size_t BYTES>
KVINDEX_XXH3_INLINE void kernel(const Byte* p, std::size_t bytes, std::size_t n, const Byte* secret,
                                std::uint64_t* out) noexcept {
    const std::size_t step = BYTES ? BYTES : bytes;
    for (std::size_t i = 0; i < n; ++i) out[i] = kernel_one<Lanes, BYTES>(p + step * i, step, secret);
}

#if defined(KVINDEX_XXH3_AVX2)
template <std::size_t BYTES>
KVINDEX_XXH3_TARGET KVINDEX_XXH3_FLATTEN inline void kernel_avx2(const Byte* p, std::size_t bytes, std::size_t n,
                                                                 const Byte* secret, std::uint64_t* out) noexcept {
    kernel<LanesAvx2, BYTES>(p, bytes, n, secret, out);
}
#endif

/// Hashes n consecutive inputs of the same length over 240 bytes.
template <std::size_t BYTES>
inline void hash_long(const Byte* p, std::size_t bytes, std::size_t n, const Byte* secret, Isa isa,
                      std::uint64_t* out) noexcept {
    switch (isa) {
#if defined(KVINDEX_XXH3_AVX2)
        case Isa::avx2: return kernel_avx2<BYTES>(p, bytes, n, secret, out);
#endif
#if defined(KVINDEX_XXH3_SSE2)
        case Isa::sse2: return kernel<LanesSse2, BYTES>(p, bytes, n, secret, out);
#endif
        default: return kernel<LanesPortable, BYTES>(p, bytes, n, secret, out);
    }
}

inline std::uint64_t hash_short(const Byte* p, std::size_t n, std::uint64_t seed) noexcept {
    return n <= 16 ? hash_0_to_16(p, n, seed) : hash_17_to_240(p, n, seed);
}

}  // namespace xxh3

/// XXH3-64 of n bytes. p may have any alignment and may be null when n is 0. An `isa` that this processor or this
/// build lacks means best_isa().
inline std::uint64_t xxh3_64(const void* p, std::size_t n, std::uint64_t seed, Isa isa) noexcept {
    const xxh3::Byte* bytes = static_cast<const xxh3::Byte*>(p);
    if (n <= xxh3::SHORT_MAX) return xxh3::hash_short(bytes, n, seed);
    const xxh3::Secret secret(seed);
    std::uint64_t out;
    xxh3::hash_long<0>(bytes, n, 1, secret.bytes(), at_most_best(isa), &out);
    return out;
}

inline std::uint64_t xxh3_64(const void* p, std::size_t n, std::uint64_t seed) noexcept {
    if (n <= xxh3::SHORT_MAX) return xxh3::hash_short(static_cast<const xxh3::Byte*>(p), n, seed);
    return xxh3_64(p, n, seed, best_isa());
}

/// Hashes of token blocks. Everything that depends only on seed and block size is computed in advance.
///
///     local(block)      = XXH3(the block's tokens as little-endian u32, seed + lora)
///     roll(prev, local) = XXH3(prev || local as little-endian u64, seed)
///
/// `lora` is XXH3(LoRA name, 0), or 0 without one: an adapter changes the identity of a block, not the chaining of
/// blocks. An `isa` that this processor or this build lacks means best_isa(). Immutable and trivially copyable;
/// building one costs about two block hashes.
///
/// Tokens are a plain uint32_t array (4-byte aligned). Blocks lie one behind the other, block_tokens apart, and only
/// the requested blocks are read. Every function is linear in tokens, allocates nothing and may run in any thread.
class BlockHasher {
public:
    explicit BlockHasher(std::uint64_t seed, std::uint32_t block_tokens, std::uint64_t lora = 0,
                         Isa isa = best_isa()) noexcept
        : secret_(seed + lora),
          roll_prev_((xxh3::load64(xxh3::SECRET + 24) ^ xxh3::load64(xxh3::SECRET + 32)) + seed),
          roll_local_((xxh3::load64(xxh3::SECRET + 40) ^ xxh3::load64(xxh3::SECRET + 48)) - seed),
          seed_(seed),
          local_seed_(seed + lora),
          block_tokens_(block_tokens),
          isa_(at_most_best(isa)) {}

    std::uint64_t seed() const noexcept { return seed_; }
    std::uint64_t local_seed() const noexcept { return local_seed_; }
    std::uint32_t block_tokens() const noexcept { return block_tokens_; }
    Isa isa() const noexcept { return isa_; }

    /// Calls f(std::integral_constant<unsigned, BT>) with BT = 16, 32, 64 or 128 if that is the block size, else 0, and
    /// returns its result: one choice in front of a loop that is compiled for that size.
    template <class F>
    decltype(auto) visit(F&& f) const {
        switch (block_tokens_) {
            case 16: return std::forward<F>(f)(std::integral_constant<unsigned, 16>{});
            case 32: return std::forward<F>(f)(std::integral_constant<unsigned, 32>{});
            case 64: return std::forward<F>(f)(std::integral_constant<unsigned, 64>{});
            case 128: return std::forward<F>(f)(std::integral_constant<unsigned, 128>{});
            default: return std::forward<F>(f)(std::integral_constant<unsigned, 0>{});
        }
    }

    /// Local hash of one block. BT must be block_tokens(), or 0 for any size. 16 and 32 are inlined into the caller;
    /// for 64 and 128, locals_fixed over a few blocks saves a call and a choice per block (256 bytes: 4.0 ns instead of
    /// 5.7).
    template <unsigned BT>
    KVINDEX_XXH3_INLINE std::uint64_t local_fixed(const std::uint32_t* block) const noexcept {
        const xxh3::Byte* p = reinterpret_cast<const xxh3::Byte*>(block);
        constexpr std::size_t BYTES = std::size_t{BT} * 4;
        if constexpr (BT == 0) {
            const std::size_t bytes = std::size_t{block_tokens_} * 4;
            if (bytes <= xxh3::SHORT_MAX) return xxh3::hash_short(p, bytes, local_seed_);
        }
        if constexpr (BT == 0 || BYTES > xxh3::SHORT_MAX) {
            std::uint64_t out;
            xxh3::hash_long<BYTES>(p, std::size_t{block_tokens_} * 4, 1, secret_.bytes(), isa_, &out);
            return out;
        } else {
            static_assert(BYTES >= 32 && BYTES <= 128 && BYTES % 32 == 0, "pairs of 16 bytes that do not overlap");
            return medium<BYTES>(p, std::make_index_sequence<BYTES / 32>{});
        }
    }

    template <unsigned BT>
    void locals_fixed(const std::uint32_t* tokens, std::size_t n_blocks, std::uint64_t* out) const noexcept {
        const std::size_t step = BT ? BT : block_tokens_;
        if (step * 4 > xxh3::SHORT_MAX) {
            const xxh3::Byte* p = reinterpret_cast<const xxh3::Byte*>(tokens);
            constexpr std::size_t BYTES = std::size_t{BT} * 4 > xxh3::SHORT_MAX ? std::size_t{BT} * 4 : 0;
            return xxh3::hash_long<BYTES>(p, step * 4, n_blocks, secret_.bytes(), isa_, out);
        }
        for (std::size_t i = 0; i < n_blocks; ++i) out[i] = local_fixed<BT>(tokens + step * i);
    }

    /// Local hash of one block of block_tokens() tokens.
    std::uint64_t local(const std::uint32_t* block) const noexcept {
        return visit([&](auto bt) { return local_fixed<decltype(bt)::value>(block); });
    }

    /// out[i] = local hash of block i.
    void locals(const std::uint32_t* tokens, std::size_t n_blocks, std::uint64_t* out) const noexcept {
        visit([&](auto bt) { locals_fixed<decltype(bt)::value>(tokens, n_blocks, out); });
    }

    /// Prefix hash of a block from its parent's prefix hash and its own local hash.
    KVINDEX_XXH3_INLINE std::uint64_t roll(std::uint64_t prev, std::uint64_t local) const noexcept {
        const std::uint64_t low = roll_prev_ ^ prev, high = roll_local_ ^ local;
        return xxh3::avalanche(16 + high + xxh3::swap_bytes(low) + xxh3::multiply_fold(low, high));
    }

    /// out[i] = prefix hash of block i, from local hashes; `parent` is the prefix hash in front of block 0, null at the
    /// start of a sequence (whose first prefix hash is its local hash). out may be locals.
    void chain(const std::uint64_t* locals, std::size_t n_blocks, const std::uint64_t* parent,
               std::uint64_t* out) const noexcept {
        if (n_blocks == 0) return;
        std::uint64_t prev = out[0] = parent ? roll(*parent, locals[0]) : locals[0];
        for (std::size_t i = 1; i < n_blocks; ++i) prev = out[i] = roll(prev, locals[i]);
    }

    /// locals and chain in one pass. Each roll waits for the roll before, while local hashes wait for nothing. They
    /// fill the time in which the rolls leave the multiplier idle, so 16-token blocks cost little more than their
    /// rolls.
    void prefixes(const std::uint32_t* tokens, std::size_t n_blocks, const std::uint64_t* parent,
                  std::uint64_t* out) const noexcept {
        visit([&](auto bt) { prefixes_fixed<decltype(bt)::value>(tokens, n_blocks, parent, out); });
    }

    template <unsigned BT>
    void prefixes_fixed(const std::uint32_t* tokens, std::size_t n_blocks, const std::uint64_t* parent,
                        std::uint64_t* out) const noexcept {
        // Inlined hashes overlap best one by one (15 cycles a 16-token block, 18 in groups of four). Hashes behind a
        // call pay for the call once per group.
        constexpr std::size_t GROUP = BT == 16 || BT == 32 ? 1 : 4;
        const std::size_t step = BT ? BT : block_tokens_;
        if (n_blocks == 0) return;
        std::uint64_t locals[GROUP], prev = local_fixed<BT>(tokens);
        if (parent) prev = roll(*parent, prev);
        out[0] = prev;
        std::size_t i = 1;
        for (; i + GROUP <= n_blocks; i += GROUP) {
            locals_fixed<BT>(tokens + step * i, GROUP, locals);
            for (std::size_t j = 0; j < GROUP; ++j) out[i + j] = prev = roll(prev, locals[j]);
        }
        for (; i < n_blocks; ++i) out[i] = prev = roll(prev, local_fixed<BT>(tokens + step * i));
    }

private:
    template <std::size_t BYTES, std::size_t... I>
    KVINDEX_XXH3_INLINE std::uint64_t medium(const xxh3::Byte* p, std::index_sequence<I...>) const noexcept {
        // By itself, GCC adds up at the end and spills the products on the way. In a caller's loop it also moves the
        // secret out of this object onto the stack: 16 to 17 cycles instead of 14 for 128 bytes.
        const std::uint64_t* s = xxh3::settle(&secret_.words[0]);
        std::uint64_t acc = BYTES * xxh3::PRIME64_1;
        ((acc = xxh3::settle(acc + xxh3::mix16(p + 16 * I, s[4 * I], s[4 * I + 1])),
          acc = xxh3::settle(acc + xxh3::mix16(p + BYTES - 16 - 16 * I, s[4 * I + 2], s[4 * I + 3]))),
         ...);
        return xxh3::avalanche(acc);
    }

    xxh3::Secret secret_;
    std::uint64_t roll_prev_, roll_local_, seed_, local_seed_;
    std::uint32_t block_tokens_;
    Isa isa_;
};

static_assert(std::is_trivially_copyable_v<BlockHasher>, "hashers are copied into queries");

}  // namespace kvindex

#undef KVINDEX_XXH3_INLINE
#undef KVINDEX_XXH3_FLATTEN
#undef KVINDEX_XXH3_TARGET
#undef KVINDEX_XXH3_UNROLL
