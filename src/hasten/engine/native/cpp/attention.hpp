// Attention: what queries make of keys and values.
//
// Up to eight queries that want the same keys and values are a tile: the heads of a group (Ainslie et al. 2023), then the
// tokens of a sequence that share a pass. A tile reads keys and values once, as a product does its weights. First it
// writes down all scores, then it weighs the values; a query's own sums run from its first position to its last, in the
// same order whatever the tile, so that a token's arithmetic does not depend on its company.
//
// A cache of integers is multiplied as it is: queries are rounded to 8 bits with a scale for every 32 columns, weights
// (with the values' scales in them) to 8 bits with one for every 32 positions.
#pragma once

#include "cache.hpp"

namespace hasten {

struct Input {
    int32_t id, slot, position, row;  // row: of the logits, -1 if nobody asks what comes next
};

template <Kept KEPT>
inline f32x16 lanes(const uint8_t* p) {
    if (KEPT == WHOLE) return load(reinterpret_cast<const float*>(p));
    return load_half(reinterpret_cast<const uint16_t*>(p));
}

inline i32x16 load_bytes(const uint8_t* p) { i32x16 v; memcpy(&v, p, 64); return v; }
inline i32x16 splat_four(const void* p) { int32_t four; memcpy(&four, p, 4); return i32x16{} + four; }

// To each lane, its four products of unsigned and signed bytes.
inline i32x16 add_products(i32x16 sum, i32x16 unsigned_, i32x16 signed_) {
#ifdef __AVX512VNNI__
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_, (__m512i)signed_);
#else
    for (int k = 0; k < 32; k += 8) sum += (unsigned_ >> k & 255) * (signed_ << (24 - k) >> 24);
    return sum;
#endif
}

class Attention {
public:
    struct Sizes {
        int layers, slots, heads, kv_heads, width, context, threads;
        Kept kept;
        float scale;
    };

    explicit Attention(const Sizes& z) : z(z), cache(z.kept, z.layers, z.slots, z.kv_heads, z.width, z.context), own(z.threads) {
        const size_t positions = size_t(MOST) * cache.positions, columns = size_t(MOST) * cache.groups * STRETCH;
        for (auto& mine : own) {
            mine.scores.resize(positions), mine.mixed.resize(MOST * cache.filled);
            if (z.kept != BYTES) continue;
            mine.rounded.resize(columns), mine.scales.resize(columns / STRETCH), mine.shifts.resize(columns / STRETCH);
            mine.weights.resize(positions), mine.steps.resize(positions / STRETCH);
        }
    }

    size_t bytes() const { return cache.bytes(); }

    // Before a pass: which queries go together. There are tiles for all threads, if there are queries enough.
    void plan(const std::vector<Input>& inputs) {
        for (int most = MOST; most; most /= 2) {
            tiles.clear();
            for (size_t t = 0, next; t < inputs.size(); t = next) {
                for (next = t + 1; next < inputs.size() && inputs[next].slot == inputs[t].slot;) next++;
                for (int row = 0, count = int(next - t) * group(), rows; row < count; row += rows) {
                    for (rows = most; rows > count - row;) rows /= 2;
                    tiles.push_back({int(t) + row / group(), row % group(), rows});
                }
            }
            if (int(tiles.size()) * z.kv_heads >= z.threads) return;
        }
    }

    void remember(int layer, const Input& input, int kv_head, const float* key, const float* value) {
        cache.remember(layer, input.slot, kv_head, input.position, key, value);
    }

    // This thread's tiles of a layer, with as many positions to visit as any other's. queries: turned, `stride` from token
    // to token. out: (tokens, heads, width). window: 0 is everything.
    void attend(int layer, int window, const std::vector<Input>& inputs, const float* queries, int stride, float* out, int me) {
        int64_t total = 0, before = 0;
        for (const Tile& tile : tiles) total += z.kv_heads * cost(tile, inputs, window);
        for (int kv_head = 0; kv_head < z.kv_heads; kv_head++)
            for (const Tile& tile : tiles) {
                const int64_t mine = cost(tile, inputs, window), middle = before + mine / 2;
                before += mine;
                if (middle * z.threads / total != me) continue;
                Row rows[MOST];
                for (int n = 0; n < tile.rows; n++) {
                    const int token = tile.token + (tile.head + n) / group(), head = kv_head * group() + (tile.head + n) % group();
                    Row& row = rows[n] = own[me].row(n, cache);
                    row.query = queries + size_t(token) * stride + head * z.width;
                    row.out = out + (size_t(token) * z.heads + head) * z.width;
                    row.end = inputs[token].position + 1, row.first = window ? std::max(0, row.end - window) : 0;
                }
                const int slot = inputs[tile.token].slot;
                const uint8_t *keys = cache.keys(layer, slot, kv_head), *values = cache.values(layer, slot, kv_head);
                switch (z.kept) {
                    case WHOLE: visit<WHOLE>(keys, values, rows, tile.rows); break;
                    case HALF: visit<HALF>(keys, values, rows, tile.rows); break;
                    case BYTES: visit<BYTES>(keys, values, rows, tile.rows);
                }
            }
    }

private:
    static constexpr int MOST = 8;
    struct Tile {
        int token, head, rows;  // from this head of the group on, heads first
    };
    struct Row {  // a query
        const float* query;
        float *out, *scores, *mixed;
        int first, end;      // the positions that it sees
        int8_t* rounded;     // the query as integers,
        float* scales;       // for every 32 columns its scale
        int32_t* shifts;     // and the integers' sum, times what keys are shifted by, negative
        uint8_t* weights;    // of the values, as integers
        float* steps;        // and their scales, for every 32 positions
    };
    struct Own {
        std::vector<float> scores, mixed, scales, steps;
        std::vector<int8_t> rounded;
        std::vector<int32_t> shifts;
        std::vector<uint8_t> weights;

        Row row(int n, const Cache& c) {
            return {nullptr, nullptr, scores.data() + n * c.positions, mixed.data() + n * c.filled, 0, 0,
                    rounded.data() + n * c.groups * STRETCH, scales.data() + n * c.groups, shifts.data() + n * c.groups,
                    weights.data() + n * c.positions, steps.data() + n * c.positions / STRETCH};
        }
    };
    const Sizes z;
    Cache cache;
    std::vector<Own> own;
    std::vector<Tile> tiles;

    int group() const { return z.heads / z.kv_heads; }

    int64_t cost(const Tile& tile, const std::vector<Input>& inputs, int window) const {
        int end = inputs[tile.token + (tile.head + tile.rows - 1) / group()].position + 1;
        return int64_t(tile.rows + 2) * (LANES + (window ? std::min(end, window) : end));
    }

    template <Kept KEPT>
    void visit(const uint8_t* keys, const uint8_t* values, const Row* rows, int count) const {
        switch (count) {
            case 8: return compute<KEPT, 8>(keys, values, rows);
            case 4: return compute<KEPT, 4>(keys, values, rows);
            case 2: return compute<KEPT, 2>(keys, values, rows);
            default: compute<KEPT, 1>(keys, values, rows);
        }
    }

    template <Kept KEPT, int N>
    void compute(const uint8_t* keys, const uint8_t* values, const Row* rows) const {
        int first = rows[0].first, end = rows[0].end, from = first, to = end;  // what one of them sees, and what all see
        for (int n = 1; n < N; n++) {
            first = std::min(first, rows[n].first), end = std::max(end, rows[n].end);
            from = std::max(from, rows[n].first), to = std::min(to, rows[n].end);
        }
        if (KEPT == BYTES)
            for (int n = 0; n < N; n++) round_query(rows[n]);
        for (int p = first / LANES * LANES; p < end; p += LANES) score<KEPT, N>(keys, p, rows);
        float totals[N];
        for (int n = 0; n < N; n++) totals[n] = soften(rows[n]), std::fill_n(rows[n].mixed, cache.filled, 0.0f);
        if (KEPT == BYTES) {
            for (int n = 0; n < N; n++) round_weights(values, rows[n], first, end);
            mix<BYTES, N>(values, first, end, rows);
        } else {
            to = std::max(from, to);
            for (int n = 0; n < N; n++) mix<KEPT, 1>(values, rows[n].first, std::min(from, rows[n].end), &rows[n]);
            mix<KEPT, N>(values, from, to, rows);
            for (int n = 0; n < N; n++) mix<KEPT, 1>(values, to, rows[n].end, &rows[n]);
        }
        for (int n = 0; n < N; n++)
            for (int i = 0; i < z.width; i++) rows[n].out[i] = rows[n].mixed[i] / totals[n];
    }

    // Scores of sixteen positions.
    template <Kept KEPT, int N>
    void score(const uint8_t* keys, int p, const Row* rows) const {
        const uint8_t* block = keys + p / LANES * cache.key_block;
        f32x16 sums[2][N] = {};
        if (KEPT == BYTES) {
            for (int g = 0, c = 0; g < cache.groups; g++) {
                const f32x16 scales = load(reinterpret_cast<const float*>(block));
                i32x16 whole[N];
                UNROLLED for (int n = 0; n < N; n++) whole[n] = i32x16{} + rows[n].shifts[g];
                block += 64;
                for (const int stop = std::min(c + STRETCH, z.width); c < stop; c += 4, block += 64) {
                    const i32x16 key = load_bytes(block);
                    UNROLLED for (int n = 0; n < N; n++) whole[n] = add_products(whole[n], key, splat_four(rows[n].rounded + c));
                }
                UNROLLED for (int n = 0; n < N; n++)
                    sums[0][n] += __builtin_convertvector(whole[n], f32x16) * (scales * rows[n].scales[g]);
            }
        } else {
            constexpr int STEP = LANES * (KEPT == WHOLE ? 4 : 2);
            for (int i = 0; i < z.width; i += 2, block += 2 * STEP)
                UNROLLED for (int c = 0; c < 2; c++) {
                    const f32x16 key = lanes<KEPT>(block + c * STEP);
                    UNROLLED for (int n = 0; n < N; n++) sums[c][n] += key * rows[n].query[i + c];
                }
        }
        for (int n = 0; n < N; n++) store(rows[n].scores + p, (sums[0][n] + sums[1][n]) * z.scale);
    }

    // Scores to weights, relative to the largest, and zero for what the query does not see; returns their sum.
    float soften(const Row& row) const {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int start = row.first / LANES * LANES;
        auto seen = [&](int p) { return (lane + p >= row.first) & (lane + p < row.end); };
        f32x16 most = splat(-INFINITY), total = {};
        for (int p = start; p < row.end; p += LANES) {
            f32x16 v = load(row.scores + p);
            most = (v > most) & seen(p) ? v : most;
        }
        float largest = -INFINITY, sum = 0;
        for (int r = 0; r < LANES; r++) largest = std::max(largest, most[r]);
        for (int p = start; p < row.end; p += LANES) {
            f32x16 v = exp16(load(row.scores + p) - largest);
            v = seen(p) ? v : splat(0);
            store(row.scores + p, v);
            total += v;
        }
        for (int r = 0; r < LANES; r++) sum += total[r];
        return sum;
    }

    // Adds the values of positions [from, to) by their weights, all columns of them.
    template <Kept KEPT, int N>
    void mix(const uint8_t* values, int from, int to, const Row* rows) const {
        constexpr int MANY = KEPT == BYTES ? std::min(8 / N, 4) : N < 8 ? 4 : 3;  // sums stay in registers
        for (int i = 0; i < cache.filled && from < to;) {
            const int left = (cache.filled - i) / LANES;
            if (left >= MANY)
                mix<KEPT, N, MANY>(values, i, from, to, rows), i += MANY * LANES;
            else if (MANY > 3 && left == 3)
                mix<KEPT, N, 3>(values, i, from, to, rows), i += 3 * LANES;
            else if (MANY > 2 && left == 2)
                mix<KEPT, N, 2>(values, i, from, to, rows), i += 2 * LANES;
            else
                mix<KEPT, N, 1>(values, i, from, to, rows), i += LANES;
        }
    }

    template <Kept KEPT, int N, int VECTORS>
    void mix(const uint8_t* values, int i, int from, int to, const Row* rows) const {
        f32x16 sums[VECTORS][N];
        for (int c = 0; c < VECTORS; c++)
            for (int n = 0; n < N; n++) sums[c][n] = load(rows[n].mixed + i + c * LANES);
        if (KEPT == BYTES) {
            for (int s = from / STRETCH; s * STRETCH < to; s++) {
                const uint8_t* line = values + s * cache.value_block + (STRETCH + i) * 4;
                i32x16 whole[VECTORS][N] = {};
                for (int p = s * STRETCH; p < (s + 1) * STRETCH; p += 4, line += cache.filled * 4)
                    UNROLLED for (int n = 0; n < N; n++) {
                        i32x16 weights = splat_four(rows[n].weights + p);
                        UNROLLED for (int c = 0; c < VECTORS; c++)
                            whole[c][n] = add_products(whole[c][n], weights, load_bytes(line + c * 64));
                    }
                for (int n = 0; n < N; n++)
                    for (int c = 0; c < VECTORS; c++) sums[c][n] += __builtin_convertvector(whole[c][n], f32x16) * rows[n].steps[s];
            }
        } else {
            constexpr int SIZE = KEPT == WHOLE ? 4 : 2;
            const uint8_t* line = values + (size_t(from) * cache.filled + i) * SIZE;
            for (int p = from; p < to; p++, line += cache.filled * SIZE)
                UNROLLED for (int c = 0; c < VECTORS; c++) {
                    f32x16 value = lanes<KEPT>(line + c * LANES * SIZE);
                    UNROLLED for (int n = 0; n < N; n++) sums[c][n] += value * rows[n].scores[p];
                }
        }
        for (int c = 0; c < VECTORS; c++)
            for (int n = 0; n < N; n++) store(rows[n].mixed + i + c * LANES, sums[c][n]);
    }

    void round_query(const Row& row) const {
        for (int g = 0; g < cache.groups; g++) {
            const int count = std::min(STRETCH, z.width - g * STRETCH);
            int8_t* q = row.rounded + g * STRETCH;
            const float largest = largest_of(row.query + g * STRETCH, count);
            round_by(largest, row.query + g * STRETCH, count, q);
            int32_t sum = 0;
            for (int i = 0; i < count; i++) sum += q[i];
            row.scales[g] = largest / 127.0f, row.shifts[g] = -128 * sum;
        }
    }

    // The weights of the stretches that hold [first, end) as integers up to 255, each with the scale of its value in it.
    void round_weights(const uint8_t* values, const Row& row, int first, int end) const {
        for (int s = first / STRETCH; s * STRETCH < end; s++) {
            const float* scales = reinterpret_cast<const float*>(values + s * cache.value_block);
            float w[STRETCH] = {};
            for (int p = s * STRETCH, i = 0; i < STRETCH; i += LANES)
                if (p + i + LANES > row.first && p + i < row.end) {
                    f32x16 weight = load(row.scores + p + i);
                    store(w + i, (weight > splat(0)) | (weight != weight) ? weight * load(scales + i) : splat(0));
                }
            const float largest = largest_of(w, STRETCH), inverse = largest > 1e-36f && largest < INFINITY ? 255.0f / largest : 0.0f;
            row.steps[s] = largest / 255.0f;
            for (int i = 0; i < STRETCH; i++) row.weights[s * STRETCH + i] = uint8_t(int(w[i] * inverse + 0.5f));
        }
    }
};

}  // namespace hasten
