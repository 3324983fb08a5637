// Rows of floats onto a grid, and gradients through the trust mask: one pass over memory in the place of ten.
//
// For a row x of length K, rotated in groups of g = 2^p:  h = x H_g / sqrt(g),  step = unit * sqrt(sum x^2 / K),
// u = h / step, code = clamp(floor(u) + N/2, 0, N - 1) (round(u) + 1 for three levels), mask = |u| <= trusted.
//
// Every level of instructions gives the same bits: sums are taken in one order (kLanes partial sums, then those from left
// to right), and products are not contracted (-ffp-contract=off).
//
// A plain C interface without headers of Python or torch. Nothing here throws.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define HFNOISE_X86 1
#endif
#if defined(__GNUC__)
#define HFNOISE_INLINE inline __attribute__((always_inline))
#else
#define HFNOISE_INLINE inline
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kMaxThreads = 64;
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal float: the inverse of less would overflow
constexpr float kLargest = 3.40282347e+38f;
enum Status { kDone = 0, kBadArgument = 3 };

struct Rows {
    const float* x;
    int64_t rows, length;
    int group, levels;
    float unit, trusted;
    float* points;  // or null, as codes and mask
    uint8_t* codes;
    uint8_t* mask;
    float* step;
    int scaled;  // points * step in the place of points
};

struct Codes {
    const uint8_t* codes;
    const float* step;  // or null: in steps
    int64_t rows, length;
    float half;
    float* out;
};

struct Sums {
    float* sums;  // in place
    const float *step_x, *step_w, *bias;  // bias may be null
    int64_t rows, length;
};

struct Gradients {
    const float* gradient;
    const uint8_t* mask;  // or null
    int64_t rows, length;
    int group;
    float* out;
};


// W floats, as the machine holds them.
template <int W>
struct Vector {
    typedef float Floats __attribute__((vector_size(4 * W)));
    typedef int32_t Ints __attribute__((vector_size(4 * W)));
    typedef uint8_t Bytes __attribute__((vector_size(W)));
};
template <int W>
using Floats = typename Vector<W>::Floats;
template <int W>
using Ints = typename Vector<W>::Ints;
template <int W>
using Bytes = typename Vector<W>::Bytes;

template <typename To, typename From>
HFNOISE_INLINE To load(const From* from) {
    To v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Lanes i and i ^ kStride of a vector become their sum and their difference.
template <int W, int kStride, int... I>
HFNOISE_INLINE void butterfly(Floats<W>& v, std::integer_sequence<int, I...>) {
    const Ints<W> signs = {(I & kStride ? INT32_MIN : 0)...};  // minus, for the upper of two lanes
    const Floats<W> other = __builtin_shufflevector(v, v, (I ^ kStride)...);
    v = other + load<Floats<W>>(&(const Ints<W>&)(load<Ints<W>>(&v) ^ signs));
}

template <int W, int kStride>
HFNOISE_INLINE void butterflies(Floats<W>& v) {
    if constexpr (kStride < W) {
        butterfly<W, kStride>(v, std::make_integer_sequence<int, W>());
        butterflies<W, 2 * kStride>(v);
    }
}

// N vectors, a group of N W: rotated in place.
template <int W, int N>
HFNOISE_INLINE void rotate(Floats<W> (&v)[N], float scale) {
    for (int n = 0; n < N; ++n) butterflies<W, 1>(v[n]);
    for (int stride = 1; stride < N; stride *= 2)
        for (int n = 0; n < N; ++n)
            if (!(n & stride)) {
                const Floats<W> a = v[n], b = v[n | stride];
                v[n] = a + b;
                v[n | stride] = a - b;
            }
    for (int n = 0; n < N; ++n) v[n] *= scale;
}

void not_finite(const Rows& p, int64_t row) {
    for (int64_t k = row * p.length; k < (row + 1) * p.length; ++k) {
        if (p.points) p.points[k] = NAN;
        if (p.codes) p.codes[k] = 0;
        if (p.mask) p.mask[k] = 0;
    }
}

template <int W>
HFNOISE_INLINE float size_of(const float* x, int64_t length) {
    Floats<W> sums[kLanes / W] = {};
    for (int64_t k = 0; k < length; k += kLanes)
        for (int n = 0; n < kLanes / W; ++n) {
            const auto v = load<Floats<W>>(x + k + n * W);
            sums[n] += v * v;
        }
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += sums[i / W][i % W];
    return static_cast<float>(std::sqrt(total / static_cast<double>(length)));
}

// floor(clamp(u)) is clamp(floor(u)), both bounds being whole; a row that is not finite has NaN points and trusts none.
template <int W, int kGroup, bool kRotated>
HFNOISE_INLINE void quantize_rows(const Rows& p, int64_t first, int64_t last) {
    constexpr int N = kGroup / W;
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kGroup)));
    const bool middle = p.levels % 2 != 0;
    const float half = 0.5f * static_cast<float>(p.levels - 1);
    const float lowest = middle ? -half : -half - 0.5f, highest = middle ? half : half - 0.5f;
    const float shift = middle ? 0.0f : 0.5f;
    for (int64_t row = first; row < last; ++row) {
        const float* x = p.x + row * p.length;
        const float step = size_of<W>(x, p.length) * p.unit;
        const float inverse = step < kTiny ? 0.0f : 1.0f / step;
        p.step[row] = step;
        if (!(step <= kLargest)) {
            not_finite(p, row);
            continue;
        }
        for (int64_t k = 0; k < p.length; k += kGroup) {
            Floats<W> v[N];
            for (int n = 0; n < N; ++n) v[n] = load<Floats<W>>(x + k + n * W);
            if (kRotated) rotate<W, N>(v, scale);
            const int64_t at = row * p.length + k;
            for (int n = 0; n < N; ++n) {
                Floats<W> u = v[n] * inverse;
                if (p.mask) {
                    const Floats<W> magnitude = u < 0 ? -u : u;
                    const Ints<W> inside = (magnitude <= p.trusted) & 1;
                    const auto trusted = __builtin_convertvector(inside, Bytes<W>);
                    std::memcpy(p.mask + at + n * W, &trusted, sizeof trusted);
                }
                u = u < lowest ? Floats<W>{} + lowest : u;
                u = u > highest ? Floats<W>{} + highest : u;
                Floats<W> whole;
                if (middle) {  // true is -1
                    whole = __builtin_convertvector((u < -0.5f) - (u > 0.5f), Floats<W>);
                } else {
                    whole = __builtin_convertvector(__builtin_convertvector(u, Ints<W>), Floats<W>);
                    whole += __builtin_convertvector(whole > u, Floats<W>);
                }
                whole += shift;
                if (p.codes) {
                    const Ints<W> integers = __builtin_convertvector(whole + half, Ints<W>);
                    const auto codes = __builtin_convertvector(integers, Bytes<W>);
                    std::memcpy(p.codes + at + n * W, &codes, sizeof codes);
                }
                if (p.points) {
                    const Floats<W> values = p.scaled ? whole * step : whole;
                    std::memcpy(p.points + at + n * W, &values, sizeof values);
                }
            }
        }
    }
}

template <int W, int kGroup, bool kRotated>
HFNOISE_INLINE void rotate_gradients(const Gradients& p, int64_t first, int64_t last) {
    constexpr int N = kGroup / W;
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kGroup)));
    for (int64_t at = first * p.length; at < last * p.length; at += kGroup) {
        Floats<W> v[N];
        for (int n = 0; n < N; ++n) {
            v[n] = load<Floats<W>>(p.gradient + at + n * W);
            if (p.mask)
                v[n] *= __builtin_convertvector(load<Bytes<W>>(p.mask + at + n * W), Floats<W>);
        }
        if (kRotated) rotate<W, N>(v, scale);
        for (int n = 0; n < N; ++n) std::memcpy(p.out + at + n * W, &v[n], sizeof v[n]);
    }
}

HFNOISE_INLINE void decode_any(const Codes& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const float step = p.step ? p.step[row] : 1.0f, half = p.half;
        const uint8_t* codes = p.codes + row * p.length;
        float* out = p.out + row * p.length;
        for (int64_t k = 0; k < p.length; ++k) out[k] = (static_cast<float>(codes[k]) - half) * step;
    }
}

// sums * step_x * step_w + bias, in this order: it decides the last bit.
HFNOISE_INLINE void scale_any(const Sums& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const float step = p.step_x[row];
        float* sums = p.sums + row * p.length;
        const float *step_w = p.step_w, *bias = p.bias;
        if (bias)
            for (int64_t n = 0; n < p.length; ++n) sums[n] = sums[n] * step * step_w[n] + bias[n];
        else
            for (int64_t n = 0; n < p.length; ++n) sums[n] = sums[n] * step * step_w[n];
    }
}

#define HFNOISE_GROUPS(function)                              \
    switch (p.group) {                                        \
        case 1: return function<W, kLanes, false>(p, a, b);   \
        case 16: return function<W, 16, true>(p, a, b);       \
        case 32: return function<W, 32, true>(p, a, b);       \
        case 64: return function<W, 64, true>(p, a, b);       \
        case 128: return function<W, 128, true>(p, a, b);     \
    }

template <int W>
HFNOISE_INLINE void quantize_any(const Rows& p, int64_t a, int64_t b) {
    HFNOISE_GROUPS(quantize_rows)
}

template <int W>
HFNOISE_INLINE void gradients_any(const Gradients& p, int64_t a, int64_t b) {
    HFNOISE_GROUPS(rotate_gradients)
}

#define HFNOISE_LEVEL(name, width, target)                                                                  \
    target void quantize_##name(const Rows& p, int64_t a, int64_t b) { quantize_any<width>(p, a, b); }       \
    target void gradients_##name(const Gradients& p, int64_t a, int64_t b) { gradients_any<width>(p, a, b); } \
    target void decode_##name(const Codes& p, int64_t a, int64_t b) { decode_any(p, a, b); }                 \
    target void scale_##name(const Sums& p, int64_t a, int64_t b) { scale_any(p, a, b); }

HFNOISE_LEVEL(generic, 4, )
#ifdef HFNOISE_X86
HFNOISE_LEVEL(avx2, 8, __attribute__((target("avx2"))))
HFNOISE_LEVEL(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

// The function of a level of instructions.
#ifdef HFNOISE_X86
#define HFNOISE_PICK(name, level) ((level) == 2 ? name##_avx512 : (level) == 1 ? name##_avx2 : name##_generic)
#else
#define HFNOISE_PICK(name, level) (static_cast<void>(level), name##_generic)
#endif

bool fits(int64_t rows, int64_t length, int group) {
    const bool known = group == 1 || group == 16 || group == 32 || group == 64 || group == 128;
    return rows >= 0 && length >= kLanes && length % kLanes == 0 && known && length % group == 0;
}

template <typename Problem>
void in_threads(void (*work)(const Problem&, int64_t, int64_t), const Problem& p, int threads) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > p.rows) threads = static_cast<int>(p.rows);
    std::thread workers[kMaxThreads];
    for (int number = 1; number < threads; ++number) {
        const int64_t first = p.rows * number / threads, last = p.rows * (number + 1) / threads;
        try {
            workers[number] = std::thread(work, std::cref(p), first, last);
        } catch (...) {  // no thread to be had: this one does it
            work(p, first, last);
        }
    }
    work(p, 0, threads > 1 ? p.rows / threads : p.rows);
    for (int number = 1; number < threads; ++number)
        if (workers[number].joinable()) workers[number].join();
}

}  // namespace

#if defined(_WIN32)
#define HFNOISE_PUBLIC extern "C" __declspec(dllexport)
#else
#define HFNOISE_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

// x [rows][length] -> step [rows], and those of points, codes and mask [rows][length] that are not null. `group` is 1,
// 16, 32, 64 or 128, and divides the length; so does 16. `level` is one that hfnoise_best_level allows.
HFNOISE_PUBLIC int hfnoise_quantize_rows(const float* x, int64_t rows, int64_t length, int group, int levels,
                                         float unit, float trusted, float* points, int scaled, uint8_t* codes,
                                         uint8_t* mask, float* step, int level, int threads) {
    if (!fits(rows, length, group) || levels < 2 || levels > 256) return kBadArgument;
    const Rows problem{x, rows, length, group, levels, unit, trusted, points, codes, mask, step, scaled};
    in_threads(HFNOISE_PICK(quantize, level), problem, threads);
    return kDone;
}

// (mask * gradient) [rows][length], rotated in groups; a mask of null trusts everything. `out` may be the gradient.
HFNOISE_PUBLIC int hfnoise_rotate_gradients(const float* gradient, const uint8_t* mask, int64_t rows, int64_t length,
                                            int group, float* out, int level, int threads) {
    if (!fits(rows, length, group)) return kBadArgument;
    const Gradients problem{gradient, mask, rows, length, group, out};
    in_threads(HFNOISE_PICK(gradients, level), problem, threads);
    return kDone;
}

// (codes - half) * step [rows][length]; a step of null is 1.
HFNOISE_PUBLIC int hfnoise_decode_rows(const uint8_t* codes, const float* step, int64_t rows, int64_t length, float half,
                                       float* out, int level, int threads) {
    if (rows < 0 || length < 0) return kBadArgument;
    const Codes problem{codes, step, rows, length, half, out};
    in_threads(HFNOISE_PICK(decode, level), problem, threads);
    return kDone;
}

// sums [rows][length] <- sums * step_x [rows] * step_w [length] + bias [length], which may be null.
HFNOISE_PUBLIC int hfnoise_scale_sums(float* sums, const float* step_x, const float* step_w, const float* bias,
                                      int64_t rows, int64_t length, int level, int threads) {
    if (rows < 0 || length < 0) return kBadArgument;
    const Sums problem{sums, step_x, step_w, bias, rows, length};
    in_threads(HFNOISE_PICK(scale, level), problem, threads);
    return kDone;
}
