"""The calculator in the page: its numbers are the accounting's, and whoever types nonsense is told so."""

import itertools
import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect

from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import PRESETS
from dsv2_ref.checks import LARGEST_SIZE
from dsv2_ref.config import DeepseekV2Config
from tests.published_configs import OTHERS, TOTALS, configs
from tests.site.conftest import ROOT, SITE
from tests.site.published_mutations import mutations
from tests.site.test_figure_roofline import seconds
from tools.figures.roofline import machines
from tools.pages import known_configurations

INTEGERS = """const integers = object => Object.fromEntries(Object.entries(object).map(
    ([name, value]) => [name, typeof value === "number" ? BigInt(value) : value]));"""
ACCOUNT = f"""cases => cases.map(([config, call]) => {{
    {INTEGERS}
    const found = dsv2.account(integers(config), integers(call));
    const text = value => typeof value === "bigint" ? value.toString() : value;
    return JSON.parse(JSON.stringify(found, (_, value) => text(value)));
}})"""
REFUSE = f"""cases => cases.map(([config, call]) => {{
    {INTEGERS}
    return dsv2.refusals(integers(config), integers(call)).map(([, sentence]) => sentence);
}})"""
# What the page reads from texts; of fields that a model has no use for, nothing.
READ = """([texts, names]) => texts.map(text => {
    try {
        const { config, said } = dsv2.read(text);
        const { total, active_per_token } = dsv2.account(config, { batch: 1n, seq: 1n, kv: 1n, form: "auto", dtype: "int8" }).parameters;
        const shown = names.filter(name => ["bigint", "boolean", "string"].includes(typeof config[name]));
        return { said, total: `${total}`, active: `${active_per_token}`,
            config: Object.fromEntries(shown.map(name => [name, String(config[name])])) };
    } catch (error) {
        return { rejected: error.message };
    }
})"""
# The fields that are shown, after a text was put in the box.
PASTE = """text => {
    const box = document.getElementById("calculator-config");
    box.value = text;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    const fields = [...document.querySelectorAll("#cost-calculator fieldset:not(:first-of-type) :is(input, select)")];
    const shown = fields.filter(field => field.checkVisibility());
    return Object.fromEntries(shown.map(field => [field.name, field.type === "checkbox" ? String(field.checked) : field.value]));
}"""
# Each value in each field that is shown, one after the other, and whether the page refuses it.
TYPE = """values => {
    const shown = field => field.checkVisibility() && field.type === "text";
    const fields = [...document.querySelectorAll("#cost-calculator input")].filter(shown);
    const type = (field, value) => {
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
    };
    return fields.flatMap(field => values.map(value => {
        const before = field.value;
        type(field, value);
        const refused = document.querySelectorAll("#cost-calculator [aria-invalid=true]").length > 0;
        type(field, before);
        return [field.name, value, refused];
    }));
}"""
TABLES = """() => Object.fromEntries([...document.querySelectorAll("#cost-calculator table")].map(table =>
    [table.caption.textContent, Object.fromEntries([...table.tBodies[0].rows].map(row =>
        [row.cells[0].textContent, [...row.cells].slice(1).map(cell => cell.textContent)]))]))"""
NAMES = [
    "use_mla",
    "attention_bias",
    "tie_word_embeddings",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "topk_method",
    "n_group",
    "topk_group",
]
CALL = ("batch", "seq", "kv", "form", "causal", "dtype", "weights", "group", "cache", "kept", "read")


@pytest.fixture(scope="module")
def opened(browser: Browser, origin: str) -> Iterator[Page]:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{origin}/book/calculator.html")
    yield page
    context.close()


@pytest.fixture
def page(opened: Page) -> Page:
    """The page with the calculator as it starts."""
    opened.set_viewport_size(ViewportSize(width=1280, height=900))
    opened.evaluate("dsv2.start(document.getElementById('cost-calculator'))")
    return opened


@cache
def read_by_the_package(text: str) -> dict[str, Any]:
    """What Python makes of the text of a file, in the form of READ."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = DeepseekV2Config.from_published(json.loads(text))
        except ValueError as error:
            return {"rejected": str(error)}
    matrices = acc.weights.model_matrices(config)
    stored, active = acc.weights.by_module(matrices), acc.weights.by_module(matrices, active=True)
    sizes = {name: value for name, value in given(config).items() if isinstance(value, bool | int | str)}
    return {
        "said": [str(warning.message) for warning in caught],
        "total": str(sum(stored.values())),
        "active": str(sum(active.values())),
        "config": {
            name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in sizes.items()
        },
    }


def random_sizes(draw: random.Random) -> dict[str, Any]:
    """Fields of a model, whose groups and heads may not fit each other."""
    heads, mla = draw.choice([1, 2, 8, 16, 128]), draw.random() < 0.7
    experts = draw.choice([None, 4, 64, 160])
    return {
        "vocab_size": draw.randrange(1, 200_000), "hidden_size": heads * draw.randrange(1, 120),
        "intermediate_size": draw.randrange(1, 20_000), "num_hidden_layers": draw.randrange(1, 80),
        "num_attention_heads": heads, "use_mla": mla,
        "num_key_value_heads": None if mla else draw.choice([None, 1, 3, heads]),
        "q_lora_rank": draw.choice([None, 1536, 7]), "kv_lora_rank": draw.randrange(1, 600),
        "qk_nope_head_dim": draw.randrange(1, 200), "qk_rope_head_dim": draw.choice([63, 2 * draw.randrange(1, 50)]),
        "v_head_dim": draw.randrange(1, 200), "n_routed_experts": experts, "n_shared_experts": draw.choice([None, 1, 2]),
        "num_experts_per_tok": draw.randrange(1, (experts or 6) + 2), "moe_intermediate_size": draw.randrange(1, 2000),
        "first_k_dense_replace": draw.randrange(0, 90), "moe_layer_freq": draw.randrange(1, 5),
        "topk_method": draw.choice(["greedy", "group_limited_greedy", "noaux_tc"]), "n_group": draw.choice([1, 2, 4, 5, 8]),
        "topk_group": draw.randrange(1, 6), "attention_bias": draw.random() < 0.5, "tie_word_embeddings": draw.random() < 0.5,
    }  # fmt: skip


def random_call(draw: random.Random) -> dict[str, Any]:
    """Fields of a call, whose bits and rows may fit neither each other nor a model."""
    seq = draw.choice([1, 7, 2048, draw.randrange(1, 100_000)])
    kv = seq + draw.choice([0, 8191, draw.randrange(200_000)])
    kept = draw.choice([None, None, draw.randrange(1, kv + 2), draw.randrange(seq, kv + 1)])
    return {
        "batch": draw.randrange(1, 512), "seq": seq, "kv": kv, "form": draw.choice(acc.FORMS),
        "causal": draw.random() < 0.5, "dtype": draw.choice(list(acc.DTYPE_BYTES)),
        "weights": draw.choice([None, None, *acc.WEIGHTS]), "group": draw.choice([2, 2, 2, 2, 4, 64, 64, 7]),
        "cache": draw.choice([None, None, None, *acc.CACHES]), "kept": kept,
        "read": draw.choice([None, None, draw.randrange(1, kv + 2), draw.randrange(1, (kept or kv) + 1), 1]),
    }  # fmt: skip


def reported(config: DeepseekV2Config, call: dict[str, Any]) -> dict[str, Any] | str:
    """The package's report on a call of a model, or what it says against it."""
    try:
        return acc.report(config, acc.Call(**call))
    except ValueError as error:
        return str(error)


def refusal(**fields: Any) -> str | None:
    """What the package says against a model of these sizes."""
    try:
        DeepseekV2Config(**fields)
    except ValueError as error:
        return str(error)
    return None


def given(config: DeepseekV2Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in NAMES}


def part_of_parameters(name: str) -> str:
    if name.startswith(("layers.mlp.gate", "layers.mlp.experts", "layers.mlp.shared_experts")):
        return "gates and experts"
    starts = {
        "embed_tokens": "embedding",
        "layers.self_attn": "attention",
        "layers.mlp": "dense networks",
        "lm_head": "head",
    }
    return next((part for start, part in starts.items() if name.startswith(start)), "norms")


def part_of_products(name: str) -> str | None:
    """None for what is no matrix product."""
    if name in ("self_attn.scores", "self_attn.values"):
        return "scores and values"
    starts = {
        "self_attn.": "projections of attention",
        "mlp.": "gates and experts",
        "mlp": "dense networks",
        "lm_head": "head",
    }
    return next((part for start, part in starts.items() if name.startswith(start)), None)


def by_part(counts: dict[str, int], part_of: Callable[[str], str | None]) -> dict[str, str]:
    sums: dict[str, int] = {}
    for name, count in counts.items():
        if part := part_of(name):
            sums[part] = sums.get(part, 0) + count
    return {part: str(count) for part, count in sums.items()}


def expected(config: DeepseekV2Config, call: acc.Call, found: Any = None) -> dict[str, Any]:
    found = found or acc.report(config, call)
    parameters, flops, sizes = found["parameters"], found["flops"], found["bytes"]
    expanded = "expanded" if config.use_mla else "mha"
    return {
        "total": str(parameters["total"]),
        "active": str(parameters["active_per_token"]),
        "stored parts": by_part(parameters["by_module"], part_of_parameters),
        "active parts": by_part(parameters["active_by_module"], part_of_parameters),
        "products": str(flops["products"]),
        "parts of products": by_part(flops["by_operation"], part_of_products),
        "weights": str(sizes["weights"]),
        "kv_cache": str(sizes["kv_cache"]),
        "kv_cache_read": str(sizes["kv_cache_read"]),
        "expanded": str(acc.cache_bytes(config, call.batch * call.rows, call.dtype, kind=expanded)),
        "a token": str(acc.cache_bytes(config, 1, call.dtype, cache=call.cache)),
        "form": found["config"]["call"]["form"],
    }


def answered(answer: dict[str, Any]) -> dict[str, Any]:
    def parts(counts: dict[str, str]) -> dict[str, str]:
        return {part: count for part, count in counts.items() if count != "0"}

    parameters, flops, sizes = answer["parameters"], answer["flops"], answer["bytes"]
    return {
        "total": parameters["total"],
        "active": parameters["active_per_token"],
        "stored parts": parts(parameters["by_part"]),
        "active parts": parts(parameters["active_by_part"]),
        "products": flops["products"],
        "parts of products": parts(flops["by_part"]),
        "weights": sizes["weights"],
        "kv_cache": sizes["kv_cache"],
        "kv_cache_read": sizes["kv_cache_read"],
        "expanded": sizes["kv_cache_expanded"],
        "a token": sizes["a_token"],
        "form": answer["form"],
    }


def test_models_are_accepted_and_refused_as_by_the_package_and_cost_the_same(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page shows no peaks, and the layer would have to run for each.
    monkeypatch.setattr(acc.summary, "activation_peak", lambda *args: None)
    draw = random.Random(0)
    models = [random_sizes(draw) for _ in range(400)]
    refused = [refusal(**fields) for fields in models]
    any_call = {name: getattr(acc.Call(), name) for name in CALL}
    for fields, wanted, said in zip(
        models, refused, page.evaluate(REFUSE, [[fields, any_call] for fields in models]), strict=True
    ):
        assert (wanted in said) if wanted else said == [], fields
    kinds = {sentence.split(" is ")[0] for sentence in refused if sentence}
    assert kinds == {
        "hidden_size",
        "num_key_value_heads",
        "qk_rope_head_dim",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
    }
    built = [DeepseekV2Config(**fields) for fields, wanted in zip(models, refused, strict=True) if wanted is None]
    tried = [(config, random_call(draw)) for config in built for _ in range(3)]
    sent = [(given(config), call) for config, call in tried]
    found = [reported(config, call) for config, call in tried]
    for case, one, said in zip(tried, found, page.evaluate(REFUSE, sent), strict=True):
        assert (one in said) if isinstance(one, str) else said == [], (case, one, said)
    against = {re.sub(r"\d+", "0", one).split(",")[0] for one in found if isinstance(one, str)}
    assert {sentence.split(" is ")[0] for sentence in against} == {"weights", "group", "cache", "kept", "read"}

    cases = [
        (config, acc.Call(**call), one)
        for (config, call), one in zip(tried, found, strict=True)
        if not isinstance(one, str)
    ]
    assert len(cases) > 100
    for name in ("weights", "cache"):
        assert {getattr(call, name) for _, call, _ in cases} == {None, "fp8", "int8", "int4"}
    sent = [(given(config), {name: getattr(call, name) for name in CALL}) for config, call, _ in cases]
    answers = page.evaluate(ACCOUNT, json.loads(json.dumps(sent)))
    for (config, call, one), answer in zip(cases, answers, strict=True):
        assert answered(answer) == expected(config, call, one), (config, call)
        read = one["bytes"]["weights_read"]
        assert math.isclose(int(answer["bytes"]["weights_read"]), read, rel_tol=1e-12), (config, call)


def test_halves_of_bytes_are_rounded_as_by_the_package(page: Page) -> None:
    """Two tokens choose one of two experts of three bytes: on average one and a half are read, 4.5 bytes."""
    config = replace(
        DeepseekV2Config.tiny(), hidden_size=1, moe_intermediate_size=1, n_routed_experts=2, num_experts_per_tok=1
    )
    call = acc.Call(seq=2, kv=2, dtype="int8")
    sent = [(given(config), {name: getattr(call, name) for name in CALL})]
    read = int(page.evaluate(ACCOUNT, json.loads(json.dumps(sent)))[0]["bytes"]["weights_read"])
    assert read == acc.report(config, call)["bytes"]["weights_read"]


@pytest.mark.parametrize("preset", ["deepseek_v2", "deepseek_ocr"])
def test_a_field_takes_what_the_package_takes(page: Page, preset: str) -> None:
    page.get_by_label("start from").select_option(preset)
    page.get_by_label("weights", exact=True).select_option("int4")
    config = getattr(DeepseekV2Config, preset)()

    def is_taken(name: str, value: str) -> bool:
        number = int(value) if value else None
        try:
            call = acc.Call(kv=8192, weights="int4")
            if name in CALL:
                acc.model_weight_bytes(config, replace(call, **{name: number}))
            else:
                acc.model_weight_bytes(replace(config, **{name: number}), call)
        except ValueError:
            return False
        return True

    tried = page.evaluate(TYPE, ["", "-1", "0", "1", "7", "20", str(LARGEST_SIZE), str(LARGEST_SIZE + 1)])
    names = set(NAMES) - {"use_mla", "attention_bias", "tie_word_embeddings", "topk_method"}
    names |= {"batch", "seq", "kv", "group", "kept", "read"}
    latent = {
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
    }
    assert {name for name, _, _ in tried} == names - ({"num_key_value_heads"} if config.use_mla else latent)
    assert [(name, value) for name, value, refused in tried if refused == is_taken(name, value)] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tables_show_the_accounting_of_every_preset(page: Page, preset: str) -> None:
    page.get_by_label("start from").select_option(preset)
    found = expected(getattr(DeepseekV2Config, preset)(), acc.Call(kv=8192))
    shown = page.evaluate(TABLES)

    def exact(caption: str, column: int) -> dict[str, str]:
        return {row: cells[column].replace(",", "") for row, cells in shown[caption].items()}

    assert exact("Parameters", 0) == found["stored parts"] | {"total": found["total"]}
    assert exact("Parameters", 1) == found["active parts"] | {"total": found["active"]}
    assert exact("FLOPs of the call", 0) == found["parts of products"] | {"total": found["products"]}
    short = shown["In short"]
    share = 100 * int(found["active"]) / int(found["total"])
    assert short["active per token"][0].endswith(f"({share:.1f} %)")
    assert short["cache per token"] == [f"{int(found['a token']):,} B"]


def test_groups_bound_the_choice_of_experts(page: Page) -> None:
    chosen, invalid = page.get_by_label("num_experts_per_tok"), page.locator("#cost-calculator [aria-invalid=true]")
    chosen.fill("60")  # all of 3 of 8 groups of 160 experts
    expect(invalid).to_have_count(0)
    chosen.fill("61")
    expect(page.locator("#calculator-num_experts_per_tok-refusal")).to_have_text(
        "num_experts_per_tok is 61; wanted at most 60, the experts in topk_group=3 of n_group=8 groups"
    )
    page.get_by_label("topk_method").select_option("noaux_tc")
    page.get_by_label("n_group").fill("160")
    page.get_by_label("topk_group").fill("159")
    expect(page.locator("#calculator-n_group-refusal")).to_have_text(
        "n_group is 160; wanted two experts in a group, whose two best judge it"
    )
    page.get_by_label("topk_group").fill("160")
    expect(invalid).to_have_count(0)
    page.get_by_label("topk_method").select_option("greedy")
    expect(invalid).to_have_count(0)
    expect(page.get_by_label("n_group")).to_be_hidden()
    page.get_by_label("n_routed_experts").fill("")
    expect(page.get_by_label("topk_method")).to_be_hidden()


def test_presets_are_the_packages(page: Page) -> None:
    told = page.evaluate(
        "JSON.parse(JSON.stringify(dsv2.PRESETS, (_, value) => typeof value === 'bigint' ? Number(value) : value))"
    )
    assert sorted(told) == sorted(PRESETS)
    for name, preset in told.items():
        assert preset == given(getattr(DeepseekV2Config, name)()), name


def test_a_reader_chooses_a_model_and_a_context(page: Page) -> None:
    results = page.locator("#cost-calculator .results")
    expect(results).to_contain_text("235,741,434,880")
    page.get_by_label("start from").select_option("deepseek_v2_lite")
    expect(results).to_contain_text("15,706,484,224")
    page.get_by_label("tokens attended to").fill("100000")
    expect(results).to_contain_text("3.11 GB")  # 100,000 tokens of 31,104 bytes
    expect(results.locator("svg")).to_have_attribute("aria-label", "Cache over context: 3.11 GB at 100,000 tokens, "
        "32.6 GB at 1,048,576; the weights take 31.4 GB.")  # fmt: skip
    page.get_by_label("num_hidden_layers").fill("54")
    expect(page.get_by_label("start from")).to_have_value("own")
    expect(results).to_contain_text("6.22 GB")


@pytest.mark.parametrize(
    ("label", "typed", "said"),
    [
        ("hidden_size", "many", "hidden_size is 'many'; wanted a whole number from 1 to 1,000,000,000,000,000"),
        ("num_hidden_layers", "-3", "num_hidden_layers is '-3'"),
        ("num_hidden_layers", "", "num_hidden_layers is ''"),
        ("vocab_size", "1.5", "vocab_size is '1.5'"),
        ("vocab_size", "9999999999999999999999", "wanted a whole number"),
        ("vocab_size", "1,5", "vocab_size is '1,5'"),
        ("vocab_size", "9" * 500, f"vocab_size is '{'9' * 40}…'; wanted a whole number"),
        ("qk_rope_head_dim", "63", "qk_rope_head_dim is 63; wanted an even number"),
        ("num_experts_per_tok", "161", "wanted at most 60, the experts in topk_group=3 of n_group=8 groups"),
        ("seq: new tokens of each", "9000", "kv is 8192; wanted at least the 9000 new tokens"),
    ],
)
def test_nonsense_is_named_beside_the_field_and_never_shown(page: Page, label: str, typed: str, said: str) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(typed)
    invalid = page.locator("#cost-calculator [aria-invalid=true]")
    expect(invalid).to_have_count(1)
    described = invalid.get_attribute("aria-describedby")
    expect(page.locator(f"#{described}")).to_contain_text(said)
    expect(page.locator("#cost-calculator .results")).to_have_class("results stale")
    status = page.locator("#cost-calculator").get_by_role("status")
    expect(status).to_contain_text(said)
    expect(status).to_contain_text("The numbers below are those of the last input that could be read.")
    text = page.locator("#cost-calculator").inner_text()
    assert not any(word in text for word in ("NaN", "Infinity", "undefined"))


def test_two_errors_are_named_each_beside_its_field(page: Page) -> None:
    page.get_by_label("vocab_size").fill("x")
    page.get_by_label("qk_rope_head_dim").fill("63")
    page.get_by_label("new tokens of each").fill("9000")
    for name, said in (
        ("vocab_size", "is 'x'"),
        ("qk_rope_head_dim", "wanted an even number"),
        ("kv", "at least the 9000"),
    ):
        expect(page.locator(f"#calculator-{name}-refusal")).to_contain_text(said)
    expect(page.locator("#cost-calculator [aria-invalid=true]")).to_have_count(3)
    expect(page.locator("#cost-calculator").get_by_role("status")).to_contain_text("(and 2 more)")
    results = page.locator("#cost-calculator .results > *").first
    assert float(results.evaluate("element => getComputedStyle(element).opacity")) < 0.8
    page.get_by_label("vocab_size").fill("100")
    page.get_by_label("qk_rope_head_dim").fill("64")
    page.get_by_label("new tokens of each").fill("1")
    expect(page.locator("#cost-calculator .results.stale")).to_have_count(0)


def test_the_machine_bounds_the_call_by_reading_and_by_arithmetic(page: Page) -> None:
    draw = random.Random(1)
    for preset, size in itertools.product(PRESETS, (1, 16, 512)):
        config = getattr(DeepseekV2Config, preset)()
        call = acc.Call(batch=size, kv=draw.randrange(2, 9000))
        sent = [[given(config), {name: getattr(call, name) for name in CALL}]]
        read = int(page.evaluate(ACCOUNT, json.loads(json.dumps(sent)))[0]["bytes"]["weights_read"])
        assert math.isclose(read, acc.report(config, call)["bytes"]["weights_read"], rel_tol=1e-12)
    page.get_by_label("start from").select_option("deepseek_v2_lite")
    for name, machine in machines().items():
        page.get_by_label("machine").select_option(name)
        config = DeepseekV2Config.deepseek_v2_lite()
        found = acc.report(config, acc.Call(kv=8192))
        sizes = found["bytes"]
        times = [(sizes["weights_read"] + sizes["kv_cache"]) / machine["bandwidth"]]
        times.append(found["flops"]["products"] / machine["peak"])
        cells = page.evaluate(TABLES)[f"On the machine: {name}"]
        held = f"{machine['memory'] / 1e9:.0f}"
        wanted = rf"31.7 GB, {'of' if machine['memory'] > 31.7e9 else 'more than'} {held}(\.\d)? GB"
        assert re.fullmatch(wanted, cells["memory for weights and cache"][0])
        assert cells["reading weights and cache"] == [seconds(times[0])]
        assert cells["computing the products"] == [seconds(times[1])]


def test_the_address_holds_what_differs_from_the_preset(page: Page, origin: str) -> None:
    tab = page.context.new_page()
    tab.goto(f"{origin}/book/calculator.html")
    tab.get_by_label("start from").select_option("deepseek_v2_lite")
    tab.get_by_label("tokens attended to").fill("4096")
    tab.get_by_label("num_hidden_layers").fill("54")
    tab.get_by_label("machine").select_option("laptop CPU")
    tab.get_by_label("tie_word_embeddings").check()
    tab.wait_for_function("location.search.includes('tie_word')")
    query = parse_qs(urlsplit(tab.url).query)
    differs = {"num_hidden_layers": ["54"], "tie_word_embeddings": ["true"], "kv": ["4096"], "machine": ["laptop CPU"]}
    assert query == {"preset": ["deepseek_v2_lite"]} | differs
    status = tab.locator("#cost-calculator [role=status]")
    before = status.inner_text()
    tab.reload()
    expect(status).to_have_text(before)
    expect(tab.get_by_label("start from")).to_have_value("own")
    expect(tab.get_by_label("machine")).to_have_value("laptop CPU")
    tab.goto(f"{origin}/book/calculator.html?preset=nonsense&machine=abacus&kv=x&constructor=1")
    expect(tab.get_by_label("machine")).to_have_value("H100 (SXM)")
    expect(status).to_contain_text("kv is 'x'")
    tab.close()


def test_one_line_is_read_out_when_a_number_changes(page: Page) -> None:
    live = page.locator("#cost-calculator :is([role=status], [role=alert], [aria-live])")
    expect(live).to_have_text("Parameters 236 billion, 20.9 billion active; weights 471 GB, cache of 8,192 tokens 566 MB; "
        "the call takes 179 GFLOP.")  # fmt: skip
    page.get_by_label("dtype").select_option("int8")
    expect(live).to_contain_text("weights 236 GB, cache of 8,192 tokens 283 MB")


@pytest.mark.parametrize("typed", ["100000", " 100000 ", "100,000", "100_000", "100 000"])
def test_digits_may_stand_in_groups_of_three(page: Page, typed: str) -> None:
    page.get_by_label("tokens attended to").fill(typed)
    expect(page.get_by_role("rowheader", name="cache of")).to_have_text("cache of 100,000 tokens")


def test_numbers_beyond_all_units_are_powers_of_ten(page: Page) -> None:
    page.set_viewport_size(ViewportSize(width=320, height=640))
    for name in [*NAMES[3:-3], "batch", "seq", "kv"]:
        field = page.locator(f"#calculator-{name}")
        if field.is_visible() and name not in ("n_routed_experts", "first_k_dense_replace"):
            field.fill(str(LARGEST_SIZE))
    page.get_by_label("num_experts_per_tok").fill("6")
    text = page.locator("#cost-calculator").inner_text()
    assert "The numbers below" not in text
    assert re.search(r"parameters\t[1-9]\.\d\d × 10[⁰-⁹²³¹]{2}\n", text)
    assert not any(word in text for word in ("NaN", "Infinity", "undefined"))
    assert re.findall(r"\d{4,}(?:\.\d+)? [kMGTPEZY]?(?:B|FLOP)\b", text) == []
    labels = page.locator("#cost-calculator svg text").all_text_contents()
    assert len(labels) > 6
    assert all(re.fullmatch(r"10+ [kMGTPEZY]?B|10[⁰-⁹²³¹]+ B|[\d,]+|tokens of context", label) for label in labels)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(1, "34.6 kB"), (28, "968 kB"), (29, "1.00 MB"), (10**12, "34.6 PB"), (10**15, "34.6 EB")],
)
def test_units_go_on_where_three_digits_end(page: Page, tokens: int, shown: str) -> None:
    page.get_by_label("dtype").select_option("int8")
    page.get_by_label("tokens attended to").fill(str(tokens))
    expect(page.get_by_role("row", name="cache of").get_by_role("cell")).to_have_text(shown)


def test_every_dtype_of_the_accounting_can_be_chosen(page: Page) -> None:
    options = page.get_by_label("dtype").locator("option").evaluate_all("found => found.map(each => each.value)")
    assert options == list(acc.DTYPE_BYTES)
    results = page.locator("#cost-calculator .results")
    expect(results).to_contain_text("69,120 B")
    page.get_by_label("dtype").select_option("int8")
    expect(results).to_contain_text("34,560 B")


def step_of(draw: random.Random) -> dict[str, Any]:
    """Fields of a call in training, most of which fit, and how it is trained."""
    seq = draw.choice([1, 64, 4096, draw.randrange(1, 9000)])
    odd = {"kv": seq + 1, "weights": "int8", "cache": "fp8", "dtype": "int8"}
    call = {"batch": draw.randrange(1, 64), "seq": seq, "kv": seq, "form": draw.choice(acc.FORMS)}
    call |= {"causal": draw.random() < 0.5, "dtype": draw.choice(["float64", "float32", "bfloat16", "float16"])}
    if draw.random() < 0.2:
        name = draw.choice(list(odd))
        call[name] = odd[name]
    return {name: call.get(name, getattr(acc.Call(), name)) for name in CALL}


def test_training_costs_what_the_package_says(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acc.summary, "activation_peak", lambda *args: None)  # no layer is run for it
    draw = random.Random(2)
    models = [fields for fields in (random_sizes(draw) for _ in range(300)) if refusal(**fields) is None]
    assert len(models) > 40
    cases, found = [], []
    for fields in models:
        config, call = DeepseekV2Config(**fields), step_of(draw)
        mode, optimizer = draw.choice([None, *acc.CHECKPOINTING]), draw.choice(list(acc.OPTIMIZERS))
        how = {"training": True, "checkpointing": mode, "optimizer": optimizer}
        cases.append([given(config), call | how])
        try:
            found.append(acc.report(config, acc.Call(**call), None, *how.values())["training"])
        except ValueError as error:
            found.append(str(error))
    for case, one, said in zip(cases, found, page.evaluate(REFUSE, cases), strict=True):
        assert (one in said) if isinstance(one, str) else said == [], (case, one, said)
    assert {one.split(" is ")[0] for one in found if isinstance(one, str)} == {"kv", "weights", "cache", "dtype"}
    kept = [(case, one) for case, one in zip(cases, found, strict=True) if not isinstance(one, str)]
    for (case, one), answer in zip(kept, page.evaluate(ACCOUNT, [case for case, _ in kept]), strict=True):
        told, sizes = answer["training"], one["bytes"]
        assert told["flops"] == {part: str(one["flops"][part]) for part in told["flops"]}, case
        assert told["bytes"] == {name: str(sizes[name]) for name in told["bytes"]}, case
        assert told["flops"].keys() | {"total", "by_operation"} == one["flops"].keys()
        assert told["bytes"].keys() | {"activations", "total"} == sizes.keys()


def test_a_reader_chooses_a_training_step(page: Page, origin: str) -> None:
    tab = page.context.new_page()
    tab.goto(f"{origin}/book/calculator.html")
    for name in ("checkpointing", "optimizer"):
        expect(tab.get_by_label(name, exact=True)).to_be_hidden()
    tab.get_by_label("start from").select_option("deepseek_v2_lite")
    tab.get_by_label("new tokens of each").fill("4096")
    tab.get_by_label("weights", exact=True).select_option("int4")
    tab.get_by_label("a training step").check()
    tab.get_by_label("checkpointing", exact=True).select_option("selective")
    for name in ("kv: tokens attended to", "weights", "cache: latents", "kept: rows in the cache"):
        expect(tab.get_by_label(name, exact=True)).to_be_hidden()
    lite, call = DeepseekV2Config.deepseek_v2_lite(), acc.Call(seq=4096, kv=4096)
    flops = {name: sum(counts.values()) for name, counts in acc.step_flops(lite, call, None, "selective").items()}
    sizes = acc.state_bytes(lite, call)
    shown = tab.evaluate(TABLES)
    rows = {name.replace("_", " "): [f"{count:,}"] for name, count in flops.items()}
    assert shown["FLOPs of a training step"] == rows | {"total": [f"{sum(flops.values()):,}"]}
    rows = {name.replace("_", " "): [f"{count:,}"] for name, count in sizes.items()}
    assert shown["Bytes held from step to step"] == rows | {"total": [f"{sum(sizes.values()):,}"]}
    status = tab.locator("#cost-calculator [role=status]")
    expect(status).to_have_text(
        "A training step of 4,096 tokens takes 85.5 TFLOP; weights, gradients and optimizer 251 GB."
    )
    machine = next(rows for caption, rows in shown.items() if caption.startswith("On the machine"))
    assert machine["memory for weights, gradients and optimizer"][0].startswith("251 GB, more than ")
    assert "reading weights and cache" not in machine
    tab.wait_for_function("location.search.includes('training')")
    tab.reload()
    expect(status).to_contain_text("85.5 TFLOP")
    tab.get_by_label("optimizer", exact=True).select_option("sgd")
    expect(status).to_contain_text("optimizer 126 GB")
    tab.get_by_label("dtype").select_option("int8")
    refused = tab.locator("#calculator-dtype-refusal")
    expect(refused).to_have_text("dtype is 'int8'; wanted a floating-point dtype: no layer is trained in int8")
    tab.get_by_label("a training step").uncheck()
    expect(refused).to_be_empty()
    expect(tab.get_by_label("weights", exact=True)).to_have_value("int4")
    tab.close()


def test_a_reader_chooses_fewer_bits_and_rows(page: Page) -> None:
    results, status = page.locator("#cost-calculator .results"), page.locator("#cost-calculator").get_by_role("status")
    page.get_by_label("start from").select_option("deepseek_v2_lite")
    group = page.get_by_label("group: weights per scale")
    expect(group).to_be_hidden()
    page.get_by_label("weights", exact=True).select_option("int4")
    expect(group).to_have_value("64")
    page.get_by_label("cache: latents").select_option("fp8")
    expect(results).to_contain_text(f"{27 * 656:,} B")
    expect(status).to_contain_text("weights 8.97 GB, cache of 8,192 tokens 145 MB")
    page.get_by_label("kept: rows in the cache").fill("512")
    expect(status).to_contain_text("cache of 512 tokens 9.07 MB")
    label = "Cache over context: 9.07 MB at 8,192 tokens, 9.07 MB at 1,048,576; the weights take 8.97 GB."
    expect(results.locator("svg")).to_have_attribute("aria-label", label)
    page.get_by_label("read: rows per query").fill("64")
    call = acc.Call(kv=8192, weights="int4", cache="fp8", kept=512, read=64)
    found = acc.report(DeepseekV2Config.deepseek_v2_lite(), call)
    cells = page.evaluate(TABLES)
    assert cells["FLOPs of the call"]["total"] == [f"{found['flops']['products']:,}"]
    read = (found["bytes"]["weights_read"] + found["bytes"]["kv_cache_read"]) / machines()["H100 (SXM)"]["bandwidth"]
    assert cells["On the machine: H100 (SXM)"]["reading weights and cache"] == [seconds(read)]
    for field, typed, said in (
        (group, "128", "group is 128; wanted a divisor of 10944, the inputs of down_proj, such as 64"),
        (group, "7", "group is 7; wanted an even number, 2 or more"),
        (page.get_by_label("kept: rows in the cache"), "9000", "kept is 9000; wanted None, or from seq=1 to kv=8192"),
        (page.get_by_label("read: rows per query"), "513", "read is 513; wanted None, or from 1 to the 512 rows in the cache"),
    ):  # fmt: skip
        before = field.input_value()
        field.fill(typed)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(page.locator(f"#{field.get_attribute('aria-describedby')}")).to_have_text(said)
        expect(status).to_contain_text(said)
        field.fill(before)
        expect(results).to_have_class("results")
    page.get_by_label("dtype").select_option("int8")
    for name, kind in (("weights", "int4"), ("cache", "fp8")):
        said = f"{name} is '{kind}'; wanted None for the dtype int8, which has no scales"
        expect(page.locator(f"#calculator-{name}-refusal")).to_have_text(said)
    page.get_by_label("dtype").select_option("bfloat16")
    page.get_by_label("use_mla").uncheck()
    expect(page.get_by_label("cache: latents")).to_be_hidden()
    expect(results).to_have_class("results")


def test_bits_and_rows_stay_in_the_address(page: Page, origin: str) -> None:
    tab = page.context.new_page()
    tab.goto(f"{origin}/book/calculator.html?preset=deepseek_v2_lite&weights=int4&group=32&cache=int4&kept=100&read=9")
    status = tab.locator("#cost-calculator [role=status]")
    expect(status).to_contain_text("cache of 100 tokens 1.08 MB")
    tab.get_by_label("read: rows per query").fill("8")
    tab.wait_for_function("location.search.includes('read=8')")
    query = parse_qs(urlsplit(tab.url).query)
    wanted = {
        "preset": "deepseek_v2_lite",
        "weights": "int4",
        "group": "32",
        "cache": "int4",
        "kept": "100",
        "read": "8",
    }
    assert query == {name: [value] for name, value in wanted.items()}
    tab.close()


def test_a_model_without_latents_has_one_cache(page: Page) -> None:
    expect(page.get_by_role("rowheader", name="cache, expanded")).to_have_count(1)
    page.get_by_label("start from").select_option("deepseek_ocr")
    expect(page.get_by_role("rowheader", name="cache, expanded")).to_have_count(0)


def test_it_works_by_keyboard(page: Page) -> None:
    page.get_by_label("text of the file").focus()
    names = []
    for _ in range(50):
        names.append(page.evaluate("document.activeElement.name || ''"))
        page.keyboard.press("Tab")
    visible = page.evaluate("[...document.querySelectorAll('#cost-calculator :is(input, select, textarea)')]"
                            ".filter(field => field.checkVisibility()).map(field => field.name)")  # fmt: skip
    assert names[: len(visible)] == visible


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_kind_of_model_is_accessible_and_fits_a_phone(browser: Browser, origin: str, colours: str) -> None:
    phone = ViewportSize(width=390, height=844)
    page = browser.new_page(color_scheme=colours, viewport=phone, reduced_motion="reduce")
    page.goto(f"{origin}/book/calculator.html")
    chart = page.locator("#cost-calculator svg")
    for width in (1280, 390):  # it is drawn anew when the screen turns
        page.set_viewport_size(ViewportSize(width=width, height=844))
        expect(chart).to_have_attribute("width", "640" if width == 1280 else re.compile(r"3\d\d"))
        letters = chart.locator("text").evaluate_all(
            "found => found.map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"
        )
        assert min(letters) >= 11
        ends = chart.locator("text").evaluate_all("found => found.map(text => text.getBoundingClientRect().right)")
        assert max(ends) <= width
    for preset, read in {"deepseek_v2": "v3", "deepseek_ocr": "llama"}.items():
        page.get_by_label("start from").select_option(preset)
        page.get_by_label("vocab_size").fill("x" if preset == "deepseek_ocr" else "1000")
        page.get_by_label("text of the file").fill(json.dumps(configs()[read] | {"an_unknown_key" * 9: 1}))
        page.get_by_label("weights", exact=True).select_option("int4")
        page.get_by_label("read: rows per query").fill("9" if preset == "deepseek_v2" else "9999")
        violations = Axe().run(page).response["violations"]
        assert [(found["id"], node["html"]) for found in violations for node in found["nodes"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


# A model's own config.json


def test_the_page_has_the_packages_table() -> None:
    written = (SITE / "_static/published.js").read_text(encoding="utf-8")
    assert written == known_configurations(), "build the book again"
    pages = [
        path.name
        for path in (SITE / "book").glob("*.html")
        if "_static/published.js" in path.read_text(encoding="utf-8")
    ]
    assert pages == ["calculator.html"]


def test_files_are_read_or_rejected_as_by_the_package(page: Page) -> None:
    accepted, keys = 0, set()
    for name in configs():
        texts = mutations(name, 200)
        wanted = [read_by_the_package(text) for text in texts]
        found = page.evaluate(READ, [texts, NAMES])
        for text, one, other in zip(texts, wanted, found, strict=True):
            assert other == one, text
        assert wanted[0].get("total") == (str(TOTALS[name]) if name in TOTALS else None)
        accepted += sum("rejected" not in one for one in wanted)
        keys |= {one["rejected"].split(" is ")[0] for one in wanted if "rejected" in one}
    assert accepted > 900
    assert len(keys) > 100


@pytest.mark.parametrize("name", TOTALS)
def test_a_pasted_file_fills_the_fields_that_its_model_has(page: Page, name: str) -> None:
    shared = {"batch": "1", "seq": "1", "kv": "8192", "dtype": "bfloat16", "form": "auto", "causal": "true"}
    shared |= {"training": "false"}
    tried = 0
    for text in mutations(name, 40):
        wanted = read_by_the_package(text)
        if "rejected" in wanted:
            continue
        fields = page.evaluate(PASTE, text)
        assert fields.pop("preset") == "own"
        machine, form = fields.pop("machine"), fields.get("form", "auto")
        empty = {field for field in fields if fields[field] == ""}
        assert {field: value for field, value in fields.items() if value} == {
            field: value
            for field, value in {**wanted["config"], **shared, "form": form}.items()
            if field in fields and field not in empty
        }
        assert machine == "H100 (SXM)"
        assert not empty & wanted["config"].keys()
        expect(page.locator("#cost-calculator [aria-invalid=true]")).to_have_count(0)
        total = page.evaluate(TABLES)["Parameters"]["total"]
        assert [cell.replace(",", "") for cell in total] == [wanted["total"], wanted["active"]]
        tried += 1
    assert tried > 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the text is not JSON: "),
        ("many", "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "rope_theta": NaN}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "rope_theta": -Infinity}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "hidden_size": 0x10}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "hidden_size": 01}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "hidden_size": 1.}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2", "hidden_size": "1\\2}', "the text is not JSON: "),
        ('{"model_type": "deepseek_v2",}', "the text is not JSON: "),
        ('\ufeff{"model_type": "deepseek_v2"}', "the text is not JSON: it begins with a byte order mark"),
        (f'{{"model_type": "deepseek_v2", "x": {"9" * 4301}}}', "the text is not JSON that can be read: an integer of more"),
        ("[" * 10**5 + "]" * 10**5, "the text is not JSON that can be read: nested too deeply"),
        ('{"x":' * 10**5 + "1" + "}" * 10**5, "the text is not JSON that can be read: nested too deeply"),
        ('{"model_type": "deepseek_v2", "hidden_size": 64, "hidden_\\u0073ize": 64}', "the text says 'hidden_size' twice"),
        ('{"x": {"b": [{"a": "{", "a" \n: 1}], "b": "\\"a\\": "}, "x": "a"}', "the text says 'a, b, x' twice"),
        ("[]", "the configuration is a list of 0; wanted a JSON object"),
        ("12", "the configuration is 12; wanted a JSON object"),
        ("null", "the configuration is None; wanted a JSON object"),
        ('{"weight_map": {}}', "the configuration is the index of a checkpoint, as its key weight_map says; wanted a model's"),
        ('{"model_type": "deepseek_v2", "hidden_size": 2.048e3}', "hidden_size is 2048.0; wanted an integer of at least 1"),
        ('{"model_type": "deepseek_v2", "hidden_size": -0}', "hidden_size is 0; wanted"),
        ('{"model_type": "deepseek_v2", "hidden_size": -0.0}', "hidden_size is -0.0; wanted"),
        ('{"model_type": "deepseek_v2", "rope_theta": 1e400}', "rope_theta is inf; wanted a finite number, above 1"),
        ('{"model_type": "deepseek_v2", "rms_norm_eps": 1E-30}', "rms_norm_eps is 1e-30; wanted a finite number, at least 5.16988e-26"),
    ],
)  # fmt: skip
def test_a_text_that_is_rejected_is_told_why(page: Page, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        DeepseekV2Config.from_published(path)
    assert said.startswith("the text is not JSON") == str(caught.value).startswith(f"{path} is not JSON")
    page.evaluate(PASTE, text)
    refusal = page.locator("#calculator-config-refusal")
    expect(refusal).to_contain_text(said)
    expect(page.get_by_label("text of the file")).to_have_attribute("aria-invalid", "true")
    status = page.locator("#cost-calculator").get_by_role("status")
    expect(status).to_contain_text(said)
    expect(status).to_contain_text("The numbers below are those of the last input that could be read.")
    assert len(refusal.inner_text()) < 500
    page.get_by_label("vocab_size").fill("1000")  # whoever goes on is not held up
    expect(refusal).to_have_text("")
    expect(page.locator("#cost-calculator .results.stale")).to_have_count(0)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "deepseek_v2", "hidden_size": 4096, "x": [1e400, "\\ud800\\"\\\\", {"x": 1}]}',
        ' \n{"model_type":\t"deepseek_v2" , "7": 1, "rope_theta": 1E+4, "__proto__": {"vocab_size": 5}}\r\n',
        f'{{"model_type": "deepseek_v2", "x": {"9" * 4300}, "y": {"[" * 900}{"]" * 900}}}',
    ],
)
def test_odd_texts_are_read_as_by_the_package(page: Page, text: str) -> None:
    found = page.evaluate(READ, [[text], NAMES])[0]
    assert found == read_by_the_package(text)
    assert "rejected" not in found


def test_values_are_named_as_in_python(page: Page) -> None:
    draw = random.Random(0)
    values: list[Any] = [draw.uniform(1, 10) * 10.0 ** draw.randrange(-30, 30) for _ in range(300)]
    values += [10.0**power for power in range(-20, 25)] + [12345678.9, 2.5, 1 / 3, 5e-324, 1.7976931348623157e308]
    values += ["".join(chr(draw.randrange(0x20, 0x250)) for _ in range(9)) for _ in range(200)]
    values += ["'", '"', "'\"", "\\", "\n\r\t\0\x7f\x80", "\u2028\ue000", "𝄞\U000e0001"]
    values += [{"it's": [None, True, {"a": 1.0}]}, {}, []]
    texts = [json.dumps({"model_type": "deepseek_v2", "hidden_size": value}) for value in values]
    texts += [
        json.dumps(
            {
                "model_type": "deepseek_v2",
                "rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0, "beta_slow": value},
            }
        )
        for value in values[:350]
    ]
    assert page.evaluate(READ, [texts, NAMES]) == [read_by_the_package(text) for text in texts]


def test_a_reader_pastes_a_file(page: Page) -> None:
    box, status = page.get_by_label("text of the file"), page.locator("#cost-calculator").get_by_role("status")
    box.fill(json.dumps(configs()["v3"] | {"zebra": 1, "<img>": 2}))
    said = "Read as deepseek_v3; not known, and so not read from the configuration: zebra, <img>."
    expect(page.locator("#calculator-config-read")).to_have_text(said)
    expect(status).to_contain_text(f"{said} Parameters 671 billion")
    expect(page.get_by_label("start from")).to_have_value("own")
    expect(page.get_by_label("topk_method")).to_have_value("noaux_tc")
    page.get_by_label("tokens attended to").fill("4096")
    expect(status).to_contain_text(re.compile("^Parameters 671 billion"))  # said once
    expect(page.locator("#calculator-config-read")).to_have_text(said)
    page.get_by_label("num_hidden_layers").fill("5")
    expect(page.locator("#calculator-config-read")).to_have_text("")
    box.fill(json.dumps(configs()[next(iter(OTHERS))]))
    expect(page.locator("#calculator-config-refusal")).to_contain_text(
        "model_type is 'glm_moe_dsa'; wanted one of deepseek_v2, "
    )
    expect(page.get_by_label("num_hidden_layers")).to_have_value("5")
    box.fill("")
    expect(page.locator("#cost-calculator [aria-invalid=true]")).to_have_count(0)
    box.fill(json.dumps({"model_type": "deepseek_v2", "topk_method": "gready"}))
    expect(status).to_contain_text("Read as deepseek_v2; topk_method 'gready' is a misspelling")


def test_a_reader_chooses_or_drops_a_file(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    chooser, refusal = page.get_by_label("or the file itself"), page.locator("#calculator-config-refusal")

    def choose() -> None:
        with page.expect_file_chooser() as shown:
            chooser.click()
        shown.value.set_files(path)

    for name in ("v3", "moonlight"):  # the same file, changed
        path.write_text(json.dumps(configs()[name], indent=2), encoding="utf-8")
        choose()
        expect(page.locator("#cost-calculator .results")).to_contain_text(f"{TOTALS[name]:,}")
        expect(page.get_by_label("text of the file")).to_have_value(path.read_text())
        assert chooser.evaluate("file => file.files.length") == 1
    for content, said in {
        b"\xff\xfe{": "config.json is not text in UTF-8",
        b'\xef\xbb\xbf{"model_type": "deepseek_v2"}': "the text is not JSON: it begins with a byte order mark",
        b"": "config.json is empty; wanted a config.json, which has a few kB",
        b" " * 1_000_001: "config.json has 1.00 MB; wanted a config.json, which has a few kB",
    }.items():
        path.write_bytes(content)
        choose()
        expect(refusal).to_have_text(said)
    dropped = page.evaluate_handle(
        "text => { const data = new DataTransfer(); data.items.add(new File([text], 'config.json')); return data; }",
        json.dumps(configs()["v2_lite"]),
    )
    results = page.locator("#cost-calculator .results")
    results.dispatch_event("dragover", {"dataTransfer": dropped})
    expect(page.locator("#cost-calculator .dropping")).to_have_count(1)
    results.dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.locator("#cost-calculator .dropping")).to_have_count(0)
    expect(results).to_contain_text(f"{TOTALS['v2_lite']:,}")
    expect(refusal).to_have_text("")
    assert chooser.evaluate("file => file.files.length") == 0  # it would name another file


def test_a_pasted_model_stays_in_the_address(page: Page, origin: str) -> None:
    tab = page.context.new_page()
    tab.goto(f"{origin}/book/calculator.html")
    tab.get_by_label("text of the file").fill(json.dumps(configs()["kimi_k2"]))
    tab.wait_for_function("location.search.includes('n_routed_experts=384')")
    query = parse_qs(urlsplit(tab.url).query, keep_blank_values=True)
    assert query["preset"] == ["deepseek_v2"]
    assert query["hidden_size"] == ["7168"]
    assert "config" not in query
    tab.reload()
    expect(tab.locator("#cost-calculator .results")).to_contain_text(f"{TOTALS['kimi_k2']:,}")
    expect(tab.get_by_label("start from")).to_have_value("own")
    expect(tab.get_by_label("text of the file")).to_have_value("")
    tab.close()


def test_it_works_from_files(browser: Browser) -> None:
    page = browser.new_page(offline=True)
    page.goto((SITE / "book/calculator.html").as_uri())
    page.get_by_label("start from").select_option("deepseek_v2_lite")
    expect(page.locator("#cost-calculator .results")).to_contain_text("15,706,484,224")
    page.close()


def test_the_books_scripts_are_small_and_ask_for_nothing() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "book/_static").glob("*.js")]
    assert len(sources) == 3
    assert sum(len(source.encode()) for source in sources) < 76_000
    for source in sources:
        assert not any(word in source for word in ("fetch(", "XMLHttpRequest", "import(", "https://"))
