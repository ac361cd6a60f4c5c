"""Registration with torch.library: schemas, dispatch to a backend, and the errors of a second derivative."""

from functools import partial

import torch

from cover_kernels.backends import run
from cover_kernels.schemas import SCHEMAS

NAMESPACE = "cover_kernels"

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"{NAMESPACE}::{_name}", "CompositeExplicitAutograd", partial(run, _name))


def register(name: str, *, fake, setup_context=None, backward=None) -> None:
    """Give an operator its fake (meta) kernel and its autograd formula.

    Without a formula, the operator is a backward: differentiating through it raises RuntimeError.
    """

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative: {name.removesuffix('_bwd')} can be differentiated once, not twice"
        )

    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward or no_second_derivative, setup_context=setup_context)
