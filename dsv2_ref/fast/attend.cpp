// Attention of one token to a cache, as an operator of torch. See attention.h.

static Tensor attend_to_keys(Tensor query, Tensor keys, int64_t latent, double scale, int64_t format, int64_t tile) {
    require(query.dim() == 3 && keys.dim() == 3 && keys.size(0) == query.size(0) && query.size(2) >= latent &&
                query.scalar_type() == ScalarType::BFloat16,
            "query or keys do not fit; wanted (batch, heads, features) in torch.bfloat16 and (batch, kv_seq, stored)");
    query = torch::stable::contiguous(query);
    const int64_t batch = query.size(0), heads = query.size(1);
    const Sizes sizes{latent, query.size(2) - latent, tile};
    const Keys given = checked_keys(keys, sizes, format);
    Tensor out = torch::stable::new_empty(query, {batch, heads, latent});
    for (int64_t b = 0; b < batch; b++)
        attend_one(data<bfloat16>(out) + b * heads * latent, data<bfloat16>(query) + b * heads * query.size(2), scale,
                   given.of_sequence(b), heads, sizes, torch::stable::get_num_threads());
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, CPU, library) { library.impl("attend_to_keys", TORCH_BOX(&attend_to_keys)); }
