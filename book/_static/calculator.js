// Parameters, cache and FLOPs of a DeepSeek-V2 model, by the rules of dsv2_ref.accounting. Integers are exact (BigInt).
// Models and machines are those of figures/data.js; published-reader.js reads the reader's own config.json.
"use strict";

(() => {
  // A model's dimensions, by what they are of: name, least value, what leaving it empty means (null: it may not be), and
  // which models have it.
  const always = () => true;
  const latent = (config) => config.use_mla;
  const mixed = (config) => config.n_routed_experts !== null;
  const grouped = (config) => mixed(config) && config.topk_method !== "greedy";
  const OF_THE_MODEL = [
    ["hidden_size", 1n, null, always],
    ["num_hidden_layers", 1n, null, always],
    ["vocab_size", 1n, null, always],
  ];
  const OF_ATTENTION = [
    ["num_attention_heads", 1n, null, always],
    ["num_key_value_heads", 1n, "one per head", (config) => !config.use_mla],
    ["q_lora_rank", 1n, "not compressed", latent],
    ["kv_lora_rank", 1n, null, latent],
    ["qk_nope_head_dim", 1n, null, latent],
    ["qk_rope_head_dim", 1n, null, latent],
    ["v_head_dim", 1n, null, latent],
  ];
  const OF_NETWORKS = [
    ["intermediate_size", 1n, null, always],
    ["n_routed_experts", 1n, "none, all dense", always],
    ["num_experts_per_tok", 1n, null, mixed],
    ["n_shared_experts", 1n, "none", mixed],
    ["moe_intermediate_size", 1n, null, mixed],
    ["first_k_dense_replace", 0n, null, mixed],
    ["moe_layer_freq", 1n, null, mixed],
  ];
  const OF_GROUPS = [
    ["n_group", 1n, null, grouped],
    ["topk_group", 1n, null, grouped],
  ];
  const DIMENSIONS = [...OF_THE_MODEL, ...OF_ATTENTION, ...OF_NETWORKS, ...OF_GROUPS];
  const SWITCHES = ["use_mla", "attention_bias", "tie_word_embeddings"];
  const METHODS = { greedy: "greedy", group_limited_greedy: "group_limited_greedy", noaux_tc: "noaux_tc" };
  const CALL = [
    ["batch", "batch: sequences", 1n],
    ["seq", "seq: new tokens of each", 1n],
    ["kv", "kv: tokens attended to", 8192n],
  ];
  const FEWER = [
    ["group", "group: weights per scale", 2n, null],
    ["kept", "kept: rows in the cache", 1n, "all"],
    ["read", "read: rows per query", 1n, "all that it sees"],
  ];
  const WEIGHTS = { "": "in the dtype", int8: "int8, a scale per row", int4: "int4, a scale per group", fp8: "fp8, a scale per 128 × 128" };
  const CACHES = { "": "in the dtype", fp8: "fp8, a scale per 128", int8: "int8, a scale per 128", int4: "int4, a scale per 128" };
  const CHECKPOINTING = { "": "keep all results", full: "full: run layers again", selective: "selective: choose and attend once" };
  const OPTIMIZERS = { adamw: ["AdamW", 2n], momentum: ["SGD with momentum", 1n], sgd: ["SGD", 0n] }; // and values per parameter
  const MOST = 10n ** 15n;
  const LARGEST_FILE = 1e6;
  const BYTES = { float64: 8n, float32: 4n, bfloat16: 2n, float16: 2n, int8: 1n };
  const FORMS = { auto: "the cheaper one", absorbed: "absorbed", expanded: "expanded" };

  // What is wrong with a configuration or a call: pairs of a field's name and a sentence. What could not be read is
  // undefined, and judged by nobody.
  function refusals(config, call) {
    const found = [];
    const refuse = (name, value, wanted) => found.push([name, `${name} is ${value}; wanted ${wanted}`]);
    const known = (...values) => !values.includes(undefined);
    const { num_attention_heads: heads, n_routed_experts: experts, num_key_value_heads: shared } = config;
    if (config.use_mla) {
      const rope = config.qk_rope_head_dim;
      if (known(rope) && rope % 2n) refuse("qk_rope_head_dim", rope, "an even number");
    } else {
      const hidden = config.hidden_size;
      if (known(hidden, heads) && hidden % (2n * heads))
        refuse("hidden_size", hidden, `a multiple of twice num_attention_heads=${heads}, for heads that rotate in pairs`);
      if (known(shared, heads) && shared !== null && heads % shared) refuse("num_key_value_heads", shared, `a divisor of ${heads}`);
    }
    if (mixed(config) && known(experts)) {
      const { n_group: groups, topk_group: kept, num_experts_per_tok: chosen } = config;
      let [allowed, wanted] = [experts, `at most n_routed_experts=${experts}`];
      if (grouped(config) && known(groups, kept)) {
        if (experts % groups) refuse("n_group", groups, `a divisor of n_routed_experts=${experts}`);
        else if (kept <= groups) {
          allowed = (kept * experts) / groups;
          wanted = `at most ${allowed}, the experts in topk_group=${kept} of n_group=${groups} groups`;
        }
        if (kept > groups) refuse("topk_group", kept, `at most n_group=${groups}`);
        if (config.topk_method === "noaux_tc" && kept < groups && 2n * groups > experts && experts % groups === 0n)
          refuse("n_group", groups, "two experts in a group, whose two best judge it");
      }
      if (known(chosen) && chosen > allowed) refuse("num_experts_per_tok", chosen, wanted);
    }
    if (known(call.kv, call.seq) && call.kv < call.seq) refuse("kv", call.kv, `at least the ${call.seq} new tokens`);
    else fewerRows(call, known, refuse);
    if (call.training) {
      if (known(call.kv, call.seq) && call.kv > call.seq) refuse("kv", call.kv, `the ${call.seq} new tokens: training has no cache`);
      if (call.cache) refuse("cache", `'${call.cache}'`, "None: training has no cache");
      if (call.weights) refuse("weights", `'${call.weights}'`, "None for training: rounded weights get no gradients");
      if (call.dtype === "int8") refuse("dtype", "'int8'", "a floating-point dtype: no layer is trained in int8");
    }
    for (const name of ["weights", "cache"])
      if (call[name] && call.dtype === "int8") refuse(name, `'${call[name]}'`, "None for the dtype int8, which has no scales");
    if (known(call.group) && (call.group < 2n || call.group % 2n)) refuse("group", call.group, "an even number, 2 or more");
    else if (call.weights) fewerBits(config, call, known, refuse);
    const { kv_lora_rank: C } = config;
    if (call.cache && !config.use_mla) refuse("cache", `'${call.cache}'`, "None: this model has no latent");
    else if (call.cache === "int4" && known(C) && C % 2n)
      refuse("cache", "'int4'", `fp8 or int8: the latent of ${C} features cannot be halved`);
    return found;
  }

  function fewerRows({ seq, kv, kept, read }, known, refuse) {
    if (!known(seq, kv, kept)) return;
    if (kept !== null && (kept < seq || kept > kv)) refuse("kept", kept, `None, or from seq=${seq} to kv=${kv}`);
    else if (known(read) && read !== null && read > (kept ?? kv)) refuse("read", read, `None, or from 1 to the ${kept ?? kv} rows in the cache`);
  }

  // Widths that a group does not divide, in the order in which the package meets them, and experts in cut blocks.
  function fewerBits(config, { weights, group }, known, refuse) {
    const sizes = [...DIMENSIONS.map(([name]) => config[name]), group];
    if (!known(...sizes) || !config.hidden_size || config.hidden_size % config.num_attention_heads && !config.use_mla) return;
    const { dense, mixed: withExperts } = layersByKind(config);
    const width = config.moe_intermediate_size;
    if (weights === "fp8" && withExperts && width % 128n)
      refuse("weights", "'fp8'", `int8 or int4: 128 does not divide the experts' width ${width}`);
    if (weights !== "int4") return;
    const rows = Object.entries(attention(config).matrices).map(([name, [, inputs]]) => [name, inputs]);
    const networks = [];
    if (dense) networks.push(["down_proj", config.intermediate_size]);
    if (withExperts) networks.push(["experts", width]);
    const last = config.num_hidden_layers - 1n;
    const endsDense = config.n_routed_experts === null || last < config.first_k_dense_replace || last % config.moe_layer_freq;
    const wrong = [...rows, ...(endsDense ? networks.reverse() : networks)].find(([, inputs]) => inputs % group);
    if (!wrong) return;
    const [name, inputs] = wrong;
    if (inputs % 2n) return refuse("weights", "'int4'", `int8 or fp8: ${inputs}, the inputs of ${name}, is odd`);
    const fitting = [256n, 128n, 64n, 32n, 16n, 8n, 4n, 2n].find((size) => inputs % size === 0n && size < group);
    refuse("group", group, `a divisor of ${inputs}, the inputs of ${name}, such as ${fitting}`);
  }

  const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0n);

  // Layers of each kind, dense and with experts.
  function layersByKind(config) {
    const layers = config.num_hidden_layers;
    if (config.n_routed_experts === null) return { dense: layers, mixed: 0n };
    const multiplesBelow = (end) => (end + config.moe_layer_freq - 1n) / config.moe_layer_freq;
    const first = config.first_k_dense_replace < layers ? config.first_k_dense_replace : layers;
    const withExperts = multiplesBelow(layers) - multiplesBelow(first);
    return { dense: layers - withExperts, mixed: withExperts };
  }

  // Shapes of the projections' matrices, and of all vectors beside them: norms, and biases where there are any.
  function attention(config) {
    const { hidden_size: D, num_attention_heads: H, q_lora_rank: Q, kv_lora_rank: C } = config;
    const { qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V } = config;
    if (!config.use_mla) {
      const kv = (config.num_key_value_heads ?? H) * (D / H);
      const matrices = { q_proj: [D, D], k_proj: [kv, D], v_proj: [kv, D], o_proj: [D, D] };
      return { matrices, vectors: config.attention_bias ? 2n * (D + kv) : 0n };
    }
    const query = Q === null ? { q_proj: [H * (N + R), D] } : { q_a_proj: [Q, D], q_b_proj: [H * (N + R), Q] };
    const rest = { kv_a_proj_with_mqa: [C + R, D], kv_b_proj: [H * (N + V), C], o_proj: [D, H * V] };
    const biases = config.attention_bias ? (Q ?? 0n) + C + R + D : 0n;
    return { matrices: { ...query, ...rest }, vectors: (Q ?? 0n) + C + biases };
  }

  const elements = (matrices) => Object.values(matrices).reduce((sum, [outputs, inputs]) => sum + outputs * inputs, 0n);

  // Weights of the feed-forward part of one layer with experts, of which a token passes through `chosen` routed ones.
  function experts(config, chosen) {
    const one = 3n * config.hidden_size * config.moe_intermediate_size;
    const gate = config.n_routed_experts * config.hidden_size;
    return gate + (chosen + (config.n_shared_experts ?? 0n)) * one;
  }

  function parameters(config, active) {
    const D = config.hidden_size;
    const { dense, mixed: withExperts } = layersByKind(config);
    const { matrices, vectors } = attention(config);
    const chosen = active ? config.num_experts_per_tok : config.n_routed_experts;
    const tied = config.tie_word_embeddings;
    return {
      embedding: D * (active && !tied ? 1n : config.vocab_size),
      attention: config.num_hidden_layers * (elements(matrices) + vectors),
      "dense networks": dense * 3n * D * config.intermediate_size,
      "gates and experts": withExperts ? withExperts * experts(config, chosen) : 0n,
      norms: config.num_hidden_layers * 2n * D + D,
      head: tied ? 0n : D * config.vocab_size,
    };
  }

  // Bytes of a matrix: in the dtype, or as codes and scales.
  function bytesOf([outputs, inputs], { weights, group, dtype }) {
    const count = outputs * inputs;
    const scale = dtype === "float16" ? 4n : BYTES[dtype];
    if (!weights) return count * BYTES[dtype];
    if (weights === "int8") return count + outputs * scale;
    if (weights === "int4") return count / 2n + (count / group) * scale;
    return count + 4n * ((outputs + 127n) / 128n) * ((inputs + 127n) / 128n);
  }

  const network = (hidden, width, call) => 2n * bytesOf([width, hidden], call) + bytesOf([hidden, width], call);

  function weightBytes(config, call) {
    const { hidden_size: D, moe_intermediate_size: I } = config;
    const { dense, mixed: withExperts } = layersByKind(config);
    const { matrices, vectors } = attention(config);
    const { embedding, norms, head } = parameters(config, false);
    const of = (shapes) => Object.values(shapes).reduce((sum, shape) => sum + bytesOf(shape, call), 0n);
    const expert = withExperts ? network(D, I, call) : 0n;
    const shared = withExperts && config.n_shared_experts ? network(D, config.n_shared_experts * I, call) : 0n;
    const gate = (config.n_routed_experts ?? 0n) * D;
    const rest = embedding + norms + head + config.num_hidden_layers * vectors + withExperts * gate;
    const all = rest * BYTES[call.dtype] + config.num_hidden_layers * of(matrices) + dense * network(D, config.intermediate_size, call)
      + withExperts * ((config.n_routed_experts ?? 0n) * expert + shared);
    return { all, expert };
  }

  // Rows of each sequence in the cache, those that a query reads, and different ones that all its queries read, at most.
  const rowsOf = (call) => call.kept ?? call.kv;
  const perQuery = (call) => call.read ?? rowsOf(call);
  const smaller = (a, b) => (a < b ? a : b);
  const rowsRead = (call) => smaller(rowsOf(call), call.seq * perQuery(call));

  function pairs(call) {
    const [most, first] = [perQuery(call), rowsOf(call) - call.seq + 1n];
    const fewer = call.causal && most > first ? smaller(most - first, call.seq) : 0n; // queries that see fewer rows
    return fewer * first + (fewer * (fewer - 1n)) / 2n + (call.seq - fewer) * most;
  }

  function formOf(config, call) {
    if (!config.use_mla) return null;
    if (call.form !== "auto") return call.form;
    const { kv_lora_rank: C, qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V } = config;
    const seen = pairs({ ...call, causal: true, read: null }); // as the layer decides, whatever is counted
    const expanded = rowsOf(call) * C * (N + V) + seen * (N + R + V);
    return call.seq * C * (N + V) + seen * (2n * C + R) < expanded ? "absorbed" : "expanded";
  }

  // FLOPs of all matrix products of the model, by part.
  function products(config, call) {
    const { hidden_size: D, num_attention_heads: H, num_hidden_layers: L } = config;
    const { kv_lora_rank: C, qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V } = config;
    const tokens = call.batch * call.seq;
    const seen = call.batch * H * pairs(call);
    const { matrices } = attention(config);
    const form = formOf(config, call);
    let projections = tokens * elements(matrices);
    let attending = seen * 2n * (config.use_mla ? 0n : D / H);
    if (form === "expanded") {
      projections += (call.batch * rowsRead(call) - tokens) * elements({ kv_b_proj: matrices.kv_b_proj });
      attending = seen * (N + R + V);
    } else if (form === "absorbed") attending = seen * (2n * C + R);
    const { dense, mixed: withExperts } = layersByKind(config);
    const counts = {
      "projections of attention": L * projections,
      "scores and values": L * attending,
      "dense networks": dense * tokens * 3n * D * config.intermediate_size,
      "gates and experts": withExperts ? withExperts * tokens * experts(config, config.num_experts_per_tok) : 0n,
      head: tokens * D * config.vocab_size,
    };
    return Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, 2n * count]));
  }

  // The nearest whole number; halves go to the even one, as in Python.
  function rounded(x) {
    const up = Math.round(x);
    return x % 1 === 0.5 && up % 2 === 1 ? up - 1 : up;
  }

  // Bytes of weights that a call reads, each once; of the routed experts, as many as tokens choose on average by chance.
  function weightsRead(config, call) {
    const tokens = call.batch * call.seq;
    const { all: stored, expert } = weightBytes(config, call);
    const rows = config.vocab_size - tokens; // of the embedding, that are not read
    let read = stored - (config.tie_word_embeddings ? 0n : rows * config.hidden_size * BYTES[call.dtype]);
    const { mixed: withExperts } = layersByKind(config);
    if (withExperts) {
      const [all, chosen] = [Number(config.n_routed_experts), Number(config.num_experts_per_tok)];
      const used = all * (1 - (1 - chosen / all) ** Number(tokens));
      read += withExperts * (BigInt(rounded(used * Number(expert))) - config.n_routed_experts * expert);
    }
    return read;
  }

  // Elements a layer caches per token: its own cache, and keys and values of all heads.
  function remembered(config) {
    const { num_attention_heads: H, kv_lora_rank: C } = config;
    const { qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V } = config;
    if (config.use_mla) return { own: C + R, expanded: H * (N + R + V) };
    const width = config.hidden_size / H;
    return { own: 2n * (config.num_key_value_heads ?? H) * width, expanded: 2n * H * width };
  }

  // Bytes a layer caches per token.
  function recordBytes(config, call) {
    const { kv_lora_rank: C, qk_rope_head_dim: R } = config;
    if (!call.cache) return remembered(config).own * BYTES[call.dtype];
    const codes = call.cache === "int4" ? C / 2n : C;
    return codes + 4n * (C % 128n ? 1n : C / 128n) + R * BYTES[call.dtype];
  }

  // FLOPs of a training step's products by pass, and bytes held from step to step. Attention is one kernel, but absorbed.
  function training(config, call) {
    const { hidden_size: D, num_attention_heads: H, qk_nope_head_dim: N, qk_rope_head_dim: R } = config;
    const { dense, mixed: withExperts } = layersByKind(config);
    const counts = products(config, call);
    const forward = total(counts);
    const fused = formOf(config, call) !== "absorbed";
    const scores = 2n * config.num_hidden_layers * call.batch * H * pairs(call) * (config.use_mla ? N + R : D / H);
    let recomputed = fused ? scores : 0n; // the kernel keeps none
    if (call.checkpointing) {
      // What comes last in a layer is needed by no gradient: the down product of a dense network or of the shared experts.
      const shared = withExperts ? withExperts * (config.n_shared_experts ?? 0n) * config.moe_intermediate_size : 0n;
      recomputed += forward - counts.head - 2n * call.batch * call.seq * D * (dense * config.intermediate_size + shared);
      if (fused && call.checkpointing === "selective") recomputed -= counts["scores and values"];
    }
    const [stored, size] = [total(parameters(config, false)), BYTES[call.dtype]];
    const states = OPTIMIZERS[call.optimizer][1] * stored * (size > 4n ? size : 4n);
    return {
      flops: { forward, backward: 2n * forward, recomputed },
      bytes: { weights: stored * size, gradients: stored * size, master_weights: size === 2n ? 4n * stored : 0n, optimizer: states },
    };
  }

  function account(config, call) {
    const [stored, active] = [parameters(config, false), parameters(config, true)];
    const record = config.num_hidden_layers * recordBytes(config, call);
    const expanded = config.num_hidden_layers * BYTES[call.dtype] * remembered(config).expanded;
    return {
      parameters: { total: total(stored), active_per_token: total(active), by_part: stored, active_by_part: active },
      flops: { products: total(products(config, call)), by_part: products(config, call) },
      bytes: {
        weights: weightBytes(config, call).all,
        weights_read: weightsRead(config, call),
        kv_cache: call.batch * rowsOf(call) * record,
        kv_cache_read: call.batch * rowsRead(call) * record,
        kv_cache_expanded: call.batch * rowsOf(call) * expanded,
        a_token: record,
      },
      form: formOf(config, call),
      training: call.training ? training(config, call) : null,
    };
  }

  // ---- The page

  const element = (tag, attributes = {}, ...children) => {
    const space = ["svg", "path", "line", "text", "circle", "title"].includes(tag) && attributes.svg !== false;
    const made = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (name !== "svg") made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const withCommas = (count) => count.toLocaleString("en-US");

  // Three digits of a whole number; beyond the units, as a power of ten.
  function inUnits(count, units) {
    const [digits, power] = Number(count).toExponential(2).split("e").map(Number);
    const [unit, more] = [Math.floor(power / 3), power % 3];
    if (unit === 0) return `${count} ${units[0]}`.trim();
    if (unit < units.length) return `${(digits * 10 ** more).toFixed(2 - more)} ${units[unit]}`;
    const raised = String(power).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
    return `${digits.toFixed(2)} × 10${raised} ${units[0]}`.trim();
  }
  const prefixed = (unit) => ["", "k", "M", "G", "T", "P", "E", "Z", "Y"].map((prefix) => prefix + unit);
  const inBytes = (count) => inUnits(count, prefixed("B"));
  const inFlops = (count) => inUnits(count, prefixed("FLOP"));
  const inWords = (count) => inUnits(count, ["", "thousand", "million", "billion", "trillion", "quadrillion"]);
  const inTokens = (count) => (count < 10n ** 9n ? withCommas(count) : inWords(count));
  const atATick = (bytes) => inBytes(bytes).replace(/\.0+(?=\D)/, "").replace("1 × ", "");

  function inPercent(part, whole) {
    const share = (100 * Number(part)) / Number(whole);
    return share < 0.1 ? "below 0.1 %" : `${share.toFixed(1)} %`;
  }

  function field(name, label, value, empty) {
    const input = element("input", {
      id: `calculator-${name}`, name, inputmode: "numeric", autocomplete: "off", value: value ?? "",
      placeholder: empty ?? "", "aria-describedby": `calculator-${name}-refusal`,
    });
    const refusal = element("span", { id: `calculator-${name}-refusal`, class: "refusal" });
    return element("div", { "data-field": name }, element("label", { for: input.id }, label), input, refusal);
  }

  // A box for the text of a config.json, and a way to choose a file; `read` tells below the box what was read.
  function source() {
    const box = element("textarea", {
      id: "calculator-config", name: "config", rows: 3, spellcheck: "false", autocomplete: "off",
      "aria-describedby": "calculator-config-refusal calculator-config-read",
    });
    const refusal = element("span", { id: "calculator-config-refusal", class: "refusal" });
    const read = element("span", { id: "calculator-config-read", class: "read" });
    const file = element("input", { id: "calculator-file", name: "file", type: "file", accept: ".json,application/json" });
    return [
      element("div", { "data-field": "config" }, element("label", { for: box.id }, "text of the file"), box, refusal, read),
      element("div", { "data-field": "file" }, element("label", { for: file.id }, "or the file itself"), file),
    ];
  }

  // A sentence of which the middle is left out where it is long, as the values in a file may be.
  const inBrief = (sentence) => (sentence.length > 400 ? `${sentence.slice(0, 200)} … ${sentence.slice(-190)}` : sentence);

  function choice(name, label, options) {
    const made = Object.entries(options).map(([value, text]) => element("option", { value }, text));
    const select = element("select", { id: `calculator-${name}`, name }, ...made);
    const refusal = element("span", { id: `calculator-${name}-refusal`, class: "refusal" });
    select.setAttribute("aria-describedby", refusal.id);
    return element("div", { "data-field": name }, element("label", { for: select.id }, label), select, refusal);
  }

  function checkbox(name, label) {
    const input = element("input", { id: `calculator-${name}`, name, type: "checkbox" });
    return element("div", { "data-field": name }, element("label", { for: input.id }, input, ` ${label}`));
  }

  const group = (legend, ...fields) =>
    element("fieldset", {}, element("legend", {}, legend), element("div", { class: "fields" }, ...fields));

  function table(caption, head, rows) {
    const header = element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)));
    const body = rows.map(([name, ...cells]) =>
      element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))));
    const made = element("table", { class: "table" }, element("caption", {}, caption), element("thead", {}, header),
      element("tbody", {}, ...body));
    return element("div", { class: "pst-scrollable-table-container" }, made);
  }

  // Bytes of the cache over the context, both logarithmic, in a picture as wide as there is room for.
  function plot(config, call, found, room) {
    const width = Math.max(240, Math.min(640, Math.floor(room)));
    const narrow = width < 480;
    const [left, right, top, bottom, height] = [70, 40, 14, 46, narrow ? 280 : 340];
    const contexts = Array.from({ length: 13 }, (_, power) => 256 * 2 ** power);
    const { own, expanded } = remembered(config);
    const layers = Number(call.batch * config.num_hidden_layers);
    const held = (context) => Math.min(context, Number(call.kept ?? MOST));
    const curves = { cache: Number(recordBytes(config, call)) * layers };
    if (expanded !== own) curves.expanded = Number(expanded * BYTES[call.dtype]) * layers;
    const weights = Number(found.bytes.weights);
    const values = [...Object.values(curves).flatMap((each) => [each * held(contexts[0]), each * held(contexts[12])]), weights];
    const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10);
    const x = (context) => left + (Math.log2(context / 256) / 12) * (width - left - right);
    const y = (bytes) => height - bottom - ((Math.log10(bytes) - low) / (high - low)) * (height - top - bottom);
    const named = { cache: "the cache", expanded: "keys and values of all heads", weights: "all weights" };
    const said = `Cache over context: ${inBytes(found.bytes.kv_cache)} at ${inTokens(call.kv)} tokens, `
      + `${inBytes(Math.round(curves.cache * held(contexts[12])))} at ${withCommas(contexts[12])}; the weights take ${inBytes(weights)}.`;
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said });
    const ink = { stroke: "currentColor", "stroke-width": 1, opacity: 0.35 };
    for (let power = Math.ceil(low); power <= high; power += Math.max(1, Math.round((high - low) / 6))) {
      svg.append(element("line", { x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power), ...ink }));
      svg.append(element("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, atATick(10 ** power)));
    }
    for (const context of contexts.filter((_, i) => i % (narrow ? 6 : 3) === 0)) {
      svg.append(element("line", { x1: x(context), x2: x(context), y1: top, y2: height - bottom, ...ink }));
      const place = { x: x(context), y: height - bottom + 18, "text-anchor": "middle" };
      svg.append(element("text", place, withCommas(context)));
    }
    svg.append(element("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, "tokens of context"));
    const draw = (name, path, dashes) => svg.append(element("path", {
      d: path, fill: "none", "stroke-width": 2.5, "stroke-dasharray": dashes, style: `stroke: var(--curve-${name})`,
    }));
    const dashes = { cache: "none", expanded: "9 5" };
    const bend = Math.min(Math.max(held(contexts[12]), 256), contexts[12]);
    for (const [name, each] of Object.entries(curves))
      draw(name, `M${[256, bend, contexts[12]].map((context) => `${x(context)},${y(each * held(context))}`).join("L")}`, dashes[name]);
    draw("weights", `M${left},${y(weights)}L${width - right},${y(weights)}`, "2 4");
    const here = Number(call.kv);
    if (here >= 256 && here <= contexts[12])
      svg.append(element("circle", {
        cx: x(here), cy: y(curves.cache * held(here)), r: 6, style: "fill: var(--curve-cache)",
      }));
    const legend = [...Object.keys(curves), "weights"].map((name) =>
      element("li", { style: `border-color: var(--curve-${name})`, class: `key-${name}` }, named[name]));
    return element("figure", { class: "chart" }, svg, element("ul", { class: "legend" }, ...legend));
  }

  function inShort(found, call) {
    if (found.training) {
      const { flops, bytes } = found.training;
      return `A training step of ${inTokens(call.batch * call.seq)} tokens takes ${inFlops(total(flops))}; weights, gradients and `
        + `optimizer ${inBytes(total(bytes))}.`;
    }
    const { total: stored, active_per_token: active } = found.parameters;
    return `Parameters ${inWords(stored)}, ${inWords(active)} active; weights ${inBytes(found.bytes.weights)}, cache of `
      + `${inTokens(call.batch * rowsOf(call))} tokens ${inBytes(found.bytes.kv_cache)}; the call takes ${inFlops(found.flops.products)}.`;
  }

  // What the call takes on a machine at best: arithmetic and reading go on at the same time.
  function onMachine({ name, peak, bandwidth, memory, source, url, note }, found) {
    const step = found.training;
    const needed = step ? total(step.bytes) : found.bytes.weights + found.bytes.kv_cache;
    const read = Number(found.bytes.weights_read + found.bytes.kv_cache_read);
    const heldFor = step ? "weights, gradients and optimizer" : "weights and cache";
    const link = element("a", { href: url }, source);
    const made = table(`On the machine: ${name}`, ["at best", "amount"], [
      [`memory for ${heldFor}`, `${inBytes(needed)}, ${needed > memory ? "more than" : "of"} ${inBytes(memory)}`],
      ...(step ? [] : [["reading weights and cache", inSeconds(read / bandwidth)]]),
      ["computing the products", inSeconds(Number(step ? total(step.flops) : found.flops.products) / peak)],
    ]);
    made.append(element("p", {}, `${inUnits(peak, prefixed("FLOP/s"))}, ${inUnits(bandwidth, prefixed("B/s"))} (`, link, note ? `: ${note})` : ")"));
    return made;
  }

  function ofTraining({ flops, bytes }) {
    const rows = (counts) => [...Object.entries(counts), ["total", total(counts)]].map(
      ([name, count]) => [name.replace("_", " "), withCommas(count)]);
    return [
      table("FLOPs of a training step", ["pass", "FLOPs"], rows(flops)),
      table("Bytes held from step to step", ["of", "bytes"], rows(bytes)),
    ];
  }

  function show(output, config, call, machine, found) {
    const { by_part: stored, active_by_part: active, total: all, active_per_token: used } = found.parameters;
    const formText = found.form ? `, ${found.form}` : "";
    output.replaceChildren(
      table("In short", ["of the model", "amount"], [
        ["parameters", inWords(all)],
        ["active per token", `${inWords(used)} (${inPercent(used, all)})`],
        ["weights", inBytes(found.bytes.weights)],
        [`cache of ${inTokens(call.batch * rowsOf(call))} tokens`, inBytes(found.bytes.kv_cache)],
        ...(found.bytes.kv_cache_expanded === found.bytes.kv_cache ? []
          : [["cache, expanded", inBytes(found.bytes.kv_cache_expanded)]]),
        ["cache per token", `${withCommas(found.bytes.a_token)} B`],
        [`products of the call${formText}`, inFlops(found.flops.products)],
      ]),
      ...(found.training ? ofTraining(found.training) : []),
      plot(config, call, found, output.clientWidth),
      onMachine(machine, found),
      table("Parameters", ["part", "stored", "active"], [
        ...Object.keys(stored).map((part) => [part, withCommas(stored[part]), withCommas(active[part])]),
        ["total", withCommas(all), withCommas(used)],
      ]),
      table("FLOPs of the call", ["part", "FLOPs"], [
        ...Object.entries(found.flops.by_part).map(([part, count]) => [part, withCommas(count)]),
        ["total", withCommas(found.flops.products)],
      ]),
    );
  }

  // `asked` has the state of the address: a preset, and what differs from it.
  function start(root, asked = new URLSearchParams()) {
    const fields = (dimensions) => dimensions.map(([name, , empty]) => field(name, name, "", empty));
    const form = element("form", { novalidate: "" },
      group("A config.json", ...source()),
      group("Model", choice("preset", "start from", { ...MODEL_NAMES, own: "my own" }), ...fields(OF_THE_MODEL),
        checkbox("tie_word_embeddings", "tie_word_embeddings")),
      group("Attention", checkbox("use_mla", "use_mla (latent attention)"), ...fields(OF_ATTENTION),
        checkbox("attention_bias", "attention_bias")),
      group("Feed-forward networks", ...fields(OF_NETWORKS), choice("topk_method", "topk_method", METHODS), ...fields(OF_GROUPS)),
      group("Call", ...CALL.map(([name, label, value]) => field(name, label, value)),
        choice("dtype", "dtype", Object.fromEntries(Object.keys(BYTES).map((name) => [name, name]))),
        choice("form", "form of MLA", FORMS), checkbox("causal", "count causal pairs only"),
        choice("weights", "weights", WEIGHTS), field("group", FEWER[0][1], 64), choice("cache", "cache: latents", CACHES),
        ...FEWER.slice(1).map(([name, label, , empty]) => field(name, label, "", empty)),
        checkbox("training", "a training step"), choice("checkpointing", "checkpointing", CHECKPOINTING),
        choice("optimizer", "optimizer", Object.fromEntries(Object.entries(OPTIMIZERS).map(([name, [label]]) => [name, label]))),
        choice("machine", "machine", Object.fromEntries(MACHINES.map(({ name }) => [name, name])))));
    const status = element("p", { role: "status" });
    const output = element("div", { class: "results" });
    const all = element("div", {}, form, status, output);
    root.replaceChildren(all);
    const control = (name) => form.elements.namedItem(name);
    const fieldOf = (name) => form.querySelector(`[data-field="${name}"]`);

    function refuse(name, sentence) {
      control(name).setAttribute("aria-invalid", String(Boolean(sentence)));
      fieldOf(name).querySelector(".refusal").textContent = sentence;
    }

    // A whole number, in groups of three digits or not; null for nothing, undefined for what is refused.
    function read(name, least, empty) {
      const text = control(name).value.trim();
      if (text === "" && empty) return null;
      const digits = /^\d{1,3}([,_ ]\d{3})+$/.test(text) ? text.replace(/\D/g, "") : text;
      if (/^\d{1,40}$/.test(digits) && BigInt(digits) >= least && BigInt(digits) <= MOST) return BigInt(digits);
      const typed = text.length > 40 ? `${text.slice(0, 40)}…` : text;
      const wanted = `a whole number from ${least} to ${withCommas(MOST)}${empty ? ", or nothing" : ""}`;
      refuse(name, `${name} is '${typed}'; wanted ${wanted}`);
      return undefined;
    }

    // The state in the address: of a model the preset it started from, and of all fields those that were changed.
    const usual = {};
    let from = "deepseek_v2";
    const sizes = [...SWITCHES, "topk_method", ...DIMENSIONS.map(([name]) => name)];
    const calls = [...[...CALL, ...FEWER].map(([name]) => name), "dtype", "form", "causal", "weights", "cache", "training", "checkpointing",
      "optimizer", "machine"];
    const valueOf = (name) => (control(name).type === "checkbox" ? String(control(name).checked) : control(name).value);

    function restore() {
      if (Object.hasOwn(MODELS, asked.get("preset"))) from = asked.get("preset");
      control("preset").value = from;
      startFrom(MODELS[from]);
      for (const name of calls) usual[name] = valueOf(name);
      for (const [name, value] of asked) {
        if (!Object.hasOwn(usual, name)) continue;
        const field = control(name);
        if (field.type === "checkbox") field.checked = value === "true";
        else if (!field.options || [...field.options].some((option) => option.value === value)) field.value = value;
      }
      if (sizes.some((name) => valueOf(name) !== usual[name])) control("preset").value = "own";
    }

    function store() {
      const address = new URL(location.href);
      address.searchParams.set("preset", from);
      for (const [name, value] of Object.entries(usual)) {
        if (valueOf(name) === value) address.searchParams.delete(name);
        else address.searchParams.set(name, valueOf(name));
      }
      history.replaceState(null, "", address);
    }

    // What a model has no use for, its file may give in any way: such a field stays empty.
    function fill(model) {
      for (const name of SWITCHES) control(name).checked = model[name];
      control("topk_method").value = Object.hasOwn(METHODS, model.topk_method) ? model.topk_method : "greedy";
      for (const [name, least] of DIMENSIONS)
        control(name).value = typeof model[name] === "bigint" && model[name] >= least && model[name] <= MOST ? model[name] : "";
    }

    function startFrom(preset) {
      fill(preset);
      for (const name of sizes) usual[name] = valueOf(name);
    }

    const tell = (sentence) => (fieldOf("config").querySelector(".read").textContent = sentence);

    // Fill the fields from the text of a config.json, unless it is rejected.
    function readText(text) {
      tell("");
      refuse("config", "");
      if (text.trim() === "") return update();
      try {
        const { kind, config, said } = publishedReader.read(text);
        fill(config);
        control("preset").value = "own";
        tell(inBrief([`Read as ${kind}`, ...said].join("; ")) + ".");
      } catch (error) {
        if (!(error instanceof publishedReader.Rejection)) throw error;
        refuse("config", inBrief(error.message));
      }
      update(fieldOf("config").querySelector(".read").textContent);
      storeSoon();
    }

    // The text of a file, or an Error that says why there is none.
    async function textOf(file) {
      const size = file.size ? `has ${inBytes(file.size)}` : "is empty";
      if (!file.size || file.size > LARGEST_FILE) throw new Error(`${file.name} ${size}; wanted a config.json, which has a few kB`);
      const bytes = await file.arrayBuffer().catch(() => null);
      if (bytes === null) throw new Error(`${file.name} cannot be read; wanted a file`);
      try {
        return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
      } catch {
        throw new Error(`${file.name} is not text in UTF-8`);
      }
    }

    async function readFile(file) {
      let text;
      try {
        text = await textOf(file);
      } catch (error) {
        tell("");
        refuse("config", error.message);
        return update();
      }
      control("config").value = text;
      return readText(text);
    }

    // `said` of a file that was read is told before what the model comes to.
    function update(said = "") {
      const config = Object.fromEntries(SWITCHES.map((name) => [name, control(name).checked]));
      const call = { dtype: control("dtype").value, form: control("form").value, causal: control("causal").checked };
      for (const name of [...[...DIMENSIONS, ...CALL, ...FEWER].map(([each]) => each), "weights", "cache", "dtype"]) refuse(name, "");
      config.topk_method = control("topk_method").value;
      config.n_routed_experts = read("n_routed_experts", 1n, true);
      for (const [name, least, empty, wanted] of DIMENSIONS) {
        fieldOf(name).hidden = !wanted(config);
        if (name !== "n_routed_experts") config[name] = wanted(config) ? read(name, least, empty) : null;
      }
      fieldOf("topk_method").hidden = !mixed(config);
      fieldOf("form").hidden = !config.use_mla;
      call.training = control("training").checked; // without a cache, and in the dtype
      for (const name of ["kv", "weights", "kept", "read"]) fieldOf(name).hidden = call.training;
      for (const name of ["checkpointing", "optimizer"]) fieldOf(name).hidden = !call.training;
      fieldOf("cache").hidden = !config.use_mla || call.training;
      call.checkpointing = control("checkpointing").value || null;
      call.optimizer = control("optimizer").value;
      for (const name of ["weights", "cache"]) call[name] = (!fieldOf(name).hidden && control(name).value) || null;
      fieldOf("group").hidden = call.weights !== "int4";
      for (const [name] of CALL) call[name] = fieldOf(name).hidden ? call.seq : read(name, 1n, null);
      const unless = { group: 64n, kept: null, read: null };
      for (const [name, , fewest, empty] of FEWER) call[name] = fieldOf(name).hidden ? unless[name] : read(name, fewest, empty);
      for (const [name, sentence] of refusals(config, call)) refuse(name, sentence);
      const [first, ...others] = [...form.querySelectorAll(".refusal:not(:empty)")].map((refusal) => refusal.textContent);
      output.classList.toggle("stale", first !== undefined);
      if (first) {
        const more = others.length ? ` (and ${others.length} more)` : "";
        status.textContent = `${first}${more}. The numbers below are those of the last input that could be read.`;
        return;
      }
      const machine = MACHINES.find(({ name }) => name === control("machine").value);
      shown = [config, call, account(config, call)];
      status.textContent = `${said} ${inShort(shown[2], call)}`.trim();
      show(output, config, call, machine, shown[2]);
    }

    let shown;
    let waiting;
    let room = 0;
    new ResizeObserver(() => {
      if (output.clientWidth === room) return;
      room = output.clientWidth;
      if (shown) output.querySelector(".chart")?.replaceWith(plot(...shown, room));
    }).observe(output);

    function storeSoon() {
      clearTimeout(waiting);
      waiting = setTimeout(store, 300);
    }

    form.addEventListener("input", ({ target }) => {
      if (target.name === "file") return target.files.length && readFile(target.files[0]);
      control("file").value = "";
      if (target.name === "config") return readText(target.value);
      refuse("config", "");
      if (fieldOf(target.name).closest("fieldset") !== form.lastElementChild) {
        tell("");
        if (target.name !== "preset") control("preset").value = "own";
        else if (target.value !== "own") startFrom(MODELS[from = target.value]);
      }
      update();
      storeSoon();
    });
    control("file").addEventListener("click", ({ target }) => (target.value = "")); // so that the same file, changed, can be chosen again
    const hasFile = ({ dataTransfer }) => dataTransfer.types.includes("Files");
    all.addEventListener("dragover", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      all.classList.add("dropping");
    });
    all.addEventListener("dragleave", ({ relatedTarget }) => {
      if (!all.contains(relatedTarget)) all.classList.remove("dropping");
    });
    all.addEventListener("drop", (event) => {
      all.classList.remove("dropping");
      if (!hasFile(event)) return;
      event.preventDefault();
      control("file").value = "";
      readFile(event.dataTransfer.files[0]);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    control("dtype").value = "bfloat16";
    control("causal").checked = true;
    restore();
    update();
  }

  window.dsv2 = { PRESETS: MODELS, account, read: publishedReader.read, refusals, start };
  document.addEventListener("DOMContentLoaded", () => {
    const root = document.getElementById("cost-calculator");
    if (root) start(root, new URLSearchParams(location.search));
  });
})();
