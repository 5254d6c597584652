"""The integrations where the packages that they are for aren't installed, and the folders that they leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

import statedict  # noqa: E402
from statedict.runs.sealing import seal  # noqa: E402

WITHOUT = r"""
import importlib, sys
for name in ("accelerate", "lightning", "transformers"):
    sys.modules[name] = None  # every import of it fails
    try:
        importlib.import_module(f"statedict.torch.integrations.{name}")
    except ImportError as error:
        print(error)
"""


def test_each_says_what_to_install() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=100, check=True)

    assert [
        "SealedStates needs accelerate, which can't be imported here. Install it: pip install 'statedict[transformers]'",
        "StateDictCheckpointIO needs lightning, which can't be imported here. Install it: pip install 'statedict[lightning]'",
        "SealCheckpoints needs transformers, which can't be imported here. Install it: pip install 'statedict[transformers]'",
    ] == run.stdout.splitlines()


def test_a_sealed_folder_is_opened_as_before(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text("{}")
    seal(tmp_path)
    with statedict.open(tmp_path) as opened:
        assert ["weight"] == list(opened)
