"""Calls of a module, handed to a function for as long as a block lasts; the module itself is not changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# What torch.nn.Module.__call__ looks up first, on the instance; compile() in place uses it too.
_SLOT = "_compiled_call_impl"
_LOCK = threading.Lock()


@contextmanager
def intercepted(
    module: torch.nn.Module,
    handler: Handler,
    on_context: Callable[[str], None] | None = None,
    *,
    nested: bool = False,
) -> Iterator[None]:
    """Within the block, a call of `module` is `handler(call, args, kwargs)`, where `call` is what would have run.

    Neither `forward` nor hooks are touched, so offloading, quantised layers and block caches work as they do, also
    where accelerate takes its hooks off and puts them on again during the block; and it stays outside of compiled
    graphs, for `torch.compile(module)` and for `module.compile()`.

    Args:
        module (`torch.nn.Module`): a denoiser.
        handler (`Callable`): what is called instead.
        on_context (`Callable[[str], None]`, *optional*): is told the name of each `module.cache_context(name)` that is
            entered.
        nested (`bool`, defaults to `False`): allow a block within another one of this thread, whose handler is then
            what `call` runs.

    Raises:
        RuntimeError: if the module is in another such block already.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.module_calls import intercepted
        >>> module = torch.nn.Identity()
        >>> with intercepted(module, lambda call, args, kwargs: 2 * call(*args, **kwargs)):
        ...     module(21)
        42
        >>> module(21)
        21
    """
    # Around torch.compile's module, not within it, where setattr would put it.
    own = object.__getattribute__(module, "__dict__")
    with _LOCK:
        before = own.get(_SLOT)
        owner = getattr(before, "interception_of", None)
        if owner is not None and not (nested and owner == threading.get_ident()):
            raise RuntimeError(
                f"this {type(module).__name__} is in the middle of a guided call. A shared model serves one run at a "
                "time: finish that call first, or give each thread its own copy."
            )
        call = before if before is not None else module._call_impl

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return handler(call, args, kwargs)

        replaced.interception_of = threading.get_ident()  # type: ignore[attr-defined]
        own[_SLOT] = replaced
    has_contexts = on_context is not None and hasattr(module, "cache_context")
    if has_contexts:
        cache_context: Callable[..., Any] = module.cache_context  # type: ignore[assignment]

        @contextmanager
        def told(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            on_context(name)  # type: ignore[misc]
            with cache_context(name, *args, **kwargs) as value:
                yield value

        context_before = own.get("cache_context")
        own["cache_context"] = told
    try:
        yield
    finally:
        with _LOCK:
            if has_contexts:
                _put_back(own, "cache_context", context_before)
            _put_back(own, _SLOT, before)


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is None:
        own.pop(name, None)
    else:
        own[name] = before


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether each new number of rows would be compiled anew.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.module_calls import is_compiled
        >>> is_compiled(torch.nn.Identity()), is_compiled(torch.compile(torch.nn.Identity(), backend="eager"))
        (False, True)
    """
    if "_orig_mod" in module._modules:  # torch.compile's module, without an import of all of its compiler
        return True
    before = module.__dict__.get(_SLOT)
    if before is not None and not hasattr(before, "interception_of"):
        return True
    # module.forward = torch.compile(module.forward)
    if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        return True
    # compile_repeated_blocks() compiles in place, block by block.
    return any(_SLOT in part.__dict__ for part in module.modules() if part is not module)


@contextmanager
def watched_method(owner: Any, name: str, seen: Callable[[Any], None]) -> Iterator[None]:
    """Within the block `seen` is told what a method of `owner` returns; nothing happens if it has no such method.

    Example:
        >>> from hfnoise.pipelines.module_calls import watched_method
        >>> class Counter:
        ...     def count(self):
        ...         return 3
        >>> counter = Counter()
        >>> with watched_method(counter, "count", print):
        ...     _ = counter.count()
        3
    """
    method = getattr(owner, name, None)
    if method is None:
        yield
        return

    def told(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        seen(result)
        return result

    before = owner.__dict__.get(name)
    owner.__dict__[name] = told
    try:
        yield
    finally:
        _put_back(owner.__dict__, name, before)
