"""What torch has written is read, counted and written again by a process in which torch can't be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from saved_values import facts, packed, saved  # noqa: E402
from test_convert import rich  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|TypedStorage is deprecated|quantiz).*")

READ = r"""
import hashlib, json, sys
sys.modules["torch"] = None  # every import of it fails
import statedict
path, target = sys.argv[1:]
found = {}
with statedict.open(path) as checkpoint:
    for key in checkpoint:
        tensor = checkpoint[key]
        for name, part in {"": tensor, **tensor.parts}.items():
            if part.entry.view is not None:
                found[f"{key}/{name}"] = [part.dtype, list(part.shape), hashlib.sha256(part.read()).hexdigest()]
statedict.inspect(path, stats=True)
statedict.convert(path, target)
assert sys.modules["torch"] is None and not any(name.startswith("torch.") for name in sys.modules)
print(json.dumps(found))
"""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The strided tensors of a tree by dotted key."""
    if isinstance(value, torch.Tensor):
        return {prefix: value} if value.layout == torch.strided and not value.is_quantized else {}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {
        name: tensor
        for key, item in items
        for name, tensor in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_is_read_bit_by_bit(zipped: bool, tmp_path: Path) -> None:
    value = rich()
    del value["a.b"]  # reads like another key
    if not zipped:  # torch itself can't load the newer dtypes from its old format
        for key in ("float8", "float4", "uint16"):
            del value[key]
    source = saved(value, tmp_path / "m.pth", zipped=zipped)
    arguments = [sys.executable, "-c", READ, str(source), str(tmp_path / "again.pth")]
    run = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=100, check=False)

    assert 0 == run.returncode, run.stderr
    found = json.loads(run.stdout)
    for key, tensor in flat(value).items():
        if tensor.device.type == "cpu":
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert [dtype, list(tensor.shape), sha256(packed(tensor)).hexdigest()] == found[f"{key}/"], key
    loaded = torch.load(source, weights_only=True)
    assert facts(loaded) == facts(torch.load(tmp_path / "again.pth", weights_only=True))
