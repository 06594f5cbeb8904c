"""The calculator in the page: its numbers are the accounting's, and whoever types nonsense is told so."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect

from dsv2_ref import accounting as acc
from dsv2_ref.config import DeepseekV2Config
from tests.site.conftest import ROOT

ACCOUNT = """cases => cases.map(([config, call]) => {
    const integers = object => Object.fromEntries(Object.entries(object).map(
        ([name, value]) => [name, typeof value === "number" ? BigInt(value) : value]));
    const found = dsv2.account(integers(config), integers(call));
    const text = value => typeof value === "bigint" ? value.toString() : value;
    return JSON.parse(JSON.stringify(found, (_, value) => text(value)));
})"""
NAMES = [
    "use_mla",
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
]


@pytest.fixture
def page(browser: Browser, origin: str) -> Iterator[Page]:
    context = browser.new_context(viewport=ViewportSize(width=1280, height=900), reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{origin}/book/calculator.html")
    yield page
    context.close()


def random_case(draw: random.Random) -> tuple[DeepseekV2Config, acc.Call]:
    heads, mla = draw.choice([1, 2, 8, 16, 128]), draw.random() < 0.7
    experts = draw.choice([None, 4, 64, 160])
    config = DeepseekV2Config(
        vocab_size=draw.randrange(1, 200_000), hidden_size=2 * heads * draw.randrange(1, 60),
        intermediate_size=draw.randrange(1, 20_000), num_hidden_layers=draw.randrange(1, 80),
        num_attention_heads=heads, use_mla=mla, num_key_value_heads=None if mla else draw.choice([None, 1, heads]),
        q_lora_rank=draw.choice([None, 1536, 7]), kv_lora_rank=draw.randrange(1, 600),
        qk_nope_head_dim=draw.randrange(1, 200), qk_rope_head_dim=2 * draw.randrange(1, 50),
        v_head_dim=draw.randrange(1, 200), n_routed_experts=experts, n_shared_experts=draw.choice([None, 1, 2]),
        num_experts_per_tok=draw.randrange(1, (experts or 6) + 1), moe_intermediate_size=draw.randrange(1, 2000),
        first_k_dense_replace=draw.randrange(0, 90), moe_layer_freq=draw.randrange(1, 5),
        tie_word_embeddings=draw.random() < 0.5,
    )  # fmt: skip
    seq = draw.choice([1, 7, 2048, draw.randrange(1, 100_000)])
    call = acc.Call(
        batch=draw.randrange(1, 512), seq=seq, kv=seq + draw.choice([0, 8191, draw.randrange(200_000)]),
        form=draw.choice(acc.FORMS), causal=draw.random() < 0.5, dtype=draw.choice(list(acc.DTYPE_BYTES)),
    )  # fmt: skip
    return config, call


def given(config: DeepseekV2Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in NAMES}


def expected(config: DeepseekV2Config, call: acc.Call) -> dict[str, Any]:
    found = acc.report(config, call)
    expanded = "expanded" if config.use_mla else "mha"
    return {
        "total": str(found["parameters"]["total"]),
        "active": str(found["parameters"]["active_per_token"]),
        "products": str(found["flops"]["products"]),
        "weights": str(found["bytes"]["weights"]),
        "kv_cache": str(found["bytes"]["kv_cache"]),
        "expanded": str(acc.cache_bytes(config, call.batch * call.kv, call.dtype, kind=expanded)),
        "form": found["config"]["call"]["form"],
    }


def test_results_are_those_of_the_accounting_on_random_models(page: Page) -> None:
    draw = random.Random(0)
    cases = [random_case(draw) for _ in range(250)]
    fields = ("batch", "seq", "kv", "form", "causal", "dtype")
    sent = [(given(config), {name: getattr(call, name) for name in fields}) for config, call in cases]
    answers = page.evaluate(ACCOUNT, json.loads(json.dumps(sent)))
    for (config, call), answer in zip(cases, answers, strict=True):
        found = {
            "total": answer["parameters"]["total"],
            "active": answer["parameters"]["active_per_token"],
            "products": answer["flops"]["products"],
            "weights": answer["bytes"]["weights"],
            "kv_cache": answer["bytes"]["kv_cache"],
            "expanded": answer["bytes"]["kv_cache_expanded"],
            "form": answer["form"],
        }
        assert found == expected(config, call), (config, call)


def test_presets_are_the_packages(page: Page) -> None:
    told = page.evaluate(
        "JSON.parse(JSON.stringify(dsv2.PRESETS, (_, value) => typeof value === 'bigint' ? Number(value) : value))"
    )
    assert sorted(told) == sorted(["card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr"])
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
        ("hidden_size", "many", "hidden_size is 'many'; wanted a whole number from 1 to 1,000,000,000"),
        ("num_hidden_layers", "-3", "num_hidden_layers is '-3'"),
        ("num_hidden_layers", "", "num_hidden_layers is ''"),
        ("vocab_size", "1.5", "vocab_size is '1.5'"),
        ("vocab_size", "9999999999999999999999", "wanted a whole number"),
        ("qk_rope_head_dim", "63", "qk_rope_head_dim is 63; wanted an even number"),
        ("num_experts_per_tok", "161", "wanted at most n_routed_experts=160"),
        ("new tokens of each", "9000", "kv is 8192; wanted at least the 9000 new tokens"),
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
    results = page.locator("#cost-calculator .results > *").first
    assert float(results.evaluate("element => getComputedStyle(element).opacity")) < 0.8
    page.get_by_label("vocab_size").fill("100")
    page.get_by_label("qk_rope_head_dim").fill("64")
    page.get_by_label("new tokens of each").fill("1")
    expect(page.locator("#cost-calculator .results.stale")).to_have_count(0)


def test_every_dtype_of_the_accounting_can_be_chosen(page: Page) -> None:
    options = page.get_by_label("numbers are").locator("option").evaluate_all("found => found.map(each => each.value)")
    assert options == list(acc.DTYPE_BYTES)
    results = page.locator("#cost-calculator .results")
    expect(results).to_contain_text("69,120 B")
    page.get_by_label("numbers are").select_option("int8")
    expect(results).to_contain_text("34,560 B")


def test_a_model_without_latents_has_one_cache(page: Page) -> None:
    expect(page.get_by_role("rowheader", name="cache, expanded")).to_have_count(1)
    page.get_by_label("start from").select_option("deepseek_ocr")
    expect(page.get_by_role("rowheader", name="cache, expanded")).to_have_count(0)


def test_it_works_by_keyboard(page: Page) -> None:
    page.get_by_label("start from").focus()
    names = []
    for _ in range(40):
        names.append(page.evaluate("document.activeElement.name || ''"))
        page.keyboard.press("Tab")
    visible = page.evaluate("[...document.querySelectorAll('#cost-calculator :is(input, select)')]"
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
    for preset in ("deepseek_v2", "deepseek_ocr"):
        page.get_by_label("start from").select_option(preset)
        page.get_by_label("vocab_size").fill("x" if preset == "deepseek_ocr" else "1000")
        violations = Axe().run(page).response["violations"]
        assert [(found["id"], node["html"]) for found in violations for node in found["nodes"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_it_is_small_and_asks_for_nothing() -> None:
    source = (ROOT / "book/_static/calculator.js").read_text(encoding="utf-8")
    assert len(source.encode()) < 40_000
    assert not any(word in source for word in ("fetch(", "XMLHttpRequest", "import(", "https://"))
