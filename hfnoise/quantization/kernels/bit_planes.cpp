// Exact products of rows of 1- and 2-bit codes, by counting bits.
//
// A code c of b bits stands for the odd integer 2c - (2^b - 1) = sum_i 2^i s_i, s_i = +-1 the bits of c (0 is -1). So
//     S[m, n] = sum_k (2 x[m, k] - (2^bx - 1)) (2 w[n, k] - (2^bw - 1))
//             = (2^bx - 1) (2^bw - 1) K - 2 sum_ij 2^(i + j) popcount(x plane i of row m  xor  w plane j of row n).
// Bits beyond K are 0 in both planes, and their xor counts nothing.
//
// Layouts, in 64-bit words (little-endian: code k is bit k mod 64 of word k / 64), `words` = ceil(K / 64):
//     inputs  [M][words][bx]
//     weights [ceil(N / 8)][words][bw][8 rows]: a vector holds a word of each of eight rows, so that every lane counts
//             for a row of its own and nothing is added up across lanes.
//
// A plain C interface without headers of Python or torch: it is compiled by whatever compiler is there, and loaded by
// ctypes. Functions return 0, or one of the errors below. Nothing here throws.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#if defined(__x86_64__) && defined(__GNUC__)
#define HFNOISE_X86 1
#include <immintrin.h>
#endif

namespace {

constexpr int kVersion = 1;
constexpr int kRows = 8;  // rows of weights in a group
constexpr int64_t kBlockBytes = 16384;  // of weights that all tokens meet before the next: a third of a small L1 cache
constexpr int kMaxThreads = 64;
enum Status { kDone = 0, kCodeTooLarge = 1, kOutOfMemory = 2, kBadArgument = 3 };
enum Level { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// Adds up for T tokens and a group of rows; sums are [T][8].
using Tile = void (*)(const uint64_t* x, const uint64_t* w, int64_t words, int64_t* sums);
// Writes the planes of 64 codes; returns the OR of what does not fit into the bits.
using Split = uint64_t (*)(const uint8_t* codes, int bits, uint64_t* planes);

// ---- any machine ----------------------------------------------------------------------------------------------------

inline uint64_t count_bits(uint64_t v) {
#if defined(__aarch64__) && defined(__GNUC__)
    return static_cast<uint64_t>(__builtin_popcountll(v));
#else
    v -= (v >> 1) & 0x5555555555555555ULL;
    v = (v & 0x3333333333333333ULL) + ((v >> 2) & 0x3333333333333333ULL);
    v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
    return (v * 0x0101010101010101ULL) >> 56;
#endif
}

template <int XB, int WB>
void tile_generic(const uint64_t* x, const uint64_t* w, int64_t words, int64_t* sums) {
    uint64_t counts[kRows] = {};
    for (int64_t k = 0; k < words; ++k)
        for (int i = 0; i < XB; ++i)
            for (int j = 0; j < WB; ++j)
                for (int row = 0; row < kRows; ++row)
                    counts[row] += count_bits(x[k * XB + i] ^ w[(k * WB + j) * kRows + row]) << (i + j);
    for (int row = 0; row < kRows; ++row) sums[row] = static_cast<int64_t>(counts[row]);
}

uint64_t split_generic(const uint8_t* codes, int bits, uint64_t* planes) {
    constexpr uint64_t kLowest = 0x0101010101010101ULL;
    const uint64_t allowed = kLowest * ((1u << bits) - 1);
    uint64_t beyond = 0, found[2] = {};
    for (int byte = 0; byte < 8; ++byte) {
        uint64_t eight;
        std::memcpy(&eight, codes + 8 * byte, 8);
        beyond |= eight & ~allowed;
        for (int i = 0; i < bits; ++i)  // the product moves the lowest bit of byte j to bit 56 + j
            found[i] |= ((((eight >> i) & kLowest) * 0x0102040810204080ULL) >> 56) << (8 * byte);
    }
    for (int i = 0; i < bits; ++i) planes[i] = found[i];
    return beyond;
}

#ifdef HFNOISE_X86

// ---- AVX2: bits of half a byte are looked up ------------------------------------------------------------------------

#define HFNOISE_AVX2 __attribute__((target("avx2")))

template <int XB, int WB, int T>
HFNOISE_AVX2 void tile_avx2(const uint64_t* x, const uint64_t* w, int64_t words, int64_t* sums) {
    constexpr int kSums = XB + WB - 1;
    constexpr int64_t kFlush = 8;  // words: a byte counts to 8 * 2 * 8 = 128 at most, and holds 255
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; ++half) {
        __m256i totals[T];
        for (int t = 0; t < T; ++t) totals[t] = _mm256_setzero_si256();
        for (int64_t begin = 0; begin < words; begin += kFlush) {
            const int64_t end = begin + kFlush < words ? begin + kFlush : words;
            __m256i bytes[T][kSums];
            for (int t = 0; t < T; ++t)
                for (int s = 0; s < kSums; ++s) bytes[t][s] = _mm256_setzero_si256();
            for (int64_t k = begin; k < end; ++k)
                for (int j = 0; j < WB; ++j) {
                    const uint64_t* rows = w + (k * WB + j) * kRows + half * 4;
                    const __m256i plane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
                    for (int t = 0; t < T; ++t)
                        for (int i = 0; i < XB; ++i) {
                            const auto word = static_cast<long long>(x[(t * words + k) * XB + i]);
                            const __m256i differ = _mm256_xor_si256(plane, _mm256_set1_epi64x(word));
                            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(differ, 4), low);
                            const __m256i count =
                                _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(differ, low)),
                                                _mm256_shuffle_epi8(table, high));
                            bytes[t][i + j] = _mm256_add_epi8(bytes[t][i + j], count);
                        }
                }
            for (int t = 0; t < T; ++t)
                for (int s = 0; s < kSums; ++s) {
                    const __m256i lanes = _mm256_sad_epu8(bytes[t][s], _mm256_setzero_si256());
                    totals[t] = _mm256_add_epi64(totals[t], _mm256_slli_epi64(lanes, s));
                }
        }
        for (int t = 0; t < T; ++t)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + t * kRows + half * 4), totals[t]);
    }
}

HFNOISE_AVX2 uint64_t split_avx2(const uint8_t* codes, int bits, uint64_t* planes) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
    const __m256i forbidden = _mm256_set1_epi8(static_cast<char>(~((1 << bits) - 1)));
    for (int i = 0; i < bits; ++i) {  // the wanted bit becomes the highest of its byte, which movemask collects
        const auto lower = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(first, 7 - i)));
        const auto upper = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(second, 7 - i)));
        planes[i] = lower | static_cast<uint64_t>(upper) << 32;
    }
    return _mm256_testz_si256(_mm256_or_si256(first, second), forbidden) ? 0 : 1;
}

// ---- AVX-512 with VPOPCNTDQ: the machine counts ---------------------------------------------------------------------

#define HFNOISE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vpopcntdq")))

template <int XB, int WB, int T>
HFNOISE_AVX512 void tile_avx512(const uint64_t* x, const uint64_t* w, int64_t words, int64_t* sums) {
    constexpr int kSums = XB + WB - 1;
    __m512i counts[T][kSums];
    for (int t = 0; t < T; ++t)
        for (int s = 0; s < kSums; ++s) counts[t][s] = _mm512_setzero_si512();
    for (int64_t k = 0; k < words; ++k) {
        __m512i planes[WB];
        for (int j = 0; j < WB; ++j) planes[j] = _mm512_loadu_si512(w + (k * WB + j) * kRows);
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < XB; ++i) {
                const __m512i word = _mm512_set1_epi64(static_cast<long long>(x[(t * words + k) * XB + i]));
                for (int j = 0; j < WB; ++j) {
                    const __m512i count = _mm512_popcnt_epi64(_mm512_xor_si512(planes[j], word));
                    counts[t][i + j] = _mm512_add_epi64(counts[t][i + j], count);
                }
            }
    }
    for (int t = 0; t < T; ++t) {
        __m512i total = counts[t][0];
        for (int s = 1; s < kSums; ++s)
            total = _mm512_add_epi64(total, _mm512_slli_epi64(counts[t][s], static_cast<unsigned>(s)));
        _mm512_storeu_si512(sums + t * kRows, total);
    }
}

HFNOISE_AVX512 uint64_t split_avx512(const uint8_t* codes, int bits, uint64_t* planes) {
    const __m512i all = _mm512_loadu_si512(codes);
    for (int i = 0; i < bits; ++i)
        planes[i] = _mm512_test_epi8_mask(all, _mm512_set1_epi8(static_cast<char>(1 << i)));
    return _mm512_test_epi8_mask(all, _mm512_set1_epi8(static_cast<char>(~((1 << bits) - 1))));
}

#endif  // HFNOISE_X86

// ---- which of them --------------------------------------------------------------------------------------------------

struct Tiles {
    Tile one, several;
    int tokens;  // of `several`
};

int best_level() {
#ifdef HFNOISE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kGeneric;
}

template <int XB, int WB>
Tiles tiles_of(int level) {
#ifdef HFNOISE_X86
    // As many tokens as leave their counters in registers.
    if (level == kAvx512) return {tile_avx512<XB, WB, 1>, tile_avx512<XB, WB, 4>, 4};
    if (level == kAvx2) return {tile_avx2<XB, WB, 1>, tile_avx2<XB, WB, 2>, 2};
#else
    (void)level;
#endif
    return {tile_generic<XB, WB>, tile_generic<XB, WB>, 1};
}

Tiles tiles_for(int level, int x_bits, int w_bits) {
    if (x_bits == 1) return w_bits == 1 ? tiles_of<1, 1>(level) : tiles_of<1, 2>(level);
    return w_bits == 1 ? tiles_of<2, 1>(level) : tiles_of<2, 2>(level);
}

Split split_for(int level) {
#ifdef HFNOISE_X86
    if (level == kAvx512) return split_avx512;
    if (level == kAvx2) return split_avx2;
#else
    (void)level;
#endif
    return split_generic;
}

// ---- the product ----------------------------------------------------------------------------------------------------

struct Problem {
    const uint64_t* x;
    const uint64_t* w;
    int32_t* out;  // or null, and then the layer's output is wanted:
    float* output;
    const float *step_x, *step_w, *bias;
    int64_t tokens, length, words, rows;
    int x_bits, w_bits;
    Tiles tiles;
};

// The same operations on floats, in the same order, as `scaled` in linear_function.py: equal to the last bit as long as
// no product and sum are joined into one operation (-ffp-contract=off).
inline float finished(const Problem& p, int32_t sum, int64_t token, int64_t row) {
    float value = static_cast<float>(sum) * 0.25f;
    value *= p.step_x[token];
    value *= p.step_w[row];
    return p.bias == nullptr ? value : value + p.bias[row];
}

void multiply_groups(const Problem& p, int64_t first, int64_t last) {
    const int64_t group_words = p.words * p.w_bits * kRows;
    const int64_t fitting = kBlockBytes / (group_words * 8);
    const int64_t block = fitting < 1 ? 1 : fitting;
    const int64_t base = ((1 << p.x_bits) - 1) * ((1 << p.w_bits) - 1) * p.length;
    int64_t sums[4 * kRows];
    for (int64_t begin = first; begin < last; begin += block) {
        const int64_t end = begin + block < last ? begin + block : last;
        for (int64_t token = 0; token < p.tokens;) {
            const int step = p.tokens - token >= p.tiles.tokens ? p.tiles.tokens : 1;
            const Tile tile = step > 1 ? p.tiles.several : p.tiles.one;
            for (int64_t group = begin; group < end; ++group) {
                tile(p.x + token * p.words * p.x_bits, p.w + group * group_words, p.words, sums);
                const int64_t left = p.rows - group * kRows;
                const int count = left < kRows ? static_cast<int>(left) : kRows;
                for (int t = 0; t < step; ++t) {
                    const int64_t place = (token + t) * p.rows + group * kRows;
                    for (int row = 0; row < count; ++row) {
                        const auto sum = static_cast<int32_t>(base - 2 * sums[t * kRows + row]);
                        if (p.out != nullptr)
                            p.out[place + row] = sum;
                        else
                            p.output[place + row] = finished(p, sum, token + t, group * kRows + row);
                    }
                }
            }
            token += step;
        }
    }
}

void multiply(const Problem& p, int threads) {
    const int64_t groups = (p.rows + kRows - 1) / kRows;
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > groups) threads = static_cast<int>(groups);
    std::thread workers[kMaxThreads];
    for (int number = 1; number < threads; ++number) {
        const int64_t first = groups * number / threads, last = groups * (number + 1) / threads;
        try {
            workers[number] = std::thread(multiply_groups, std::cref(p), first, last);
        } catch (...) {  // no thread to be had: this one does it
            multiply_groups(p, first, last);
        }
    }
    multiply_groups(p, 0, threads > 1 ? groups / threads : groups);
    for (int number = 1; number < threads; ++number)
        if (workers[number].joinable()) workers[number].join();
}

// The even bits of a word, together.
inline uint64_t even_bits(uint64_t v) {
    v &= 0x5555555555555555ULL;
    v = (v | v >> 1) & 0x3333333333333333ULL;
    v = (v | v >> 2) & 0x0f0f0f0f0f0f0f0fULL;
    v = (v | v >> 4) & 0x00ff00ff00ff00ffULL;
    v = (v | v >> 8) & 0x0000ffff0000ffffULL;
    return (v | v >> 16) & 0x00000000ffffffffULL;
}

}  // namespace

#if defined(_WIN32)
#define HFNOISE_PUBLIC extern "C" __declspec(dllexport)
#else
#define HFNOISE_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

HFNOISE_PUBLIC int hfnoise_bit_planes_version() { return kVersion; }

// The highest level that this machine has: 0 any machine, 1 AVX2, 2 AVX-512 with VPOPCNTDQ.
HFNOISE_PUBLIC int hfnoise_best_level() { return best_level(); }

// Packed rows [rows][ceil(length * bits / 8)] (version 1 of the file format) -> planes, which the caller has zeroed.
HFNOISE_PUBLIC int hfnoise_weight_planes(const uint8_t* packed, int64_t rows, int64_t length, int bits,
                                         uint64_t* planes) {
    if (bits < 1 || bits > 2 || rows < 0 || length < 1) return kBadArgument;
    const int64_t words = (length + 63) / 64, row_bytes = (length * bits + 7) / 8;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < words; ++k) {
            const int64_t start = k * 8 * bits, left = row_bytes - start;
            uint64_t raw[2] = {};
            std::memcpy(raw, packed + row * row_bytes + start, static_cast<size_t>(left < 8 * bits ? left : 8 * bits));
            uint64_t found[2] = {raw[0], 0};
            if (bits == 2) {
                found[0] = even_bits(raw[0]) | even_bits(raw[1]) << 32;
                found[1] = even_bits(raw[0] >> 1) | even_bits(raw[1] >> 1) << 32;
            }
            const int64_t used = length - k * 64;
            if (used < 64 && (found[0] | found[1]) >> used) return kCodeTooLarge;  // bits beyond the row
            uint64_t* group = planes + (row / kRows * words + k) * bits * kRows + row % kRows;
            for (int j = 0; j < bits; ++j) group[j * kRows] = found[j];
        }
    return kDone;
}

// codes [tokens][length], planes of hfnoise_weight_planes -> out [tokens][rows]; or, where `out` is null,
// out / 4 * step_x [tokens] * step_w [rows] + bias [rows] (or null) -> output [tokens][rows].
HFNOISE_PUBLIC int hfnoise_bit_plane_product(const uint8_t* codes, int64_t tokens, int64_t length, int x_bits,
                                             const uint64_t* planes, int64_t rows, int w_bits, int32_t* out, float* output,
                                             const float* step_x, const float* step_w, const float* bias, int level,
                                             int threads) {
    if (x_bits < 1 || x_bits > 2 || w_bits < 1 || w_bits > 2 || tokens < 0 || length < 1 || rows < 0 || level < 0 ||
        level > best_level())
        return kBadArgument;
    if (tokens == 0 || rows == 0) return kDone;
    if (out == nullptr && (output == nullptr || step_x == nullptr || step_w == nullptr)) return kBadArgument;
    const int64_t words = (length + 63) / 64;
    auto* x = static_cast<uint64_t*>(std::malloc(static_cast<size_t>(tokens * words * x_bits * 8 + 8)));
    if (x == nullptr) return kOutOfMemory;
    const Split split = split_for(level);
    uint64_t beyond = 0;
    for (int64_t token = 0; token < tokens; ++token) {
        const uint8_t* row = codes + token * length;
        uint64_t* target = x + token * words * x_bits;
        for (int64_t k = 0; k < length / 64; ++k) beyond |= split(row + k * 64, x_bits, target + k * x_bits);
        if (length % 64) {
            uint8_t last[64] = {};
            std::memcpy(last, row + length / 64 * 64, static_cast<size_t>(length % 64));
            beyond |= split(last, x_bits, target + (words - 1) * x_bits);
        }
    }
    if (beyond == 0)
        multiply({x, planes, out, output, step_x, step_w, bias, tokens, length, words, rows, x_bits, w_bits,
                  tiles_for(level, x_bits, w_bits)},
                 threads);
    std::free(x);
    return beyond == 0 ? kDone : kCodeTooLarge;
}
