// Products of weight matrices with the activations of a few tokens, and what surrounds them.
//
// Decoding reads every weight once per token, so a kernel is judged by how closely it follows the memory: weights lie in
// the order in which they are read. Sixteen rows are a block, one lane of a 64-byte vector each; along the input a
// vector holds, for each of them, one float32, two bfloat16, four 8-bit integers or eight 4-bit ones.
//
//   u4  byte 4r + j: row r, column j in the low half and column 4 + j in the high one
//   scales  float16, sixteen for each group of columns
//
// Integers are stored shifted to unsigned (q + 2^(b-1)), as VNNI wants one operand: sum (u - o) x = sum u x - o sum x.
// The activations are rounded to 8 bits with a scale for every 32 (as llama.cpp does). All tokens of a tile share one
// reading of the weights, so eight users cost hardly more than one until arithmetic is what binds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define UNROLLED _Pragma("GCC unroll 8")

namespace hasten {

constexpr int LANES = 16, STRETCH = 32;  // rows of a block; columns that share an activation's scale

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define INSTRUCTIONS "AVX512-VNNI, AVX512-BF16"
#elif defined(__AVX512VNNI__)
#define INSTRUCTIONS "AVX512-VNNI"
#elif defined(__AVX512F__)
#define INSTRUCTIONS "AVX512"
#else
#define INSTRUCTIONS "portable"
#endif

enum Kind : int32_t { F32 = 0, BF16 = 1, U8 = 2, U4 = 3 };

struct Matrix {
    int32_t kind, rows, columns, group;  // columns: padded to STRETCH; group: columns that share a scale
    const void* data;
    const uint16_t* scales;
    const float* bias;  // or null

    int blocks() const { return (rows + LANES - 1) / LANES; }
    size_t block_bytes() const {
        size_t values = size_t(columns) * LANES;
        return kind == F32 ? values * 4 : kind == BF16 ? values * 2 : kind == U8 ? values : values / 2;
    }
    const uint8_t* block(int b) const { return static_cast<const uint8_t*>(data) + b * block_bytes(); }
    const uint16_t* block_scales(int b) const { return scales + size_t(b) * (columns / group) * LANES; }
};

inline f32x16 splat(float x) { return f32x16{} + x; }
inline f32x16 load(const float* p) { f32x16 v; memcpy(&v, p, 64); return v; }
inline void store(float* p, f32x16 v) { memcpy(p, &v, 64); }

#ifdef __F16C__
inline float from_half(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float from_half(uint16_t h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return float(x);
}
inline uint16_t to_half(float x) {
    _Float16 h = _Float16(x);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
#endif
inline f32x16 load_half(const uint16_t* p) {
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = from_half(p[i]);
    return v;
#endif
}
inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where the largest of `count` numbers is, the first of equals; 0 if none is a number.
inline int place_of_largest(const float* x, int count) {
    f32x16 most = splat(-INFINITY);
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        f32x16 v = load(x + i);
        most = v > most ? v : most;
    }
    float largest = -INFINITY;
    for (int r = 0; r < LANES; r++) largest = std::max(largest, most[r]);
    for (; i < count; i++) largest = x[i] > largest ? x[i] : largest;
    for (i = 0; i < count; i++)
        if (x[i] == largest) return i;
    return 0;
}

// e^x for sixteen numbers, to about 1e-7 (Cephes' expf).
inline f32x16 exp16(f32x16 x) {
    x = x > splat(88.0f) ? splat(88.0f) : x < splat(-87.0f) ? splat(-87.0f) : x;
    f32x16 t = x * 1.44269504f;
    i32x16 n = __builtin_convertvector(t + (t < splat(0) ? splat(-0.5f) : splat(0.5f)), i32x16);
    f32x16 f = __builtin_convertvector(n, f32x16);
    f32x16 r = x - f * 0.693359375f + f * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    p = p * r * r + r + 1.0f;
    i32x16 bits = (n + 127) << 23;
    f32x16 scale;
    memcpy(&scale, &bits, 64);
    return p * scale;
}

// Thirty-two numbers as 8-bit integers (to nearest, ties to even) and their scale; returns the integers' sum.
inline int32_t round_stretch(const float* in, int8_t* out, float& scale) {
#ifdef __AVX512F__
    __m512 left = _mm512_loadu_ps(in), right = _mm512_loadu_ps(in + LANES);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(left), _mm512_abs_ps(right)));
    __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(left, inverse)), second = _mm512_cvtps_epi32(_mm512_mul_ps(right, inverse));
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((__m128i*)(out + LANES), _mm512_cvtepi32_epi8(second));
    scale = largest / 127.0f;
    return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
#else
    float largest = 0;
    for (int i = 0; i < STRETCH; i++) largest = std::max(largest, std::fabs(in[i]));
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < STRETCH; i++) sum += out[i] = int8_t(std::nearbyintf(in[i] * inverse));
    scale = largest / 127.0f;
    return sum;
#endif
}

// The inputs of a product: as floats, and in the form that the matrix is multiplied with.
struct Activations {
    int columns = 0;
    std::vector<float> floats;    // (tokens, columns), zero beyond the width
    std::vector<uint16_t> low;    // the same as bfloat16
    std::vector<int8_t> integers; // the same as integers
    std::vector<float> scales;    // (tokens, columns / STRETCH)
    std::vector<int32_t> sums;    // of the integers of each stretch, times what its weights are shifted by, negative

    void reserve(int tokens, int most_columns) {
        size_t size = size_t(tokens) * most_columns;
        floats.assign(size, 0), low.assign(size, 0), integers.assign(size, 0);
        scales.assign(size / STRETCH, 0), sums.assign(size / STRETCH, 0);
    }
    float* row(int token) { return floats.data() + size_t(token) * columns; }

    // shift: of the integers that it will be multiplied with, 0 for none.
    void round_row(int token, int shift, bool to_low) {
        const float* x = row(token);
        if (to_low)
            for (int c = 0; c < columns; c++) low[size_t(token) * columns + c] = to_bfloat16(x[c]);
        if (!shift) return;
        for (int s = 0; s < columns / STRETCH; s++) {
            size_t place = size_t(token) * (columns / STRETCH) + s;
            int8_t* out = integers.data() + size_t(token) * columns + s * STRETCH;
            sums[place] = -shift * round_stretch(x + s * STRETCH, out, scales[place]);
        }
    }
};

// One vector of float weights: column c of a block's sixteen rows.
inline f32x16 column(const Matrix& m, const uint8_t* w, int c) {
    if (m.kind == F32) return load(reinterpret_cast<const float*>(w) + size_t(c) * LANES);
    f32x16 v;
    if (m.kind == BF16) {
        i32x16 pair;
        memcpy(&pair, w + size_t(c / 2) * 64, 64);
        pair = c % 2 ? pair & int32_t(0xffff0000) : pair << 16;
        memcpy(&v, &pair, 64);
        return v;
    }
    for (int r = 0; r < LANES; r++) {
        uint8_t byte = m.kind == U8 ? w[size_t(c / 4) * 64 + r * 4 + c % 4] : w[size_t(c / 8) * 64 + r * 4 + c % 4];
        v[r] = m.kind == U8 ? float(byte) - 128.0f : float(c % 8 < 4 ? byte & 15 : byte >> 4) - 8.0f;
    }
    return v;
}

// out[n] += the sixteen rows of block b times token n, in float32 throughout: the reference for all others.
template <int N>
void product_floats(const Matrix& m, int b, const float* const* x, f32x16* out) {
    const uint8_t* w = m.block(b);
    bool integers = m.kind == U8 || m.kind == U4;
    for (int n = 0; n < N; n++) out[n] = f32x16{};
    for (int c = 0; c < m.columns; c++) {
        f32x16 weights = column(m, w, c);
        if (integers) weights *= load_half(m.block_scales(b) + size_t(c / m.group) * LANES);
        for (int n = 0; n < N; n++) out[n] += weights * x[n][c];
    }
}

#if defined(__AVX512F__)
template <int N>
void product_f32(const Matrix& m, int b, const float* const* x, f32x16* out) {
    const float* w = reinterpret_cast<const float*>(m.block(b));
    constexpr int CHAINS = 2;  // the same for every N: a token's sum must not depend on its company
    f32x16 sums[CHAINS][N] = {};
    for (int c = 0; c < m.columns; c += CHAINS)
        UNROLLED for (int k = 0; k < CHAINS; k++) {
            f32x16 weights = load(w + size_t(c + k) * LANES);
            UNROLLED for (int n = 0; n < N; n++) sums[k][n] += weights * x[n][c + k];
        }
    for (int n = 0; n < N; n++) {
        out[n] = sums[0][n];
        for (int k = 1; k < CHAINS; k++) out[n] += sums[k][n];
    }
}
#endif

#if defined(__AVX512BF16__)
template <int N>
void product_bf16(const Matrix& m, int b, const uint16_t* const* x, f32x16* out) {
    const uint8_t* w = m.block(b);
    constexpr int CHAINS = 2;
    __m512 sums[CHAINS][N] = {};
    for (int c = 0; c < m.columns / 2; c += CHAINS)
        UNROLLED for (int k = 0; k < CHAINS; k++) {
            __m512bh weights = (__m512bh)_mm512_loadu_si512(w + size_t(c + k) * 64);
            UNROLLED for (int n = 0; n < N; n++) {
                int32_t pair;
                memcpy(&pair, x[n] + 2 * (c + k), 4);
                sums[k][n] = _mm512_dpbf16_ps(sums[k][n], weights, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    for (int n = 0; n < N; n++) {
        for (int k = 1; k < CHAINS; k++) sums[0][n] = _mm512_add_ps(sums[0][n], sums[k][n]);
        out[n] = (f32x16)sums[0][n];
    }
}
#endif

struct Rounded {  // a token's integers
    const int8_t* q;
    const float* scales;
    const int32_t* sums;
};

#if defined(__AVX512VNNI__)
inline __m512i four(const int8_t* q) {
    int32_t bytes;
    memcpy(&bytes, q, 4);
    return _mm512_set1_epi32(bytes);
}

template <int N, bool FOUR_BITS>
void product_integers(const Matrix& m, int b, const Rounded* x, f32x16* out) {
    constexpr int VECTORS = FOUR_BITS ? 4 : 8;
    const uint8_t* w = m.block(b);
    const uint16_t* s = m.block_scales(b);
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(char(0xf0));
    const int per_scale = m.group / STRETCH, stretches = m.columns / STRETCH;
    __m512 sums[N];
    for (int n = 0; n < N; n++) sums[n] = _mm512_setzero_ps();
    __m512 scale = _mm512_setzero_ps();
    for (int t = 0, left = 0; t < stretches; t++, w += VECTORS * 64) {
        if (left-- == 0) {
            scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)s));
            s += LANES, left = per_scale - 1;
        }
        __m512i u[8];
        UNROLLED for (int v = 0; v < VECTORS; v++) {
            __m512i bytes = _mm512_loadu_si512(w + v * 64);
            if (FOUR_BITS) {
                u[2 * v] = _mm512_and_si512(bytes, low);
                u[2 * v + 1] = _mm512_and_si512(bytes, high);  // sixteen times as large; its sum is divided
            } else
                u[v] = bytes;
        }
        UNROLLED for (int n = 0; n < N; n++) {
            const int8_t* q = x[n].q + t * STRETCH;
            __m512i even = _mm512_set1_epi32(x[n].sums[t]), odd = _mm512_setzero_si512();
            UNROLLED for (int v = 0; v < 8; v += 2) {
                even = _mm512_dpbusd_epi32(even, u[v], four(q + 4 * v));
                odd = _mm512_dpbusd_epi32(odd, u[v + 1], four(q + 4 * v + 4));
            }
            even = _mm512_add_epi32(even, FOUR_BITS ? _mm512_srai_epi32(odd, 4) : odd);
            sums[n] = _mm512_fmadd_ps(
                _mm512_cvtepi32_ps(even), _mm512_mul_ps(scale, _mm512_set1_ps(x[n].scales[t])), sums[n]);
        }
    }
    for (int n = 0; n < N; n++) out[n] = (f32x16)sums[n];
}
#else
template <int N, bool FOUR_BITS>
void product_integers(const Matrix& m, int b, const Rounded* x, f32x16* out) {
    const uint8_t* w = m.block(b);
    const int per_scale = m.group / STRETCH, bytes = FOUR_BITS ? 256 : 512;
    for (int n = 0; n < N; n++) out[n] = f32x16{};
    for (int t = 0; t < m.columns / STRETCH; t++, w += bytes) {
        f32x16 scale = load_half(m.block_scales(b) + size_t(t / per_scale) * LANES);
        for (int n = 0; n < N; n++) {
            const int8_t* q = x[n].q + t * STRETCH;
            i32x16 sum = i32x16{} + x[n].sums[t];
            for (int c = 0; c < STRETCH; c++)
                for (int r = 0; r < LANES; r++) {
                    uint8_t u = FOUR_BITS ? w[c / 8 * 64 + r * 4 + c % 4] : w[c / 4 * 64 + r * 4 + c % 4];
                    sum[r] += int32_t(FOUR_BITS ? (c % 8 < 4 ? u & 15 : u >> 4) : u) * q[c];
                }
            out[n] += __builtin_convertvector(sum, f32x16) * scale * x[n].scales[t];
        }
    }
}
#endif

enum Precision : int32_t { FLOATS = 0, LOW = 1, INTEGERS = 2 };

template <int N>
void tile(const Matrix& m, int b, Activations& a, int first, Precision precision, f32x16* out) {
    if (precision == INTEGERS && (m.kind == U8 || m.kind == U4)) {
        Rounded x[N];
        for (int n = 0; n < N; n++) {
            size_t token = first + n, stretches = a.columns / STRETCH;
            x[n] = {a.integers.data() + token * a.columns, a.scales.data() + token * stretches, a.sums.data() + token * stretches};
        }
        return m.kind == U4 ? product_integers<N, true>(m, b, x, out) : product_integers<N, false>(m, b, x, out);
    }
#if defined(__AVX512BF16__)
    if (precision != FLOATS && m.kind == BF16) {
        const uint16_t* x[N];
        for (int n = 0; n < N; n++) x[n] = a.low.data() + size_t(first + n) * a.columns;
        return product_bf16<N>(m, b, x, out);
    }
#endif
    const float* x[N];
    for (int n = 0; n < N; n++) x[n] = a.row(first + n);
#if defined(__AVX512F__)
    if (m.kind == F32) return product_f32<N>(m, b, x, out);
#endif
    product_floats<N>(m, b, x, out);
}

// Blocks [from, to) of a matrix times tokens [0, count): take(b, token, sixteen results with their bias).
template <typename Take>
void multiply(const Matrix& m, Activations& a, int count, Precision precision, int from, int to, Take take) {
    for (int b = from; b < to; b++) {
        f32x16 bias = m.bias ? load(m.bias + size_t(b) * LANES) : f32x16{}, out[8];
        for (int first = 0; first < count;) {
            int left = count - first, width = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            switch (width) {
                case 8: tile<8>(m, b, a, first, precision, out); break;
                case 4: tile<4>(m, b, a, first, precision, out); break;
                case 2: tile<2>(m, b, a, first, precision, out); break;
                default: tile<1>(m, b, a, first, precision, out);
            }
            for (int n = 0; n < width; n++) take(b, first + n, out[n] + bias);
            first += width;
        }
    }
}

}  // namespace hasten
