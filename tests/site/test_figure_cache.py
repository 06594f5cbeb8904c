"""The cache figure has the calculator's models, and leads to the calculator with the same model."""

from dataclasses import replace

import pytest
from playwright.sync_api import Browser, expect

from dsv2_ref import accounting as acc
from dsv2_ref.config import DeepseekV2Config
from tests.site.test_figures import SET, amount, opened
from tools.figures.cache import WAYS, three_ways

MODELS = {
    "DeepSeek-V2-Lite": "deepseek_v2_lite",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
    "Moonlight-16B-A3B": "moonlight",
    "the worked example (the card)": "card",
    "tiny": "tiny",
}


@pytest.mark.parametrize("heads", [None, 3])
def test_every_model_with_mla_is_counted_and_led_to(browser: Browser, origin: str, heads: int | None) -> None:
    tab = opened(browser, origin, "decoding")
    tab.wait_for_selector("#cache-model")
    assert tab.locator("#cache-model option").all_text_contents() == [*MODELS]
    for name, preset in MODELS.items():
        config = getattr(DeepseekV2Config, preset)()
        state = {"model": name, "cached": 12, "fresh": 8}
        if heads is not None:
            config = replace(config, num_attention_heads=2**heads)
            state["heads"] = heads
        shown = tab.evaluate(SET, state)
        counted = three_ways(config, 8, 4096)
        for way in WAYS:
            assert shown[f"FLOPs of attention in one layer: {way}"] == amount(counted["flops"][way], "FLOP")
            assert shown[f"Bytes read and made in one layer: {way}"] == amount(counted["bytes"][way], "B")
        with tab.context.new_page() as other:
            other.goto(tab.get_by_role("link", name="This model in the calculator").get_attribute("href") or "")
            results = other.locator("#cost-calculator .results")
            expect(results).to_contain_text(f"{sum(acc.model_parameters(config).values()):,}")
            expect(results).to_contain_text("cache of 4,096 tokens")
            expect(other.get_by_label("start from")).to_have_value(preset if heads is None else "own")
            expect(other.get_by_label("seq: new tokens")).to_have_value("8")
    tab.context.close()
