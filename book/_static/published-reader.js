// Reads a published config.json as dsv2_ref.published and dsv2_ref.checks do: what is accepted, with which dimensions, and
// which key is named where it is not. PUBLISHED is their table, which the build of the book writes into published.js.
// JSON is read with integers as BigInt, other numbers as Number, and objects as Map, whose keys may have any name.
"use strict";

const publishedReader = (() => {
  class Rejection extends Error {}

  // ---- JSON

  const KEY_OR_BRACE = /"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?|[{}]/g;
  const STRING_OR_NUMBER = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(\.\d+)?([eE][+-]?\d+)?/g;

  // Each string and number gets a letter in front for what it is: JSON.parse alone would make 2048.0 of 2048.
  function parse(text) {
    if (text.startsWith("\uFEFF")) throw new Rejection("the text is not JSON: it begins with a byte order mark");
    try {
      JSON.parse(text);
    } catch (error) {
      throw new Rejection(`the text is not JSON: ${error.message}`);
    }
    const lettered = text.replace(STRING_OR_NUMBER, (found, fraction, power) => {
      if (found.startsWith('"')) return `"s${found.slice(1)}`;
      if (fraction || power) return `"f${found}"`;
      if (found.length > 4300) throw new Rejection("the text is not JSON that can be read: an integer of more than 4300 digits");
      return `"i${found}"`;
    });
    const of = { s: String, f: Number, i: BigInt };
    const plain = (value) => of[value[0]](value.slice(1));
    const content = JSON.parse(lettered, (_, value) => {
      if (typeof value === "string") return plain(value);
      if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
      return new Map(Object.entries(value).map(([key, each]) => [plain(key), each]));
    });
    const twice = saidTwice(text);
    if (twice.length) throw new Rejection(`the text says ${described(twice.join(", "))} twice`);
    return content;
  }

  // The keys that an object has twice, object by object as they end.
  function saidTwice(text) {
    const [open, twice] = [[], []];
    for (const [found, colon] of text.matchAll(KEY_OR_BRACE)) {
      if (found === "{") open.push(new Map());
      else if (found === "}") twice.push(...[...open.pop()].filter(([, times]) => times > 1).map(([key]) => key));
      else if (colon) {
        const [keys, key] = [open.at(-1), JSON.parse(found.slice(0, -colon.length))];
        keys.set(key, (keys.get(key) ?? 0) + 1);
      }
    }
    return twice;
  }

  // ---- Values, compared and written as in Python

  const isNumeric = (value) => ["bigint", "number", "boolean"].includes(typeof value);

  // 1 equals 1.0, and true.
  function equal(one, other) {
    if (isNumeric(one) && isNumeric(other)) return one == other;
    if (Array.isArray(one) && Array.isArray(other))
      return one.length === other.length && one.every((each, i) => equal(each, other[i]));
    if (one instanceof Map && other instanceof Map)
      return one.size === other.size && [...one].every(([key, each]) => other.has(key) && equal(each, other.get(key)));
    return one === other;
  }

  // 1 equals 1.0, and not true.
  const same = (one, other) => equal(one, other) && (typeof one === "boolean") === (typeof other === "boolean");
  const among = (value, others) => others.some((other) => equal(value, other));
  const isNothing = (value) => value === null || (value instanceof Map && value.size === 0);
  const get = (object, key) => object.get(key) ?? null;
  const scientific = (digits, power) => `${digits}e${power[0]}${power.slice(1).padStart(2, "0")}`;

  function inFull(number) {
    if (!Number.isFinite(number)) return number < 0 ? "-inf" : "inf";
    const [digits, power] = number.toExponential().split("e");
    if (power < -4 || power > 15) return scientific(digits, power);
    return `${Object.is(number, -0) ? "-" : ""}${number}${Number.isInteger(number) ? ".0" : ""}`;
  }

  // In six digits.
  function inShort(number) {
    const [digits, power] = Number(number).toExponential(5).split("e");
    const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
    return power < -4 || power > 5 ? scientific(bare(digits), power) : bare(Number(number).toFixed(5 - power));
  }

  function quoted(text) {
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    const escapes = { " ": " ", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\" };
    const escaped = (letter) => {
      const code = letter.codePointAt(0);
      const [mark, length] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
      return escapes[letter] ?? `\\${mark}${code.toString(16).padStart(length, "0")}`;
    };
    return quote + text.replace(/[\p{C}\p{Z}\\]/gu, escaped).replaceAll(quote, `\\${quote}`) + quote;
  }

  function written(value) {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value === "bigint") return String(value);
    if (typeof value === "number") return inFull(value);
    if (typeof value === "string") return quoted(value);
    throw new TypeError("lists and objects are described by their length");
  }

  function described(value) {
    if (Array.isArray(value)) return `a list of ${value.length}`;
    if (value instanceof Map) return `an object of ${value.size}`;
    const [letters, longest] = [[...written(value)], known.get("longest value")];
    return letters.length <= longest ? letters.join("") : `${letters.slice(0, Number(longest)).join("")}…`;
  }

  function require(fits, name, value, wanted) {
    if (!fits) throw new Rejection(`${name} is ${described(value)}; wanted ${wanted}`);
  }

  function requireObject(value, name) {
    require(value instanceof Map, name, value, "a JSON object");
    return value;
  }

  // ---- dsv2_ref.published: which kind of model it is, and what its keys mean

  const known = parse(PUBLISHED);
  const [kinds, nested, rope, fields] = ["kinds", "nested", "rope", "fields"].map((part) => known.get(part));
  const allKinds = [...kinds.keys(), ...nested.keys()].join(", ");

  // Rejects what is said twice, and otherwise; of two objects it names the first key in which they differ.
  function requireSame(name, value, other, whose) {
    if (!(value instanceof Map && other instanceof Map)) return require(same(value, other), name, value, `${whose} ${described(other)}`);
    for (const key of new Set([...value.keys(), ...other.keys()]))
      requireSame(`${name}.${key}`, get(value, key), get(other, key), whose);
  }

  // What stands around the decoder's keys, the kind of the decoder, and its keys.
  function decoderOf(published) {
    const told = get(published, "model_type");
    require(told === null || typeof told === "string", "model_type", told, "a name");
    const kind = told ?? kindByArchitecture(published);
    if (kinds.has(kind)) {
      requireArchitectures(published, kind, kinds.get(kind));
      return [new Map(), kind, published];
    }
    let [key, innerKind] = [nestedKey(published), null];
    if (nested.has(kind)) {
      requireArchitectures(published, kind, nested.get(kind));
      [key, innerKind] = ["key", "kind"].map((name) => nested.get(kind).get(name));
    } else if (kind !== null) {
      const why = known.get("others").has(kind) ? `: ${kind} has ${known.get("others").get(kind)}` : "";
      require(false, "model_type", kind, `one of ${allKinds}${why}`);
    }
    if (key === null) return [new Map(), kindByKeys(published), published];
    const inside = get(published, key);
    const outer = new Map(published);
    outer.delete(key);
    if (isNothing(inside) && innerKind !== null) { // the values stand outside
      const around = new Map([...outer].filter(([name]) => name === "architectures" || known.get("beside").includes(name)));
      for (const name of around.keys()) outer.delete(name);
      return [around, innerKind, outer.set("model_type", innerKind)];
    }
    const inner = new Map(requireObject(inside, key));
    if (innerKind !== null && get(inner, "model_type") === null) inner.set("model_type", innerKind);
    const wanted = "a decoder's configuration, which holds no other";
    require(nestedKey(inner) === null, key, inner, wanted);
    const [beside, itsKind, decoder] = decoderOf(inner);
    require(beside.size === 0, key, inner, wanted);
    return [outer, itsKind, decoder];
  }

  function nestedKey(published) {
    const keys = new Set([...nested.values()].map((entry) => entry.get("key")));
    const present = [...keys].sort().filter((key) => !isNothing(get(published, key)));
    if (present.length > 1) throw new Rejection(`${present.join(" and ")} are given; wanted one decoder's configuration`);
    return present[0] ?? null;
  }

  function architectures(published) {
    let names = get(published, "architectures");
    if (!names || isNothing(names)) names = [];
    const fits = Array.isArray(names) && names.every((name) => typeof name === "string");
    require(fits, "architectures", names, "a list of names");
    return names;
  }

  // Whether all these classes belong to an entry's architectures, whatever they are for: DeepseekV3ForCausalLM to DeepseekV3.
  const areOf = (names, entry) =>
    names.every((name) => entry.get("architectures").includes(name.replace(/(For[A-Z][A-Za-z0-9]*|Model)$/, "")));

  function requireArchitectures(published, kind, entry) {
    const names = architectures(published);
    const own = entry.get("architectures").map((name) => `${name}ForCausalLM`).join(", ");
    require(areOf(names, entry), "architectures", names.join(" "), `an architecture of model_type ${kind}: ${own}`);
  }

  function kindByArchitecture(published) {
    const names = architectures(published);
    if (names.length) for (const [kind, entry] of [...kinds, ...nested]) if (areOf(names, entry)) return kind;
    require(!names.length, "architectures", names.join(" "), "an architecture of a model that is known");
    return null;
  }

  // The kind of a file that does not name it: the keys must leave no doubt.
  function kindByKeys(published) {
    for (const [key, what] of known.get("not_a_model"))
      if (published.has(key) && !published.has("hidden_size"))
        throw new Rejection(`the configuration is ${what}, as its key ${key} says; wanted a model's config.json`);
    const hasAll = (...groups) => groups.every((group) => known.get(`keys of ${group}`).every((key) => published.has(key)));
    const told = hasAll("a size") && (published.has("use_mla") || hasAll("a latent"));
    const routed = get(published, "n_routed_experts") !== null;
    require(told && (!routed || hasAll("routing")), "model_type", null, `one of ${allKinds}: the keys leave open which model this is`);
    return "deepseek_v2";
  }

  function rejectOthers(given, only, where = "") {
    for (const [key, value] of given) {
      const allowed = only.get(key);
      const says = isNothing(value) ? null : value; // an empty object says nothing
      if (!allowed || allowed.some((one) => same(says, one))) continue;
      const names = allowed.map((one) => (one === null ? "no such key" : written(one))).join(" or ");
      require(false, `${where}${key}`, value, `${names}: the layer would be another`);
    }
  }

  // The fields of a stretch of rotary positions, which the file has under `key`; null for none.
  function stretch(scaling, key) {
    rejectOthers(scaling, rope.get("only"), `${key}.`);
    const given = new Map([...scaling].filter(([name, value]) => value !== null && !rope.get("only").has(name)));
    given.delete("rope_theta");
    const types = new Map(["type", "rope_type"].filter((name) => given.has(name)).map((name) => [name, given.get(name)]));
    for (const name of types.keys()) given.delete(name);
    if (!types.size && !given.size && scaling.size) return null;
    const [type = null] = types.values();
    for (const [name, value] of types.size ? types : [["type", null]]) {
      require(["linear", "dynamic", "yarn", "default"].includes(value), `${key}.${name}`, value, "linear, dynamic or yarn");
      require(value === type, `${key}.${name}`, value, `${written(type)}, as its type says`);
    }
    for (const [name, value] of given)
      require(type !== "default" && rope.get("read").includes(name), `${key}.${name}`, value, `no such key beside type ${type}`);
    if (type === "default") return null;
    require(given.has("factor"), `${key}.factor`, null, "a factor");
    return new Map([["type", type], ...given]);
  }

  // rope_theta and rope_scaling, wherever the file has them: the theta inside wins.
  function ropeOf(decoder) {
    const found = new Map();
    const [default_, whose] = [new Map([["type", "default"]]), "what rope_parameters says,"];
    for (const key of ["rope_parameters", "rope_scaling"]) {
      const parameters = get(decoder, key);
      if (isNothing(parameters)) continue;
      const scaling = stretch(requireObject(parameters, key), key);
      const theta = parameters.has("rope_theta") ? parameters.get("rope_theta") : get(found, "rope_theta");
      requireSame(`${key}.rope_theta`, theta, found.has("rope_theta") ? found.get("rope_theta") : theta, whose);
      const before = found.has("rope_scaling") ? found.get("rope_scaling") : scaling;
      requireSame(key, scaling ?? default_, before ?? default_, whose);
      found.set("rope_scaling", scaling);
      if (theta !== null) found.set("rope_theta", theta);
    }
    return found;
  }

  // The configuration that a text describes, the kind of its decoder, and what its reader should know.
  function read(text) {
    try {
      return configurationOf(requireObject(parse(text), "the configuration"));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error; // too many calls within calls
      throw new Rejection("the text is not JSON that can be read: nested too deeply");
    }
  }

  function configurationOf(published) {
    const [outer, kind, decoder] = decoderOf(published);
    const only = new Map([...known.get("only"), ...(kinds.get(kind).get("only") ?? [])]);
    const isRead = (key) => fields.has(key) || known.get("same_as").has(key) || known.get("read").includes(key);
    const unknown = [];
    for (const where of [decoder, outer]) {
      rejectOthers(where, only);
      const others = new Set(known.get("irrelevant").concat(where === outer ? known.get("beside") : []));
      const isKnown = (key) => isRead(key) || only.has(key) || others.has(key);
      unknown.push(...[...where.keys()].filter((key) => !isKnown(key)));
    }
    const given = new Map([...decoder].filter(([key]) => fields.has(key)));
    for (const [other, name] of known.get("same_as")) {
      if (!decoder.has(other)) continue;
      const value = decoder.get(other);
      if (!given.has(name)) given.set(name, value);
      requireSame(other, value, given.get(name), `${name}'s`);
    }
    const tied = "tie_word_embeddings";
    if (outer.has(tied) && !given.has(tied)) given.set(tied, outer.get(tied));
    const inside = new Map([...decoder, ...given]);
    for (const [name, value] of outer) {
      if (!isRead(name)) continue;
      if (inside.has(name)) requireSame(name, value, inside.get(name), "what the nested configuration says,");
      else unknown.push(name);
    }
    const said = [];
    if (unknown.length) said.push(`not known, and so not read from the configuration: ${[...new Set(unknown)].join(", ")}`);
    const values = [...fields, ...kinds.get(kind).get("defaults"), ...given, ["rope_scaling", null], ...ropeOf(decoder)];
    const config = Object.fromEntries(values);
    if (config.rope_scaling) requireStretch(config.rope_scaling);
    if (config.topk_method === "gready") {
      said.push("topk_method 'gready' is a misspelling in published configurations; read as 'greedy'");
      config.topk_method = "greedy";
    }
    requireConfiguration(config);
    requireAgreement(decoder, config);
    return { kind, config, said };
  }

  // Rejects keys that say again, and otherwise, what follows from the fields.
  function requireAgreement(decoder, config) {
    const { qk_rope_head_dim: rotating, num_hidden_layers: layers } = config;
    const query = config.use_mla && rotating + config.qk_nope_head_dim;
    const heads = config.use_mla ? { head_dim: [rotating, query], qk_head_dim: [query] }
      : { head_dim: [config.hidden_size / config.num_attention_heads] };
    for (const [key, allowed] of Object.entries(heads)) {
      const value = get(decoder, key);
      require(value === null || allowed.some((one) => same(value, one)), key, value, allowed.join(" or "));
    }
    const feedForward = (layer) => (config.n_routed_experts !== null && layer >= config.first_k_dense_replace
      && layer % config.moe_layer_freq === 0n ? "sparse" : "dense");
    const types = {
      layer_types: [() => "full_attention", "full_attention in each layer"],
      mlp_layer_types: [feedForward, "dense and sparse as the fields say"],
    };
    for (const [key, [expected, wanted]] of Object.entries(types)) {
      const value = get(decoder, key);
      if (value === null) continue;
      const fits = Array.isArray(value) && BigInt(value.length) === layers;
      require(fits, key, value, `a list of num_hidden_layers=${layers} kinds of layers`);
      value.forEach((type, layer) =>
        require(type === expected(BigInt(layer)), `${key}[${layer}]`, type, `${expected(BigInt(layer))}: ${wanted}`));
    }
  }

  // ---- dsv2_ref.checks: values of which no layer can be made

  const isInt = (value, least) => typeof value === "bigint" && value >= least && value <= known.get("largest size");
  const isNumber = (value) => ["bigint", "number"].includes(typeof value) && value <= Number.MAX_VALUE && value >= -Number.MAX_VALUE;

  function requireEach(config, names, fits, wanted) {
    for (const name of names) require(fits(config[name]), name, config[name], wanted);
  }

  function requireInts(config, names, least, optional = false) {
    const wanted = `an integer of at least ${least}${optional ? " or None" : ""}, and at most 10^15`;
    requireEach(config, names, (value) => isInt(value, least) || (optional && value === null), wanted);
  }

  function requireNumbers(config, names, least, below = Infinity, above = false) {
    const from = `${above ? "above" : "at least"} ${inShort(least)}`;
    const wanted = `a finite number, ${from}${below < Infinity ? `, below ${inShort(below)}` : ""}`;
    const fits = (value) => (above ? least < value : least <= value) && value < below;
    requireEach(config, names, (value) => isNumber(value) && fits(value), wanted);
  }

  function requireStretch(given) {
    const scaling = Object.fromEntries([...known.get("stretch"), ...given]);
    const { type, beta_slow: slow } = scaling;
    requireNumbers(scaling, ["factor"], 1);
    requireInts(scaling, ["original_max_position_embeddings"], 1);
    requireNumbers(scaling, ["beta_slow", "mscale", "mscale_all_dim"], 0);
    requireNumbers(scaling, ["beta_fast"], slow);
    require(slow > 0, "beta_slow", slow, "above 0, and at most beta_fast");
    if (type === "yarn") return;
    for (const [name, value] of known.get("stretch"))
      require(equal(scaling[name], value), name, scaling[name], `nothing: ${type} scaling has no such setting`);
  }

  function requireConfiguration(config) {
    const [implementations, forms] = ["implementations", "forms"].map((part) => known.get(part));
    const sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    requireInts(config, [...sizes, "max_position_embeddings", "moe_layer_freq"], 1);
    requireInts(config, ["first_k_dense_replace"], 0);
    requireInts(config, ["num_key_value_heads", "n_shared_experts", "n_routed_experts", "q_lora_rank"], 1, true);
    const alphas = ["aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha"];
    requireNumbers(config, ["routed_scaling_factor", "initializer_range", ...alphas], 0);
    requireNumbers(config, ["attention_dropout"], 0, 1);
    requireNumbers(config, ["rms_norm_eps"], known.get("smallest eps"));
    requireNumbers(config, ["rope_theta"], 1, Infinity, true);
    const flags = ["norm_topk_prob", "seq_aux", "tie_word_embeddings", "attention_bias", "use_mla"];
    requireEach(config, flags, (flag) => typeof flag === "boolean", "True or False");
    requireEach(config, ["hidden_act"], (act) => act === "silu", "silu, as in every published model");
    requireEach(config, ["_attn_implementation"], (name) => implementations.includes(name), implementations.join(", "));
    requireEach(config, ["mla_form"], (name) => forms.includes(name), forms.join(", "));
    const { num_attention_heads: heads, num_key_value_heads: shared, hidden_size: hidden } = config;
    if (config.use_mla) {
      require(shared === null || shared === heads, "num_key_value_heads", shared, `${heads} or None: MLA has no KV heads`);
      requireInts(config, ["kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"], 1);
      require(config.qk_rope_head_dim % 2n === 0n, "qk_rope_head_dim", config.qk_rope_head_dim, "an even number");
    } else {
      const wanted = `a multiple of twice num_attention_heads=${heads}, for heads that rotate in pairs`;
      require(hidden % (2n * heads) === 0n, "hidden_size", hidden, wanted);
      require(shared === null || heads % shared === 0n, "num_key_value_heads", shared, `a divisor of ${heads}`);
    }
    if (config.n_routed_experts !== null) requireExperts(config, config.n_routed_experts);
  }

  function requireExperts(config, experts) {
    const [scores, methods] = ["scores", "methods"].map((part) => known.get(part));
    const grouped = config.topk_method !== "greedy";
    requireInts(config, ["moe_intermediate_size", "num_experts_per_tok"], 1);
    requireEach(config, ["scoring_func"], (name) => scores.includes(name), scores.join(" or "));
    requireEach(config, ["topk_method"], (name) => methods.includes(name), methods.join(", "));
    requireEach(config, ["device_aux_loss_alpha", "communication_aux_loss_alpha"], (alpha) => grouped || alpha == 0,
      "0 with greedy, which has no groups that could be devices");
    let [allowed, wanted] = [experts, `at most n_routed_experts=${experts}`];
    if (grouped) {
      requireInts(config, ["n_group", "topk_group"], 1);
      const { n_group: groups, topk_group: kept } = config;
      require(experts % groups === 0n, "n_group", groups, `a divisor of n_routed_experts=${experts}`);
      require(kept <= groups, "topk_group", kept, `at most n_group=${groups}`);
      const judged = config.topk_method === "noaux_tc" && kept < groups;
      require(!judged || 2n * groups <= experts, "n_group", groups, "two experts in a group, whose two best judge it");
      allowed = (kept * experts) / groups;
      wanted = `at most ${allowed}, the experts in topk_group=${kept} of n_group=${groups} groups`;
    }
    require(config.num_experts_per_tok <= allowed, "num_experts_per_tok", config.num_experts_per_tok, wanted);
  }

  return { Rejection, read };
})();
