"""A pretended GPU: tensors that say they are on a device of their own, and compute on the CPU.

As on CUDA, operators refuse tensors of several devices, but for numbers and indices, and generators
of another device; and nothing can be read as NumPy. Where the host waits for the device is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import pytest
import sae_lens
import torch
import transformer_lens
from torch import Tensor
from torch._utils import _rebuild_device_tensor_from_cpu_tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import mxd_lens

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no backends written in Python", allow_module_level=True)

NAME = "gpu"
DEVICE = f"{NAME}:0"

_PACKAGES = {
    f"{Path(package.__path__[0])}/": package.__name__
    for package in (mxd_lens, sae_lens, transformer_lens)
}
_READS = {
    **{"_local_scalar_dense": "number", "equal": "number", "bincount": "number"},
    **dict.fromkeys(("nonzero", "masked_select", "_unique2", "repeat_interleave"), "shape"),
}
"""Operators after which the host knows a number, or the shape of the result."""
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_SHAPES = {"size", "stride", "dim", "numel", "storage_offset", "is_contiguous"}
_SHAPES |= {f"sym_{name}" for name in _SHAPES} | {"is_strides_like_format"}
_SHAPES |= {"is_non_overlapping_and_dense"}


class Sync(NamedTuple):
    """The host waits for the device."""

    what: str
    """It reads a number or the shape of a result, or copies from (download) or to it (upload)."""
    package: str
    """Whose line is the innermost that asks for it."""
    function: str
    line: int


class OnGPU(Tensor):
    """A tensor of the pretended device, around one of the CPU."""

    syncs: ClassVar[Counter[Sync]] = Counter()
    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
            dispatch_sizes_strides_policy="sizes",  # operators may resize inner
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _name(func) in _SHAPES:
            return func(args[0].inner, *args[1:])
        return _run(func, *args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        saved = self.detach().cpu(), self.dtype, DEVICE, self.requires_grad
        return _rebuild_device_tensor_from_cpu_tensor, saved

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnGPU) -> None:
        self.inner = value.inner

    def untyped_storage(self) -> Any:
        """By which safetensors tells what shares memory."""
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()


class _Module(backend_registration._DummyBackendModule):
    """``torch.gpu``."""

    entered = False

    def is_available(self) -> bool:
        return self.entered

    def device_count(self) -> int:
        return int(self.entered)

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        """The CPU's generator is this device's, too."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def _module() -> _Module:
    """Tells PyTorch the name of the device. That stays; but there is none until it is entered."""
    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    return module


@contextmanager
def pretended_gpu() -> Iterator[Counter[Sync]]:
    """There is this device for as long as the context is entered; yields the count of its syncs.

    Autocast on it does nothing.
    """
    module = _module()
    OnGPU.syncs.clear()
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(_run, "PrivateUse1")
    copy = torch.ops.aten.copy_.default  # for which torch.tensor does not ask the fallback
    aten.impl("copy_", partial(_run, copy), "PrivateUse1")
    module.entered = True
    try:
        # Backward passes in this thread are counted by the lines that ask for them.
        with patch.object(torch, "load", _load), torch.autograd.set_multithreading_enabled(False):
            yield OnGPU.syncs
    finally:
        module.entered = False
        aten._destroy()
        fallback._destroy()


_torch_load = torch.load


def _load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """As torch.load, which would move bytes to the device, where there are none."""
    found = _torch_load(file, "cpu", **kwargs)
    if map_location is None:
        return found
    return tree_map(lambda leaf: leaf.to(map_location) if isinstance(leaf, Tensor) else leaf, found)


def _name(func: Any) -> str:
    return func.name().removeprefix("aten::").split(".")[0]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGPU) else value


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator, on the CPU."""
    name = _name(func)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(tensor, OnGPU) for tensor in tensors)
    asked = kwargs.get("device")
    result_on_gpu = on_gpu if asked is None else torch.device(asked).type == NAME
    generator = kwargs.get("generator")
    if result_on_gpu and generator is not None:
        raise RuntimeError(f"{name}: expected a generator of {DEVICE}, found {generator.device}")
    if on_gpu:
        if name not in ("copy_", "_to_copy"):
            _check_together(name, args, tensors)
        for what in _reasons(name, args, kwargs, result_on_gpu):
            OnGPU.syncs[_sync(what)] += 1
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    own = {id(_inner(tensor)): tensor for tensor in tensors}

    def outer(value: Any) -> Any:
        if id(value) in own:
            return own[id(value)]
        return OnGPU(value) if isinstance(value, Tensor) and result_on_gpu else value

    return tree_map(outer, found)


def _check_together(name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Raises if tensors of this device meet others, as CUDA does."""
    if name in _INDEXED and isinstance(args[0], OnGPU):
        tensors = tree_leaves(args[2:3])  # indices may be anywhere
    many = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()]
    others = [tensor for tensor in many if not isinstance(tensor, OnGPU)]
    if others:
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {shapes}")


def _reasons(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], result_on_gpu: bool
) -> Iterator[str]:
    """Why the host waits for this operator."""
    if name == "copy_":
        to, of = (isinstance(tensor, OnGPU) for tensor in args[:2])
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if to != of and waits:
            yield "upload" if to else "download"
    elif name == "_to_copy":
        if not result_on_gpu and not kwargs.get("non_blocking"):
            yield "download"
    elif name in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        yield from ["upload" for index in indices if not isinstance(index, OnGPU)]
        filled = "put" in name and len(indices) == 1 and args[2].numel() == 1  # as masked_fill
        masks = [index for index in indices if isinstance(index, OnGPU) and not filled]
        yield from ["shape" for index in masks if index.dtype == torch.bool]
    elif name in _READS and kwargs.get("output_size") is None:
        yield _READS[name]


def _sync(what: str) -> Sync:
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        for folder, package in _PACKAGES.items():
            if code.co_filename.startswith(folder):
                file = code.co_filename.removeprefix(folder)
                return Sync(what, package, f"{file}:{code.co_name}", frame.f_lineno)
        frame = frame.f_back
    return Sync(what, "elsewhere", "", 0)
