"""The part of the whole layer: its cases and known mistakes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dsv2_ref.grading.answers import Values, output, tokens
from dsv2_ref.grading.part import Case, Mistake, Part, Plant
from dsv2_ref.grading.parts.experts import MIXED

Line = Callable[[Any, Values], Values]
"""What one of the layer's two lines, or both, make of a layer and its stream."""


def first_line(layer: Any, x: Values) -> Values:
    """x + attention(norm(x)), which is right."""
    return x + layer.att(layer.n1(x))


def second_line(layer: Any, h: Values) -> Values:
    """h + mlp(other_norm(h)), which is right."""
    return h + layer.mlp(layer.n2(h))


def in_two_lines(layer: Any, x: Values) -> Values:
    """One line after the other."""
    return layer.fed(layer, layer.attended(layer, x))


def order(whole: Line = in_two_lines, **lines: Line) -> Plant:
    """Another order of the layer's parts; or the line ``attended`` or ``fed`` another one, while the other line stays as
    it is, right or wrong."""

    def change(layer: Any) -> None:
        layer.n1, layer.n2 = lambda x: layer.input_layernorm(x), lambda x: layer.post_attention_layernorm(x)
        layer.att = lambda x: layer.self_attn(x)[0]
        vars(layer).update({"attended": first_line, "fed": second_line} | vars(layer) | lines)
        layer.forward = lambda x: (whole(layer, x),)

    return change


def post_norm(layer: Any, x: Values) -> Values:
    """Norms after the additions."""
    h = layer.n1(x + layer.att(x))
    return layer.n2(h + layer.mlp(h))


def branch_norm(layer: Any, x: Values) -> Values:
    """Norms at the end of the branches."""
    h = x + layer.n1(layer.att(x))
    return h + layer.n2(layer.mlp(h))


def after_norm(layer: Any, x: Values) -> Values:
    """Residuals taken after the norms."""
    u = layer.n1(x)
    v = layer.n2(u + layer.att(u))
    return v + layer.mlp(v)


def parallel(layer: Any, x: Values) -> Values:
    """Both parts read the layer's input."""
    return first_line(layer, x) + layer.mlp(layer.n2(x))


def exchanged_norms(layer: Any) -> None:
    """The first norm's weights in the second's place."""
    names = ("input_layernorm", "post_attention_layernorm")
    one, two = (getattr(layer, name) for name in names)
    layer.input_layernorm, layer.post_attention_layernorm = two, one


def default_epsilon(layer: Any) -> None:
    """The norms of the layer built without the configuration's epsilon."""
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.variance_epsilon = 1e-6


WHOLE = replace(MIXED, q_lora_rank=None, rms_norm_eps=0.01, first_k_dense_replace=1)
ORDERS, LINES, LAYER_SYMPTOMS = "Two orders", "The whole layer on one page", "Symptoms"
LAYER = Part(
    name="layer",
    module="layer",
    defines=("DeepseekV2DecoderLayer",),
    takes=("config", "layer_idx"),
    answer=output,
    yours=("model.DeepseekV2Model", "model.DeepseekV2ForCausalLM"),
    cases=(
        Case("a dense layer", 4, tokens(2, 6, 48, seed=50, size=0.2), (WHOLE, 0)),
        Case("a layer with experts", 4, tokens(1, 9, 48, seed=51, size=0.2), (WHOLE, 1)),
    ),
    mistakes=(
        Mistake("post-norm: norms after the additions", "prenorm", ORDERS, order(post_norm)),
        Mistake("norms at the end of the branches, as in OLMo 2", "prenorm", ORDERS, order(branch_norm)),
        Mistake("residuals taken after the norms", "prenorm", LAYER_SYMPTOMS, order(after_norm)),
        Mistake(
            "the first residual taken after its norm",
            "prenorm",
            LAYER_SYMPTOMS,
            order(attended=lambda layer, x: layer.n1(x) + layer.att(layer.n1(x))),
        ),
        Mistake(
            "the second residual taken after its norm",
            "prenorm",
            LAYER_SYMPTOMS,
            order(fed=lambda layer, h: layer.n2(h) + layer.mlp(layer.n2(h))),
        ),
        Mistake("the first norm left out", "prenorm", LINES, order(attended=lambda layer, x: x + layer.att(x))),
        Mistake("the second norm left out", "prenorm", LINES, order(fed=lambda layer, h: h + layer.mlp(h))),
        Mistake(
            "one norm for both parts",
            "prenorm",
            LAYER_SYMPTOMS,
            order(fed=lambda layer, h: h + layer.mlp(layer.n1(h))),
        ),
        Mistake("the two norms exchanged", "prenorm", LAYER_SYMPTOMS, exchanged_norms),
        Mistake(
            "nothing added to what attention returns",
            "prenorm",
            LINES,
            order(attended=lambda layer, x: layer.att(layer.n1(x))),
        ),
        Mistake(
            "nothing added to what the feed-forward part returns",
            "prenorm",
            LINES,
            order(fed=lambda layer, h: layer.mlp(layer.n2(h))),
        ),
        Mistake("both parts read the layer's input, as in parallel layers", "prenorm", LAYER_SYMPTOMS, order(parallel)),
        Mistake(
            "the layer's input added twice, not what attention made of it",
            "prenorm",
            LINES,
            order(lambda layer, x: x + layer.mlp(layer.n2(first_line(layer, x)))),
        ),
        Mistake("rms_norm_eps not given to the norms", "rmsnorm", "Why ε, and why inside the root?", default_epsilon),
    ),
)
