"""The tutorial chapter's functions, right also where its own versions break."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from statedict.ops.chapter import compare_state_dicts, inspect_state_dict


def printed(capsys: pytest.CaptureFixture[str], value: object) -> str:
    """What the inspection of a value prints."""
    inspect_state_dict(value)
    return capsys.readouterr().out


def compared(capsys: pytest.CaptureFixture[str], a: object, b: object, **tolerance: float) -> tuple[bool, str]:
    """What a comparison gives, and what it prints, which is never nothing."""
    equal = compare_state_dicts(a, b, **tolerance)
    text = capsys.readouterr().out
    assert text.strip()
    return equal, text


def test_inspection_prints_every_fact_of_a_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, {"fc.weight": np.float32([[1, 2, 3], [4, 5, -3]]), "n": np.int64(3), "e": "x"})

    assert "fc.weight:\n  shape [2, 3], float32, 6 parameters, 24 B, cpu\n  min -3, max 5, mean 2\n" in text
    assert "e: str, 'x'\n" in text
    assert text.endswith("Total: 1 tensor, 6 parameters, 24 B\n")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.arange(4), "min 0, max 3, mean 1.5"),
        (np.array([True, False]), "min 0, max 1, mean 0.5"),
        (np.array(7.0), "shape [], float64, 1 parameter, 8 B, cpu\n  min 7, max 7, mean 7"),
        (np.zeros((0, 3)), "shape [0, 3], float64, 0 parameters, 0 B, cpu\nTotal"),
        (np.array([math.nan, 2.0]), "min 2, max 2, mean 2"),
        (np.array([1 + 2j, 3]), "  mean 2+1j"),
        (np.array([1, 3]).astype(ml_dtypes.bfloat16), "bfloat16, 2 parameters, 4 B, cpu\n  min 1, max 3, mean 2"),
        (
            np.array([1, 3]).astype(ml_dtypes.float8_e4m3fn),
            "float8_e4m3fn, 2 parameters, 2 B, cpu\n  min 1, max 3, mean 2",
        ),
    ],
)
def test_inspection_of_values_that_have_no_mean_of_their_own(
    capsys: pytest.CaptureFixture[str], value: object, wanted: str
) -> None:
    assert wanted in printed(capsys, {"x": value})


def test_keys_and_values_are_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, {"\x1b[31m\n": np.ones(1), "v": "\x1b]0;x\x07", "\u202e": 1})

    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\x1b[31m\\n:\n" in text


def test_comparison_prints_also_where_all_is_equal(capsys: pytest.CaptureFixture[str]) -> None:
    equal, text = compared(capsys, {"a": np.ones(3), "n": [1, {"k": "v"}]}, {"a": np.ones(3), "n": [1, {"k": "v"}]})

    assert equal
    assert "The same 1 tensor" in text


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ({"x": np.array([1, math.nan])}, {"x": np.array([1, math.nan])}, True),
        ({"x": np.array([1, math.nan])}, {"x": np.array([1, 2.0])}, False),
        ({"x": np.ones(2)}, {"x": np.ones(2) + 1e-6}, True),
        ({"x": np.ones(2)}, {"x": np.ones(2) + 1e-4}, False),
        ({"x": np.ones(2)}, {"x": np.ones(2, np.float32)}, False),
        ({"x": np.ones(2)}, {"x": np.ones((2, 1))}, False),
        ({"x": np.ones(2)}, {"x": np.ones(3)}, False),
        ({"x": np.ones(2)}, {"y": np.ones(2)}, False),
        ({"x": np.ones(2)}, {"x": "text"}, False),
        ({"x": np.arange(3)}, {"x": np.arange(3)}, True),
        ({"x": np.array([True])}, {"x": np.array([False])}, False),
        ({"x": np.zeros((0, 3))}, {"x": np.zeros((0, 3))}, True),
        ({"x": np.array(1j)}, {"x": np.array(2j)}, False),
        ({"_extra_state": {"a": [1, (2, None)], "b": b"x"}}, {"_extra_state": {"a": [1, (2, None)], "b": b"x"}}, True),
        ({"_extra_state": {"a": [1, 2]}}, {"_extra_state": {"a": [1, 3]}}, False),
        ({}, {}, True),
    ],
)
def test_comparison_gives_whether_all_is_equal(
    capsys: pytest.CaptureFixture[str], a: object, b: object, equal: bool
) -> None:
    assert equal == compared(capsys, a, b)[0] == compared(capsys, b, a)[0]


def test_the_tolerance_is_the_callers(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = {"x": np.array([1.0])}, {"x": np.array([1.5])}

    assert compared(capsys, a, b, rtol=0.0, atol=0.5)[0]
    assert not compared(capsys, a, b, rtol=0.0, atol=0.4)[0]


def test_copies_of_tied_tensors_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.ones(3)
    equal, text = compared(capsys, {"a": x, "b": x}, {"a": x.copy(), "b": x.copy()})

    assert equal
    assert "tied" in text


def test_what_differs_is_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    text = compared(capsys, {"\x1b[2J": np.ones(3), "w": 1}, {"\x1b[2J": np.zeros(3), "w": "\x1b"})[1]

    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_modules_and_state_dicts_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    copy = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    assert "1.num_batches_tracked:\n  shape [], int64, 1 parameter, 8 B, cpu\n  min 0, max 0, mean 0" in printed(
        capsys, model
    )
    assert compared(capsys, model, copy)[0]
    copy["1.num_batches_tracked"] += 1
    equal, text = compared(capsys, model, copy)
    assert not equal
    assert "1.num_batches_tracked" in text
    for value in (model, model.state_dict()):
        inspect_state_dict(value)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_tensors_without_plain_values_raise_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    value: dict[str, Any] = {
        "meta": torch.ones(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "expanded": torch.ones(1).expand(10**10),
    }
    text = printed(capsys, value)

    assert all(f"{key}:\n" in text for key in value)
    assert "shape [3], float32, 3 parameters, 12 B, meta\n" in text
    assert compared(capsys, value, value)[0]
    assert not compared(capsys, value, {**value, "meta": torch.ones(3)})[0]
    assert not compared(capsys, {**value, "meta": torch.ones(4)}, value)[0]
