"""Each principle of an alignment by names and shapes, on small networks whose names are typed out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statedict.aligning import Alignment, Side, align
from statedict.aligning.alignment import Mapped, Spec
from statedict.aligning.assignment import assign
from statedict.aligning.naming import component_words, meaning, spot
from statedict.knowledge import vocabulary

Shape = tuple[int, ...]


def side(shapes: dict[str, Shape], *, ordered: bool = True, tied: tuple[tuple[str, ...], ...] = ()) -> Side:
    return Side(
        {key: Spec(shape, "int64" if key.endswith("tracked") else "float32") for key, shape in shapes.items()},
        ordered,
        tied,
    )


def linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int = 8) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def timm_vit(depth: int = 3, width: int = 8, hidden: int = 24) -> dict[str, Shape]:
    found: dict[str, Shape] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
    }
    for n in range(depth):
        found |= norm(f"blocks.{n}.norm1", width)
        found |= linear(f"blocks.{n}.attn.qkv", 3 * width, width) | linear(f"blocks.{n}.attn.proj", width, width)
        found |= norm(f"blocks.{n}.norm2", width)
        found |= linear(f"blocks.{n}.mlp.fc1", hidden, width) | linear(f"blocks.{n}.mlp.fc2", width, hidden)
    return found | norm("norm", width) | linear("head", 10, width)


def split_vit(depth: int = 3, width: int = 8, hidden: int = 24) -> dict[str, Shape]:
    found: dict[str, Shape] = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, 17, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, 4, 4),
    }
    for n in range(depth):
        layer = f"vit.encoder.layer.{n}"
        for part in ("query", "key", "value"):
            found |= linear(f"{layer}.attention.attention.{part}", width, width)
        found |= linear(f"{layer}.attention.output.dense", width, width)
        found |= linear(f"{layer}.intermediate.dense", hidden, width) | linear(f"{layer}.output.dense", width, hidden)
        found |= norm(f"{layer}.layernorm_before", width) | norm(f"{layer}.layernorm_after", width)
    return found | norm("vit.layernorm", width) | linear("classifier", 10, width)


def gpt2(depth: int = 2, width: int = 8, *, is_linear: bool = False) -> dict[str, Shape]:
    def matrix(rows: int, columns: int) -> Shape:
        return (columns, rows) if is_linear else (rows, columns)

    found: dict[str, Shape] = {"wte.weight": (50, width), "wpe.weight": (20, width)}
    for n in range(depth):
        found |= {
            f"h.{n}.attn.c_attn.weight": matrix(width, 3 * width),
            f"h.{n}.attn.c_proj.weight": matrix(width, width),
            f"h.{n}.mlp.c_fc.weight": matrix(width, 4 * width),
            f"h.{n}.mlp.c_proj.weight": matrix(4 * width, width),
        }
    return found | norm("ln_f", width)


def meta_llama(depth: int = 2, width: int = 8) -> dict[str, Shape]:
    found: dict[str, Shape] = {"tok_embeddings.weight": (50, width)}
    for n in range(depth):
        found |= {
            f"layers.{n}.attention.wq.weight": (width, width),
            f"layers.{n}.attention.wk.weight": (4, width),
            f"layers.{n}.attention.wv.weight": (4, width),
            f"layers.{n}.attention.wo.weight": (width, width),
            f"layers.{n}.feed_forward.w1.weight": (24, width),
            f"layers.{n}.feed_forward.w2.weight": (width, 24),
            f"layers.{n}.feed_forward.w3.weight": (24, width),
            f"layers.{n}.attention_norm.weight": (width,),
            f"layers.{n}.ffn_norm.weight": (width,),
        }
    return found | {"norm.weight": (width,), "output.weight": (50, width)}


def hf_llama(depth: int = 2, width: int = 8, prefix: str = "model.") -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{prefix}embed_tokens.weight": (50, width)}
    for n in range(depth):
        layer = f"{prefix}layers.{n}"
        found |= {
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (4, width),
            f"{layer}.self_attn.v_proj.weight": (4, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_proj.weight": (24, width),
            f"{layer}.mlp.up_proj.weight": (24, width),
            f"{layer}.mlp.down_proj.weight": (width, 24),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return found | {f"{prefix}norm.weight": (width,), "lm_head.weight": (50, width)}


def experts(count: int, *, stacked: bool, width: int = 8, inner: int = 6) -> dict[str, Shape]:
    found = hf_llama()
    for layer in range(2):
        home = f"model.layers.{layer}.mlp.experts"
        if stacked:
            found |= {f"{home}.gate_up_proj": (count, 2 * inner, width), f"{home}.down_proj": (count, width, inner)}
            continue
        for n in range(count):
            found[f"{home}.{n}.gate_proj.weight"] = found[f"{home}.{n}.up_proj.weight"] = (inner, width)
            found[f"{home}.{n}.down_proj.weight"] = (width, inner)
    return found


def claims(found: Alignment) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {mapped.target: (mapped.op, mapped.sources) for mapped in found.mapped if mapped.is_claim}


def of(found: Alignment, target: str) -> Mapped:
    return next(mapped for mapped in found.mapped if mapped.target == target)


# Names


def test_a_flat_parameter_is_the_weight_of_a_module() -> None:
    assert (("attn", "in_proj"), "weight") == spot("attn.in_proj_weight")
    assert (("cls_token",), "") == spot("cls_token")


def test_gamma_and_beta_are_weight_and_bias_of_a_norm_alone() -> None:
    assert (("LayerNorm",), "weight") == spot("LayerNorm.gamma")
    assert (("ls1", "gamma"), "") == spot("ls1.gamma")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("attention.attention.query", "q"),
        ("self_attn.q_proj", "q"),
        ("attention.wq", "q"),
        ("attention.output.dense", "o"),
        ("output.dense", "down"),
        ("intermediate.dense", "fc1"),
        ("mlp.fc2", "down"),
        ("mlp.c_proj", "down"),
        ("attn.c_proj", "o"),
        ("attn.qkv", "fused"),
        ("norm1", "norm 1"),
        ("layernorm_after", "norm 2"),
        ("post_attention_layernorm", "norm"),
        ("attention_norm", "norm 1"),
        ("self_attn.q_norm", "q norm"),
        ("fc", "head"),
        ("something", ""),
    ],
)
def test_a_role_follows_from_the_words_of_a_name(name: str, role: str) -> None:
    assert role == meaning(tuple(name.split("."))).role


def test_a_norm_called_by_what_it_follows_is_the_second_beside_one_at_the_input() -> None:
    path = ("post_attention_layernorm",)

    assert "norm 2" == meaning(path, frozenset({"input_layernorm"})).role
    assert "norm" == meaning(path, frozenset({"input_layernorm", "post_feedforward_layernorm"})).role


def test_three_numbered_matrices_are_gated_and_two_are_not() -> None:
    path = ("feed_forward", "w1")

    assert "gate" == meaning(path, frozenset({"w1", "w2", "w3"})).role
    assert "fc1" == meaning(path, frozenset({"w1", "w2"})).role


def test_words_are_those_of_the_field() -> None:
    assert ("vision",) == component_words("vision_tower")
    assert ("q",) == component_words("to_q") == component_words("linear_q") == component_words("query")


def test_the_vocabulary_is_read_once_and_lower_case() -> None:
    assert vocabulary() is vocabulary()
    assert [] == [word for word in vocabulary().words if word != word.lower()]


# The same names


def test_the_same_name_and_shape_is_proven() -> None:
    found = align(side(timm_vit()), side(timm_vit()))

    assert {key: ("copy", (key,)) for key in timm_vit()} == claims(found)
    assert {"proven"} == {mapped.tier for mapped in found.mapped}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.model.", "state_dict.model."]
)
def test_a_prefix_on_either_side_is_seen_through(prefix: str) -> None:
    plain = timm_vit()
    wrapped = {prefix + key: shape for key, shape in plain.items()}

    assert {key: ("copy", (prefix + key,)) for key in plain} == claims(align(side(wrapped), side(plain)))
    assert {prefix + key: ("copy", (key,)) for key in plain} == claims(align(side(plain), side(wrapped)))


def test_half_a_file_fills_half_a_model() -> None:
    half = dict(itertools.islice(timm_vit().items(), 0, None, 2))
    found = align(side({"module." + key: shape for key, shape in half.items()}), side(timm_vit()))

    assert set(half) == set(claims(found))
    assert set(timm_vit()) - set(half) == {left.key for left in found.unfilled}


def test_a_part_of_a_file_is_found_and_the_rest_is_listed() -> None:
    file = {f"vision_tower.{key}": shape for key, shape in timm_vit().items()}
    file |= {f"language_model.{key}": shape for key, shape in hf_llama(width=12).items()}
    found = align(side(file), side(timm_vit()))

    assert {key: ("copy", (f"vision_tower.{key}",)) for key in timm_vit()} == claims(found)
    assert {f"language_model.{key}" for key in hf_llama()} == {left.key for left in found.dropped}


def test_optimizer_state_beside_the_weights_is_no_weight() -> None:
    file: dict[str, Shape] = {f"model_state_dict.{key}": shape for key, shape in timm_vit().items()}
    file |= {f"optimizer.state.{n}.exp_avg": shape for n, shape in enumerate(timm_vit().values())}
    found = align(side(file), side(timm_vit()))

    assert {key: ("copy", (f"model_state_dict.{key}",)) for key in timm_vit()} == claims(found)
    assert {"state of an optimizer or scheduler, no weights"} == {left.reason for left in found.dropped}


def test_swapped_nesting_of_two_parts_is_followed() -> None:
    new = {f"model.vision_tower.{key}": shape for key, shape in timm_vit().items()}
    new |= {
        f"model.language_model.{key}": shape for key, shape in hf_llama(prefix="").items() if key != "lm_head.weight"
    }
    new["lm_head.weight"] = (50, 8)
    old = {f"vision_tower.{key}": shape for key, shape in timm_vit().items()}
    old |= {f"language_model.{key}": shape for key, shape in hf_llama().items()}
    found = claims(align(side(old, ordered=False), side(new)))

    assert len(new) == len(found)
    assert ("copy", ("language_model.lm_head.weight",)) == found["lm_head.weight"]
    assert ("copy", ("language_model.model.norm.weight",)) == found["model.language_model.norm.weight"]


# Other names


@pytest.mark.parametrize("ordered", [True, False])
def test_a_fused_matrix_is_split_in_the_order_of_its_name(ordered: bool) -> None:
    found = align(side(timm_vit(), ordered=ordered), side(split_vit()))
    layer = "vit.encoder.layer.2.attention"

    assert set(split_vit()) == set(claims(found))
    assert ("copy", ("blocks.2.attn.proj.bias",)) == claims(found)[f"{layer}.output.dense.bias"]
    key = of(found, f"{layer}.attention.key.weight")
    assert ("split", ("blocks.2.attn.qkv.weight",), {"dim": 0, "start": 8, "stop": 16}) == (
        key.op,
        key.sources,
        key.args,
    )


@pytest.mark.parametrize("ordered", [True, False])
def test_three_matrices_are_joined_in_the_order_of_the_fused_name(ordered: bool) -> None:
    found = align(side(split_vit(), ordered=ordered), side(timm_vit()))
    fused = of(found, "blocks.0.attn.qkv.weight")
    parts = tuple(f"vit.encoder.layer.0.attention.attention.{part}.weight" for part in ("query", "key", "value"))

    assert set(timm_vit()) == set(claims(found))
    assert ("concat", parts, {"dim": 0}) == (fused.op, fused.sources, fused.args)


def test_parts_of_grouped_queries_have_sizes_of_their_own() -> None:
    target = hf_llama()
    source = {key: shape for key, shape in target.items() if not any(f"{part}_proj" in key for part in "qkv")}
    source |= {f"model.layers.{n}.self_attn.qkv_proj.weight": (16, 8) for n in range(2)}
    found = align(side(source), side(target))

    cuts = [of(found, f"model.layers.1.self_attn.{part}_proj.weight").args for part in "qkv"]
    assert [{"dim": 0, "start": a, "stop": b} for a, b in ((0, 8), (8, 12), (12, 16))] == cuts


def test_a_fused_name_that_lists_no_order_is_asked_about() -> None:
    target = hf_llama()
    source = {key: shape for key, shape in target.items() if not any(f"{part}_proj" in key for part in "qkv")}
    source |= {f"model.layers.{n}.self_attn.query_key_value.weight": (16, 8) for n in range(2)}
    found = align(side(source), side(target))

    asked = of(found, "model.layers.0.self_attn.v_proj.weight")
    assert ("ambiguous", "In which order does query_key_value hold q_proj, k_proj, v_proj?") == (
        asked.tier,
        asked.question,
    )


def test_up_gate_holds_up_first() -> None:
    target = hf_llama()
    source = {key: shape for key, shape in target.items() if "gate_proj" not in key and "up_proj" not in key}
    source |= {f"model.layers.{n}.mlp.up_gate_proj.weight": (48, 8) for n in range(2)}
    found = align(side(source), side(target))

    assert {"dim": 0, "start": 0, "stop": 24} == of(found, "model.layers.0.mlp.up_proj.weight").args
    assert {"dim": 0, "start": 24, "stop": 48} == of(found, "model.layers.0.mlp.gate_proj.weight").args


def test_twelve_experts_are_stacked_by_number_and_not_by_text() -> None:
    found = align(
        side(dict(sorted(experts(12, stacked=False).items())), ordered=False), side(experts(12, stacked=True))
    )
    home = "model.layers.1.mlp.experts"
    stack, fused = of(found, f"{home}.down_proj"), of(found, f"{home}.gate_up_proj")

    assert ("stack", tuple(f"{home}.{n}.down_proj.weight" for n in range(12))) == (stack.op, stack.sources)
    assert tuple(f"{home}.{n}.{part}_proj.weight" for n in range(12) for part in ("gate", "up")) == fused.sources
    assert {"dim": 0, "each": [{"op": "concat", "dim": 0}], "group": 2} == fused.args


def test_a_stack_is_taken_apart_layer_by_layer() -> None:
    found = align(side(experts(4, stacked=True)), side(experts(4, stacked=False)))
    up = of(found, "model.layers.0.mlp.experts.3.up_proj.weight")

    assert set(experts(4, stacked=False)) == set(claims(found))
    assert ("unstack", ("model.layers.0.mlp.experts.gate_up_proj",)) == (up.op, up.sources)
    assert {"dim": 0, "index": 3, "then": [{"op": "split", "dim": 0, "start": 6, "stop": 12}]} == up.args


def test_a_stack_of_another_number_of_experts_is_left_open() -> None:
    found = align(side(experts(4, stacked=False)), side(experts(5, stacked=True)))

    assert [] == [key for key in claims(found) if "experts" in key]


def test_transposed_matrices_are_seen_and_the_square_one_is_asked_about() -> None:
    found = align(side(gpt2()), side(gpt2(is_linear=True)))

    assert "transpose" == of(found, "h.0.attn.c_attn.weight").op == of(found, "h.1.mlp.c_proj.weight").op
    asked = of(found, "h.0.attn.c_proj.weight")
    assert ("undecidable", True) == (
        asked.tier,
        asked.question.startswith("Is h.0.attn.c_proj.weight stored transposed"),
    )
    assert "copy" == of(found, "wte.weight").op


def test_a_square_matrix_among_matrices_that_are_not_transposed_is_copied() -> None:
    found = align(side(gpt2()), side({f"transformer.{key}": shape for key, shape in gpt2().items()}))

    assert ("copy", ("h.0.attn.c_proj.weight",)) == claims(found)["transformer.h.0.attn.c_proj.weight"]


def test_dimensions_of_size_one_come_and_go() -> None:
    source = timm_vit() | {"blocks.0.mlp.fc1.weight": (24, 8, 1, 1), "cls_token": (8,)}
    found = align(side({"module." + key: shape for key, shape in source.items()}), side(timm_vit()))

    assert ("squeeze", ("module.cls_token",)) == claims(found)["cls_token"]


@pytest.mark.parametrize("ordered", [True, False])
def test_rotary_rows_between_two_conventions_are_asked_about_and_the_rest_is_claimed(ordered: bool) -> None:
    found = align(side(meta_llama(), ordered=ordered), side(hf_llama()))
    open_keys = set(hf_llama()) - set(claims(found))

    assert {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(2) for part in "qk"} == open_keys
    assert {"undecidable"} == {of(found, key).tier for key in open_keys}
    assert ("copy", ("layers.1.ffn_norm.weight",)) == claims(found)["model.layers.1.post_attention_layernorm.weight"]
    assert ("copy", ("layers.0.feed_forward.w3.weight",)) == claims(found)["model.layers.0.mlp.up_proj.weight"]
    assert ("copy", ("output.weight",)) == claims(found)["lm_head.weight"]


def test_index_offsets_and_numbered_names_are_lists() -> None:
    old: dict[str, Shape] = {}
    new: dict[str, Shape] = {}
    for stage, block in itertools.product(range(3), range(2)):
        width = 8 << stage
        old |= {f"layer{stage + 1}.{block}.conv{n}.weight": (width, width, 3, 3) for n in (1, 2)}
        old |= {f"layer{stage + 1}.{block}.bn{n}.weight": (width,) for n in (1, 2)}
        home = f"encoder.stages.{stage}.layers.{block}.layer"
        new |= {f"{home}.{n}.convolution.weight": (width, width, 3, 3) for n in (0, 1)}
        new |= {f"{home}.{n}.normalization.weight": (width,) for n in (0, 1)}
    found = claims(align(side(old), side(new)))

    assert set(new) == set(found)
    assert ("copy", ("layer3.1.bn2.weight",)) == found["encoder.stages.2.layers.1.layer.1.normalization.weight"]


# What can't be decided


def test_numbered_norms_against_norms_called_by_what_they_follow_stay_open() -> None:
    def network(first: str, second: str) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for n in range(3):
            found |= linear(f"layers.{n}.self_attn.out_proj", 8, 8) | linear(f"layers.{n}.mlp.fc1", 24, 8)
            found |= norm(f"layers.{n}.{first}") | norm(f"layers.{n}.{second}")
        return found

    found = align(side(network("norm1", "norm2")), side(network("post_attention_layernorm", "post_mlp_layernorm")))

    assert [] == [key for key in claims(found) if "norm" in key]
    assert ("copy", ("layers.0.mlp.fc1.weight",)) == claims(found)["layers.0.mlp.fc1.weight"]


def test_two_halves_without_a_name_for_either_stay_open() -> None:
    target = hf_llama()
    names = {"gate_proj": "fc11", "up_proj": "fc12", "down_proj": "fc2"}
    source: dict[str, Shape] = {}
    for key, shape in target.items():
        for new, old in names.items():
            key = key.replace(new, old)
        source[key] = shape
    found = claims(align(side(source), side(target)))

    assert ("copy", ("model.layers.0.mlp.fc2.weight",)) == found["model.layers.0.mlp.down_proj.weight"]
    assert {f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(2) for part in ("gate", "up")} == set(
        target
    ) - set(found)


def test_an_average_beside_the_weights_is_asked_about() -> None:
    file = {f"{tree}.{key}": shape for tree in ("net", "net_ema") for key, shape in timm_vit().items()}
    found = align(side(file), side(timm_vit()))

    assert {} == claims(found)
    assert "Which weights are meant, those under 'net' or 'net_ema'? Both fit." == found.mapped[0].question
    assert (("net.cls_token",), ("net_ema.cls_token",)) == found.mapped[0].alternatives


def test_an_average_is_asked_about_under_other_names_too() -> None:
    file = {f"{tree}.{key}": shape for tree in ("model", "ema") for key, shape in timm_vit().items()}

    assert {} == claims(align(side(file), side(split_vit())))


def test_two_towers_on_both_sides_are_no_twins() -> None:
    both = {f"{tower}.{key}": shape for tower in ("student", "teacher") for key, shape in timm_vit().items()}
    found = claims(align(side({"module." + key: shape for key, shape in both.items()}), side(both)))

    assert {key: ("copy", (f"module.{key}",)) for key in both} == found


def test_a_bias_goes_where_its_weight_goes() -> None:
    old = linear("block.0.self_attn.out", 8, 8) | linear("block.0.ff.second", 8, 24) | linear("block.0.ff.first", 24, 8)
    old |= (
        linear("block.1.self_attn.out", 8, 8) | linear("block.1.ff.second", 8, 24) | linear("block.1.ff.first", 24, 8)
    )
    new = {key.replace("ff.second", "mlp.fc2").replace("ff.first", "mlp.fc1"): shape for key, shape in old.items()}
    del old["block.0.ff.second.bias"], old["block.1.ff.second.bias"]
    found = claims(align(side(old), side(new)))

    assert "block.0.mlp.fc2.bias" not in found
    assert ("copy", ("block.1.ff.second.weight",)) == found["block.1.mlp.fc2.weight"]


# Sizes


def test_another_number_of_classes_is_offered_and_not_claimed() -> None:
    found = align(side(timm_vit() | linear("head", 1000, 8)), side(timm_vit()))

    assert set(timm_vit()) - {"head.weight", "head.bias"} == set(claims(found))
    offer = of(found, "head.weight")
    assert ("resize", "guess", ("head.weight",)) == (offer.op, offer.tier, offer.sources)
    assert {"resize"} == {left.reason for left in found.unfilled}


def test_counters_that_a_file_does_not_have_are_made_again() -> None:
    counted: dict[str, Shape] = {}
    for n in range(3):
        counted |= norm(f"bn{n}") | {f"bn{n}.running_mean": (8,), f"bn{n}.num_batches_tracked": ()}
    file = {key: shape for key, shape in counted.items() if not key.endswith("tracked")}
    found = align(side(file), side(counted))

    assert {"the model makes it again by itself"} == {left.reason for left in found.unfilled}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (timm_vit(depth=3), timm_vit(depth=4)),
        (timm_vit(depth=4), timm_vit(depth=3)),
        (timm_vit(depth=3), split_vit(depth=4)),
        (timm_vit(width=8), timm_vit(width=12)),
        (timm_vit(width=8), split_vit(width=12)),
        (timm_vit(hidden=24), timm_vit(hidden=32)),
        (timm_vit(hidden=24), split_vit(hidden=32)),
        (hf_llama(depth=2), hf_llama(depth=3)),
        (meta_llama(width=8), hf_llama(width=12)),
        (gpt2(), timm_vit()),
        (timm_vit(), gpt2()),
        (gpt2(), hf_llama(width=12)),
    ],
)
def test_other_sizes_and_other_networks_are_refused(source: dict[str, Shape], target: dict[str, Shape]) -> None:
    found = align(side(source), side(target))

    assert found.refusal.endswith(".")
    assert () == found.mapped
    assert set(source) == {left.key for left in found.dropped}
    assert set(target) == {left.key for left in found.unfilled}


def test_a_refusal_says_what_differs() -> None:
    deeper = align(side(timm_vit(depth=3)), side(timm_vit(depth=4))).refusal
    wider = align(side(timm_vit(hidden=24)), side(split_vit(hidden=32))).refusal

    assert "The source has 3 blocks in blocks and the target has 4 in blocks" in deeper
    assert "[24, 8]" in wider and "[32, 8]" in wider


def test_nothing_in_common_is_no_error() -> None:
    assert "different networks" in align(side({"a": (1,)}), side({"b": (2,)})).refusal
    assert Alignment((), (), ()) == align(side({}), side({}))._replace(refusal="")


# What is known


def test_what_values_prove_is_kept() -> None:
    known = [Mapped("head.weight", "copy", ("classifier.weight",), "proven")]
    found = align(side(split_vit()), side(timm_vit()), known=known)

    assert known[0] == of(found, "head.weight")
    assert set(timm_vit()) == set(claims(found))


def test_what_is_known_is_not_contradicted_by_names() -> None:
    source = {"a.weight": (4, 4), "b.weight": (4, 4)}
    found = align(side(source), side(source), known=[Mapped("a.weight", "copy", ("b.weight",), "proven")])

    assert {"a.weight": ("copy", ("b.weight",)), "b.weight": ("copy", ("a.weight",))} == claims(found)


def test_tied_names_are_filled_with_their_twin() -> None:
    target = hf_llama()
    source = {key: shape for key, shape in target.items() if key != "lm_head.weight"}
    tied = (("model.embed_tokens.weight", "lm_head.weight"),)
    told = align(side(source), side(target, tied=tied))
    untold = align(side(source), side(target))

    assert ("tie", ("model.embed_tokens.weight",)) == claims(told)["lm_head.weight"]
    assert "guess" == of(untold, "lm_head.weight").tier


# The answer depends on what it should depend on


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["module", "model", "backbone", "student", "net", "wrapped"]), min_size=1, max_size=3))
def test_wrappers_change_no_source(words: list[str]) -> None:
    prefix = ".".join(words) + "."
    plain = claims(align(side(split_vit()), side(timm_vit())))
    wrapped = claims(align(side({prefix + key: shape for key, shape in split_vit().items()}), side(timm_vit())))

    assert plain == {
        key: (op, tuple(old.removeprefix(prefix) for old in sources)) for key, (op, sources) in wrapped.items()
    }


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_the_order_of_a_file_that_has_none_changes_nothing(random: object) -> None:
    keys = list(split_vit().items())
    random.shuffle(keys)  # type: ignore[attr-defined]
    shuffled = align(side(dict(keys), ordered=False), side(timm_vit()))

    assert claims(align(side(split_vit(), ordered=False), side(timm_vit()))) == claims(shuffled)


@settings(max_examples=25)
@given(st.integers(1, 12))
def test_all_layers_of_a_template_are_made_in_the_same_way(depth: int) -> None:
    found = align(side(split_vit(depth)), side(timm_vit(depth)))
    ops = {key: op for key, (op, _) in claims(found).items()}

    for n in range(depth):
        assert [ops[f"blocks.{n}.attn.{part}"] for part in ("qkv.weight", "proj.weight")] == ["concat", "copy"]


def test_ten_thousand_names_are_claimed_in_one_go() -> None:
    def network(prefix: str) -> Side:
        return side({f"{prefix}.{n}.part{i}.inner.weight": (8, i + 1) for n in range(100) for i in range(100)})

    assert 10_000 == len(claims(align(network("h"), network("model.blocks"))))


# The assignment


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_no_other_assignment_gains_more(rows: int, columns: int, data: st.DataObject) -> None:
    gains = [[data.draw(st.integers(-9, 9)) for _ in range(columns)] for _ in range(rows)]
    chosen = assign(gains)
    small, large = min(rows, columns), max(rows, columns)
    ways = itertools.permutations(range(large), small)
    best = max(sum(gains[a][b] if rows <= columns else gains[b][a] for a, b in enumerate(way)) for way in ways)

    assert small == len(chosen) == len({a for a, _ in chosen}) == len({b for _, b in chosen})
    assert best == sum(gains[a][b] for a, b in chosen)
