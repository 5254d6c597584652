"""Rules that reckon one tensor from several and leave these out: weight normalisation, batch normalisation, LoRA.

None of them can be taken back: what they were made of is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from statedict.errors import RuleError, one_line
from statedict.keys import Path, dotted, matches
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft
from statedict.rules.patterns import Pattern, listed
from statedict.rules.regrowing import Moved, Tree, grown, placed
from statedict.rules.rule import Rule, Step, matches_nothing, refuse_collisions

if TYPE_CHECKING:
    from statedict.recipes.derived import Recipe

__all__ = ["Fold", "FoldBatchNorm", "FoldWeightNorm", "Folding", "MergeLora"]


class Fold(NamedTuple):
    """One tensor to come: its key, which tensor it takes after, what is left out for it, and how it is reckoned."""

    key: str
    like: TensorEntry
    gone: tuple[str, ...]
    make: Callable[[Draft], Recipe] | None  # None: the tensor ``like`` as it is, under the key


class Folding(Rule):
    """The ways of folding have in common that some keys go and few come."""

    __slots__ = ()
    lossless = False

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """What there is to fold. Raises ``RuleError`` where a part is missing."""
        raise NotImplementedError

    def applied(self, draft: Draft) -> Step:
        """The tree with what was reckoned in the place of the first part of each."""
        tree = Tree(draft.root)
        places = {dotted(path): path for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)}
        tensors = {dotted(path): leaf for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)}
        folds = self.folds(tensors)
        if not folds:
            raise matches_nothing(self, str(self.arguments[0]), list(tensors))
        coming: dict[Path, list[Moved]] = {}
        gone = {places[key] for fold in folds for key in fold.gone}
        for fold in folds:
            home = next(path for path, _ in tree.leaves if path in gone and dotted(path) in fold.gone)
            entry = fold.like if fold.make is None else self._computed(fold, draft)
            coming.setdefault(home, []).append(Moved(home, placed(home, fold.key, tree), entry))
        leaves: list[Moved] = []
        for path, leaf in tree.leaves:
            leaves += coming.get(path, []) if path in gone else [Moved(path, path, leaf)]
        refuse_collisions(self, leaves)
        touched = frozenset([moved.new for each in coming.values() for moved in each])
        created = tuple([fold.key for fold in folds])
        lost = tuple(sorted({key for fold in folds for key in fold.gone} - set(created)))
        return Step(grown(tree, leaves), len(gone), touched, lost, created)

    def _computed(self, fold: Fold, draft: Draft) -> TensorEntry:
        assert fold.make is not None
        try:
            made = draft.computed(fold.like, fold.make(draft))
        except RuleError as error:
            raise RuleError(
                f"{one_line(self)}: {error.what}",
                key=error.key or fold.key,
                expected=error.expected,
                found=error.found,
                hint=error.hint,
            ) from error
        # Strides and pairings of the parts say nothing of what is made of them.
        return made._replace(attributes={}, kind="Tensor" if fold.like.kind == "Buffer" else fold.like.kind)


class FoldWeightNorm(Folding):
    """Weights as a size and a direction (``weight_g`` and ``weight_v``, or torch's parametrization) become plain weights.

    Sources: torch/nn/utils/weight_norm.py and torch/nn/utils/parametrizations.py.
    """

    __slots__ = ()
    name = "fold_weight_norm"
    fields = ("glob",)
    defaults: ClassVar[Mapping[str, object]] = {"glob": "*"}

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Pairs of both forms, whose module the glob matches."""
        found = []
        for key in tensors:
            pair = _weight_norm_of(key)
            if pair is None or pair[1] not in tensors or not matches(pair[0].rpartition(".")[0], self.arguments[0]):
                continue
            target, direction = pair
            found.append(self._fold(target, key, direction, tensors))
        return found

    def _fold(self, target: str, size: str, direction: str, tensors: Mapping[str, TensorEntry]) -> Fold:
        g, v = tensors[size], tensors[direction]
        wide = [dim for dim, length in enumerate(g.shape) if length != 1]
        if len(wide) > 1 or (g.shape and len(g.shape) != len(v.shape)):
            raise RuleError(f"{one_line(self)}: these are no size and direction", key=size, found=list(g.shape))
        # A size of one element is that of the whole weight, or of a dimension of one: the same numbers.
        dim = wide[0] if wide else None

        def make(draft: Draft) -> Recipe:
            from statedict.recipes.folding import FoldedWeightNorm

            return FoldedWeightNorm(draft.lazy(g), draft.lazy(v), dim)

        return Fold(target, v, (size, direction), make)


def _weight_norm_of(key: str) -> tuple[str, str] | None:
    """Of the key of a size: the key of the weight, and that of its direction."""
    if key.endswith("_g"):
        return key[:-2], f"{key[:-2]}_v"
    module, _, last = key.rpartition(".")
    home, _, name = module.rpartition(".")
    if last == "original0" and (home == "parametrizations" or home.endswith(".parametrizations")):
        return f"{home.removesuffix('parametrizations')}{name}", f"{module}.original1"
    return None


class FoldBatchNorm(Folding):
    """The statistics of a batch normalisation go into the weights before it, as they are when a network is used.

    Source: torch/nn/utils/fusion.py, ``fuse_conv_bn_weights``.
    """

    __slots__ = ("_after", "_before")
    name = "fold_batch_norm"
    fields = ("conv", "bn", "eps", "transposed")
    defaults: ClassVar[Mapping[str, object]] = {"eps": 1e-5, "transposed": False}

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._before, self._after = Pattern(arguments[0]), Pattern(arguments[1])
        self._after.check_names(self._before.names)

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Each weight whose module is meant, with the normalisation behind it."""
        found: list[Fold] = []
        for key in tensors:
            module, _, last = key.rpartition(".")
            values = self._before.match(module) if last == "weight" else None
            if values is not None:
                found += self._fold(module, self._after.fill(values), tensors)
        return found

    def _fold(self, conv: str, bn: str, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        missing = [key for key in (f"{bn}.running_mean", f"{bn}.running_var") if key not in tensors]
        if missing:
            raise RuleError(f"{one_line(self)}: parts are missing: {listed(missing)}", key=f"{conv}.weight")
        weight, mean, var = tensors[f"{conv}.weight"], tensors[f"{bn}.running_mean"], tensors[f"{bn}.running_var"]
        bias, gamma, beta = (tensors.get(key) for key in (f"{conv}.bias", f"{bn}.weight", f"{bn}.bias"))
        eps = float(self.arguments[2])

        def make_weight(draft: Draft) -> Recipe:
            from statedict.recipes.folding import FoldedBatchNormWeight

            dim = 1 if self.arguments[3] else 0
            return FoldedBatchNormWeight(draft.lazy(weight), gamma and draft.lazy(gamma), draft.lazy(var), eps, dim)

        def make_bias(draft: Draft) -> Recipe:
            from statedict.recipes.folding import FoldedBatchNormBias

            old, size, shift = (part and draft.lazy(part) for part in (bias, gamma, beta))
            return FoldedBatchNormBias(old, size, shift, draft.lazy(mean), draft.lazy(var), eps, dtype=weight.dtype)

        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        gone = tuple([key for key in (f"{conv}.bias", *[f"{bn}.{name}" for name in names]) if key in tensors])
        like = bias or beta or weight._replace(path=mean.path, attributes={})
        return [
            Fold(f"{conv}.weight", weight, (f"{conv}.weight",), make_weight),
            Fold(f"{conv}.bias", like, gone, make_bias),
        ]


class MergeLora(Folding):
    """Low-rank changes go into the weights that they change: ``weight + scaling · B A``.

    Names as peft gives them: ``M.lora_A.weight`` and ``M.lora_B.weight``, or ``M.lora_A.NAME.weight``, beside ``M.weight`` or
    ``M.base_layer.weight``.
    """

    __slots__ = ()
    name = "merge_lora"
    fields = ("glob", "scaling", "alpha")
    defaults: ClassVar[Mapping[str, object]] = {"glob": "*", "scaling": None, "alpha": None}

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Each base weight whose module the glob matches, and what is merged into it."""
        found: list[Fold] = []
        for key in tensors:
            module, marker, rest = key.partition(".lora_A.")
            if (
                not marker
                or not (rest == "weight" or rest.endswith(".weight"))
                or not matches(module, self.arguments[0])
            ):
                continue
            found += self._fold(module, key, f"{module}.lora_B.{rest}", tensors)
        merged = [fold.key for fold in found]
        twice = sorted({key for key in merged if merged.count(key) > 1})
        if twice:
            hint = "Keep one of the adapters first: drop('*.lora_?.NAME.weight')"
            raise RuleError(f"{one_line(self)}: several adapters change {listed(twice)}", hint=hint)
        return found

    def _fold(self, module: str, a_key: str, b_key: str, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        base_key = next((k for k in (f"{module}.base_layer.weight", f"{module}.weight") if k in tensors), None)
        missing = [
            key for key, there in ((b_key, b_key in tensors), (f"{module}.weight", base_key is not None)) if not there
        ]
        if missing or base_key is None:
            raise RuleError(f"{one_line(self)}: parts are missing: {listed(missing)}", key=a_key)
        a, b, base = tensors[a_key], tensors[b_key], tensors[base_key]
        _, scaling, alpha = self.arguments
        factor = float(scaling) if scaling is not None else float(alpha) / max(1, a.shape[0] if a.shape else 1)

        def make(draft: Draft) -> Recipe:
            from statedict.recipes.folding import MergedLora

            return MergedLora(draft.lazy(base), draft.lazy(a), draft.lazy(b), factor)

        made = [Fold(f"{module}.weight", base, (base_key, a_key, b_key), make)]
        bias = f"{module}.base_layer.bias"
        if base_key.endswith(".base_layer.weight") and bias in tensors:
            made.append(Fold(f"{module}.bias", tensors[bias], (bias,), None))
        return made
