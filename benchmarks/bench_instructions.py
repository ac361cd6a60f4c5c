"""Instruction counts beside the times of the full form: what compare.py judges without noise."""

import instructions
import pytest
from conftest import KEY


def test_instructions(request, form):
    if form != "full":
        pytest.skip("takes minutes inside valgrind: only in the full form, or python instructions.py")
    try:
        request.config.stash[KEY]["instructions"] = instructions.count()
    except instructions.Unavailable as reason:
        pytest.skip(str(reason))
