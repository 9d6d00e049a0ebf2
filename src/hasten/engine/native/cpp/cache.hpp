// Keys and values of the tokens so far, in the order in which attention reads them.
//
//   keys    blocks of sixteen positions side by side, so that scores need no sum over lanes
//             floats    (width, 16)
//             integers  for every 32 columns sixteen scales and (columns / 4, 16, 4), shifted to unsigned
//   values  blocks of 32 positions, their width filled up to whole vectors
//             floats    (32, width)
//             integers  32 scales and (8, width, 4)
//
// Eight bits share a scale along 32 of a key's columns, but along the whole of a value: some columns of keys are far
// larger than others, while a value's one scale becomes part of its weight.
#pragma once

#include "kernels.hpp"

namespace hasten {

enum Kept : int32_t { WHOLE = 0, HALF = 1, BYTES = 2 };  // float32, float16, 8-bit integers

// The largest of these magnitudes, or no number if one of them is none.
inline float largest_of(const float* x, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffff);  // magnitudes are in the order of their bits, what is no number last
    }
    float largest;
    memcpy(&largest, &most, 4);
    return largest;
}

// Numbers up to `largest` as integers up to 127, to nearest, ties to even.
inline void round_by(float largest, const float* x, int count, int8_t* out) {
    const float inverse = largest > 1e-36f && largest < INFINITY ? 127.0f / largest : 0.0f;
    for (int i = 0; i < count; i++) out[i] = int8_t(std::nearbyintf(x[i] * inverse));
}

class Cache {
public:
    const Kept kept;
    const int width, filled, groups, positions;  // groups: of 32 columns, the last may have fewer
    const size_t key_block, value_block;         // bytes of sixteen keys and of 32 values

    Cache(Kept kept, int layers, int slots, int kv_heads, int width, int context)
        : kept(kept), width(width), filled(up(width, LANES)), groups(up(width, STRETCH) / STRETCH), positions(up(context, STRETCH)),
          key_block(kept == BYTES ? 64 * (groups + up(width, 4) / 4) : LANES * size() * width),
          value_block(kept == BYTES ? STRETCH * (4 + filled) : STRETCH * size() * filled), slots(slots), kv_heads(kv_heads) {
        size_t places = size_t(layers) * slots * kv_heads;
        key_lines.resize(places * key_bytes() / 64), value_lines.resize(places * value_bytes() / 64);
    }

    size_t bytes() const { return 64 * (key_lines.size() + value_lines.size()); }
    uint8_t* keys(int layer, int slot, int kv_head) { return key_lines[0].bytes + place(layer, slot, kv_head) * key_bytes(); }
    uint8_t* values(int layer, int slot, int kv_head) { return value_lines[0].bytes + place(layer, slot, kv_head) * value_bytes(); }

    void remember(int layer, int slot, int kv_head, int position, const float* key, const float* value) {
        uint8_t* k = keys(layer, slot, kv_head) + position / LANES * key_block;
        uint8_t* v = values(layer, slot, kv_head) + position / STRETCH * value_block;
        if (kept == BYTES) return round(k, v, position, key, value);
        for (int i = 0; i < width; i++) {
            write(k, size_t(i) * LANES + position % LANES, key[i]);
            write(v, size_t(position % STRETCH) * filled + i, value[i]);
        }
    }

    static int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

private:
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    const int slots, kv_heads;
    std::vector<Line> key_lines, value_lines;

    size_t size() const { return kept == WHOLE ? 4 : 2; }
    size_t key_bytes() const { return positions / LANES * key_block; }
    size_t value_bytes() const { return positions / STRETCH * value_block; }
    size_t place(int layer, int slot, int kv_head) const { return (size_t(layer) * slots + slot) * kv_heads + kv_head; }

    void write(uint8_t* at, size_t i, float x) const {
        uint16_t half = to_half(x);
        kept == WHOLE ? memcpy(at + i * 4, &x, 4) : memcpy(at + i * 2, &half, 2);
    }

    void round(uint8_t* k, uint8_t* v, int position, const float* key, const float* value) {
        int8_t q[STRETCH];
        for (int first = 0; first < width; first += STRETCH, k += 64) {
            const int count = std::min(STRETCH, width - first);
            const float largest = largest_of(key + first, count), scale = largest / 127.0f;
            memcpy(k + position % LANES * 4, &scale, 4);
            round_by(largest, key + first, count, q);
            for (int i = 0; i < count; i++) {
                if (i % 4 == 0) k += 64;
                k[position % LANES * 4 + i % 4] = uint8_t(q[i] + 128);
            }
        }
        const float largest = largest_of(value, width), scale = largest / 127.0f;
        memcpy(v + position % STRETCH * 4, &scale, 4);
        v += STRETCH * 4 + position % STRETCH / 4 * filled * 4 + position % 4;
        for (int first = 0; first < width; first += STRETCH) {
            const int count = std::min(STRETCH, width - first);
            round_by(largest, value + first, count, q);
            for (int i = 0; i < count; i++) v[(first + i) * 4] = uint8_t(q[i]);
        }
    }
};

}  // namespace hasten
