// Products of one row with matrices in bfloat16, int8 or int4, which read each weight once and as it lies:
//     out[c, o] = sum over i of weight[chosen[c], o, i] * rows[c, i]
// Sums are in float32. `step` is the distance in elements from one matrix of a stack, or from one row, to the next. Without
// `chosen`, choice c takes matrix c.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

using bfloat16 = uint16_t;  // its bits are the upper half of a float's

static inline float value(bfloat16 bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

static inline float value(int8_t code) { return code; }

template <typename Weight>
static void product(float* out, const bfloat16* rows, int64_t row_step, const Weight* weight, int64_t matrix_step,
                    const int64_t* chosen, int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    int64_t different = row_step ? choices : 1;
    std::vector<float> wide(different * inputs);
    for (int64_t i = 0; i < different * inputs; i++) wide[i] = value(rows[i / inputs * row_step + i % inputs]);
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * outputs; at++) {
        int64_t choice = at / outputs, output = at % outputs;
        const Weight* w = weight + (chosen ? chosen[choice] : choice) * matrix_step + output * inputs;
        const float* x = wide.data() + (row_step ? choice * inputs : 0);
        float sum = 0;
#pragma omp simd reduction(+ : sum) simdlen(32)
        for (int64_t i = 0; i < inputs; i++) sum += value(w[i]) * x[i];
        out[at] = sum;
    }
}

extern "C" void product_bf16(float* out, const bfloat16* rows, int64_t row_step, const bfloat16* weight,
                             int64_t matrix_step, const int64_t* chosen, int64_t choices, int64_t outputs,
                             int64_t inputs, int64_t threads) {
    product(out, rows, row_step, weight, matrix_step, chosen, choices, outputs, inputs, threads);
}

extern "C" void product_int8(float* out, const bfloat16* rows, int64_t row_step, const int8_t* weight,
                             int64_t matrix_step, const int64_t* chosen, int64_t choices, int64_t outputs,
                             int64_t inputs, int64_t threads) {
    product(out, rows, row_step, weight, matrix_step, chosen, choices, outputs, inputs, threads);
}

// Four bits, laid out as torch's kernel for CPUs wants them: in blocks of outputs, input by input. The low halves of the
// bytes are the codes of the first half of a block, the high halves those of the second; 8 stands for 0. Beside every
// scale of a group of inputs lies a zero, which is not read.

template <int block>
static void outputs_of_block(float* out, const float* x, const bfloat16*, const uint8_t* codes, const bfloat16* scales,
                             int64_t scales_step, int64_t inputs, int64_t group) {
    float total[block] = {};
    for (int64_t first = 0; first < inputs; first += group, scales += scales_step) {
        float sum[block] = {};
        for (int64_t i = first; i < first + group; i++, codes += block / 2) {
#pragma omp simd
            for (int o = 0; o < block / 2; o++) {
                sum[o] += float((codes[o] & 15) - 8) * x[i];
                sum[o + block / 2] += float((codes[o] >> 4) - 8) * x[i];
            }
        }
        for (int o = 0; o < block; o++) total[o] += value(scales[2 * o]) * sum[o];
    }
    std::copy(total, total + block, out);
}

#ifdef __AVX512BF16__
// Two inputs at a time: one instruction looks up 32 codes as bfloat16, and one multiplies them by the two inputs and adds the
// pairs.

static inline __m512 some_scales(const bfloat16* scales) {  // of outputs 0 to 7 and 16 to 23 from here
    const __m256i* first = reinterpret_cast<const __m256i*>(scales);
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(first));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256(first + 2), 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
}

template <>
void outputs_of_block<64>(float* out, const float*, const bfloat16* x, const uint8_t* codes, const bfloat16* scales,
                          int64_t scales_step, int64_t inputs, int64_t group) {
    alignas(64) bfloat16 values[32];  // the fifth bit of an index, which belongs to the next code, changes nothing
    for (int code = 0; code < 32; code++) {
        float number = (code & 15) - 8;
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        values[code] = bits >> 16;
    }
    const __m512i table = _mm512_load_si512(values);
    __m512 total[4] = {};
    for (int64_t first = 0; first < inputs; first += group, scales += scales_step) {
        __m512 sum[4] = {};
        for (int64_t i = first; i < first + group; i += 2, codes += 64) {
            __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
            __m512i pairs[2] = {_mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(one, other)),
                                _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(one, other))};
            int32_t two;
            std::memcpy(&two, x + i, sizeof two);
            __m512bh inputs_of_pair = (__m512bh)_mm512_set1_epi32(two);
            for (int part = 0; part < 4; part++) {
                __m512i indices = part < 2 ? pairs[part] : _mm512_srli_epi16(pairs[part - 2], 4);
                __m512bh weights = (__m512bh)_mm512_permutexvar_epi16(indices, table);
                sum[part] = _mm512_dpbf16_ps(sum[part], weights, inputs_of_pair);
            }
        }
        for (int part = 0; part < 4; part++) {
            __m512 scale = some_scales(scales + 2 * (part / 2 * 32 + part % 2 * 8));
            total[part] = _mm512_fmadd_ps(sum[part], scale, total[part]);
        }
    }
    for (int part = 0; part < 4; part++) {
        float* to = out + part / 2 * 32 + part % 2 * 8;
        _mm256_storeu_ps(to, _mm512_castps512_ps256(total[part]));
        _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(total[part], 1));
    }
}
#endif

extern "C" void product_int4(float* out, const bfloat16* rows, int64_t row_step, const uint8_t* codes,
                             const bfloat16* scales, int64_t group, int64_t block, const int64_t* chosen,
                             int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    int64_t different = row_step ? choices : 1, blocks = outputs / block;
    std::vector<float> wide(different * inputs);
    for (int64_t i = 0; i < different * inputs; i++) wide[i] = value(rows[i / inputs * row_step + i % inputs]);
    auto* multiply = block == 16   ? outputs_of_block<16>
                     : block == 32 ? outputs_of_block<32>
                     : block == 64 ? outputs_of_block<64>
                                   : outputs_of_block<128>;
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * blocks; at++) {
        int64_t choice = at / blocks, first = at % blocks * block, row = row_step ? choice : 0;
        int64_t matrix = chosen ? chosen[choice] : choice;
        multiply(out + choice * outputs + first, wide.data() + row * inputs, rows + row * row_step,
                 codes + (matrix * outputs + first) * inputs / 2,
                 scales + 2 * (matrix * outputs * (inputs / group) + first), 2 * outputs, inputs, group);
    }
}

// Attention of one token to a cache of records: codes of a latent, a float32 scale for each tile of it, and a rotated key in
// bfloat16. A record is one key for all heads, whose latent is also the value. Shares of the keys run side by side, each with a
// running softmax; in a share some keys at a time are decoded, which then stay in the first-level cache for every head.

enum Format : int64_t { FP8, INT8, INT4 };  // as in CACHE_FORMATS

static const int64_t SHARE = 256, KEYS = 8;

static inline float fp8_value(uint8_t code) {  // s eeee mmm lies in a float as it is; the exponent's bias is 120 larger there
    uint32_t bits = uint32_t(int8_t(code)) << 20 & 0x87f00000u;  // the sign also fills the bits between
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number * 0x1p120f;
}

static void decode(float* key, const uint8_t* record, int64_t format, int64_t latent, int64_t rope, int64_t tile) {
    const uint8_t *codes = record, *scales = record + (format == INT4 ? latent / 2 : latent);
    for (float* end = key + latent; key < end; key += tile, scales += sizeof(float)) {
        float scale;
        std::memcpy(&scale, scales, sizeof scale);
        if (format == FP8) {
#pragma omp simd
            for (int64_t i = 0; i < tile; i++) key[i] = fp8_value(codes[i]) * scale;
        } else if (format == INT8) {
#pragma omp simd
            for (int64_t i = 0; i < tile; i++) key[i] = int8_t(codes[i]) * scale;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < tile / 2; i++) {
                key[2 * i] = ((codes[i] & 15) - 8) * scale;
                key[2 * i + 1] = ((codes[i] >> 4) - 8) * scale;
            }
        }
        codes += format == INT4 ? tile / 2 : tile;
    }
    for (int64_t i = 0; i < rope; i++) {
        bfloat16 bits;
        std::memcpy(&bits, scales + i * sizeof bits, sizeof bits);
        key[i] = value(bits);
    }
}

static inline float exponential(float x) {  // of at most 0, to the precision of a float
    float times = std::max(x, -87.0f) * 1.44269504f, whole = std::nearbyint(times), r = (times - whole) * 0.693147181f;
    float power = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float two;
    std::memcpy(&two, &bits, sizeof two);
    return x < -87 ? 0 : power * two;
}

// Scores of two queries with four keys: eight sums at once keep the processor busy.
static void two_by_four(float* one, float* other, const float* query, const float* key, int64_t features) {
    const float *q0 = query, *q1 = q0 + features, *k0 = key, *k1 = k0 + features, *k2 = k1 + features, *k3 = k2 + features;
    float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
    for (int64_t i = 0; i < features; i++) {
        const float x = q0[i], y = q1[i];
        a0 += x * k0[i], a1 += x * k1[i], a2 += x * k2[i], a3 += x * k3[i];
        b0 += y * k0[i], b1 += y * k1[i], b2 += y * k2[i], b3 += y * k3[i];
    }
    one[0] = a0, one[1] = a1, one[2] = a2, one[3] = a3;
    other[0] = b0, other[1] = b1, other[2] = b2, other[3] = b3;
}

// Weights of some keys in place of their scores; all that was summed before is to be multiplied by the result.
static float soften(float* scores, int64_t count, float& total, float& largest) {
    const float before = largest;
    for (int64_t j = count; j < KEYS; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < KEYS; j++) largest = std::max(largest, scores[j]);
    const float base = largest == -INFINITY ? 0 : largest;  // nothing was seen yet
#pragma omp simd
    for (int64_t j = 0; j < KEYS; j++) scores[j] = exponential(scores[j] - base);
    const float shrink = exponential(before - base);
    total *= shrink;
    for (int64_t j = 0; j < KEYS; j++) total += scores[j];
    return shrink;
}

static void add_values(float* __restrict sum, float shrink, const float* weights, const float* key, int64_t latent,
                       int64_t features) {
    const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    const float w4 = weights[4], w5 = weights[5], w6 = weights[6], w7 = weights[7];
#pragma omp simd
    for (int64_t i = 0; i < latent; i++) {
        const float* k = key + i;
        sum[i] = sum[i] * shrink + w0 * k[0] + w1 * k[features] + w2 * k[2 * features] + w3 * k[3 * features] +
                 (w4 * k[4 * features] + w5 * k[5 * features] + w6 * k[6 * features] + w7 * k[7 * features]);
    }
}

static float* aligned(std::vector<float>& room, int64_t size) {  // at a line of the cache
    room.resize(size + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
}

extern "C" void attend_records(float* out, const bfloat16* queries, float scale, const uint8_t* records,
                               int64_t record_bytes, int64_t format, int64_t keys, int64_t heads, int64_t latent,
                               int64_t rope, int64_t tile, int64_t threads) {
    const int64_t features = latent + rope, shares = (keys + SHARE - 1) / SHARE;
    const int64_t even = heads + heads % 2, size = (latent + 2 + 15) / 16 * 16;  // a head's sums, total and largest score
    std::vector<float> room, sums_room;
    float *query = aligned(room, even * features), *sums = aligned(sums_room, shares * even * size);
    for (int64_t i = 0; i < heads * features; i++) query[i] = value(queries[i]) * scale;
#pragma omp parallel for num_threads(threads)
    for (int64_t share = 0; share < shares; share++) {
        float* mine = sums + share * even * size;
        for (int64_t head = 0; head < even; head++) mine[head * size + latent + 1] = -INFINITY;
        std::vector<float> own;
        float* key = aligned(own, KEYS * features);
        const int64_t end = std::min(keys, (share + 1) * SHARE);
        for (int64_t first = share * SHARE; first < end; first += KEYS) {
            const int64_t count = std::min(KEYS, end - first);
            for (int64_t j = 0; j < count; j++)
                decode(key + j * features, records + (first + j) * record_bytes, format, latent, rope, tile);
            for (int64_t head = 0; head < even; head += 2) {
                float weights[2][KEYS];
                for (int64_t j = 0; j < KEYS; j += 4)
                    two_by_four(weights[0] + j, weights[1] + j, query + head * features, key + j * features, features);
                for (int64_t h = 0; h < 2; h++) {
                    float* sum = mine + (head + h) * size;
                    const float shrink = soften(weights[h], count, sum[latent], sum[latent + 1]);
                    add_values(sum, shrink, weights[h], key, latent, features);
                }
            }
        }
    }
    for (int64_t head = 0; head < heads; head++) {
        float largest = -INFINITY, total = 0, *to = out + head * latent;
        for (int64_t share = 0; share < shares; share++)
            largest = std::max(largest, sums[(share * even + head) * size + latent + 1]);
        std::fill(to, to + latent, 0.0f);
        for (int64_t share = 0; share < shares; share++) {
            const float* sum = sums + (share * even + head) * size;
            const float weight = exponential(sum[latent + 1] - largest);
            total += weight * sum[latent];
            for (int64_t i = 0; i < latent; i++) to[i] += weight * sum[i];
        }
        for (int64_t i = 0; i < latent; i++) to[i] /= total;
    }
}
