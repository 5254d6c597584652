"""Keys that are alike: folded lines, and the tree with its totals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from statedict.tree import Leaf, branches, fold, ranges


def folded(*keys: str) -> list[tuple[str, int]]:
    return [(group.key, group.times) for group in fold((key, None) for key in keys)]


def test_layers_are_folded_into_a_range() -> None:
    keys = [f"layers.{i}.mlp.weight" for i in range(32)]

    assert [("layers.{0…31}.mlp.weight", 32)] == folded(*keys)


def test_an_exception_follows_the_layers_that_agree() -> None:
    rows = [(f"layers.{i}.{name}", (8, 4) if i == 2 else (8, 8)) for i in range(5) for name in ("a", "b")]
    groups = [(group.key, group.members) for group in fold(rows)]

    assert [
        ("layers.{0,1,3,4}.a", (0, 2, 6, 8)),
        ("layers.2.a", (4,)),
        ("layers.{0,1,3,4}.b", (1, 3, 7, 9)),
        ("layers.2.b", (5,)),
    ] == groups


def test_numbers_that_all_share_stay_plain() -> None:
    assert [("stage.2.block.{0…3}.w", 4)] == folded(*[f"stage.2.block.{i}.w" for i in range(4)])


def test_two_ranges_stand_for_their_product() -> None:
    keys = [f"layers.{i}.experts.{j}.w" for i in range(3) for j in range(4)]

    assert [("layers.{0…2}.experts.{0…3}.w", 12)] == folded(*keys)


def test_an_incomplete_product_is_split_into_complete_ones() -> None:
    keys = [f"layers.{i}.experts.{j}.w" for i in range(3) for j in range(4 if i < 2 else 3)]

    assert [("layers.{0,1}.experts.{0…3}.w", 8), ("layers.2.experts.{0…2}.w", 3)] == folded(*keys)


def test_keys_that_only_look_alike_are_not_folded() -> None:
    keys = ["a.0", "a.00", "a.{}", "{}.0", "0.{}", "layer1.w", "layer2.w"]

    assert [(key, 1) for key in keys] == folded(*keys)


def test_rows_with_one_key_are_kept_apart() -> None:
    assert [("a.0", 1), ("a.0", 1), ("a.1", 1)] == folded("a.0", "a.0", "a.1")


def test_a_key_of_numbers_only_does_not_recurse() -> None:
    keys = [".".join([str(i)] * 5000) for i in range(2)]

    assert [(key, 1) for key in keys] == folded(*keys)


def test_ranges_are_written_short() -> None:
    assert "7" == ranges([7])
    assert "{0,1}" == ranges([0, 1])
    assert "{0…3,7}" == ranges([0, 1, 2, 3, 7])
    assert "{0,2,4,…,18}" == ranges(range(0, 20, 2))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3)), unique=True, max_size=24))
def test_every_row_is_in_exactly_one_group(rows: list[tuple[str, int, int]]) -> None:
    groups = fold((f"x.{i}.{name}.{j}", None) for name, i, j in rows)

    assert list(range(len(rows))) == sorted(at for group in groups for at in group.members)


def lines(*leaves: Leaf) -> list[tuple[str, int, int]]:
    return [(branch.rails + branch.label, branch.copies, branch.tensors) for branch in branches(leaves)]


def test_equal_subtrees_are_folded_with_a_count() -> None:
    leaves = [Leaf(f"h.{i}.{name}", (4,), 4, 16) for i in range(12) for name in ("ln.w", "ln.b", "fc.w")]

    assert [
        ("h.{0…11}", 12, 36),
        ("├─ ln", 1, 24),
        ("│  ├─ w", 1, 12),
        ("│  └─ b", 1, 12),
        ("└─ fc.w", 1, 12),
    ] == lines(*leaves)


def test_a_different_subtree_stands_alone() -> None:
    leaves = [Leaf(f"h.{i}.w", (4, i == 1), 4, 16) for i in range(3)]

    assert [("h", 1, 3), ("├─ {0,2}.w", 2, 2), ("└─ 1.w", 1, 1)] == lines(*leaves)


def test_totals_of_a_branch_count_all_copies() -> None:
    leaves = [Leaf(f"h.{i}.{j}.w", (4,), 4, 16) for i in range(3) for j in range(2)]
    [branch] = branches(leaves)

    assert ("h.{0…2}.{0,1}.w", 6, 6, 24, 96) == (
        branch.label,
        branch.copies,
        branch.tensors,
        branch.numel,
        branch.nbytes,
    )


def test_a_key_may_be_a_prefix_of_another() -> None:
    assert [("a", 1, 2), ("└─ b", 1, 1)] == lines(Leaf("a", (), 1, 4), Leaf("a.b", (), 1, 4))


def test_a_key_of_dots_does_not_recurse() -> None:
    found = branches([Leaf("." * 100_000, (), 1, 4), Leaf("." * 50_000, (), 1, 4)])

    assert 3 == len(found)
