"""The door: every rejection, in one line that names the argument, the value and what was wanted. The public classes name
their check where `ops.defines` decorates them, and it runs once per public call. Importing this module does not import
torch, so that the accounting works without it."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsv2_ref.config import DeepseekV2Config


class WrongTypeError(TypeError, ValueError):
    """An argument of another type than the one wanted."""


def reject(name: str, value: Any, wanted: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` naming argument, value and what was wanted."""
    raise error(f"{name} is {describe(value)}; wanted {wanted}")


def require(
    condition: bool, name: str, value: Any, wanted: str, *details: Any, error: type[Exception] = ValueError
) -> None:
    """`reject` unless ``condition``.

    ``details`` fill the braces of ``wanted`` only where the error is raised, so that a check costs little and a
    compiled layer keeps its sizes symbolic.
    """
    if not condition:
        reject(name, value, wanted.format(*details) if details else wanted, error)


LONGEST_VALUE = 100
"""Letters of a value that an error repeats."""


def describe(value: Any) -> str:
    """A value in few words, and in a line: a tensor's shape, dtype and device, the length of a list, tuple or object."""
    if getattr(value, "is_nested", False):  # it may have no shape
        return "a nested tensor"
    if hasattr(value, "dtype") and hasattr(value, "device") and hasattr(value, "shape"):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if hasattr(value, "named_modules"):  # their repr may take many lines
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).splitlines())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def require_tensor(value: object, name: str) -> None:
    """Raise `WrongTypeError` unless ``value`` is a dense tensor."""
    from torch import Tensor, strided

    if not isinstance(value, Tensor):
        reject(name, value, "a tensor", WrongTypeError)
    if value.layout != strided or value.is_nested:
        reject(name, value, "a dense tensor, neither sparse nor nested", WrongTypeError)


LONGEST_ON_CUDA = 254
"""Bytes of a message that torch takes for an assertion on the device."""


def require_values(condition: "Tensor", name: str, value: str, wanted: str) -> None:
    """`require` for a condition on a tensor's values (a 0-d bool tensor).

    On the CPU it raises ValueError at once. On an accelerator, or while compiling, reading the condition would make the
    host wait for the device, so a device-side assertion with the same message is queued instead, or with its first half
    where that is too long there.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if condition.device.type == "meta":
        return
    message = f"{name} is {value}; wanted {wanted}"
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(condition):
            condition = torch._C._functorch.get_unwrapped(condition)  # in torch.vmap
        if not isinstance(condition, FakeTensor) and not condition.all():  # fake tensors have no values
            raise ValueError(message)
    else:
        whole = len(message.encode()) <= LONGEST_ON_CUDA
        torch._assert_async(condition, message if whole else f"{name} is {value}")


# Sizes and numbers

LARGEST_SIZE = 10**15
"""No size of a model or call is larger; products of such sizes still fit a float."""

SMALLEST_EPS = 2**-84
"""The gradient of a norm holds eps**-1.5, which float32 must be able to hold."""

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
CHECKPOINTING = ("full", "selective")
MLA_FORMS = ("auto", "expanded", "absorbed")


def is_int(value: object, least: int, most: float = math.inf) -> bool:
    """Whether this is an integer, not a bool, between ``least`` and ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> bool:
    """Whether this is a finite number, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_not_negative(name: str, value: Any) -> None:
    """Require a finite number, 0 or more."""
    require(is_number(value) and value >= 0, name, value, "a finite number, 0 or more")


def require_each(holder: object, names: tuple[str, ...], fits: Callable[[Any], bool], wanted: str) -> None:
    """Require of each of these attributes that it ``fits``."""
    for name in names:
        value = getattr(holder, name)
        require(fits(value), name, value, wanted)


def require_ints(holder: object, names: tuple[str, ...], least: int, optional: bool = False) -> None:
    """Require integers of at least ``least`` in these attributes, or None if ``optional``."""
    wanted = f"an integer of at least {least}{' or None' * optional}, and at most 10^15"
    require_each(holder, names, lambda n: is_int(n, least, LARGEST_SIZE) or (optional and n is None), wanted)


def require_object(value: object, name: str) -> Mapping[str, Any]:
    """The value, which must be a JSON object."""
    if not isinstance(value, Mapping):
        reject(name, value, "a JSON object")
    return value


# Building modules


def norm_sizes(hidden_size: int, eps: float) -> None:
    """Reject sizes and epsilons of which no norm can be made."""
    require(is_int(hidden_size, 1), "hidden_size", hidden_size, "a positive number of features")
    require(is_number(eps) and eps >= SMALLEST_EPS, "eps", eps, "a finite number, at least 2**-84 (5.2e-26)")


def is_config(config: object) -> None:
    """Reject what is not a configuration, such as a dict."""
    from dsv2_ref.config import DeepseekV2Config

    if not isinstance(config, DeepseekV2Config):
        wanted = "a DeepseekV2Config; DeepseekV2Config.from_published reads a dict or a config.json"
        raise WrongTypeError(f"config is a {type(config).__name__}; wanted {wanted}")


def layer_of(config: "DeepseekV2Config", layer_idx: int) -> None:
    """Reject a layer that the model does not have."""
    is_config(config)
    last = config.num_hidden_layers - 1
    wanted = f"the layer's index, 0 or more and at most {last}: num_hidden_layers is {last + 1}"
    require(is_int(layer_idx, 0, last), "layer_idx", layer_idx, wanted)


def attention_of(config: "DeepseekV2Config", layer_idx: int, use_mla: bool, fixed: str | None) -> None:
    """Reject a configuration of the other kind of attention, and flash-attn where it is not installed; ``fixed`` is the
    implementation of a class that has but one."""
    layer_of(config, layer_idx)
    if (fixed or config._attn_implementation) == "flash_attention_2":
        flash_attn()
    wanted = "True for latent attention" if use_mla else "False for plain multi-head attention"
    require(config.use_mla == use_mla, "use_mla", config.use_mla, wanted)


def mlp_sizes(config: "DeepseekV2Config", hidden_size: int | None, intermediate_size: int | None) -> tuple[int, int]:
    """The widths of a feed-forward network, the configuration's where they are None; reject those below 1."""
    is_config(config)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, size in sizes.items():
        require(size is None or is_int(size, 1), name, size, "a positive number of features")
    wide = [getattr(config, name) if size is None else size for name, size in sizes.items()]
    return wide[0], wide[1]


def number_of_experts(config: "DeepseekV2Config") -> int:
    """The number of routed experts; reject a configuration without any."""
    is_config(config)
    if config.n_routed_experts is None:
        reject("n_routed_experts", None, "a number of experts")
    return config.n_routed_experts


def quantization(
    weights: object, group: object, parts: Any, known_parts: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    """Check of `dsv2_ref.quantize.quantize`."""
    require(weights in kinds, "weights", weights, ", ".join(kinds))
    group_size(group)
    several = isinstance(parts, list | tuple | set | frozenset) and len(parts) > 0
    wanted = f"one or more of {', '.join(known_parts)}, in a tuple or a list"
    require(several, "parts", parts, wanted)
    for part in parts:
        require(part in known_parts, "parts", part, wanted)


def group_size(group: Any) -> None:
    """Reject a number of weights that share a scale, unless whole bytes hold them in four bits each."""
    require(is_int(group, 2, LARGEST_SIZE) and group % 2 == 0, "group", group, "an even number, 2 or more")


def width_in_groups(name: str, width: int, kind: str, group: int) -> None:
    """Reject rows that groups do not divide; only ``int4`` has any."""
    if kind == "int4" and width % group:
        require(width % 2 == 0, "weights", kind, "int8 or fp8: {}, the inputs of {}, is odd", width, name)
        fitting = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2) if width % size == 0 and size < group)
        reject("group", group, f"a divisor of {width}, the inputs of {name}, such as {fitting}")


def expert_blocks(width: int, block: int) -> None:
    """Reject experts with gates and ups, one above the other, that would share a block."""
    wanted = f"int8 or int4: {block} does not divide the experts' width {width}"
    require(width % block == 0, "weights", "fp8", wanted)


def is_module(module: object, name: str = "module") -> None:
    """Reject what is not a module, such as None or a state dict."""
    from torch import nn

    if not isinstance(module, nn.Module):
        reject(name, module, "a torch.nn.Module", WrongTypeError)


FLOATS = "float64, float32, float16 or bfloat16"


def is_float(dtype: object) -> bool:
    """Whether weights may have this dtype: float64, float32, float16 or bfloat16."""
    import torch

    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights_dtype(dtype: object) -> None:
    """Check of ``dtype`` of `PretrainedModel`."""
    require(dtype is None or is_float(dtype), "dtype", dtype, f"None or torch's {FLOATS}")


def weights_device(device: Any) -> None:
    """Check of ``device`` of `PretrainedModel`: one that is here."""
    import torch

    wanted = "None or a device that is here, such as 'cpu'"
    fits = device is None or (isinstance(device, str | int | torch.device) and not isinstance(device, bool))
    require(fits, "device", device, wanted)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device is {device!r}; wanted {wanted}") from error


def device_type(device: object) -> None:
    """Check of ``device`` of `ops.watch`."""
    import torch

    try:
        fits = isinstance(device, str) and torch.device(device).type == device
    except RuntimeError:
        fits = False
    require(fits, "device", device, "None or a type of device, such as 'cuda'")


PLAIN_WEIGHTS = (
    "a plain torch.nn.Linear or the package's own experts: quantise before packing, and before an adapter, a wrapper or a "
    "hook is put on"
)


def quantizable(name: str, matrices: "list[Tensor]", kind: str, group: int) -> None:
    """Reject weights that a group does not divide, of other dtypes, or not finite."""
    for matrix in matrices:
        require(is_float(matrix.dtype), f"the weight of {name}", matrix, FLOATS)
        width_in_groups(name, matrix.shape[-1], kind, group)
        for part in matrix if matrix.ndim == 3 else (matrix,):
            if not matrix.is_meta:
                finite = part.isfinite().all()
                require_values(finite, f"the weight of {name}", "infinite or NaN somewhere", "finite numbers")


def cache_sizes(batch: Any, capacity: Any, features: object) -> None:
    """Reject a cache without sequences, with a negative capacity, or with one number for its features."""
    from torch import SymInt

    wanted = {"batch": (batch, 1, "at least one sequence"), "capacity": (capacity, 0, "room for 0 or more tokens")}
    for name, (size, least, what) in wanted.items():
        fits = isinstance(size, int | SymInt) and not isinstance(size, bool) and size >= least
        require(fits, name, size, what)
    several = isinstance(features, list | tuple) and len(features) > 0
    require(several, "features", features, "sizes in a tuple, such as (576,)")


FLASH_ATTN_NEEDED = (
    "flash_attention_2 needs the flash-attn package and an NVIDIA GPU (Ampere or newer): pip install flash-attn "
    "--no-build-isolation. Or choose _attn_implementation='sdpa', which needs neither"
)


def flash_attn() -> Any:
    """The flash-attn package, or an ImportError that says how to get it."""
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(FLASH_ATTN_NEEDED) from error
    if getattr(flash_attn.__spec__, "origin", "") is None:  # flash-attn 4 makes a bare folder of that name
        raise ImportError(FLASH_ATTN_NEEDED)
    return flash_attn


# Calling modules: messages are made only where they are raised, so that a compiled layer keeps its sizes symbolic.


def first_weight(*modules: "nn.Module | None") -> "Tensor | None":
    """The first plain weight among these modules, which says dtype and device. A module that was quantised or wrapped
    by others may not have one: its own forward then checks the input."""
    from torch import Tensor

    for module in modules:
        for name in ("weight", "like"):  # a `QuantizedWeight` has the second
            weight = getattr(module, name, None)
            if isinstance(weight, Tensor) and weight.is_floating_point():
                return weight
    return None


def _within(module: Any, attribute: str) -> Any:
    """The module that has this attribute: the one given or, where others wrap it, one inside of it. None if there is
    none: such a module checks its own input."""
    return next((inner for inner in module.modules() if hasattr(inner, attribute)), None)


def _autocast(device: "torch.device") -> bool:
    import torch

    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _dense(hidden_states: "Tensor") -> None:
    """Tokens in a dense tensor; torch does not compute with floating-point numbers of eight bits."""
    require_tensor(hidden_states, "hidden_states")
    if hidden_states.is_floating_point() and hidden_states.dtype.itemsize == 1:
        reject("hidden_states", hidden_states, FLOATS)


def norm_input(norm: Any, hidden_states: "Tensor") -> None:
    """Check of `DeepseekV2RMSNorm.forward`."""
    _dense(hidden_states)
    weight = norm.weight
    fits = hidden_states.is_floating_point() and hidden_states.shape[-1:] == weight.shape
    if not fits or hidden_states.device != weight.device:
        wanted = f"floating-point numbers whose last axis is {weight.numel()}, on {weight.device}"
        reject("hidden_states", hidden_states, wanted)


def mlp_input(mlp: Any, hidden_states: "Tensor") -> None:
    """Check of `DeepseekV2MLP.forward`."""
    require_tensor(hidden_states, "hidden_states")
    _features(mlp, hidden_states, mlp.hidden_size, first_weight(mlp.gate_proj, mlp.down_proj))


def gate_input(gate: Any, hidden_states: "Tensor") -> None:
    """Check of `MoEGate.forward`."""
    _dense(hidden_states)
    width, device = gate.weight.shape[-1], gate.weight.device
    fits = hidden_states.ndim == 3 and hidden_states.is_floating_point()
    fits = fits and (hidden_states.numel() > 0 or _may_be_empty(hidden_states, gate))
    if not fits or hidden_states.shape[-1] != width or hidden_states.device != device:
        wanted = f"floating (batch, seq, {width}) on {device}, with at least one token"
        reject("hidden_states", hidden_states, wanted)


def moe_input(moe: Any, hidden_states: "Tensor") -> None:
    """Check of `DeepseekV2MoE.forward`."""
    _dense(hidden_states)
    if hidden_states.ndim != 3:
        reject("hidden_states", hidden_states, "(batch, seq, hidden)")
    gate, experts = first_weight(moe.gate), getattr(moe.experts, "gate_up_proj", None)
    width = hidden_states.shape[-1] if gate is None else gate.shape[-1]
    like = getattr(moe.gate, "like", gate)  # of a packed gate, whose weight was widened
    _features(moe, hidden_states, width, experts if hasattr(experts, "dtype") else like)


def _may_be_empty(x: "Tensor", module: "nn.Module") -> bool:
    """Whether the module may be called with no sequences: where ranks share its experts, all of them take part in every
    call, and one may have run out."""
    shared = any(getattr(part, "ranks", None) is not None for part in module.modules())
    return shared and len(x) == 0 and x.shape[1:].numel() > 0


def _features(
    module: "nn.Module",
    hidden_states: "Tensor",
    width: int,
    weight: "Tensor | None",
    dtype: "torch.dtype | None" = None,
) -> None:
    """Tokens of this width, in the dtype (``dtype`` if they are still to be widened) and on the device of the weight.
    Autocast decides the dtypes where it is on."""
    from torch import strided

    if hidden_states.layout != strided or hidden_states.is_nested or hidden_states.dtype.itemsize == 1:
        _dense(hidden_states)
    device = hidden_states.device
    fits = hidden_states.shape[-1:] == (width,) and (hidden_states.numel() > 0 or _may_be_empty(hidden_states, module))
    if weight is not None:
        same = (dtype or hidden_states.dtype) == weight.dtype
        fits = fits and device == weight.device and (same or _autocast(device))
    if not fits:
        kind = "floating point" if weight is None else f"{weight.dtype} on {weight.device}, as the weights"
        reject("hidden_states", hidden_states, f"at least one token of {width} features, {kind}")


def layer_call(layer: Any, hidden_states: "Tensor", *args: Any, **kwargs: Any) -> None:
    """Check of `DeepseekV2DecoderLayer.forward`: all that any of its parts could reject. The attention takes
    the same arguments."""
    import torch

    weight = getattr(layer.input_layernorm, "weight", None)
    if not isinstance(weight, torch.Tensor):  # a norm that others wrap
        weight = first_weight(*layer.modules())
    dtype = None if weight is None else weight.dtype
    if isinstance(hidden_states, torch.Tensor) and dtype is not None:
        if hidden_states.dtype.itemsize == 1:
            _dense(hidden_states)  # torch promotes no floating-point numbers of eight bits
        widens = hidden_states.is_floating_point() and torch.promote_types(hidden_states.dtype, dtype) == dtype
        if not widens:
            reject("hidden_states", hidden_states, f"floating-point numbers that {dtype} weights can hold")
    attention = layer.self_attn
    if not hasattr(attention, "cache_class"):
        attention = _within(attention, "cache_class")
    if attention is not None:
        attention_call(attention, hidden_states, *args, **{"whole": layer} | kwargs, dtype=dtype)


def attention_call(
    attention: Any,
    hidden_states: "Tensor",
    attention_mask: "Tensor | None" = None,
    position_ids: "Tensor | None" = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    *,
    dtype: "torch.dtype | None" = None,
    whole: Any = None,
) -> None:
    """Check of the attention classes' ``forward``. ``dtype`` is what a norm before it widens ``hidden_states`` to, and
    ``whole`` the layer or model that is called."""
    from torch import Tensor

    if not isinstance(hidden_states, Tensor):
        reject("hidden_states", hidden_states, "a tensor", WrongTypeError)
    for name, flag in (("output_attentions", output_attentions), ("use_cache", use_cache)):
        if flag is not None and not isinstance(flag, int):  # a bool is one
            reject(name, flag, "True or False")
    if hidden_states.ndim != 3:
        reject("hidden_states", hidden_states, "(batch, seq, hidden)")
    weight = getattr(attention.o_proj, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        weight = first_weight(*attention.children())
    _features(attention if whole is None else whole, hidden_states, attention.config.hidden_size, weight, dtype)
    kernel = attention.implementation
    if output_attentions and kernel != "eager":
        wanted = f"False: _attn_implementation={kernel!r} never holds the weights, 'eager' does"
        reject("output_attentions", output_attentions, wanted)
    batch, seq, _ = hidden_states.shape
    kv_seq = seq
    if past_key_value is not None:
        _cache(attention, past_key_value, hidden_states, weight)
        kv_seq += past_key_value.length
    if position_ids is not None:
        _positions(position_ids, hidden_states)
    if position_embeddings is not None:
        _tables(position_embeddings, hidden_states, attention.rotary_dim // 2)
    if attention_mask is not None:
        _mask(attention_mask, batch, attention.num_heads, seq, kv_seq, hidden_states.device)
    form = attention.form if attention.config.use_mla else "expanded"
    if form not in MLA_FORMS:
        reject("form", form, "expanded, absorbed or auto")
    if form == "absorbed":
        from dsv2_ref.mla import offers_matrices

        wanted = (
            "a torch.nn.Linear without bias, hooks or a forward of its own, whose weight the absorbed form reads "
            "without calling it; form='expanded' calls any module"
        )
        require(offers_matrices(attention.kv_b_proj), "kv_b_proj", attention.kv_b_proj, wanted)
    elif kernel == "flash_attention_2" and (form == "expanded" or attention.cheaper_form(seq, kv_seq) == "expanded"):
        _flash_input(attention, hidden_states, attention_mask, dtype)


FLASH_DEVICES = ("cuda",)
"""Where flash-attn runs."""


def _flash_input(
    attention: Any, hidden_states: "Tensor", attention_mask: "Tensor | None", dtype: "torch.dtype | None"
) -> None:
    import torch

    kind, width = hidden_states.device.type, attention.widest_head
    dtype = torch.get_autocast_dtype(kind) if _autocast(hidden_states.device) else dtype or hidden_states.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    require(half, "hidden_states", hidden_states, "float16 or bfloat16 for flash-attn")
    require(kind in FLASH_DEVICES, "hidden_states", hidden_states, "a CUDA tensor for flash-attn")
    padding = attention_mask is None or attention_mask.ndim == 2
    require(padding, "attention_mask", attention_mask, "None or (batch, kv_seq) for flash-attn")
    require(width <= 256, "the width of a head", width, "at most 256 for flash-attn")


def _cache(attention: Any, cache: Any, hidden_states: "Tensor", weight: "Tensor | None") -> None:
    kind, device = attention.cache_class, hidden_states.device
    if not isinstance(cache, kind) or cache.layer_idx != attention.layer_idx:
        reject("past_key_value", cache, f"the {kind.__name__} that layer {attention.layer_idx} returned")
    shape = (len(hidden_states), *attention.cache_features)
    buffer = cache._storage.buffer  # not its tokens: see `LayerCache.append`
    sizes, held, place = (*buffer.shape[:1], *buffer.shape[2:]), buffer.dtype, buffer.device
    if cache.record is not None:
        sizes, held, place = cache.like
    dtype = held if weight is None else weight.dtype
    record = getattr(cache, "record", None)
    if record is not None and record.latent != attention.kv_lora_rank:
        reject("past_key_value", cache, f"one for latents of {attention.kv_lora_rank} features")
    if sizes != shape or place != device or (held != dtype and not _autocast(device)):
        reject("past_key_value", cache, f"one that fits the new tokens, {shape} {dtype} on {device}")


def stored_tokens(stored: "Tensor") -> None:
    """Check of what a `LayerCache` is made of."""
    require_tensor(stored, "stored")
    require(stored.ndim >= 3, "stored", stored, "(batch, kv_seq, *features)")


def appended(cache: Any, new: "Tensor") -> None:
    """Check of `LayerCache.append`: tokens like those that the cache holds."""
    require_tensor(new, "new")
    alike = ((*new.shape[:1], *new.shape[2:]), new.dtype, new.device)
    if alike != cache.like:
        require(False, "past_key_value", cache, "one that fits the new tokens, {} {} on {}", *alike)


def without_derivatives(derived: bool, new: "Tensor") -> None:
    """Reject tokens whose derivatives are wanted, for a cache in fewer bits."""
    wanted = "no derivatives: a cache in fewer bits gives none, use torch.no_grad()"
    require(not derived, "what is to be cached", new, wanted)


def cache_format(format: object, formats: tuple[str, ...], latent: int, name: str = "format") -> None:
    """Check of ``format`` of `DeepseekV2Attention.empty_cache`."""
    require(format in formats, name, format, f"None or one of {', '.join(formats)}")
    wanted = "fp8 or int8: the latent of {} features cannot be halved"
    require(format != "int4" or latent % 2 == 0, name, format, wanted, latent)


def latent_format(config: "DeepseekV2Config", name: str, format: object) -> None:
    """Raise ValueError for an unknown format of latents, and for one where a model has none."""
    has_latent = config.use_mla or format is None
    require(has_latent, name, format, "None: multi-head attention caches no latent")
    if format is not None:
        from dsv2_ref.records import CACHE_FORMATS

        cache_format(format, CACHE_FORMATS, config.kv_lora_rank, name)


def budget(**rows: object) -> None:
    """Check of numbers of rows that a policy keeps."""
    for name, number in rows.items():
        require(is_int(number, 0), name, number, "a number of rows, 0 or more")
    require(any(rows.values()), " and ".join(rows), 0, "a row at least")


def is_cache(cache: object) -> None:
    """Reject what is not the cache of one layer, such as None or those of all layers."""
    from dsv2_ref.cache import LayerCache

    if not isinstance(cache, LayerCache):
        reject("cache", cache, "the cache of a layer", WrongTypeError)


def chosen_sequences(cache: Any, sequences: "Tensor") -> None:
    """Check of `LayerCache.select`."""
    require_tensor(sequences, "sequences")
    batch, device = len(cache.stored), cache.stored.device
    fits = _indexes(sequences) and sequences.ndim == 1 and sequences.device == device
    require(fits, "sequences", sequences, "integers (chosen,) on {}", device)
    inside = ((sequences >= 0) & (sequences < batch)).all()
    require_values(inside, "sequences", "beyond the batch somewhere", f"from 0 to {batch - 1}")


def _indexes(x: "Tensor") -> bool:
    return str(x.dtype) in ("torch.int32", "torch.int64")


def kept_rows(cache: Any, rows: "Tensor") -> None:
    """Check of `LayerCache.keep`."""
    require_tensor(rows, "rows")
    batch = len(cache.stored)
    fits = _indexes(rows) and rows.ndim == 2 and len(rows) in (1, batch) and rows.device == cache.stored.device
    require(fits, "rows", rows, "integers (1 or {}, kept) on {}", batch, cache.stored.device)
    inside = ((rows >= 0) & (rows < cache.length)).all()
    require_values(inside, "rows", "beyond the cached tokens somewhere", f"from 0 to {cache.length - 1}")


def received(cache: Any, weights: "Tensor", totals: "Tensor | None") -> None:
    """Check of `HeavyHitters.step`."""
    is_cache(cache)
    require_tensor(weights, "weights")
    require(not weights.is_complex(), "weights", weights, "attention weights, which are real")
    batch, length = len(cache.stored), cache.length
    fits = weights.ndim == 4 and (len(weights), weights.shape[-1]) == (batch, length)
    require(fits, "weights", weights, "({}, heads, seq, {}): a weight for each row of the cache", batch, length)
    require_values(weights.isfinite().all(), "weights", "infinite or NaN somewhere", "finite attention weights")
    if totals is not None:
        known, seq = tuple(totals.shape), weights.shape[2]
        wanted = "one with the rows kept last time and the new tokens, ({}, {} + {}, …)"
        require((batch, length) == (known[0], known[1] + seq), "cache", cache, wanted, *known, seq)


def window_rows(seq: object, kv_seq: object) -> None:
    """Check of `window_mask`."""
    require(is_int(seq, 1), "seq", seq, "at least one query")
    require(is_int(kv_seq, seq), "kv_seq", kv_seq, "at least the {} queries", seq)  # type: ignore[arg-type]


def chosen_rows(rows: "Tensor", kv_seq: int) -> None:
    """Check of `chosen_mask`."""
    require_tensor(rows, "rows")
    require(_indexes(rows) and rows.ndim == 3, "rows", rows, "integers (batch, seq, chosen)")
    require(is_int(kv_seq, rows.shape[1]), "kv_seq", kv_seq, "at least the {} queries", rows.shape[1])
    inside = ((rows >= 0) & (rows < kv_seq)).all()
    require_values(inside, "rows", "beyond the cached tokens somewhere", f"from 0 to {kv_seq - 1}")


def after_policy(shortened: Any, cache: Any) -> None:
    """Check of what a ``policy`` of `Generation.stream` returns for a layer's cache."""
    kept = type(shortened) is type(cache) and shortened.layer_idx == cache.layer_idx and shortened.like == cache.like
    if not (kept and shortened.seen == cache.seen):
        wanted = "layer {}'s {}, perhaps with fewer rows (`keep`), and as many tokens seen"
        require(False, "policy", shortened, wanted, cache.layer_idx, type(cache).__name__)


def _positions(position_ids: "Tensor", hidden_states: "Tensor") -> None:
    import torch

    require_tensor(position_ids, "position_ids")
    dtype, device, (batch, seq, _) = position_ids.dtype, hidden_states.device, hidden_states.shape
    integers = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    wanted = "int64, or other integers that torch compares"
    require(dtype not in (torch.uint16, torch.uint32, torch.uint64), "position_ids", position_ids, wanted)
    rows, columns = position_ids.shape if position_ids.ndim == 2 else (0, 0)  # `in` knows no symbolic sizes
    fits = columns == seq and (rows == 1 or rows == batch)
    if not (integers and fits and position_ids.device == device):
        reject("position_ids", position_ids, f"integers ({batch} or 1, {seq}) on {device}")
    require_values((position_ids >= 0).all(), "position_ids", "negative somewhere", "positions from 0 on")


def _tables(position_embeddings: object, hidden_states: "Tensor", pairs: int) -> None:
    import torch

    (batch, seq, _), device = hidden_states.shape, hidden_states.device
    two = isinstance(position_embeddings, tuple | list) and len(position_embeddings) == 2
    for table in position_embeddings if two else [position_embeddings]:  # type: ignore[attr-defined]
        fits = two and isinstance(table, torch.Tensor) and table.ndim == 3 and table.device == device
        fits = fits and table.dtype in (torch.float32, torch.float64)
        if fits:
            rows, columns, width = table.shape  # `in` knows no symbolic sizes
            fits = (rows == 1 or rows == batch) and columns == seq and width == pairs
        if not fits:
            wanted = f"cosines and sines of position_tables, float32 ({batch} or 1, {seq}, {pairs}) on {device}"
            reject("position_embeddings", table, wanted)


def _mask(attention_mask: "Tensor", batch: int, heads: int, seq: int, kv_seq: int, device: "torch.device") -> None:
    """See `Visibility` for what is read how."""
    import torch

    name = "attention_mask"
    require_tensor(attention_mask, name)
    shape, dtype = tuple(attention_mask.shape), attention_mask.dtype
    if attention_mask.device != device:
        reject(name, attention_mask, f"a mask on {device}")
    if attention_mask.ndim == 2:
        if shape != (batch, kv_seq):
            each = f"({batch}, 1, {seq}, {kv_seq}): add [None, None]"
            reject(name, attention_mask, f"shape {(batch, kv_seq)}, cache included; or, for each query, {each}")
        integers = not (dtype.is_floating_point or dtype.is_complex)
        require(integers, name, attention_mask, "bool or integers in a (batch, kv_seq) mask")
        return
    fits = len(shape) == 4 and shape[2:] == (seq, kv_seq)
    if not fits or (shape[0] != 1 and shape[0] != batch) or shape[1] not in (1, heads):
        each = f"({batch} or 1, {heads} or 1, {seq}, {kv_seq})"
        reject(name, attention_mask, f"shape {(batch, kv_seq)} or, for each query, {each}")
    if dtype == torch.bool:
        return
    require(is_float(dtype), name, attention_mask, "bool (True keeps) or {} (added to the scores)", FLOATS)
    lowest, highest = attention_mask.aminmax()
    require_values(highest < float("inf"), name, "infinite or NaN somewhere", "numbers below infinity")
    masks_something = lowest < 0
    if seq == 1:
        masks_something |= (lowest == 0) & (highest == 0)
    require_values(
        masks_something,
        name,
        "a floating-point mask without a negative entry, which masks nothing",
        "negative entries where keys are hidden: it is added to the scores. Ones and zeros that mean keep and drop "
        "must be bool and have four axes, as in torch.ones(seq, kv_seq).tril().bool()[None, None]; None is causal",
    )


def model_call(
    model: Any,
    input_ids: "Tensor",
    attention_mask: "Tensor | None" = None,
    position_ids: "Tensor | None" = None,
    past_key_values: Any = None,
    use_cache: bool = False,
) -> None:
    """Check of `DeepseekV2Model.forward`; the layers' own arguments included."""
    import torch

    require_tensor(input_ids, "input_ids")
    layers, vocab = model.layers, model.config.vocab_size
    weight = first_weight(model.embed_tokens)
    if weight is None:  # an embedding that others wrap
        weight = first_weight(*layers[0].modules())
    device = input_ids.device if weight is None else weight.device
    fits = input_ids.ndim == 2 and input_ids.device == device
    fits = fits and (input_ids.numel() > 0 or _may_be_empty(input_ids, model))
    if not fits or input_ids.dtype not in (torch.int32, torch.int64):
        reject("input_ids", input_ids, f"integers (batch, seq) on {device}, with at least one token")
    inside = ((input_ids >= 0) & (input_ids < vocab)).all()
    wanted = f"tokens from 0 to {vocab - 1}: vocab_size is {vocab}"
    require_values(inside, "input_ids", "outside of the vocabulary somewhere", wanted)
    if use_cache is not None and not isinstance(use_cache, int):
        reject("use_cache", use_cache, "True or False")
    given = isinstance(past_key_values, Sequence) and len(past_key_values) == len(layers)
    if past_key_values is not None and not given:
        reject("past_key_values", past_key_values, f"a cache for each of {len(layers)} layers, or None")
    # What the layers will get, as far as a check looks at it: a shape, a dtype, a device.
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    hidden_states = torch.empty(1, dtype=dtype, device=device).expand(*input_ids.shape, model.config.hidden_size)
    for wrapped, cache in zip(layers, past_key_values or [None] * len(layers), strict=True):
        if (layer := _within(wrapped, "self_attn")) is not None:
            layer_call(layer, hidden_states, attention_mask, position_ids, cache, whole=model)
            attention_mask = position_ids = None  # looked at once


def _takes_one(function: Any) -> bool:
    """Whether this can be called with one argument."""
    try:
        inspect.signature(function).bind(None)
    except ValueError:  # it does not say
        return callable(function)
    except TypeError:
        return False
    return True


def ending_tokens(config: "DeepseekV2Config", eos_token_id: object, pad_token_id: object) -> list[int]:
    """The tokens that end a sequence: one, several or none."""
    several = (list, tuple, range)
    ends: list[Any] = [*eos_token_id] if isinstance(eos_token_id, several) else [eos_token_id]
    ends = [] if eos_token_id is None else ends
    last = config.vocab_size - 1
    for name, token in [*(("eos_token_id", end) for end in ends), ("pad_token_id", pad_token_id)]:
        known = is_int(token, 0, last) or (token is None and name == "pad_token_id")
        require(known, name, token, "tokens from 0 to {}", last)
    return ends


def generation(
    config: "DeepseekV2Config",
    input_ids: "Tensor",
    max_new_tokens: int,
    attention_mask: "Tensor | None",
    temperature: float,
    top_p: float,
    generator: object,
    cache_format: str | None,
    policy: object,
) -> None:
    """Check of `Generation.stream`; the model checks the tokens themselves."""
    from torch import Generator

    latent_format(config, "cache_format", cache_format)
    taken = "None, or a callable that takes a layer's cache alone: attention weights are not handed on"
    require(policy is None or _takes_one(policy), "policy", policy, taken)
    require_tensor(input_ids, "input_ids")
    require(input_ids.ndim == 2, "input_ids", input_ids, "integers (batch, seq)")
    require(is_int(max_new_tokens, 0), "max_new_tokens", max_new_tokens, "0 or more tokens")
    require(is_number(temperature) and temperature >= 0, "temperature", temperature, "0, or more to draw")
    require(is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    drawn = generator is None or isinstance(generator, Generator)
    require(drawn, "generator", generator, "None or a torch.Generator")
    if attention_mask is None:
        return
    require_tensor(attention_mask, "attention_mask")
    same = attention_mask.shape == input_ids.shape and attention_mask.device == input_ids.device
    wanted = "the shape and device of input_ids, {} on {}"
    require(same, "attention_mask", attention_mask, wanted, tuple(input_ids.shape), input_ids.device)
    keeps = attention_mask.bool()
    on_the_left = bool((keeps[:, 1:] >= keeps[:, :-1]).all() and keeps[:, -1].all())
    require(on_the_left, "attention_mask", attention_mask, "padding on the left only, and a token last")
    whole = policy is None or bool(keeps.all())  # else each layer's padding would have to follow its rows
    require(whole, "attention_mask", attention_mask, "True everywhere, without padding, where there is a policy")
