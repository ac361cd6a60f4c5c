"""Fixtures that several test files use."""

import operators
import pytest
import torch

import cover_kernels

if operators.DEVICE != "cpu":
    torch.set_default_device(operators.DEVICE)


@pytest.fixture(params=[*operators.compiled_backends(), "reference"])
def backend(request):
    """Runs a test once on every backend that serves here."""
    with cover_kernels.use_backend(request.param):
        yield request.param
