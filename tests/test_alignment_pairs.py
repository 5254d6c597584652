"""The development set of pairs: names and shapes of real networks in two libraries, judged by the ``score.py`` beside them."""

from __future__ import annotations

import collections
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from statedict.aligning import Side, align
from statedict.aligning.alignment import Spec


def side(entries: list[Any]) -> Side:
    return Side({key: Spec(tuple(shape), dtype) for key, shape, dtype in entries})


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Any]:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "pairs"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    spec = importlib.util.spec_from_file_location("score_of_pairs", folder / "score.py")
    assert spec and spec.loader
    scorer = importlib.util.module_from_spec(spec)
    pytest.importorskip("numpy")
    spec.loader.exec_module(scorer)
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        case = json.loads(path.read_text(encoding="utf-8"))
        alignment = align(side(case["source"]), side(case["target"]))
        plan = [
            {"target": m.target, "op": m.op, "sources": list(m.sources), "tier": m.tier, "args": dict(m.args)}
            for m in alignment.mapped
        ]
        found[case["name"]] = (case, alignment, *scorer.score(case, plan))
    return found


def total(verdicts: dict[str, Any]) -> collections.Counter[str]:
    return sum((count for _, _, count, _ in verdicts.values()), collections.Counter())


def test_no_claim_is_wrong(shared: Path, verdicts: dict[str, Any]) -> None:
    wrong = {name: notes for name, (_, _, count, notes) in verdicts.items() if count["wrong"]}

    assert {} == wrong


def test_other_networks_are_refused_in_one_sentence(shared: Path, verdicts: dict[str, Any]) -> None:
    refusals = {name: found.refusal for name, (case, found, _, _) in verdicts.items() if case["expect"] == "refuse"}

    assert 15 == len([text for text in refusals.values() if text.endswith(".") and "\n" not in text])


def test_no_network_is_taken_for_another(shared: Path, verdicts: dict[str, Any]) -> None:
    refused = [name for name, (case, found, _, _) in verdicts.items() if case["expect"] == "align" and found.refusal]

    assert [] == refused


def test_most_decidable_keys_are_claimed(shared: Path, verdicts: dict[str, Any]) -> None:
    count = total(verdicts)

    assert count["right"] >= 0.985 * count["keys"]
    assert count["changed right"] >= 0.975 * count["changed keys"]
    assert 0 == count["unplaced"]


@pytest.mark.parametrize(
    ("kind", "least"), [("disk", 0.985), ("noise", 1.0), ("pair", 1.0), ("reverse", 0.97), ("tied", 1.0)]
)
def test_most_keys_of_each_kind_are_claimed(shared: Path, verdicts: dict[str, Any], kind: str, least: float) -> None:
    count = total({name: found for name, found in verdicts.items() if found[0]["kind"] == kind})

    assert count["right"] >= least * count["keys"]


def test_every_key_of_both_sides_is_accounted_for(shared: Path, verdicts: dict[str, Any]) -> None:
    astray = []
    for name, (case, found, _, _) in verdicts.items():
        claims = [mapped for mapped in found.mapped if mapped.is_claim]
        filled = {mapped.target for mapped in claims} | {left.key for left in found.unfilled}
        used = {key for mapped in claims for key in mapped.sources} | {left.key for left in found.dropped}
        if filled != {key for key, _, _ in case["target"]} or used != {key for key, _, _ in case["source"]}:
            astray.append(name)

    assert [] == astray


def test_no_whole_source_is_used_twice(shared: Path, verdicts: dict[str, Any]) -> None:
    twice = []
    for name, (_, found, _, _) in verdicts.items():
        used = collections.Counter(
            key
            for mapped in found.mapped
            if mapped.is_claim and mapped.op not in ("split", "slice", "unstack", "tie")
            for key in mapped.sources
        )
        twice += [(name, key) for key, times in used.items() if times > 1]

    assert [] == twice


def test_what_is_undecidable_has_its_question_where_something_fits(shared: Path, verdicts: dict[str, Any]) -> None:
    mute = [
        (name, mapped.target)
        for name, (_, found, _, _) in verdicts.items()
        for mapped in found.mapped
        if mapped.tier in ("ambiguous", "undecidable") and not mapped.question
    ]

    assert [] == mute


def test_a_square_matrix_among_transposed_ones_is_asked_about(shared: Path, verdicts: dict[str, Any]) -> None:
    _, found, _, _ = verdicts["p7-gpt2.conv1d-linear.sorted"]
    asked = {mapped.target: mapped.tier for mapped in found.mapped if mapped.question}

    assert {f"transformer.h.{n}.attn.c_proj.weight": "undecidable" for n in range(2)} == asked


def test_two_trees_that_both_fit_are_asked_about(shared: Path, verdicts: dict[str, Any]) -> None:
    _, found, _, _ = verdicts["noise.resnet18.ema-twin"]

    assert ["ambiguous"] * 122 == [mapped.tier for mapped in found.mapped]
    assert {(f"model.{m.target}",) for m in found.mapped} == {m.alternatives[0] for m in found.mapped}
    assert {(f"ema.{m.target}",) for m in found.mapped} == {m.alternatives[1] for m in found.mapped}
    assert {"Which weights are meant, those under 'model' or 'ema'? Both fit."} == {m.question for m in found.mapped}
