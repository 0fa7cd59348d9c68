"""What runs inside of a custom autograd function, where gradients are disabled and yet computed later."""

from __future__ import annotations

import inspect
from typing import Any

from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, FunctionCtx

_FORWARD = Function.apply.__func__.__code__  # type: ignore[attr-defined]  # what their frames run
_BACKWARD = BackwardCFunction.apply.__code__


def is_trained_inside() -> bool | None:
    """Whether the custom autograd function that is running has gradients; None if there is none.

    With gradients disabled around it, a function knows of inputs that need one and of no node to hand it to.
    """
    found: bool | None = None
    frame, inner = inspect.currentframe(), None
    while frame is not None and frame.f_code is not _BACKWARD:
        if frame.f_code is _FORWARD and inner is not None:
            first = inner.f_code.co_varnames[:1]
            ctx = inner.f_locals.get(first[0]) if first else None
            node: Any = ctx if isinstance(ctx, FunctionCtx) else None
            disabled = node is not None and any(node.needs_input_grad) and not node.next_functions
            found = bool(found) or not disabled
        frame, inner = frame.f_back, frame
    return found
