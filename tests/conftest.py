"""Fixtures that several test files use."""

import sys

import operators
import pytest
import torch

import cover_kernels

if operators.DEVICE != "cpu":
    torch.set_default_device(operators.DEVICE)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="SIGKILLs that the runs of test_survival.py get")
    parser.addoption("--examples", type=int, default=40, help="examples of each test of test_fuzz.py")


@pytest.fixture(autouse=True)
def same_precision_on_every_processor(monkeypatch):
    if "cover.learner" in sys.modules:
        monkeypatch.setattr("cover.learner.computes_in_bf16", lambda: False)


@pytest.fixture(params=[*operators.compiled_backends(), "reference"])
def backend(request):
    """Runs a test once on every backend that serves here."""
    with cover_kernels.use_backend(request.param):
        yield request.param
