"""The models that a training checkpoint holds: where their state dicts stand, and which of them are averages.

Names are what people gave them (``model_state_dict``, ``ema``, ``netG``), so structure comes first: a state dict is a mapping most of
whose bytes are in tensors that stand directly in it. What is an optimizer, a scheduler, a setting or a record of the training by its
name or by its ``param_groups`` (torch ``optim/optimizer.py``, ``state_dict``) holds no model, but may hold averages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from statedict.keys import Path
from statedict.manifest import Container, Node, TensorEntry
from statedict.nodes import components, walk

__all__ = ["StateDict", "averages_by_name", "state_dicts_of", "words_of"]

# What people call the weights inside a training checkpoint.
_WEIGHTS = frozenset(
    {
        "model_state_dict",
        "state_dict",
        "model_state",
        "current_model_state",
        "net_state",
        "model",
        "module",
        "net",
        "network",
    }
    | {"weights", "params"}
)
# Words that say of a part that it holds averages of the weights.
_AVERAGES = frozenset({"averaged", "average", "avg", "ema", "polyak", "shadow", "swa"})
# Words that say of a part that it belongs to the training.
_TRAINING = frozenset(
    {"optimizer", "optimizers", "optim", "optims", "opt", "scheduler", "schedulers", "sched", "lr", "scaler", "grad"}
    | {
        "moments",
        "momentum",
        "exp",
        "gradients",
        "rng",
        "random",
        "sampler",
        "loader",
        "loaders",
        "dataloader",
        "dataset",
        "datamodule",
        "averaging",
    }
    | {"callback", "callbacks", "loop", "loops", "progress", "timer", "logs", "history", "metric", "metrics", "hyper"}
    | {"hparams", "args", "arguments", "config", "cfg", "options", "opts", "loss", "losses", "criterion", "criterions"}
)
# Words that say of a part that it is a model of its own among others.
_MODELS = frozenset(
    {"generator", "discriminator", "netg", "netd", "g", "d", "actor", "critic", "teacher", "student", "policy"}
)
_MAPPINGS = frozenset({"dict", "OrderedDict", "defaultdict", "Namespace"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# Containers above the weights that are looked through: real files have fewer than six.
_DEEPEST = 8


class StateDict(NamedTuple):
    """A state dict, or a list of averaged tensors in the order of a model's parameters."""

    path: Path
    node: Container
    tensors: int
    nbytes: int
    is_average: bool

    @property
    def is_list(self) -> bool:
        """Whether its tensors have no names."""
        return self.node.kind in ("list", "tuple")

    @property
    def is_known(self) -> bool:
        """Whether it stands under a name that people give the weights."""
        return any(part in _WEIGHTS for part in self.path)


def words_of(name: object) -> set[str]:
    """The words of a name, in lower case: ``optimizer``, ``state`` and ``dict`` of ``optimizer_state_dict``."""
    return {word.lower() for word in _WORD.findall(str(name))}


def averages_by_name(name: object) -> bool:
    """Whether a name says of what it names that these are averages of weights; Adam's ``exp_avg`` is none."""
    words = words_of(name)
    return bool(words & _AVERAGES) and "exp" not in words


def state_dicts_of(root: Node) -> list[StateDict]:
    """The state dicts in a tree, in the order of the file."""
    found: list[StateDict] = []
    pending: list[tuple[Path, Node, bool, bool]] = [((), root, False, False)]
    while pending:
        path, node, is_training, is_average = pending.pop()
        if not isinstance(node, Container) or len(path) > _DEEPEST:
            continue
        is_list = node.kind in ("list", "tuple")
        if _is_shadow(node, is_average) if is_list else _is_state_dict(node):
            if is_average or not is_training:
                found.append(_part(path, node, is_average))
            # An average may stand beside the tensors themselves.
            pending += [each for each in _inside(path, node, True, is_average) if each[3] and not is_average]
        else:
            pending += _inside(path, node, is_training, is_average)
    return _lightning(root, found)


def _inside(
    path: Path, node: Container, is_training: bool, is_average: bool
) -> Iterator[tuple[Path, Node, bool, bool]]:
    """What is to be looked at in a container, the last first: a stack gives it back in order."""
    optimizer = "param_groups" in node.keys
    pairs = list(zip(components(node.keys), node.children))
    for part, child in reversed(pairs):
        # What torch_ema sets aside while the averages are in the model's place are no averages.
        skipped = part == "collected_params" or (optimizer and part in ("state", "param_groups"))
        if isinstance(child, Container) and not skipped:
            average = is_average or averages_by_name(part)
            training = is_training or optimizer or bool(words_of(part) & _TRAINING)
            yield (*path, part), child, training, average


def _part(path: Path, node: Container, is_average: bool) -> StateDict:
    sizes = [leaf.nbytes for _, leaf in walk(node) if isinstance(leaf, TensorEntry)]
    return StateDict(path, node, len(sizes), sum(sizes), is_average)


def _is_shadow(node: Container, is_average: bool) -> bool:
    """Whether a list holds averaged tensors and nothing else."""
    return is_average and all(isinstance(child, TensorEntry) for child in node.children)


def _is_state_dict(node: Container) -> bool:
    """Whether a mapping is a state dict: flat, as torch has it, or nested with nothing in it that looks like one."""
    if node.kind not in _MAPPINGS or "param_groups" in node.keys:
        return False
    direct = [child for child in node.children if isinstance(child, TensorEntry)]
    nested = [
        (part, child) for part, child in zip(components(node.keys), node.children) if isinstance(child, Container)
    ]
    models = [
        (part, child)
        for part, child in nested
        if not (words_of(part) & _TRAINING or averages_by_name(part) or "param_groups" in child.keys)
        and _weight([child])
    ]
    if direct and nested and all(child.shape == () for child in direct):
        return False  # a loss, a scale
    if any(_is_model(part, child) for part, child in models):
        return False
    if direct:
        return 2 * _weight(direct) >= _weight([*direct, *[child for _, child in models]])
    return len(models) > 1


def _is_model(name: object, node: Container) -> bool:
    """Whether what stands in a container looks like a model of its own, and not like a module of a nested state dict."""
    if name in _WEIGHTS or words_of(name) & _MODELS or node.kind == "OrderedDict" or "_metadata" in node.attributes:
        return True
    return isinstance(name, int) or any(isinstance(key, str) and "." in key for key in node.keys)


def _weight(nodes: Iterable[Node]) -> int:
    """Elements of the tensors in these nodes; a byte more for each, so that empty ones count."""
    return sum([1 + leaf.nbytes for node in nodes for _, leaf in walk(node) if isinstance(leaf, TensorEntry)])


def _lightning(root: Node, parts: Sequence[StateDict]) -> list[StateDict]:
    """Lightning's WeightAveraging puts the averages under ``state_dict``, and the weights that it trains elsewhere.

    Source: ``lightning/pytorch/callbacks/weight_averaging.py``, ``on_save_checkpoint``.
    """
    names = set(root.keys) if isinstance(root, Container) and root.kind in _MAPPINGS else set()
    if not {"current_model_state", "averaging_state", "state_dict"} <= names:
        return list(parts)
    return [part._replace(is_average=True) if part.path == ("state_dict",) else part for part in parts]
