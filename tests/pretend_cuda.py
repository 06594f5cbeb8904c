"""A GPU that is not there: tensors of the CPU that pass for CUDA's, so that notebooks run as they would on one.

Tensors that were asked for on "cuda" are marked, by their storage, and so is whatever is computed from them. A marked tensor
says that it is on CUDA, does not meet an unmarked one in an operation, cannot become a NumPy array, shows its device when
printed, and ends the run at an assertion that only a GPU would notice later. Fused kernels are switched off: the definitions
serve. Numbers are the CPU's: what another order of sums changes is for a real GPU to show.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dsv2_ref import recompute
from dsv2_ref.fast.processor import has_bfloat16

CUDA = torch.device("cuda", 0)
MAY_MIX = {"copy_", "__set__", "__setitem__", "__getitem__", "index_put_"}
"""Operations that take tensors of both kinds on a GPU as well."""

PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "linear"}
"""Made in float32, and rounded, where the CPU would multiply bfloat16 one number at a time."""

SHAPES = (Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.ndim.__get__, Tensor.requires_grad.__get__)
IDENTITY = {
    Tensor.device.__get__: (lambda x: CUDA),
    Tensor.is_cuda.__get__: (lambda x: True),
    Tensor.is_cpu.__get__: (lambda x: False),
    Tensor.get_device: (lambda x: 0),
    Tensor.cpu: Tensor.clone,
}
"""What a marked tensor answers in place of PyTorch."""


class PretendCuda(TorchFunctionMode):
    """Marks what is asked for on CUDA, and watches over the marks."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[int, StorageWeakRef] = {}  # kept, so that a storage's address is not given to another

    def marked(self, x: Any) -> bool:
        fits = isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.layout == torch.strided
        return fits and x.device.type == "cpu" and x.untyped_storage()._cdata in self.marks

    def mark(self, x: Any) -> Any:
        fits = isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.layout == torch.strided
        if fits and x.device.type == "cpu":
            self.marks.setdefault(x.untyped_storage()._cdata, StorageWeakRef(x.untyped_storage()))
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        name = getattr(func, "__name__", str(func))
        if func in SHAPES:
            return func(*args, **kwargs)
        if self.marked(first):
            if func in IDENTITY:
                return IDENTITY[func](first)
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            if func in (Tensor.__repr__, Tensor.__format__) and first.ndim:
                return str(func(*args, **kwargs)).removesuffix(")") + ", device='cuda:0')"
            if name == "_assert_async" and len(args[1].encode()) >= 255:
                raise RuntimeError("Message length must be smaller than 255")
            if name == "_assert_async" and not bool(first):
                raise RuntimeError(f"CUDA error: device-side assert triggered; the context is lost: {args[1:]}")
        if name == "_has_compatible_shallow_copy_type":  # a module moves: its parameters are replaced, not filled
            return self.marked(first) == self.marked(args[1]) and func(*args)
        if func is Tensor.cuda:
            return self.mark(first if self.marked(first) else first.clone())
        if func is Tensor.to:
            return self.to(first, list(args[1:]), kwargs)
        if (device := kwargs.get("device")) is not None:
            if torch.device(device).type != "cuda":
                return func(*args, **kwargs)
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            return tree_map(self.mark, func(*args, **kwargs | {"device": "cpu"}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(self.marked, tensors)):
            return func(*args, **kwargs)
        strangers = [x for x in tensors if not self.marked(x) and x.device.type == "cpu" and x.ndim]
        if strangers and name not in MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors on cuda:0, found {tuple(strangers[0].shape)} on cpu")
        if name in PRODUCTS and tensors[0].dtype == torch.bfloat16 and not has_bfloat16():
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return self.mark(func(*args, **kwargs).bfloat16())
        return tree_map(self.mark, func(*args, **kwargs))

    def to(self, x: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> Tensor:
        """`Tensor.to`, to and from the GPU that is not there."""
        before, wanted = self.marked(x), kwargs.pop("device", None)
        for place, given in enumerate(rest):
            if isinstance(given, Tensor):
                wanted, rest[place] = CUDA if self.marked(given) else given.device, given.dtype
            elif isinstance(given, str | torch.device):
                wanted = given
                del rest[place]
                break
        rest = [given for given in rest if given is not None and not isinstance(given, bool)]
        kind = ("cuda" if before else "cpu") if wanted is None else torch.device(wanted).type
        if kind not in ("cuda", "cpu"):
            return x.to(wanted, *rest, **kwargs)
        out = x.to(*rest, **kwargs) if rest or kwargs else x
        if (kind == "cuda") != before and out.data_ptr() == x.data_ptr():
            out = out.clone()
        return self.mark(out) if kind == "cuda" else out

    def kept_in_backward(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A ``checkpoint`` whose function finds this mode in the backward pass as well, where PyTorch has none."""

        def with_mode(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*given: Any, **named: Any) -> Any:
                with nullcontext() if torch._C._len_torch_function_stack() else self:
                    return function(*given, **named)

            return checkpoint(run, *args, **kwargs)

        return with_mode


def begin() -> PretendCuda:
    """From here on, in this process, there is a GPU."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ["DSV2_KERNELS"] = "0"  # there is nothing to run them
    h100 = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80e9, multi_processor_count=132)
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: h100
    mode = PretendCuda()
    mode.__enter__()
    recompute.checkpoint = mode.kept_in_backward(recompute.checkpoint)
    from dsv2_ref import teach  # only here: it looks for a GPU

    right = teach.milliseconds
    teach.milliseconds = lambda calls, repeats=1: right(calls, repeats=1)  # what is measured is not compared
    return mode
