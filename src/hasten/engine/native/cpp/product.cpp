// One product of a matrix with the activations of a few tokens, in the threads of who calls (OpenMP): for networks that
// are computed elsewhere and have threads already, which a team of our own would only keep from their cores.
#include <omp.h>

#include "kernels.hpp"

using namespace hasten;

extern "C" {

const char* hasten_kernels() { return INSTRUCTIONS; }

// x (count, width), as the matrix wants them rounded -> out (count, blocks * LANES), without a bias.
void hasten_multiply(int32_t kind, int32_t rows, int32_t columns, int32_t group, const void* data, const uint16_t* scales,
                     const float* x, int32_t count, int32_t width, float* out, int32_t threads) {
    const Matrix m{kind, rows, columns, group, data, scales, nullptr};
    static thread_local Activations kept;
    Activations& a = kept;
    a.columns = m.columns;
    if (a.floats.size() < size_t(count) * m.columns) a.reserve(count, m.columns);
    const int shift = m.kind == U8 ? 128 : m.kind == U4 ? 8 : 0, blocks = m.blocks();
    auto fill = [&](int t) {
        memcpy(a.row(t), x + size_t(t) * width, sizeof(float) * width);
        std::fill(a.row(t) + width, a.row(t) + m.columns, 0.0f);
        a.round_row(t, shift, m.kind == BF16);
    };
    if (count == 1) fill(0);  // a barrier would take longer
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        if (count > 1) {
#pragma omp for
            for (int t = 0; t < count; t++) fill(t);
        }
        multiply(m, a, count, INTEGERS, int(blocks * me / all), int(blocks * (me + 1) / all),
                 [&](int b, int t, f32x16 v) { store(out + (size_t(t) * blocks + b) * LANES, v); });
    }
}

}
