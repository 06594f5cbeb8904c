// What figures and the calculator share: machines and models.
"use strict";

// Peaks are for dense products in bfloat16 (a data sheet's number with sparsity, halved), in FLOPs per second; then bytes
// per second and bytes of memory, all from the source. The list is JSON, for tools/figures/roofline.py.
const MACHINES = [
	{
		"name": "H100 (SXM)", "peak": 989e12, "bandwidth": 3.35e12, "memory": 80e9,
		"source": "data sheet, 2023", "url": "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
	},
	{
		"name": "H200 (SXM)", "peak": 989e12, "bandwidth": 4.8e12, "memory": 141e9,
		"source": "data sheet, 2024", "url": "https://www.nvidia.com/en-us/data-center/h200/"
	},
	{
		"name": "A100 (80 GB SXM)", "peak": 312e12, "bandwidth": 2.039e12, "memory": 80e9,
		"source": "data sheet, 2021", "url": "https://www.nvidia.com/en-us/data-center/a100/"
	},
	{
		"name": "MI300X", "peak": 1307.4e12, "bandwidth": 5.3e12, "memory": 192e9,
		"source": "data sheet, 2023", "url": "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
	},
	{
		"name": "RTX 4090", "peak": 165.2e12, "bandwidth": 1.008e12, "memory": 24e9,
		"source": "Ada architecture, 2022", "note": "sums in float32",
		"url": "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
	},
	{
		"name": "laptop CPU", "peak": 844.8e9, "bandwidth": 89.6e9, "memory": 32e9,
		"source": "AMD Ryzen 7 7840U, 2023", "note": "8 cores at 3.3 GHz, 32 float32 operations per cycle each, two channels of DDR5-5600; 32 GB are assumed",
		"url": "https://www.amd.com/en/products/processors/laptop/ryzen/7000-series/amd-ryzen-7-7840u.html"
	}
];

// The presets of DeepseekV2Config, as far as they have a size; a test compares them.
const MODELS = (() => {
	const shared = {
		use_mla: true, attention_bias: false, tie_word_embeddings: false, vocab_size: 102400n, num_key_value_heads: null,
		q_lora_rank: 1536n, kv_lora_rank: 512n, qk_nope_head_dim: 128n, qk_rope_head_dim: 64n, v_head_dim: 128n, n_shared_experts: 2n,
		moe_intermediate_size: 1408n, first_k_dense_replace: 1n, moe_layer_freq: 1n, num_experts_per_tok: 6n,
		topk_method: "greedy", n_group: 1n, topk_group: 1n,
	};
	return {
		deepseek_v2: {
			...shared, hidden_size: 5120n, num_hidden_layers: 60n, intermediate_size: 12288n, num_attention_heads: 128n,
			n_routed_experts: 160n, moe_intermediate_size: 1536n, topk_method: "group_limited_greedy", n_group: 8n, topk_group: 3n,
		},
		deepseek_v2_lite: {
			...shared, hidden_size: 2048n, num_hidden_layers: 27n, intermediate_size: 10944n, num_attention_heads: 16n,
			q_lora_rank: null, n_routed_experts: 64n,
		},
		deepseek_v3: {
			...shared, vocab_size: 129280n, hidden_size: 7168n, num_hidden_layers: 61n, intermediate_size: 18432n,
			num_attention_heads: 128n, n_shared_experts: 1n, n_routed_experts: 256n, num_experts_per_tok: 8n,
			moe_intermediate_size: 2048n, first_k_dense_replace: 3n, topk_method: "noaux_tc", n_group: 8n, topk_group: 4n,
		},
		moonlight: {
			...shared, vocab_size: 163840n, hidden_size: 2048n, num_hidden_layers: 27n, intermediate_size: 11264n,
			num_attention_heads: 16n, q_lora_rank: null, n_routed_experts: 64n, topk_method: "noaux_tc",
		},
		deepseek_ocr: {
			...shared, use_mla: false, hidden_size: 1280n, num_hidden_layers: 12n, vocab_size: 129280n,
			intermediate_size: 6848n, num_attention_heads: 10n, q_lora_rank: null, kv_lora_rank: null, qk_nope_head_dim: 0n,
			qk_rope_head_dim: 0n, v_head_dim: 0n, n_routed_experts: 64n, moe_intermediate_size: 896n,
		},
		card: {
			...shared, hidden_size: 1280n, num_hidden_layers: 40n, intermediate_size: 3584n, num_attention_heads: 128n,
			n_routed_experts: 160n, num_experts_per_tok: 2n,
		},
		tiny: {
			...shared, hidden_size: 64n, num_hidden_layers: 4n, vocab_size: 256n, intermediate_size: 128n,
			num_attention_heads: 4n, q_lora_rank: 48n, kv_lora_rank: 32n, qk_nope_head_dim: 16n, qk_rope_head_dim: 8n,
			v_head_dim: 16n, n_routed_experts: 8n, num_experts_per_tok: 2n, moe_intermediate_size: 32n,
		},
	};
})();

const MODEL_NAMES = {
	deepseek_v2: "DeepSeek-V2", deepseek_v2_lite: "DeepSeek-V2-Lite", deepseek_v3: "DeepSeek-V3", moonlight: "Moonlight-16B-A3B",
	deepseek_ocr: "DeepSeek-OCR, decoder", card: "the worked example (the card)", tiny: "tiny",
};

// Three digits from nanoseconds on; whole seconds from a thousand.
function inSeconds(seconds) {
	const rounded = Number(seconds.toPrecision(3));
	if (rounded >= 1e9) return "over a billion s";
	if (rounded >= 1e3) return `${Math.round(seconds).toLocaleString("en-US")} s`;
	const [size, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]].find(([least]) => rounded >= least) ?? [1e-9, "ns"];
	return `${(rounded / size).toPrecision(3)} ${unit}`;
}
