// A decoder of the Llama family: one pass over a batch of tokens, each of its own sequence and at its own place there.
//
// A prompt's tokens and the newest tokens of other sequences go through together, so prefill, decoding and continuous
// batching are one function. Between the products of a layer the threads meet at a barrier; what is cheap is computed
// by every thread for itself where there are fewer tokens than threads, which saves another.
#pragma once

#include "attention.hpp"
#include "team.hpp"

namespace hasten {

struct Layer {
    Matrix qkv, output, gate_up, down;  // gate_up: blocks of both in turns
    const float *before_attention, *after_attention, *before_feed, *after_feed;  // after_*: null without post norms
    const float *query_norm, *key_norm;                                          // null without head norms
    int32_t window, rope;                                                        // window: 0 is everything
};

struct Shape {
    int32_t layers, hidden, heads, kv_heads, width, feed, vocabulary, context, slots, batch, threads, guesses;
    int32_t gelu, precision, kept;
    float epsilon, scale, embedding_scale;
    const Layer* layer;
    Matrix embedding, head;
    const float* norm;
    const float *cosines[2], *sines[2];  // (context, width / 2), of global and of local layers
};

class Model {
public:
    Model(const Shape& shape, Team& team) : s(shape), team(team), own(shape.threads), attention(sizes(shape)) {
        int widest = std::max({s.layer[0].qkv.columns, s.layer[0].output.columns, s.layer[0].down.columns});
        size_t tokens = s.batch;
        x.resize(tokens * s.hidden), y.resize(tokens * s.hidden), queries.resize(tokens * qkv_rows());
        attended.resize(tokens * s.heads * s.width), gated.resize(tokens * padded(s.feed));
        logits.resize(std::min(size_t(s.slots) * (1 + s.guesses), tokens) * padded(s.vocabulary));
        shared.reserve(s.batch, widest);
        for (auto& mine : own) {
            mine.activations.reserve(s.threads, widest);
            mine.gate.resize(tokens * LANES);
        }
    }

    size_t cache_bytes() const { return attention.bytes(); }
    const float* row_of_logits(int row) const { return logits.data() + size_t(row) * padded(s.vocabulary); }

    void forward(const std::vector<Input>& inputs) {
        attention.plan(inputs);
        team.run([&](int me) { pass(inputs, me); });
    }

private:
    struct Own {
        Activations activations;
        std::vector<float> gate;
    };
    Shape s;
    Team& team;  // models that take turns share one: an idle team's threads would spin on the other's cores
    std::vector<Own> own;
    Activations shared;
    Attention attention;
    std::vector<float> x, y, queries, attended, gated, logits;

    static Attention::Sizes sizes(const Shape& s) {
        return {s.layers, s.slots, s.heads, s.kv_heads, s.width, s.context, s.threads, Kept(s.kept), s.scale};
    }
    static int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
    int qkv_rows() const { return padded((s.heads + 2 * s.kv_heads) * s.width); }
    int from(int me, int n) const { return int(int64_t(n) * me / s.threads); }

    void pass(const std::vector<Input>& inputs, int me) {
        const int count = int(inputs.size()), rows = qkv_rows();
        for (int t = from(me, count); t < from(me + 1, count); t++) embed(inputs[t].id, x.data() + size_t(t) * s.hidden);
        team.barrier();
        for (int l = 0; l < s.layers; l++) {
            const Layer& layer = s.layer[l];
            auto& normed = prepare(count, s.hidden, layer.qkv, me, [&](int t, float* out) {
                norm(x.data() + size_t(t) * s.hidden, layer.before_attention, s.hidden, out);
            });
            share(layer.qkv, normed, count, me, 1, [&](int b, int t, f32x16 v) { store(&queries[size_t(t) * rows + b * LANES], v); });
            team.barrier();
            for (int i = from(me, count * s.kv_heads); i < from(me + 1, count * s.kv_heads); i++)
                turn(layer, l, inputs[i / s.kv_heads], i % s.kv_heads, &queries[size_t(i / s.kv_heads) * rows]);
            team.barrier();
            attention.attend(l, layer.window, inputs, queries.data(), rows, attended.data(), me);
            team.barrier();
            auto& heads = prepare(count, s.heads * s.width, layer.output, me, [&](int t, float* out) {
                memcpy(out, &attended[size_t(t) * s.heads * s.width], sizeof(float) * s.heads * s.width);
            });
            half(layer.output, heads, layer.after_attention, count, me);
            auto& fed = prepare(count, s.hidden, layer.gate_up, me, [&](int t, float* out) {
                norm(x.data() + size_t(t) * s.hidden, layer.before_feed, s.hidden, out);
            });
            float* gate = own[me].gate.data();
            const int inner = padded(s.feed);
            share(layer.gate_up, fed, count, me, 2, [&](int b, int t, f32x16 v) {
                if (b % 2 == 0)
                    store(gate + t * LANES, v);
                else
                    store(&gated[size_t(t) * inner + b / 2 * LANES], gating(load(gate + t * LANES)) * v);
            });
            team.barrier();
            auto& inside = prepare(count, s.feed, layer.down, me, [&](int t, float* out) {
                memcpy(out, &gated[size_t(t) * inner], sizeof(float) * s.feed);
            });
            half(layer.down, inside, layer.after_feed, count, me);
        }
        std::vector<int> asked;
        for (int t = 0; t < count; t++)
            if (inputs[t].row >= 0) asked.push_back(t);
        if (asked.empty()) return;
        auto& last = prepare(int(asked.size()), s.hidden, s.head, me, [&](int i, float* out) {
            norm(x.data() + size_t(asked[i]) * s.hidden, s.norm, s.hidden, out);
        });
        const int vocabulary = padded(s.vocabulary);
        share(s.head, last, int(asked.size()), me, 1, [&](int b, int i, f32x16 v) {
            store(&logits[size_t(inputs[asked[i]].row) * vocabulary + b * LANES], v);
        });
    }

    // The inputs of a product, rounded as its matrix wants them: by all threads together, or by each for itself.
    template <typename Fill>
    Activations& prepare(int count, int width, const Matrix& m, int me, Fill fill) {
        bool alone = count < s.threads;
        Activations& a = alone ? own[me].activations : shared;
        int shift = s.precision != INTEGERS ? 0 : m.kind == U8 ? 128 : m.kind == U4 ? 8 : 0;
        bool low = s.precision != FLOATS && m.kind == BF16;
        a.columns = m.columns;  // all threads write the same number
        for (int t = alone ? 0 : from(me, count); t < (alone ? count : from(me + 1, count)); t++) {
            fill(t, a.row(t));
            std::fill(a.row(t) + width, a.row(t) + m.columns, 0.0f);
            a.round_row(t, shift, low);
        }
        if (!alone) team.barrier();
        return a;
    }

    // This thread's blocks of a product, in units of `together` blocks.
    template <typename Take>
    void share(const Matrix& m, Activations& a, int count, int me, int together, Take take) {
        int units = m.blocks() / together;
        multiply(m, a, count, Precision(s.precision), from(me, units) * together, from(me + 1, units) * together, take);
    }

    // The second product of a half and what it adds to the residual stream.
    void half(const Matrix& m, Activations& a, const float* after, int count, int me) {
        share(m, a, count, me, 1, [&](int b, int t, f32x16 v) {
            float* out = (after ? y : x).data() + size_t(t) * s.hidden + b * LANES;
            int lanes = std::min(LANES, s.hidden - b * LANES);
            for (int r = 0; r < lanes; r++) out[r] = after ? v[r] : out[r] + v[r];
        });
        team.barrier();
        if (!after) return;
        for (int t = from(me, count); t < from(me + 1, count); t++) {
            float* out = y.data() + size_t(t) * s.hidden;
            norm(out, after, s.hidden, out);
            for (int i = 0; i < s.hidden; i++) x[size_t(t) * s.hidden + i] += out[i];
        }
        team.barrier();
    }

    void embed(int id, float* out) const {
        const Matrix& m = s.embedding;
        const uint8_t* w = m.block(id / LANES);
        for (int c = 0; c < s.hidden; c++) {
            float scale = m.scales ? from_half(m.block_scales(id / LANES)[c / m.group * LANES + id % LANES]) : 1.0f;
            out[c] = column(m, w, c)[id % LANES] * scale * s.embedding_scale;
        }
    }

    void norm(const float* in, const float* weight, int width, float* out) const {
        f32x16 sums = {};
        double squares = 0;
        int i = 0;
        for (; i + LANES <= width; i += LANES) sums += load(in + i) * load(in + i);
        for (int r = 0; r < LANES; r++) squares += sums[r];
        for (; i < width; i++) squares += double(in[i]) * in[i];
        float factor = float(1.0 / std::sqrt(squares / width + s.epsilon));
        for (i = 0; i < width; i++) out[i] = in[i] * factor * weight[i];
    }

    f32x16 gating(f32x16 v) const {
        f32x16 u = s.gelu ? (v + v * v * v * 0.044715f) * 1.5957691216f : v;  // 2 sqrt(2 / pi): tanh as a sigmoid
        return v / (exp16(-u) + 1.0f);
    }

    void rotate(const Layer& layer, int position, const float* weight, float* head) const {
        if (weight) norm(head, weight, s.width, head);
        const float* cosine = s.cosines[layer.rope] + size_t(position) * s.width / 2;
        const float* sine = s.sines[layer.rope] + size_t(position) * s.width / 2;
        for (int i = 0; i < s.width / 2; i++) {
            float left = head[i], right = head[i + s.width / 2];
            head[i] = left * cosine[i] - right * sine[i], head[i + s.width / 2] = right * cosine[i] + left * sine[i];
        }
    }

    // A group of a token's heads to their position; its key and value stay.
    void turn(const Layer& layer, int l, const Input& input, int kv_head, float* row) {
        const int group = s.heads / s.kv_heads;
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++) rotate(layer, input.position, layer.query_norm, row + h * s.width);
        float *key = row + (s.heads + kv_head) * s.width, *value = row + (s.heads + s.kv_heads + kv_head) * s.width;
        rotate(layer, input.position, layer.key_norm, key);
        attention.remember(l, input, kv_head, key, value);
    }
};

}  // namespace hasten
