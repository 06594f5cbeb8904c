// Products of one row with matrices in bfloat16, int8 or int4, which read each weight once and as it lies:
//     out[c, o] = sum over i of weight[chosen[c], o, i] * rows[c, i]
// Sums are in float32. All choices may share one row, `alike`. `matrix_step` is the distance in elements from one matrix of a
// stack to the next. Without `chosen`, choice c takes matrix c.

static inline float value(bfloat16 bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

static inline float value(int8_t code) { return code; }

static std::vector<float> widened(const bfloat16* numbers, int64_t count) {
    std::vector<float> wide(count);
    for (int64_t i = 0; i < count; i++) wide[i] = value(numbers[i]);
    return wide;
}

template <typename Weight>
static void product(float* out, const bfloat16* rows, bool alike, const Weight* weight, int64_t matrix_step,
                    const int64_t* chosen, int64_t choices, int64_t outputs, int64_t inputs, int64_t threads) {
    const std::vector<float> wide = widened(rows, (alike ? 1 : choices) * inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t at = 0; at < choices * outputs; at++) {
        int64_t choice = at / outputs, output = at % outputs;
        const Weight* w = weight + (chosen ? chosen[choice] : choice) * matrix_step + output * inputs;
        const float* x = wide.data() + (alike ? 0 : choice * inputs);
        float sum = 0;
#pragma omp simd reduction(+ : sum) simdlen(32)
        for (int64_t i = 0; i < inputs; i++) sum += value(w[i]) * x[i];
        out[at] = sum;
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

// The operators of torch

namespace {
struct Choices {
    std::optional<Tensor> indices;
    int64_t count;
    const int64_t* pointer() const { return indices ? data<int64_t>(*indices) : nullptr; }
};
}  // namespace

static Choices checked(const std::optional<Tensor>& chosen, int64_t stack) {
    if (!chosen) return {std::nullopt, stack};
    const Tensor indices = torch::stable::contiguous(torch::stable::to(*chosen, ScalarType::Long));
    const int64_t count = indices.numel(), *index = data<int64_t>(indices);
    if (std::any_of(index, index + count, [stack](int64_t i) { return i < 0 || i >= stack; })) {
        std::ostringstream list;
        for (int64_t c = 0; c < count; c++) list << (c ? ", " : "") << index[c];
        require(false, "chosen is [", list.str(), "]; wanted indices from 0 to ", stack - 1);
    }
    return {indices, count};
}

static Tensor checked_rows(const Tensor& rows, int64_t inputs, const Choices& choices) {
    const bool fits = rows.dim() == 2 && rows.scalar_type() == ScalarType::BFloat16 && rows.size(1) == inputs;
    require(fits && (rows.size(0) == 1 || rows.size(0) == choices.count),
            "rows do not fit; wanted one, or one for each choice, in torch.bfloat16, of ", inputs, " features");
    return torch::stable::contiguous(rows);
}

static Tensor row_products(Tensor rows, Tensor weight, std::optional<Tensor> chosen) {
    const bool codes = weight.scalar_type() == ScalarType::Char;
    require(weight.dim() == 3 && (codes || weight.scalar_type() == ScalarType::BFloat16) && weight.stride(2) == 1 &&
                weight.stride(1) == weight.size(2),
            "weight does not fit; wanted matrices in torch.bfloat16 or torch.int8 whose rows lie one behind the other");
    const int64_t outputs = weight.size(1), inputs = weight.size(2), threads = torch::stable::get_num_threads();
    const Choices choices = checked(chosen, weight.size(0));
    rows = checked_rows(rows, inputs, choices);
    const bool alike = rows.size(0) == 1;
    Tensor out = torch::stable::new_empty(rows, {choices.count, outputs}, ScalarType::Float);
    float* to = data<float>(out);
    const auto multiply = [&](const auto* matrices) {
        product(to, data<bfloat16>(rows), alike, matrices, weight.stride(0), choices.pointer(), choices.count, outputs, inputs,
                threads);
    };
    codes ? multiply(data<int8_t>(weight)) : multiply(data<bfloat16>(weight));
    return out;
}

static Tensor row_products_of_int4(Tensor rows, Tensor codes, std::optional<Tensor> chosen, Tensor scales_and_zeros,
                                   int64_t group, int64_t block) {
    const int64_t stack = codes.size(0), outputs = codes.size(1), inputs = 2 * codes.size(2);
    require(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && scales_and_zeros.is_contiguous() &&
                scales_and_zeros.scalar_type() == ScalarType::BFloat16 && group > 0 && inputs % group == 0 &&
                scales_and_zeros.numel() == stack * outputs * (inputs / group) * 2 && block > 0 && outputs % block == 0,
            "codes do not fit; wanted them, and scales, as pack_weights lays them out");
    const Choices choices = checked(chosen, stack);
    rows = checked_rows(rows, inputs, choices);
    Tensor out = torch::stable::new_empty(rows, {choices.count, outputs}, ScalarType::Float);
    product(data<float>(out), data<bfloat16>(rows), rows.size(0) == 1, data<uint8_t>(codes), data<bfloat16>(scales_and_zeros),
            group, block, choices.pointer(), choices.count, outputs, inputs, torch::stable::get_num_threads());
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, CPU, library) {
    library.impl("row_products", TORCH_BOX(&row_products));
    library.impl("row_products_of_int4", TORCH_BOX(&row_products_of_int4));
}
