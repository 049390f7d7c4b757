"""A GPU that is the host: tensors that claim to be on it, whose values lie in the host's memory, or nowhere at all.

So the way that code takes on a GPU is run on a machine without one. What a GPU would refuse is an error here too: an
operation between it and the host, and reading its memory as if it were the host's. Everything that it is given to do is
noted: operations, the bytes and products they take, copies from and to the host, and answers that the host waits for.

With `backing="meta"` tensors have no values, so that whole blocks of large models are run in no time; whatever the host
asks is answered as of a run in which all goes well.
"""

import importlib.util
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llmprune_kernels.obs import reference

GPU = torch.device("cuda", 0)
GIBIBYTES = 139  # of an H200
# Operations that launch nothing.
_FREE = {
    "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view", "view_as", "_reshape_alias", "set_", "resize_", "is_same_size", "_local_scalar_dense",
}  # fmt: skip
_TAKE_BOTH = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}  # the host's tensors beside the GPU's
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive"}


class DeviceError(AssertionError):
    """A GPU would have refused that, or read what is not its memory."""


@dataclass
class Done:
    """What a GPU was given to do, by operation: how often, the bytes that it moved, and the products, by precision."""

    calls: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    products: Counter[tuple[str, str]] = field(default_factory=Counter)  # by operation and precision
    waits: Counter[str] = field(default_factory=Counter)  # what the host waited for
    to_gpu: int = 0  # bytes
    to_host: int = 0
    pageable: int = 0  # of these, from or to memory that is not pinned

    @property
    def total(self) -> int:
        return self.calls.total()


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # the modes below see all
    _at_work = False  # on an operation, which is to see tensors as they are

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return Tensor.device.__get__(self) if OnGpu._at_work else GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Any:
        return on_gpu(Tensor.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]

    def data_ptr(self) -> int:
        place: int = self.untyped_storage()._cdata * 1024
        return place + int(self.storage_offset()) * self.element_size() + 1

    def numpy(self, **options: Any) -> Any:
        raise DeviceError("numpy reads the host's memory only")

    def __array__(self, *rest: Any) -> Any:
        raise DeviceError("numpy reads the host's memory only")

    def is_pinned(self) -> bool:  # type: ignore[override]
        return False


def on_gpu(tensor: Tensor) -> Any:
    """Return a tensor with the same memory that says that it is on a GPU."""
    return tensor if isinstance(tensor, OnGpu) else Tensor._make_subclass(OnGpu, tensor.detach(), tensor.requires_grad)


class PretendedGpu:
    """What is going on on the GPU; `done` is by phase of a run, where one has been told by `phase`."""

    def __init__(self, backing: str) -> None:
        self.backing = torch.device(backing)
        self.by_phase: dict[str, Done] = defaultdict(Done)
        self.phase = ""
        self.pinned: set[int] = set()
        self.called = False  # whether a call with tensors on the GPU is under way

    @property
    def done(self) -> Done:
        return self.by_phase[self.phase]

    def forget(self) -> None:
        """Count from here."""
        self.by_phase.clear()

    def note(self, name: str, given: list[Tensor], made: list[Tensor], func: Any, args: Any) -> None:
        done = self.done
        if name in _WAITS:
            done.waits[name] += 1
        if name == "index" and any(tensor.dtype == torch.bool for tensor in given[1:]):
            done.waits["index by a mask"] += 1
        if name in _FREE:
            return
        done.calls[name] += 1
        done.moved[name] += sum(_bytes(tensor) for tensor in {id(t): t for t in [*given, *made]}.values())
        if count := _products(name, given, made, args):
            done.products[name, _precision(name, given)] += count

    def sweep(
        self,
        block_BO: Tensor,
        upper_BB: Tensor,
        keep_BO: Tensor,
        error_BO: Tensor | None = None,
        n: int = 0,
        m: int = 0,
        fused: bool = True,
    ) -> None:
        """Stand in for the launch of the Triton kernel of the recursion."""
        self.done.calls["sweep"] += 1
        self.done.moved["sweep"] += sum(map(_bytes, (block_BO, block_BO, keep_BO)))
        if self.backing.type == "meta":
            return
        block_BO, upper_BB, keep_BO = (tensor.as_subclass(Tensor) for tensor in (block_BO, upper_BB, keep_BO))
        if n:
            errors_BO, kept_BO = reference.obs_nm(block_BO, upper_BB, n, m)
            keep_BO.copy_(kept_BO)
        else:
            errors_BO = reference.obs_masked(block_BO, upper_BB, keep_BO)
        if error_BO is not None:
            error_BO.as_subclass(Tensor).copy_(errors_BO)

    def carry(self, tensor: Tensor, dtype: torch.dtype, to_gpu: bool, pinned: bool, waits: bool = True) -> None:
        """Note that a tensor crosses from the host or to it."""
        done, count = self.done, tensor.numel() * dtype.itemsize
        if to_gpu:
            done.to_gpu += count
        else:
            done.to_host += count
            done.waits["a copy to the host"] += waits
        done.pageable += 0 if pinned else count
        done.calls["copy to the GPU" if to_gpu else "copy to the host"] += 1


def _bytes(tensor: Tensor) -> int:
    """Return what reading or writing takes: of an expanded tensor only what is there."""
    return (
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        * tensor.element_size()
    )


def _products(name: str, given: list[Tensor], made: list[Tensor], args: Any) -> int:
    """Return the floating point operations of products and factorisations."""
    if name in _PRODUCTS:
        return 2 * given[-2].numel() * given[-1].shape[-1]
    if name in ("linalg_cholesky_ex", "cholesky"):
        return int(given[0].shape[-1] * given[0].numel() / 3)
    if name in ("linalg_solve_triangular", "triangular_solve"):
        return given[0].shape[-1] * given[1].numel()
    if name == "cholesky_inverse":
        return 2 * given[0].shape[-1] * given[0].numel()  # as torch does on a GPU: two solves with the identity
    return 0


def _precision(name: str, given: list[Tensor]) -> str:
    if given[-1].dtype in (torch.bfloat16, torch.float16):
        return "16 bit"
    if name not in _PRODUCTS or given[-1].dtype != torch.float32:
        return "solver"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


class _Operations(TorchDispatchMode):
    """Sees every operation that is executed."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname if hasattr(func, "_opname") else str(func).split(".")[1]
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = [tensor for tensor in given if isinstance(tensor, OnGpu)]
        if not here:
            made = func(*args, **kwargs)
            inside = self.gpu.called and not given  # what a call with the GPU's tensors makes is there too
            return tree_map(lambda value: _kept(value, {}), made) if inside else made
        hosts = [tensor for tensor in given if not isinstance(tensor, OnGpu) and tensor.ndim]
        if hosts and name not in _TAKE_BOTH:
            shapes = [(tuple(tensor.shape), tensor.dtype, type(tensor).__name__) for tensor in given]
            raise DeviceError(f"{func} is given tensors of the host and of the GPU: {shapes}")
        if name == "copy_":
            return self._copied(func, args, kwargs)
        if name == "_local_scalar_dense" and self.gpu.backing.type == "meta":
            self.gpu.note(name, given, [], func, args)
            return _answer(args[0])
        if name == "equal" and self.gpu.backing.type == "meta":
            self.gpu.note(name, given, [], func, args)
            return True
        if name in _PRODUCTS and _precision(name, given) == "tf32" and self.gpu.backing.type == "cpu":
            *others, left, right = args  # what is added to a product is not rounded
            args = (*others, _rounded(left), _rounded(right))
        if func is torch.ops.aten.mm.dtype and self.gpu.backing.type == "cpu":  # which CPUs do not have
            func, args = torch.ops.aten.mm.default, [factor.to(args[2]) for factor in args[:2]]
        OnGpu._at_work = True
        try:
            result = func(*args, **kwargs)
        finally:
            OnGpu._at_work = False
        inplace = {id(tensor): tensor for tensor in given}
        result = tree_map(lambda value: _kept(value, inplace), result)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.gpu.note(name, given, made, func, args)
        return result

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        if isinstance(target, OnGpu) and isinstance(source, OnGpu):
            self.gpu.note("copy_", [target, source], [], func, args)
            return func(*args, **kwargs)
        to_gpu = isinstance(target, OnGpu)
        host = source if to_gpu else target
        self.gpu.carry(
            source, source.dtype, to_gpu, id(host.untyped_storage()._cdata) in self.gpu.pinned or self.pinned(host)
        )
        if self.gpu.backing.type == "meta":
            return target if to_gpu else target.zero_()
        return func(*args, **kwargs)

    def pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.gpu.pinned


def _rounded(factor: Tensor) -> Tensor:
    """Round fp32 to the 10 bits that TF32 has."""
    bits = factor.as_subclass(Tensor).contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _kept(value: Any, given: dict[int, Tensor]) -> Any:
    return on_gpu(value) if isinstance(value, Tensor) and id(value) not in given else value


def _answer(asked: Tensor) -> Any:
    """Return what the host is told where there are no values."""
    if asked.dtype == torch.bool:
        return True
    return 1.0 if asked.is_floating_point() else 0


class _Calls(TorchFunctionMode):
    """Sees every call from Python: what is made on a GPU, and what goes from one device to another."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            self.gpu.pinned.add(made.untyped_storage()._cdata)
            return made
        if func is Tensor.is_pinned:
            return args[0].untyped_storage()._cdata in self.gpu.pinned
        if func is Tensor.to or func is Tensor.cpu or func is Tensor.cuda:
            return self._moved(func, args, kwargs)
        if func is Tensor.tolist and isinstance(args[0], OnGpu):
            self.gpu.done.waits["tolist"] += 1
            if self.gpu.backing.type == "meta":
                return torch.ones(args[0].shape).to(args[0].dtype).tolist()
            return args[0].as_subclass(Tensor).tolist()
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], OnGpu):
            return self._attention(func, args, kwargs)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = self.gpu.backing
            made = func(*args, **kwargs)
            if name not in ("empty", "empty_like", "new_empty", "empty_strided"):
                self.gpu.done.calls[name] += 1
                self.gpu.done.moved[name] += _bytes(made)
            return on_gpu(made)
        if kwargs.get("device") is not None:
            return func(*tree_map(_plain, args), **kwargs)
        if func is torch.histc and not args[0].is_floating_point():  # which CPUs do not count
            return self._seen(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
        return self._seen(func, args, kwargs)

    def _seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = any(isinstance(value, OnGpu) for value in tree_leaves((args, kwargs)))
        before, self.gpu.called = self.gpu.called, self.gpu.called or given
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.called = before

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if func is Tensor.cpu:
            target, dtype, copy = torch.device("cpu"), None, False
        elif func is Tensor.cuda:
            target, dtype, copy = GPU, None, False
        else:
            copy = kwargs.pop("copy", False)
            memory_format = kwargs.pop("memory_format", None)
            target, dtype, _, found = torch._C._nn._parse_to(*args[1:], **kwargs)
            memory_format = memory_format or found
        was_here, stays = isinstance(tensor, OnGpu), False
        goes = was_here if target is None else target.type == "cuda"
        if goes == was_here and (target is None or target.type in ("cpu", "cuda")):
            stays = True
        if stays:
            options: dict[str, Any] = {"copy": copy}
            if func is Tensor.to and memory_format is not None:
                options["memory_format"] = memory_format
            return Tensor.to(tensor, dtype or tensor.dtype, **options)
        if target is not None and target.type == "meta":
            return Tensor.to(tensor.as_subclass(Tensor), target, dtype or tensor.dtype)
        dtype = dtype or tensor.dtype
        if tensor.is_meta and not was_here:
            raise DeviceError("a tensor without values is moved to the GPU")
        self.gpu.carry(tensor, tensor.dtype, goes, tensor.untyped_storage()._cdata in self.gpu.pinned)
        plain = tensor.as_subclass(Tensor)
        if self.gpu.backing.type != "meta":
            moved = plain.to(dtype, copy=True)
        elif goes:
            moved = torch.empty_like(plain, dtype=dtype, device="meta")
        else:
            moved = torch.zeros(plain.shape, dtype=dtype)
        return on_gpu(moved) if goes else moved

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A fused kernel: what a GPU computes, with half of it left out where attention is causal."""
        query, key, value = args[:3]
        done = self.gpu.done
        done.calls["attention"] += 1
        done.moved["attention"] += sum(map(_bytes, (query, key, value, query)))
        share = 0.5 if kwargs.get("is_causal") else 1.0
        factor = 3.5 if query.requires_grad else 1.0
        done.products["attention", _precision("attention", [query])] += int(
            4 * query.numel() * key.shape[-2] * share * factor
        )
        if kwargs.get("attn_mask") is not None:
            done.calls["attention with a mask"] += 1
        if self.gpu.backing.type == "meta":
            return query + 0 * (key + value).mean(-2, keepdim=True) if query.requires_grad else torch.empty_like(query)
        return self._seen(func, args, kwargs)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnGpu) else value


def _is_gpu(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _Generator(torch.Generator):
    """A class, as what torch imports meanwhile writes types with it."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, *rest: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


@contextmanager
def pretended_gpu(backing: str = "cpu", gibibytes: float = GIBIBYTES) -> Iterator[PretendedGpu]:
    """Let `device="cuda"` be a GPU that is none."""
    gpu = PretendedGpu(backing)
    room = int(gibibytes * 2**30)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "synchronize": lambda *rest: None,
        "mem_get_info": lambda *rest: (room, room),
        "memory_allocated": lambda *rest: 0,
        "memory_reserved": lambda *rest: 0,
        "max_memory_allocated": lambda *rest: 0,
        "reset_peak_memory_stats": lambda *rest: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda *rest: "a GPU that is none",
        "get_device_capability": lambda *rest: (9, 0),
        "get_device_properties": lambda *rest: SimpleNamespace(total_memory=room, multi_processor_count=132),
        "is_bf16_supported": lambda *rest, **options: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "Event": _Event,
        "device": lambda device: ExitStack(),
        "device_of": lambda tensor: ExitStack(),
    }
    with ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            from llmprune_kernels.obs import triton

            stack.enter_context(mock.patch.object(triton, "_launch", gpu.sweep))
            stack.enter_context(mock.patch.object(triton, "runs_on", lambda device: True))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        stack.enter_context(_Calls(gpu))
        stack.enter_context(_Operations(gpu))
        yield gpu
