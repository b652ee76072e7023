"""Autograd formulas of the operators: what is saved, and how upstream gradients reach hidden, weight and bias.

Legend: R = len(DivergenceRows._fields), N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators

TWICE = "is differentiable once: its gradients are computed outside autograd and have none themselves"


class _Once(torch.autograd.Function):
    """The identity, whose own backward refuses."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} {TWICE}")


def _first_order(gradients: list[Tensor | None], name: str) -> list[Tensor | None]:
    """Under create_graph=True these gradients would be constants in silence; make their backward an error."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return [None if g is None else _Once.apply(g.detach().requires_grad_(), name) for g in gradients]


def _setup_with_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.count = inputs[-1], len(inputs)
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype, inputs[1].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for dH and dW as outputs would be as large as they are
    ctx.save_for_backward(*output[2:])


def _backward_with_grads(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if getattr(ctx, "spent", False):
        raise RuntimeError('a second backward through linear_divergence needs Execution(save="statistics")')
    ctx.spent = True
    with torch.no_grad():
        scaled = [
            _scaled(saved, grad_loss).to(dtype) if wanted else None
            for saved, wanted, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
        ]
    return (*_first_order(scaled, "linear_divergence"), *[None] * (ctx.count - 3))


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """In place: a second gradient-sized buffer would cost as much as the parameter. For the same reason under a
    new name, `detach`: a tensor that the graph still holds would be copied into .grad. A compiler's tracing
    tensors are subclasses; it plans the memory itself. The factor stays in float32: a 0-dim tensor does not widen.
    """
    if type(saved) is not Tensor:
        return saved * factor
    if factor.device.type == "cpu" and factor == 1:
        return saved.detach()
    return saved.mul_(factor).detach()


def _setup_recompute(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Inputs and outputs go to the backward operator as they came."""
    outputs = (output,) if isinstance(output, Tensor) else output
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.outputs = len(outputs)
    ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.tensors = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*outputs, *(inputs[place] for place in ctx.tensors))


def _recompute(ctx: Any, grad: Tensor, backward: Any, name: str) -> tuple[Tensor | None, ...]:
    saved, inputs = ctx.saved_tensors, list(ctx.constants)
    for place, tensor in zip(ctx.tensors, saved[ctx.outputs :], strict=True):
        inputs[place] = tensor
    with torch.no_grad():
        gradients = backward(grad, *saved[: ctx.outputs], *inputs)
    needs, dtypes = inputs[-1], (inputs[0].dtype, inputs[1].dtype, inputs[1].dtype)
    wanted = [g.to(dtype) if need else None for g, need, dtype in zip(gradients, needs, dtypes, strict=True)]
    return (*_first_order(wanted, name), *[None] * (len(inputs) - 3))


def _backward_divergence(ctx: Any, grad_rows: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _recompute(ctx, grad_rows[0], operators.divergence_backward, "linear_divergence")


def _backward_logprobs(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
    return _recompute(ctx, grads, operators.logprobs_backward, "linear_logprobs")


operators.divergence_with_grads.register_autograd(_backward_with_grads, setup_context=_setup_with_grads)
operators.divergence.register_autograd(_backward_divergence, setup_context=_setup_recompute)
operators.logprobs.register_autograd(_backward_logprobs, setup_context=_setup_recompute)
