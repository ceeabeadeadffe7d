"""torch, imported when it is first used: what needs none of it (a recipe with a wrong key, a missing file) is said at once.

Every module takes torch from here. It stands for `lazy import torch` (PEP 810), which Python has from 3.15 on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar


@contextmanager
def importing() -> Iterator[None]:
    """Inside, the garbage collector rests: an import makes no garbage, and looking for it takes a tenth of torch's import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


if TYPE_CHECKING:
    import safetensors.torch as safetensors
    import torch
    from torch import Tensor, nn
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self.__name__ = name
            self._module = None

        def __getattr__(self, name: str) -> Any:
            if self._module is None:
                with importing():
                    self._module = import_module(self.__name__)
            return getattr(self._module, name)

    torch, nn, safetensors = _Lazy("torch"), _Lazy("torch.nn"), _Lazy("safetensors.torch")
    # for annotations; `isinstance` needs torch.Tensor
    Tensor = Any

__all__ = ["Tensor", "importing", "nn", "no_grad", "safetensors", "torch"]

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def no_grad(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Decorates as `torch.no_grad()` does, which would import torch with the module."""

    @wraps(function)
    def without_gradient(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradient
