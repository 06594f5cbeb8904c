// One token through a layer, with every number that `DeepseekV2DecoderLayer.forward` rounds to bfloat16 rounded to it, but for
// what stands between a sum and the next rounding. See products.h for the products, and attention.h for attention.

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/headeronly/util/Float8_e4m3fn.h>

typedef std::vector<bfloat16> Numbers;

static Numbers rounded(const std::vector<float>& sums) {
    Numbers numbers(sums.size());
    for (size_t i = 0; i < sums.size(); i++) numbers[i] = nearest(sums[i]);
    return numbers;
}

static Numbers numbers_of(const Tensor& tensor, int64_t count, const char* name) {
    const bool fits = tensor.scalar_type() == ScalarType::BFloat16 && tensor.numel() == count;
    require(fits, name, " has another dtype or size; wanted ", count, " features in torch.bfloat16");
    const Tensor flat = torch::stable::contiguous(tensor);
    return Numbers(data<bfloat16>(flat), data<bfloat16>(flat) + count);
}

static Tensor as_tensor(const Tensor& like, const Numbers& numbers, const std::vector<int64_t>& shape) {
    Tensor out = torch::stable::new_empty(like, shape, ScalarType::BFloat16);
    std::copy(numbers.begin(), numbers.end(), data<bfloat16>(out));
    return out;
}

// A linear map, or a stack of them, whose weight is in bfloat16 or codes.
struct Map {
    Tensor weight;
    std::optional<Tensor> scales, bias;  // of int4: with zeros
    int64_t group, block;                // of int4, else 0
    int64_t stack, outputs, inputs;

    Map(const Tensor& weight, std::optional<Tensor> scales, std::optional<Tensor> bias, int64_t group, int64_t block)
        : weight(weight), scales(scales), bias(bias), group(group), block(block) {
        const int64_t dims = weight.dim();
        require((dims == 2 || dims == 3) && weight.is_contiguous(), "a weight is no matrix, or does not lie row by row");
        stack = dims == 3 ? weight.size(0) : 1, outputs = weight.size(dims - 2), inputs = weight.size(dims - 1) * (group ? 2 : 1);
        const ScalarType wanted = group ? ScalarType::Byte : scales ? ScalarType::Char : ScalarType::BFloat16;
        require(weight.scalar_type() == wanted, "a weight has another dtype than before");
        require(!bias || (bias->scalar_type() == ScalarType::BFloat16 && bias->numel() == outputs && bias->is_contiguous()),
                "a bias has another dtype or size; wanted ", outputs, " features in torch.bfloat16");
        const int64_t per_row = group ? 2 * (inputs / group) : 1;
        require(!scales || (scales->scalar_type() == ScalarType::BFloat16 && scales->numel() == stack * outputs * per_row &&
                            scales->is_contiguous()),
                "scales have another dtype or size; wanted ", stack * outputs * per_row, " in torch.bfloat16");
        require(!group || (inputs % group == 0 && is_block(block) && outputs % block == 0), "codes are not laid out as before");
    }

    Numbers operator()(const Numbers& row) const {
        require(stack == 1, "a weight is a stack of ", stack, " matrices; wanted one");
        return times(row, true, nullptr, 1);
    }

    // Of one row for all choices, which are then `alike`, or of one for each: (choices, outputs).
    Numbers times(const Numbers& rows, bool alike, const int64_t* chosen, int64_t choices) const {
        require(int64_t(rows.size()) == (alike ? 1 : choices) * inputs, "rows do not fit; wanted ", alike ? 1 : choices, " of ",
                inputs, " features");
        const int64_t threads = torch::stable::get_num_threads();
        std::vector<float> out(choices * outputs);
        const auto multiply = [&](const auto* matrices) {
            product(out.data(), rows.data(), alike, matrices, outputs * inputs, chosen, choices, outputs, inputs, threads);
        };
        if (group)
            product(out.data(), rows.data(), alike, data<uint8_t>(weight), data<bfloat16>(*scales), group, block, chosen, choices,
                    outputs, inputs, threads);
        else if (scales)
            multiply(data<int8_t>(weight));
        else
            multiply(data<bfloat16>(weight));
        for (int64_t c = 0; c < choices && !group && scales; c++) {
            const bfloat16* scale = data<bfloat16>(*scales) + (chosen ? chosen[c] : c) * outputs;
            for (int64_t o = 0; o < outputs; o++) out[c * outputs + o] *= value(scale[o]);
        }
        Numbers numbers = rounded(out);
        for (int64_t o = 0; o < outputs && bias; o++) numbers[o] = nearest(value(numbers[o]) + value(data<bfloat16>(*bias)[o]));
        return numbers;
    }
};

// Of each map its group (-1: no scales, 0: of int8), its block, and whether it has a bias.
static std::vector<Map> maps_of(const std::vector<Tensor>& parts, const std::vector<int64_t>& layout) {
    std::vector<Map> maps;
    size_t part = 0;
    for (size_t i = 0; i < layout.size(); i += 3) {
        const Tensor& weight = parts.at(part++);
        std::optional<Tensor> scales, bias;
        if (layout[i] >= 0) scales = parts.at(part++);
        if (layout.at(i + 2)) bias = parts.at(part++);
        maps.emplace_back(weight, scales, bias, std::max<int64_t>(layout[i], 0), layout.at(i + 1));
    }
    return maps;
}

static Numbers normalised(const Numbers& x, const Tensor& weight, double eps) {
    const Numbers gains = numbers_of(weight, x.size(), "the weight of a norm");
    double squares = 0;
    for (bfloat16 number : x) squares += double(value(number)) * value(number);
    const float mean = squares / x.size(), factor = 1 / std::sqrt(double(mean) + eps);
    Numbers out(x.size());
    for (size_t i = 0; i < x.size(); i++) out[i] = nearest(value(nearest(value(x[i]) * factor)) * value(gains[i]));
    return out;
}

static Numbers sum(const Numbers& a, const Numbers& b) {
    require(a.size() == b.size(), "what is added has ", b.size(), " features; wanted ", a.size());
    Numbers out(a.size());
    for (size_t i = 0; i < a.size(); i++) out[i] = nearest(value(a[i]) + value(b[i]));
    return out;
}

// Pairs of neighbours, turned by an angle each.
static void rotate(bfloat16* to, const bfloat16* from, const float* cos, const float* sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        const float even = value(from[2 * i]), odd = value(from[2 * i + 1]);
        to[2 * i] = nearest(even * cos[i] - odd * sin[i]), to[2 * i + 1] = nearest(even * sin[i] + odd * cos[i]);
    }
}

static floats some_of(const bfloat16* numbers, int64_t count) {  // and zeros, up to LANES
    bfloat16 some[LANES] = {};
    std::memcpy(some, numbers, count * sizeof(bfloat16));
    return (floats)(__builtin_convertvector(load<halves>(some), integers) << 16);
}

static Numbers silu_times(const bfloat16* gates, const bfloat16* ups, int64_t count) {
    Numbers out(count);
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t some = std::min<int64_t>(LANES, count - first);
        const floats gate = some_of(gates + first, some), up = some_of(ups + first, some);
        const floats small = exponential(gate > 0 ? -gate : gate), activated = gate * (gate > 0 ? all(1) : small) / (1 + small);
        for (int64_t i = 0; i < some; i++) out[first + i] = nearest(value(nearest(activated[i])) * up[i]);
    }
    return out;
}

// W_UK or W_UV of every head times a row of its own: (heads, outputs).
static Numbers by_head(const Tensor& weight, const Numbers& rows) {
    const ScalarType kind = weight.scalar_type();
    require(weight.dim() == 3 && (kind == ScalarType::BFloat16 || kind == ScalarType::Float),
            "kv_b_proj has another dtype; wanted torch.bfloat16 or torch.float32");
    const int64_t heads = weight.size(0), outputs = weight.size(1), inputs = weight.size(2);
    const bool by_outputs = weight.stride(2) == 1 && weight.stride(1) == inputs;
    require(by_outputs || (weight.stride(1) == 1 && weight.stride(2) == outputs), "kv_b_proj does not lie row by row");
    std::vector<float> out(heads * outputs);
    const auto multiply = [&](const auto* matrices) {
        const auto multiply = by_outputs ? product<std::decay_t<decltype(*matrices)>> : product_by_inputs<std::decay_t<decltype(*matrices)>>;
        multiply(out.data(), rows.data(), false, matrices, weight.stride(0), nullptr, heads, outputs, inputs,
                 torch::stable::get_num_threads());
    };
    kind == ScalarType::Float ? multiply(data<float>(weight)) : multiply(data<bfloat16>(weight));
    return rounded(out);
}

// What is cached of a token, a latent and a rotated key, as the bytes of `Record.encode`.
static std::vector<uint8_t> encoded(const Numbers& token, int64_t latent, int64_t tile, Format format) {
    const float most = value(bfloat16(0x7f7f)), largest = format == FP8 ? 448 : format == INT8 ? 127 : 7;
    std::vector<uint8_t> codes(size_of(format, latent)), scales;
    for (int64_t first = 0; first < latent; first += tile) {
        std::vector<float> numbers(tile);
        float size = 0;
        for (int64_t i = 0; i < tile; i++) {
            const float x = value(token[first + i]);
            numbers[i] = x != x ? x : std::clamp(x, -most, most);
            size = x != x || size != size ? NAN : std::max(size, std::abs(numbers[i]));
        }
        const float scale = size / largest, unit = scale > 0 ? scale : 1;
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&scale);
        scales.insert(scales.end(), bytes, bytes + sizeof scale);
        for (int64_t i = 0; i < tile; i++) {
            const float number = std::clamp(numbers[i] / unit, -largest, largest);
            const int code = format == FP8 ? c10::Float8_e4m3fn(number).x : int(std::nearbyint(number));
            if (format == INT4)
                codes[(first + i) / 2] |= (code + 8) << (i % 2 * 4);
            else
                codes[first + i] = code;
        }
    }
    codes.insert(codes.end(), scales.begin(), scales.end());
    const uint8_t* key = reinterpret_cast<const uint8_t*>(&token[latent]);
    codes.insert(codes.end(), key, key + (token.size() - latent) * sizeof(bfloat16));
    return codes;
}

// The gate: `MoEGate.forward` of one token.

struct Choice {
    std::vector<int64_t> experts;
    std::vector<float> weights;
};

// The places of the largest, best first, as `torch.topk` finds them on CPUs: also which of equal ones. NaN is the largest.
static std::vector<int64_t> largest(const std::vector<float>& numbers, int64_t count) {
    std::vector<std::pair<float, int64_t>> queue;
    for (float number : numbers) queue.emplace_back(number, queue.size());
    const auto better = [](const auto& a, const auto& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    const auto end = queue.begin() + count;
    if (count * 64 <= int64_t(queue.size())) {
        std::partial_sort(queue.begin(), end, queue.end(), better);
    } else {
        std::nth_element(queue.begin(), end - 1, queue.end(), better);
        std::sort(queue.begin(), end - 1, better);
    }
    std::vector<int64_t> places;
    for (auto one = queue.begin(); one < end; one++) places.push_back(one->second);
    return places;
}

struct Gate {
    Tensor weight;
    std::optional<Tensor> bias;
    int64_t top_k, groups, open_groups, sigmoid, normalise;
    double factor;

    Gate(const Tensor& weight, std::optional<Tensor> bias, const std::vector<int64_t>& settings, double factor)
        : weight(weight), bias(bias), top_k(settings.at(0)), groups(settings.at(1)), open_groups(settings.at(2)),
          sigmoid(settings.at(3)), normalise(settings.at(4)), factor(factor) {
        require(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                "the gate has another dtype or does not lie row by row; wanted torch.float32");
        require(!bias || (bias->scalar_type() == ScalarType::Float && bias->numel() == experts() && bias->is_contiguous()),
                "the gate's bias has another dtype or size; wanted ", experts(), " in torch.float32");
        require(top_k >= 0 && experts() > 0 && top_k <= experts(), "top_k is ", top_k, "; wanted at most ", experts());
        const bool closes = open_groups < groups;
        require(!closes || (open_groups >= 0 && experts() % groups == 0 && experts() / groups >= (bias ? 2 : 1)),
                "the gate's groups do not fit");
    }

    int64_t experts() const { return weight.size(0); }

    Choice operator()(const Numbers& row) const {
        require(weight.size(1) == int64_t(row.size()), "the gate does not fit a token of ", row.size(), " features");
        std::vector<float> scores(experts());
        product(scores.data(), row.data(), true, data<float>(weight), 0, nullptr, 1, experts(), weight.size(1),
                torch::stable::get_num_threads());
        const float most = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (float& score : scores) sum += score = sigmoid ? 1 / (1 + std::exp(-score)) : std::exp(score - most);
        for (float& score : scores) score = sigmoid ? score : score / sum;

        std::vector<float> choose_by = scores;
        for (int64_t e = 0; e < experts() && bias; e++) choose_by[e] += data<float>(*bias)[e];
        if (open_groups < groups) {
            const int64_t size = experts() / groups;
            std::vector<float> of_groups;
            for (int64_t group = 0; group < groups; group++) {
                const std::vector<float> own(&choose_by[group * size], &choose_by[group * size] + size);
                float total = 0;
                for (int64_t e : largest(own, bias ? 2 : 1)) total += own[e];
                of_groups.push_back(total);
            }
            std::vector<bool> open(groups);
            for (int64_t group : largest(of_groups, open_groups)) open[group] = true;
            for (int64_t e = 0; e < experts(); e++)
                if (!open[e / size]) choose_by[e] = -INFINITY;
        }
        Choice choice{largest(choose_by, top_k), {}};
        float total = 0;
        for (int64_t expert : choice.experts) choice.weights.push_back(scores[expert]), total += scores[expert];
        for (float& weight : choice.weights) weight = weight / (normalise && top_k > 1 ? total + 1e-20f : 1) * float(factor);
        return choice;
    }
};

// The operators of torch

// Ask for pages of 2 MB, in which a processor finds its way faster. What is refused stays as it is.
static int64_t use_large_pages(std::vector<Tensor> tensors) {
    int64_t moved = 0;
#ifdef __linux__
    const uintptr_t page = 2 << 20;
    const int collapse = 25;  // MADV_COLLAPSE, of Linux 6.1, which older headers lack
    for (const Tensor& tensor : tensors) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(data<uint8_t>(tensor));
        const uintptr_t end = start + tensor.numel() * tensor.element_size();
        const uintptr_t first = (start + page - 1) / page * page, last = end / page * page;
        if (first >= last) continue;
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
        if (!madvise(reinterpret_cast<void*>(first), last - first, collapse)) moved += last - first;
    }
#endif
    return moved;
}

static Tensor products_of_row(Tensor x, std::vector<Tensor> parts, std::vector<int64_t> layout) {
    const Numbers out = maps_of(parts, layout).at(0)(numbers_of(x, x.numel(), "the token"));
    return as_tensor(x, out, {1, int64_t(out.size())});
}

// The token after attention in the absorbed form, and the same normalised. What is cached of it, as it is or as a record, is
// written to the last of the keys. `norms` are the layer's two, that of latents and that of queries, if they are compressed;
// `numbers` their epsilons, and the scale of the softmax. Of as many maps, one more makes the output.
static std::tuple<Tensor, Tensor> attended(Tensor x, Tensor cos, Tensor sin, Tensor keys, int64_t format, int64_t tile, Tensor w_uk,
                                           Tensor w_uv, std::vector<Tensor> norms, std::vector<double> numbers,
                                           std::vector<Tensor> parts, std::vector<int64_t> layout) {
    const int64_t heads = w_uk.size(0), nope = w_uk.size(1), latent = w_uk.size(2), rope = 2 * cos.numel();
    const int64_t threads = torch::stable::get_num_threads();
    const Sizes sizes{latent, rope, tile};
    const std::vector<Map> maps = maps_of(parts, layout);
    const Keys cached = checked_keys(keys, sizes, format);
    require(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float && sin.numel() == cos.numel() &&
                cos.is_contiguous() && sin.is_contiguous(),
            "position_embeddings have another dtype or size; wanted cosines and sines in torch.float32");
    require(w_uv.size(0) == heads && w_uv.size(2) == latent && cached.count > 0, "kv_b_proj or the cache has another size");

    const Numbers token = numbers_of(x, x.numel(), "the token"), row = normalised(token, norms.at(0), numbers.at(0));
    Numbers query = maps.at(0)(row);
    const Numbers compressed = maps.at(1)(row);
    if (norms.size() > 3) query = maps.at(2)(normalised(query, norms[3], numbers.at(3)));
    require(int64_t(query.size()) == heads * (nope + rope), "the query has another size; wanted ", heads * (nope + rope));
    require(int64_t(compressed.size()) == latent + rope, "kv_a_proj_with_mqa has other rows; wanted ", latent + rope);

    Numbers without_position(heads * nope), queries(heads * (latent + rope));
    for (int64_t head = 0; head < heads; head++)
        std::copy_n(&query[head * (nope + rope)], nope, &without_position[head * nope]);
    const Numbers at_latents = by_head(torch::stable::transpose(w_uk, 1, 2), without_position);
    for (int64_t head = 0; head < heads; head++) {
        bfloat16* to = &queries[head * (latent + rope)];
        std::copy_n(&at_latents[head * latent], latent, to);
        rotate(to + latent, &query[head * (nope + rope) + nope], data<float>(cos), data<float>(sin), rope / 2);
    }
    Numbers key = normalised(Numbers(compressed.begin(), compressed.begin() + latent), norms.at(1), numbers.at(1));
    key.resize(latent + rope);
    rotate(&key[latent], &compressed[latent], data<float>(cos), data<float>(sin), rope / 2);
    uint8_t* place = data<uint8_t>(keys) + (cached.count - 1) * cached.step;
    if (format == BFLOAT16) {
        std::memcpy(place, key.data(), key.size() * sizeof(bfloat16));
    } else {
        const std::vector<uint8_t> record = encoded(key, latent, tile, Format(format));
        std::copy(record.begin(), record.end(), place);
    }

    Numbers mixed(heads * latent);
    attend_one(mixed.data(), queries.data(), numbers.back(), cached, heads, sizes, threads);
    const Numbers out = sum(token, maps.back()(by_head(w_uv, mixed)));
    return {as_tensor(x, out, {1, 1, int64_t(out.size())}),
            as_tensor(x, normalised(out, norms.at(2), numbers.at(2)), {1, 1, int64_t(out.size())})};
}

// The experts that the gate chooses, if there is one, and the MLP of all tokens, if there is one: added up, and to the residual.
// Of the maps two are the stacks of the experts, and three those of the MLP.
static Tensor fed_forward(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> gate, std::optional<Tensor> bias,
                          std::vector<int64_t> settings, double factor, std::vector<Tensor> parts, std::vector<int64_t> layout) {
    const std::vector<Map> maps = maps_of(parts, layout);
    const Numbers row = numbers_of(x, x.numel(), "the token");
    Numbers out;
    if (gate) {
        const Map &gates_and_ups = maps.at(0), &down = maps.at(1);
        const int64_t wide = gates_and_ups.outputs / 2;
        const Choice choice = Gate(*gate, bias, settings, factor)(row);
        const int64_t choices = choice.experts.size(), stack = std::min(gates_and_ups.stack, down.stack);
        require(gate->size(0) <= stack, "the gate chooses among ", gate->size(0), " experts; wanted at most ", stack);
        require(2 * wide == gates_and_ups.outputs, "gate_up_proj has ", gates_and_ups.outputs, " rows; wanted an even number");
        const Numbers both = gates_and_ups.times(row, true, choice.experts.data(), choices);
        Numbers between;
        for (int64_t c = 0; c < choices; c++) {
            const Numbers own = silu_times(&both[c * 2 * wide], &both[c * 2 * wide + wide], wide);
            between.insert(between.end(), own.begin(), own.end());
        }
        const Numbers of_experts = down.times(between, false, choice.experts.data(), choices);
        std::vector<float> mixed(down.outputs);
        for (int64_t c = 0; c < choices; c++)
            for (int64_t o = 0; o < down.outputs; o++) mixed[o] += value(of_experts[c * down.outputs + o]) * choice.weights[c];
        out = rounded(mixed);
    }
    if (maps.size() >= 3) {
        const Map* mlp = &maps[maps.size() - 3];
        const Numbers gates = mlp[0](row), ups = mlp[1](row);
        require(gates.size() == ups.size(), "gate_proj and up_proj have other sizes");
        const Numbers own = mlp[2](silu_times(gates.data(), ups.data(), gates.size()));
        out = out.empty() ? own : sum(out, own);
    }
    if (residual) out = sum(numbers_of(*residual, out.size(), "the residual"), out);
    return as_tensor(x, out, {1, 1, int64_t(out.size())});
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, CPU, library) {
    library.impl("use_large_pages", TORCH_BOX(&use_large_pages));
    library.impl("products_of_row", TORCH_BOX(&products_of_row));
    library.impl("attended", TORCH_BOX(&attended));
    library.impl("fed_forward", TORCH_BOX(&fed_forward));
}
