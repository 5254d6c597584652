"""Rules that multiply out a weight which is kept as a product: a pruning mask, a spectral norm, the scales of quantised numbers.

None of them can be taken back: what they were made of is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from statedict.dtypes import BY_TORCH, DType
from statedict.errors import RuleError, one_line
from statedict.keys import matches
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft
from statedict.rules.dtypes import float_named
from statedict.rules.folds import Fold, Folding
from statedict.rules.patterns import Pattern, listed

if TYPE_CHECKING:
    from statedict.recipes.derived import Recipe

__all__ = ["FoldPruning", "FoldScale", "FoldSpectralNorm"]

# Bits from which on a dtype of scales is also one to keep weights in.
_REAL_BITS = 16


class FoldPruning(Folding):
    """What torch's pruning keeps of a parameter, ``NAME_orig`` and ``NAME_mask``, becomes the parameter again.

    Source: torch/nn/utils/prune.py, ``BasePruningMethod.apply_mask``.
    """

    __slots__ = ()
    name = "fold_pruning"
    fields = ("glob",)
    defaults: ClassVar[Mapping[str, object]] = {"glob": "*"}

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Pairs whose module the glob matches."""
        found = []
        for key in tensors:
            name = key.removesuffix("_mask")
            if name == key or f"{name}_orig" not in tensors or not matches(name.rpartition(".")[0], self.arguments[0]):
                continue
            found.append(self._fold(name, tensors))
        return found

    def _fold(self, name: str, tensors: Mapping[str, TensorEntry]) -> Fold:
        orig, mask = tensors[f"{name}_orig"], tensors[f"{name}_mask"]

        def make(draft: Draft) -> Recipe:
            from statedict.recipes.products import Masked

            return Masked(draft.lazy(orig), draft.lazy(mask))

        return Fold(name, orig, (f"{name}_orig", f"{name}_mask"), make)


class FoldSpectralNorm(Folding):
    """Weights with their spectral norm beside them (``weight_orig``, ``weight_u``, ``weight_v``, or torch's parametrization) become plain.

    Sources: torch/nn/utils/spectral_norm.py and torch/nn/utils/parametrizations.py.
    """

    __slots__ = ()
    name = "fold_spectral_norm"
    fields = ("glob", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"glob": "*", "dim": 0}

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Weights of both forms, whose module the glob matches."""
        found = []
        for key in tensors:
            parts = _spectral_norm_of(key)
            if parts is None or any(part not in tensors for part in parts[1:]):
                continue
            if matches(parts[0].rpartition(".")[0], self.arguments[0]):
                found.append(self._fold(*parts, tensors))
        return found

    def _fold(self, target: str, orig: str, u: str, v: str, tensors: Mapping[str, TensorEntry]) -> Fold:
        weight, left, right = (tensors[key] for key in (orig, u, v))

        def make(draft: Draft) -> Recipe:
            from statedict.recipes.products import FoldedSpectralNorm

            return FoldedSpectralNorm(draft.lazy(weight), draft.lazy(left), draft.lazy(right), self.arguments[1])

        return Fold(target, weight, (orig, u, v), make)


def _spectral_norm_of(key: str) -> tuple[str, str, str, str] | None:
    """Of the key of a left vector: the keys of the weight, of what is kept of it, and of both vectors."""
    if key.endswith("_u") and not key.endswith("._u"):
        name = key[:-2]
        return name, f"{name}_orig", key, f"{name}_v"
    module, _, last = key.rpartition("._u")
    home, _, number = module.rpartition(".")
    parent, _, name = home.rpartition(".")
    if not last and number == "0" and (parent == "parametrizations" or parent.endswith(".parametrizations")):
        target = f"{parent.removesuffix('parametrizations')}{name}"
        return target, f"{home}.original", key, f"{module}._v"
    return None


class FoldScale(Folding):
    """Quantised weights times the scales beside them become weights of floats."""

    __slots__ = ("_scale", "_weight")
    name = "fold_scale"
    fields = ("weight", "scale", "factor", "block", "dtype")
    defaults: ClassVar[Mapping[str, object]] = {"factor": 1.0, "block": None, "dtype": None}

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._weight, self._scale = Pattern(arguments[0]), Pattern(arguments[1])
        self._weight.check_names(self._scale.names)
        if arguments[4] is not None and float_named(arguments[4]).kind != "float":
            raise RuleError("fold_scale makes floats", found=one_line(repr(arguments[4])))

    def folds(self, tensors: Mapping[str, TensorEntry]) -> list[Fold]:
        """Each scale that is meant, with its weight."""
        found = []
        for key in tensors:
            values = self._scale.match(key)
            if values is not None:
                weight = self._weight.fill(values)
                if weight not in tensors:
                    raise RuleError(f"{one_line(self)}: parts are missing: {listed([weight])}", key=key)
                found.append(self._fold(tensors[weight], tensors[key], (weight, key)))
        return found

    def _fold(self, weight: TensorEntry, scale: TensorEntry, keys: tuple[str, str]) -> Fold:
        _, _, factor, block, dtype = self.arguments
        after = float_named(dtype) if dtype is not None else _dtype_beside(scale)

        def make(draft: Draft) -> Recipe:
            from statedict.recipes.products import Dequantised

            sizes = self._block(weight, scale) if block is None else [*block, *[1] * (len(weight.shape) - len(block))]
            return Dequantised(draft.lazy(weight), draft.lazy(scale), sizes, float(factor), dtype=after)

        return Fold(keys[0], weight, keys, make)

    def _block(self, weight: TensorEntry, scale: TensorEntry) -> Sequence[int]:
        from statedict.recipes.products import blocks_of

        found = blocks_of(weight.shape, scale.shape)
        if weight.numel and any(len(sizes) != 1 for sizes in found):
            shapes = f"a weight {list(weight.shape)} and scales {list(scale.shape)}"
            hint = "Give the sizes of a block: block=(128, 128)"
            raise RuleError("the shapes don't say how large a block is", key=scale.key, found=shapes, hint=hint)
        return [min(sizes, default=1) for sizes in found]


def _dtype_beside(scale: TensorEntry) -> DType:
    """The dtype of weights that have such scales."""
    return scale.dtype if scale.dtype.bits >= _REAL_BITS else BY_TORCH["float32"]
