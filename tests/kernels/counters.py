"""Dispatch modes that watch an op at work: matrix products, and the bytes of live tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mopd_kernels import operators


def inside(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func`; of our own operators the body, which a mode would not see otherwise."""
    if func.namespace != "mopd":
        return func(*args, **(kwargs or {}))
    body = getattr(operators, func.name().removeprefix("mopd::"))._init_fn
    with mode:
        return body(*args, **(kwargs or {}))


PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "mm.out", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm_")}


class Products(TorchDispatchMode):
    """Shapes (rows, inner, columns) of every matrix product; those of a batch one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in PRODUCTS:
            left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            count = left.size(0) if left.ndim == 3 else 1
            self.shapes += [(left.size(-2), left.size(-1), right.size(-1))] * count
        return inside(self, func, args, kwargs)

    def flops(self) -> int:
        return sum(2 * rows * inner * columns for rows, inner, columns in self.shapes)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of storages that were made inside, each counted once while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_address(value) for value in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(value)}
        result = inside(self, func, args, kwargs)
        for tensor in filter(_is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage, address = tensor.untyped_storage(), _address(tensor)
            if address not in before and address not in self.known and storage.nbytes() > 0:
                self._enter(storage, address)
        return result

    def _enter(self, storage: Any, address: int) -> None:
        size = storage.nbytes()
        self.known.add(address)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._leave, address, size)

    def _leave(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
