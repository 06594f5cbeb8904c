// Products of one row with matrices in bfloat16, int8 or int4, which read each weight once and as it lies:
//     out[c, o] = sum over i of weight[chosen[c], o, i] * rows[c, i]
// Sums are in float32. All choices may share one row, `alike`. `matrix_step` is the distance in elements from one matrix of a
// stack to the next. Without `chosen`, choice c takes matrix c.

static inline float value(int8_t code) { return code; }

static inline float value(float number) { return number; }

static std::vector<float> widened(const bfloat16* numbers, int64_t count) {
    std::vector<float> wide(count);
    for (int64_t i = 0; i < count; i++) wide[i] = value(numbers[i]);
    return wide;
}

// One row, ready to be multiplied by rows of weights.
template <typename Weight>
struct Row {
    std::vector<float> numbers;
    Row(const bfloat16* row, int64_t inputs) : numbers(widened(row, inputs)) {}
    float times(const Weight* weight, int64_t inputs) const {
        const float* x = numbers.data();
        float sum = 0;
#pragma omp simd reduction(+ : sum) simdlen(32)
        for (int64_t i = 0; i < inputs; i++) sum += value(weight[i]) * x[i];
        return sum;
    }
};

#ifdef __AVX512BF16__
// A code is its lower seven bits, less 128 where its sign is set. Behind the first bits of 128 in bfloat16 they are 128 more, and
// the sign stands for 128 more: a code is the difference of two numbers in bfloat16, whose bits are made in one operation each.
template <>
struct Row<int8_t> {
    static const int64_t AT_ONCE = 64, SUMS = 4, STEP = SUMS / 2 * AT_ONCE;
    std::vector<bfloat16> numbers;  // of each 64, those in even places before those in odd ones; zeros behind the last
    Row(const bfloat16* row, int64_t inputs) : numbers((inputs + STEP - 1) / STEP * STEP) {
        for (int64_t i = 0; i < inputs; i++) numbers[i / AT_ONCE * AT_ONCE + i % 2 * AT_ONCE / 2 + i % AT_ONCE / 2] = row[i];
    }
    static __m512 add_products(__m512 sum, __m512i codes, const bfloat16* x) {  // of the lower bytes of 16 bits
        const __m512bh numbers = (__m512bh)_mm512_loadu_si512(x);
        const int and_or = 0xea;  // the first and the second, or the third
        const __m512i low = _mm512_set1_epi16(0x7f), sign = _mm512_set1_epi16(0x80);
        const __m512i more = _mm512_ternarylogic_epi32(codes, low, _mm512_set1_epi16(0x4300), and_or);
        const __m512i less = _mm512_ternarylogic_epi32(codes, sign, _mm512_set1_epi16(int16_t(0xc300)), and_or);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)more, numbers);
        return _mm512_dpbf16_ps(sum, (__m512bh)less, numbers);
    }
    static void add_products(__m512* sums, const int8_t* codes, const bfloat16* x) {  // of STEP codes
        for (int s = 0; s < SUMS; s += 2, codes += AT_ONCE, x += AT_ONCE) {
            const __m512i some = _mm512_loadu_si512(codes);
            sums[s] = add_products(sums[s], some, x);
            sums[s + 1] = add_products(sums[s + 1], _mm512_srli_epi16(some, 8), x + AT_ONCE / 2);
        }
    }
    float times(const int8_t* codes, int64_t inputs) const {
        __m512 sums[SUMS] = {};
        const bfloat16* x = numbers.data();
        int64_t left = inputs;
        for (; left >= STEP; left -= STEP, codes += STEP, x += STEP) add_products(sums, codes, x);
        if (left) {
            int8_t last[STEP] = {};
            std::memcpy(last, codes, left);
            add_products(sums, last, x);
        }
        return _mm512_reduce_add_ps(sums[0] + sums[1] + sums[2] + sums[3]);
    }
};
#endif

template <typename Weight>
static void product(float* out, const bfloat16* rows, bool alike, const Weight* weight, int64_t matrix_step,
                    const int64_t* chosen, int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    std::vector<Row<Weight>> ready;
    for (int64_t row = 0; row < (alike ? 1 : choices); row++) ready.emplace_back(rows + row * inputs, inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * outputs; at++) {
        int64_t choice = at / outputs, output = at % outputs;
        const Weight* w = weight + (chosen ? chosen[choice] : choice) * matrix_step + output * inputs;
        out[at] = ready[alike ? 0 : choice].times(w, inputs);
    }
}

// The same where a matrix lies input by input: its columns are added up, some at a time.
template <typename Weight>
static void product_by_inputs(float* out, const bfloat16* rows, bool alike, const Weight* weight, int64_t matrix_step,
                              const int64_t* chosen, int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    const int64_t SOME = 512, parts = (outputs + SOME - 1) / SOME;
    const std::vector<float> wide = widened(rows, (alike ? 1 : choices) * inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * parts; at++) {
        int64_t choice = at / parts, first = at % parts * SOME, count = std::min(SOME, outputs - first);
        const Weight* w = weight + (chosen ? chosen[choice] : choice) * matrix_step + first;
        const float* x = wide.data() + (alike ? 0 : choice * inputs);
        float* to = out + choice * outputs + first;
        std::fill(to, to + count, 0.f);
        for (int64_t i = 0; i < inputs; i++, w += outputs) {
#pragma omp simd
            for (int64_t o = 0; o < count; o++) to[o] += value(w[o]) * x[i];
        }
    }
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
            _mm_prefetch(reinterpret_cast<const char*>(codes) + 512, _MM_HINT_T0);  // 4 to 7 % faster than without
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

static bool is_block(int64_t block) { return block == 16 || block == 32 || block == 64 || block == 128; }

static void product(float* out, const bfloat16* rows, bool alike, const uint8_t* codes, const bfloat16* scales, int64_t group,
                    int64_t block, const int64_t* chosen, int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    const int64_t blocks = outputs / block;
    const std::vector<float> wide = widened(rows, (alike ? 1 : choices) * inputs);
    auto* multiply = block == 16   ? outputs_of_block<16>
                     : block == 32 ? outputs_of_block<32>
                     : block == 64 ? outputs_of_block<64>
                                   : outputs_of_block<128>;
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * blocks; at++) {
        int64_t choice = at / blocks, first = at % blocks * block, row = alike ? 0 : choice;
        int64_t matrix = chosen ? chosen[choice] : choice;
        multiply(out + choice * outputs + first, wide.data() + row * inputs, rows + row * inputs,
                 codes + (matrix * outputs + first) * inputs / 2, scales + 2 * (matrix * outputs * (inputs / group) + first),
                 2 * outputs, inputs, group);
    }
}
