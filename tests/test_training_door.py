"""``TrainingState`` where torch is, and where it isn't."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from statedict.doors import TrainingState

WITHOUT = r"""
import sys
sys.modules["torch"] = None  # every import of it fails
from statedict.doors import TrainingState
from statedict.errors import MissingDependency
try:
    TrainingState(best=1)
except MissingDependency as error:
    print(error)
"""


def test_it_can_be_named_without_torch_and_says_what_to_install() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=100, check=True)

    assert (
        "TrainingState needs torch, which can't be imported here. Install it: pip install 'statedict[torch]'\n"
        == run.stdout
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_what_it_makes_is_one() -> None:
    state = TrainingState(best=1)

    assert isinstance(state, TrainingState)
    assert "TrainingState(epoch: value, step: value, best: value)" == repr(state)
