// Attention: keys and values of the tokens so far, and what queries make of them.
//
// Up to eight queries that want the same keys and values are a tile: the heads of a group (Ainslie et al. 2023), then the
// tokens of a sequence that share a pass. A tile reads keys and values once, as a product does its weights. First it
// writes down all scores, then it weighs the values; a query's own sums run from its first position to its last, in the
// same order whatever the tile, so that a token's arithmetic does not depend on its company.
//
//   keys    sixteen positions side by side, (positions / 16, width, 16), so that scores need no sum over lanes
//   values  (positions, width), the width filled up to whole vectors
#pragma once

#include "kernels.hpp"

namespace hasten {

enum Kept : int32_t { WHOLE = 0, HALF = 1 };  // float32, float16

struct Input {
    int32_t id, slot, position, row;  // row: of the logits, -1 if nobody asks what comes next
};

template <Kept KEPT>
inline f32x16 lanes(const uint8_t* p) {
    if (KEPT == WHOLE) return load(reinterpret_cast<const float*>(p));
    return load_half(reinterpret_cast<const uint16_t*>(p));
}

class Attention {
public:
    struct Sizes {
        int layers, slots, heads, kv_heads, width, context, threads;
        Kept kept;
        float scale;
    };

    explicit Attention(const Sizes& sizes) : z(sizes), own(z.threads) {
        positions = (z.context + STRETCH - 1) / STRETCH * STRETCH;
        filled = (z.width + LANES - 1) / LANES * LANES;
        size_t places = size_t(z.layers) * z.slots * z.kv_heads;
        keys.resize(places * key_bytes() / sizeof(Line)), values.resize(places * value_bytes() / sizeof(Line));
        for (auto& mine : own) mine.scores.resize(size_t(MOST) * positions), mine.mixed.resize(size_t(MOST) * filled);
    }

    size_t bytes() const { return (keys.size() + values.size()) * sizeof(Line); }

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
        uint8_t* block = keys_at(layer, input.slot, kv_head) + size_t(input.position / LANES) * LANES * z.width * size();
        uint8_t* line = values_at(layer, input.slot, kv_head) + size_t(input.position) * filled * size();
        for (int i = 0; i < z.width; i++) {
            keep(block, size_t(i) * LANES + input.position % LANES, key[i]);
            keep(line, i, value[i]);
        }
    }

    // This thread's tiles of a layer, with as many positions to visit as any other's. queries: turned, `stride` from token
    // to token. out: (tokens, heads, width). window: 0 is everything.
    void attend(int layer, int window, const std::vector<Input>& inputs, const float* queries, int stride, float* out, int me) {
        int64_t total = 0, before = 0;
        for (const Tile& tile : tiles) total += cost(tile, inputs, window);
        total *= z.kv_heads;
        for (int kv_head = 0; kv_head < z.kv_heads; kv_head++)
            for (const Tile& tile : tiles) {
                int64_t mine = cost(tile, inputs, window);
                if ((before + mine / 2) * z.threads / total == me) {
                    Row rows[MOST];
                    for (int n = 0; n < tile.rows; n++) {
                        int token = tile.token + (tile.head + n) / group(), head = kv_head * group() + (tile.head + n) % group();
                        rows[n].query = queries + size_t(token) * stride + head * z.width;
                        rows[n].out = out + (size_t(token) * z.heads + head) * z.width;
                        rows[n].end = inputs[token].position + 1;
                        rows[n].first = window ? std::max(0, rows[n].end - window) : 0;
                        rows[n].scores = own[me].scores.data() + size_t(n) * positions;
                        rows[n].mixed = own[me].mixed.data() + size_t(n) * filled;
                    }
                    const int slot = inputs[tile.token].slot;
                    z.kept == HALF ? visit<HALF>(layer, slot, kv_head, rows, tile.rows) : visit<WHOLE>(layer, slot, kv_head, rows, tile.rows);
                }
                before += mine;
            }
    }

private:
    static constexpr int MOST = 8;
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    struct Tile {
        int token, head, rows;  // from this head of the group on, heads first
    };
    struct Row {
        const float* query;
        float *out, *scores, *mixed;
        int first, end;  // the positions that it sees
    };
    struct Own {
        std::vector<float> scores, mixed;
    };
    Sizes z;
    int positions, filled;
    std::vector<Line> keys, values;
    std::vector<Own> own;
    std::vector<Tile> tiles;

    int group() const { return z.heads / z.kv_heads; }
    size_t size() const { return z.kept == WHOLE ? 4 : 2; }
    size_t key_bytes() const { return size_t(positions) * z.width * size(); }
    size_t value_bytes() const { return size_t(positions) * filled * size(); }
    size_t place(int layer, int slot, int kv_head) const { return (size_t(layer) * z.slots + slot) * z.kv_heads + kv_head; }
    uint8_t* keys_at(int layer, int slot, int kv_head) { return keys[0].bytes + place(layer, slot, kv_head) * key_bytes(); }
    uint8_t* values_at(int layer, int slot, int kv_head) { return values[0].bytes + place(layer, slot, kv_head) * value_bytes(); }

    void keep(uint8_t* at, size_t i, float x) const {
        if (z.kept == WHOLE)
            reinterpret_cast<float*>(at)[i] = x;
        else
            reinterpret_cast<uint16_t*>(at)[i] = to_half(x);
    }

    int64_t cost(const Tile& tile, const std::vector<Input>& inputs, int window) const {
        int end = inputs[tile.token + (tile.head + tile.rows - 1) / group()].position + 1;
        return int64_t(tile.rows + 2) * (LANES + (window ? std::min(end, window) : end));
    }

    template <Kept KEPT>
    void visit(int layer, int slot, int kv_head, Row* rows, int count) {
        const uint8_t *k = keys_at(layer, slot, kv_head), *v = values_at(layer, slot, kv_head);
        switch (count) {
            case 8: return compute<KEPT, 8>(k, v, rows);
            case 4: return compute<KEPT, 4>(k, v, rows);
            case 2: return compute<KEPT, 2>(k, v, rows);
            default: compute<KEPT, 1>(k, v, rows);
        }
    }

    template <Kept KEPT, int N>
    void compute(const uint8_t* k, const uint8_t* v, Row* rows) {
        int first = rows[0].first, end = rows[0].end, from = first, to = end;  // what any row sees, and what all see
        for (int n = 1; n < N; n++) {
            first = std::min(first, rows[n].first), end = std::max(end, rows[n].end);
            from = std::max(from, rows[n].first), to = std::min(to, rows[n].end);
        }
        constexpr int WIDE = N < 4 ? 4 / N : 1;
        for (int p = first / LANES * LANES; p < end;) {
            bool wide = end - p > (WIDE - 1) * LANES;
            wide ? score<KEPT, N, WIDE>(k, p, rows) : score<KEPT, N, 1>(k, p, rows);
            p += (wide ? WIDE : 1) * LANES;
        }
        float totals[N];
        for (int n = 0; n < N; n++) totals[n] = soften(rows[n]), std::fill_n(rows[n].mixed, filled, 0.0f);
        to = std::max(from, to);
        for (int n = 0; n < N; n++) mix<KEPT, 1>(v, rows[n].first, std::min(from, rows[n].end), &rows[n]);
        mix<KEPT, N>(v, from, to, rows);
        for (int n = 0; n < N; n++) {
            mix<KEPT, 1>(v, to, rows[n].end, &rows[n]);
            for (int i = 0; i < z.width; i++) rows[n].out[i] = rows[n].mixed[i] / totals[n];
        }
    }

    // Scores of `WIDE` times sixteen positions.
    template <Kept KEPT, int N, int WIDE>
    void score(const uint8_t* k, int p, const Row* rows) const {
        constexpr int STEP = LANES * (KEPT == WHOLE ? 4 : 2);
        const uint8_t* block = k + size_t(p) * z.width * (STEP / LANES);
        const size_t next = size_t(z.width) * STEP;
        f32x16 sums[2][WIDE][N] = {};
        for (int i = 0; i < z.width; i += 2, block += 2 * STEP)
            UNROLLED for (int c = 0; c < 2; c++)
                UNROLLED for (int w = 0; w < WIDE; w++) {
                    f32x16 key = lanes<KEPT>(block + w * next + c * STEP);
                    UNROLLED for (int n = 0; n < N; n++) sums[c][w][n] += key * rows[n].query[i + c];
                }
        for (int w = 0; w < WIDE; w++)
            for (int n = 0; n < N; n++) store(rows[n].scores + p + w * LANES, (sums[0][w][n] + sums[1][w][n]) * z.scale);
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

    // Adds the values of positions [from, to), which all these rows see, by their weights.
    template <Kept KEPT, int N>
    void mix(const uint8_t* v, int from, int to, const Row* rows) const {
        constexpr int MANY = N < 8 ? 4 : 3;  // sums stay in registers
        for (int i = 0; i < filled && from < to;) {
            int left = (filled - i) / LANES, vectors = left >= MANY ? MANY : left >= 2 ? 2 : 1;
            switch (vectors) {
                case MANY: mix<KEPT, N, MANY>(v, i, from, to, rows); break;
                case 2: mix<KEPT, N, 2>(v, i, from, to, rows); break;
                default: mix<KEPT, N, 1>(v, i, from, to, rows);
            }
            i += vectors * LANES;
        }
    }

    template <Kept KEPT, int N, int VECTORS>
    void mix(const uint8_t* v, int i, int from, int to, const Row* rows) const {
        constexpr int SIZE = KEPT == WHOLE ? 4 : 2;
        const uint8_t* line = v + (size_t(from) * filled + i) * SIZE;
        f32x16 sums[VECTORS][N];
        for (int c = 0; c < VECTORS; c++)
            for (int n = 0; n < N; n++) sums[c][n] = load(rows[n].mixed + i + c * LANES);
        for (int p = from; p < to; p++, line += size_t(filled) * SIZE)
            UNROLLED for (int c = 0; c < VECTORS; c++) {
                f32x16 value = lanes<KEPT>(line + c * LANES * SIZE);
                UNROLLED for (int n = 0; n < N; n++) sums[c][n] += value * rows[n].scores[p];
            }
        for (int c = 0; c < VECTORS; c++)
            for (int n = 0; n < N; n++) store(rows[n].mixed + i + c * LANES, sums[c][n]);
    }
};

}  // namespace hasten
