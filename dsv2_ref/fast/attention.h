// Attention of one token to a cache: for each head, the latents of all keys, weighted by the softmax of its scores.
//
// A key is a latent and a rotated key in bfloat16, or a record: codes of the latent, a float32 scale for each tile of it, and
// the rotated key. One key serves all heads, and its latent is also the value. Each thread takes its share of the keys, decodes
// some at a time, which then stay in the processor's cache for every head, and keeps a running softmax. Sums are in float32.

const int KEYS = 32;  // at a time

// LANES pairs of numbers, which are multiplied and added two at a time: in bfloat16 where the processor does so, rounded.
#ifdef __AVX512BF16__
typedef integers pairs;  // the first in the lower half

static inline pairs pair_up(floats first, floats second) {
    const pairs places = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                          0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    return (pairs)_mm512_permutexvar_epi16((__m512i)places, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

static inline pairs pair_up_first(pairs a, pairs b) { return (a & 0xffff) | b << 16; }
static inline pairs pair_up_second(pairs a, pairs b) { return (a >> 16 & 0xffff) | (b & 0xffff0000); }
static inline pairs everywhere(const pairs& x, int lane) { return x[lane] - pairs{}; }

static inline floats add_products(floats sum, pairs a, pairs b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
struct pairs {
    floats first, second;
};

static inline pairs pair_up(floats first, floats second) { return {first, second}; }
static inline pairs pair_up_first(pairs a, pairs b) { return {a.first, b.first}; }
static inline pairs pair_up_second(pairs a, pairs b) { return {a.second, b.second}; }
static inline pairs everywhere(const pairs& x, int lane) { return {all(x.first[lane]), all(x.second[lane])}; }

static inline floats add_products(floats sum, pairs a, pairs b) { return sum + a.first * b.first + a.second * b.second; }
#endif

template <Format format>
static inline pairs decode(const uint8_t* codes, float scale) {  // 2 * LANES of them
    if (format == INT4) {
        const integers both = __builtin_convertvector(__builtin_convertvector(load<bytes>(codes), halves), integers);
        return pair_up(numbers((both & 15) - 8) * scale, numbers((both >> 4) - 8) * scale);
    }
    if (format == BFLOAT16) {
        const integers both = load<integers>(codes);
#ifdef __AVX512BF16__
        return both;
#else
        return {(floats)(both << 16), (floats)(both & 0xffff0000)};
#endif
    }
    const integers both = __builtin_convertvector(load<halves>(codes), integers);
    if (format == INT8) return pair_up(numbers(both << 24 >> 24) * scale, numbers(both << 16 >> 24) * scale);
    // s eeee mmm lies in a float as it is; the exponent's bias is 120 larger there. The sign also fills the bits between.
    const int mask = 0x87f00000;
    const floats first = (floats)((both << 24 >> 4) & mask), second = (floats)((both << 16 >> 4) & mask);
    return pair_up(first * 0x1p120f * scale, second * 0x1p120f * scale);
}

template <Format format>
static pairs* decode(pairs* to, const uint8_t* codes, int64_t count, float scale) {
    const int AT_ONCE = 2 * LANES;
    for (; count >= AT_ONCE; count -= AT_ONCE, codes += size_of(format, AT_ONCE)) *to++ = decode<format>(codes, scale);
    if (count) {
        uint8_t last[size_of(format, AT_ONCE)];
        std::memset(last, format == INT4 ? 0x88 : 0, sizeof last);  // zeros behind them
        std::memcpy(last, codes, size_of(format, count));
        *to++ = decode<format>(last, scale);
    }
    return to;
}

struct Sizes {
    int64_t latent, rope, tile;
    static int64_t registers(int64_t features) { return (features + 2 * LANES - 1) / (2 * LANES); }
    int64_t value() const { return registers(latent); }
    int64_t key() const { return value() + registers(rope); }
};

// What is cached of one sequence.
struct Keys {
    Format format;
    const uint8_t* first;
    int64_t step, count, step_of_sequences;  // in bytes
    Keys of_sequence(int64_t b) const { return {format, first + b * step_of_sequences, step, count, step_of_sequences}; }
};

static Keys checked_keys(const Tensor& keys, const Sizes& sizes, int64_t format) {
    require(format >= FP8 && format <= BFLOAT16, "format is ", format, "; wanted a number from 0 to ", int64_t(BFLOAT16));
    const bool plain = format == BFLOAT16;
    require(sizes.tile == sizes.latent || (sizes.tile > 0 && sizes.latent % sizes.tile == 0 && sizes.tile % (2 * LANES) == 0),
            "tile is ", sizes.tile, "; wanted ", sizes.latent, " or a divisor of it that is a multiple of ", 2 * LANES);
    const int64_t scales = plain ? 0 : sizes.latent / sizes.tile * 4, size = plain ? 2 : 1;
    const int64_t stored = (size_of(Format(format), sizes.latent) + scales + sizes.rope * 2) / size;
    require(keys.dim() == 3 && keys.stride(2) == 1 && keys.size(2) == stored &&
                keys.scalar_type() == (plain ? ScalarType::BFloat16 : ScalarType::Byte),
            "keys do not fit; wanted ", stored, plain ? " features in torch.bfloat16" : " bytes", " of each");
    return {Format(format), data<uint8_t>(keys), keys.stride(1) * size, keys.size(1), keys.stride(0) * size};
}

template <Format format>
static void decode(pairs* key, const uint8_t* record, const Sizes& sizes) {
    const uint8_t* scales = record + size_of(format, sizes.latent);
    for (int64_t first = 0; first < sizes.latent; first += sizes.tile) {  // tiles are whole registers, or there is but one
        float scale = 1;
        if (format != BFLOAT16) std::memcpy(&scale, scales, sizeof scale), scales += sizeof scale;
        key = decode<format>(key, record + size_of(format, first), sizes.tile, scale);
    }
    decode<BFLOAT16>(key, scales, sizes.rope, 1);
}

// What one thread has summed for LANES heads over its keys so far: the weights, the largest score, and for every register of a
// value and every head the features in even and those in odd places.
struct Sums {
    floats total, largest;
    std::vector<floats> values;
};

// Scores of LANES heads, which lie side by side, with some keys.
static void multiply(floats* scores, const pairs* query, const pairs* keys, const Sizes& sizes) {
    const int AT_ONCE = 8;
    for (int first = 0; first < KEYS; first += AT_ONCE, keys += AT_ONCE * sizes.key()) {
        floats sum[AT_ONCE] = {};
        for (int64_t i = 0; i < sizes.key(); i++)
            for (int lane = 0; lane < LANES; lane++)
                for (int j = 0; j < AT_ONCE; j++)
                    sum[j] = add_products(sum[j], query[i * LANES + lane], everywhere(keys[j * sizes.key() + i], lane));
        std::copy(sum, sum + AT_ONCE, scores + first);
    }
}

// Weights of some keys, two and two, from their scores. All that was summed before is to be multiplied by the result.
static floats soften(pairs* weights, floats* scores, int64_t count, float scale, Sums& sums) {
    const floats before = sums.largest;
    for (int64_t j = 0; j < KEYS; j++) scores[j] = j < count ? scores[j] * scale : all(-INFINITY);
    for (int64_t j = 0; j < KEYS; j++) sums.largest = larger(scores[j], sums.largest);
    const floats base = sums.largest == -INFINITY ? all(0) : sums.largest;  // nothing was seen yet
    const floats shrink = exponential(before - base);
    sums.total *= shrink;
    for (int64_t j = 0; j < KEYS; j += 2) {
        const floats first = exponential(scores[j] - base), second = exponential(scores[j + 1] - base);
        sums.total += first + second;
        weights[j / 2] = pair_up(first, second);
    }
    return shrink;
}

static void add_values(floats* sums, floats shrink, const pairs* weights, const pairs* keys, const Sizes& sizes) {
    const int HEADS = SUMS / 2;
    for (int64_t i = 0; i < sizes.value(); i++) {
        pairs even[KEYS / 2], odd[KEYS / 2];  // of two keys, one feature each
        for (int j = 0; j < KEYS / 2; j++) {
            const pairs &a = keys[2 * j * sizes.key() + i], &b = keys[(2 * j + 1) * sizes.key() + i];
            even[j] = pair_up_first(a, b), odd[j] = pair_up_second(a, b);
        }
        for (int head = 0; head < LANES; head += HEADS, sums += SUMS) {
            floats sum[SUMS];
            for (int s = 0; s < SUMS; s++) sum[s] = sums[s] * shrink[head + s / 2];
            for (int j = 0; j < KEYS / 2; j++)
                for (int s = 0; s < SUMS; s++)
                    sum[s] = add_products(sum[s], everywhere(weights[j], head + s / 2), s % 2 ? odd[j] : even[j]);
            std::copy(sum, sum + SUMS, sums);
        }
    }
}

template <Format format>
static void attend(std::vector<Sums>& sums, const pairs* query, float scale, const uint8_t* cache, int64_t step, int64_t count,
                   const Sizes& sizes) {
    std::vector<pairs> keys(KEYS * sizes.key());
    for (int64_t first = 0; first < count; first += KEYS) {
        const int64_t some = std::min<int64_t>(KEYS, count - first);
        if (some < KEYS) std::fill(keys.begin() + some * sizes.key(), keys.end(), pairs{});
        for (int64_t j = 0; j < some; j++) decode<format>(&keys[j * sizes.key()], cache + (first + j) * step, sizes);
        for (size_t group = 0; group < sums.size(); group++) {
            floats scores[KEYS];
            pairs weights[KEYS / 2];
            multiply(scores, query + group * sizes.key() * LANES, keys.data(), sizes);
            const floats shrink = soften(weights, scores, some, scale, sums[group]);
            add_values(sums[group].values.data(), shrink, weights, keys.data(), sizes);
        }
    }
}

// The query of LANES heads side by side: in lane h of pair i, features 2 i and 2 i + 1 of head h.
static std::vector<pairs> side_by_side(const bfloat16* queries, int64_t heads, const Sizes& sizes) {
    const int64_t features = sizes.latent + sizes.rope;
    std::vector<pairs> own(sizes.key()), out((heads + LANES - 1) / LANES * sizes.key() * LANES);
    for (int64_t head = 0; head < heads; head++) {
        const uint8_t* query = reinterpret_cast<const uint8_t*>(queries + head * features);
        decode<BFLOAT16>(own.data(), query, {sizes.latent, sizes.rope, sizes.latent});
        const word* from = reinterpret_cast<const word*>(own.data());
        word* to = reinterpret_cast<word*>(&out[head / LANES * sizes.key() * LANES]);
        const int64_t numbers = sizeof(pairs) / sizeof(word);  // in each of LANES pairs, which lie together or LANES apart
        for (int64_t i = 0; i < sizes.key() * numbers; i++)
            to[(i / numbers * LANES + i % LANES) * numbers + i % numbers / LANES * LANES + head % LANES] = from[i];
    }
    return out;
}

static void attend_one(bfloat16* out, const bfloat16* queries, float scale, const Keys& keys, int64_t heads, const Sizes& sizes,
                       int64_t threads) {
    const int64_t groups = (heads + LANES - 1) / LANES, share = (keys.count + threads - 1) / threads;
    const std::vector<pairs> query = side_by_side(queries, heads, sizes);
    const Sums nothing{all(0), all(-INFINITY), std::vector<floats>(sizes.value() * LANES * 2)};
    std::vector<std::vector<Sums>> sums(threads);
    const auto attend_to = keys.format == FP8    ? attend<FP8>
                           : keys.format == INT8 ? attend<INT8>
                           : keys.format == INT4 ? attend<INT4>
                                                 : attend<BFLOAT16>;
#pragma omp parallel for num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t first = std::min(keys.count, thread * share), count = std::min(keys.count - first, share);
        sums[thread].assign(groups, nothing);
        attend_to(sums[thread], query.data(), scale, keys.first + first * keys.step, keys.step, count, sizes);
    }
    for (int64_t head = 0; head < heads; head++) {
        const int64_t group = head / LANES, lane = head % LANES;
        floats largest = all(-INFINITY), total = all(0);
        for (const auto& own : sums) largest = larger(own[group].largest, largest);
        std::vector<floats> mixed(sizes.value() * 2);
        for (const auto& own : sums) {
            const floats weight = exponential(own[group].largest - largest);
            total += weight * own[group].total;
            for (int64_t i = 0; i < sizes.value() * 2; i++)
                mixed[i] += weight[lane] * own[group].values[(i / 2 * LANES + lane) * 2 + i % 2];
        }
        for (int64_t i = 0; i < sizes.latent; i++)
            out[head * sizes.latent + i] = nearest(mixed[i / (2 * LANES) * 2 + i % 2][i / 2 % LANES] / total[lane]);
    }
}
