// Operators of torch for products of one row. See products.h.

struct Choices {
    std::optional<Tensor> indices;
    int64_t count;
    const int64_t* pointer() const { return indices ? data<int64_t>(*indices) : nullptr; }
};

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
    const ScalarType kind = weight.scalar_type();
    require(weight.dim() == 3 && (kind == ScalarType::BFloat16 || kind == ScalarType::Char || kind == ScalarType::Float),
            "weight does not fit; wanted a stack of matrices in torch.bfloat16, torch.int8 or torch.float32");
    const int64_t outputs = weight.size(1), inputs = weight.size(2), threads = torch::stable::get_num_threads();
    const bool by_outputs = weight.stride(2) == 1 && weight.stride(1) == inputs;
    require(by_outputs || (weight.stride(1) == 1 && weight.stride(2) == outputs),
            "weight does not fit; wanted matrices whose rows, or columns, lie one behind the other");
    const Choices choices = checked(chosen, weight.size(0));
    rows = checked_rows(rows, inputs, choices);
    Tensor out = torch::stable::new_empty(rows, {choices.count, outputs}, ScalarType::Float);
    const auto multiply = [&](const auto* matrices) {
        const auto multiply = by_outputs ? product<std::decay_t<decltype(*matrices)>> : product_by_inputs<std::decay_t<decltype(*matrices)>>;
        multiply(data<float>(out), data<bfloat16>(rows), rows.size(0) == 1, matrices, weight.stride(0), choices.pointer(),
                 choices.count, outputs, inputs, threads);
    };
    if (kind == ScalarType::Char) multiply(data<int8_t>(weight));
    if (kind == ScalarType::BFloat16) multiply(data<bfloat16>(weight));
    if (kind == ScalarType::Float) multiply(data<float>(weight));
    return out;
}

static Tensor row_products_of_int4(Tensor rows, Tensor codes, std::optional<Tensor> chosen, Tensor scales_and_zeros,
                                   int64_t group, int64_t block) {
    const int64_t stack = codes.size(0), outputs = codes.size(1), inputs = 2 * codes.size(2);
    require(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && scales_and_zeros.is_contiguous() &&
                scales_and_zeros.scalar_type() == ScalarType::BFloat16 && group > 0 && inputs % group == 0 &&
                scales_and_zeros.numel() == stack * outputs * (inputs / group) * 2 && is_block(block) && outputs % block == 0,
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
