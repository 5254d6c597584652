"""Open, inspect and convert checkpoints without running a byte of them.

    with statedict.open("model.pth") as ckpt:
        ckpt["fc1.weight"][0:2].numpy()
    print(statedict.inspect("model.pth"))

Importing this package imports nothing else: each name below is fetched when it is first used.
"""

# Nothing is imported here, not even from the standard library: `python -m statedict` runs this file before `__main__`
# can drop the current folder from the import path, and a `typing.py` that lies beside a download must not run.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from statedict.checkpoint import Checkpoint, open
    from statedict.errors import (
        CorruptFile,
        FileError,
        FormatError,
        KeyMismatch,
        KeyNotFound,
        LimitExceeded,
        MissingDependency,
        RuleError,
        RunError,
        SpecMismatch,
        StateDictError,
        StepExists,
        StepNotFound,
        TargetExists,
        Uncommitted,
        UnknownFormat,
        UnsafeContent,
        Unsupported,
    )
    from statedict.lazy_tensor import LazyTensor
    from statedict.limits import Limits
    from statedict.ops.convert import Conversion, convert
    from statedict.ops.inspect import Inspection, inspect

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Conversion",
    "CorruptFile",
    "FileError",
    "FormatError",
    "Inspection",
    "KeyMismatch",
    "KeyNotFound",
    "LazyTensor",
    "LimitExceeded",
    "Limits",
    "MissingDependency",
    "RuleError",
    "RunError",
    "SpecMismatch",
    "StateDictError",
    "StepExists",
    "StepNotFound",
    "TargetExists",
    "Uncommitted",
    "UnknownFormat",
    "UnsafeContent",
    "Unsupported",
    "__version__",
    "convert",
    "inspect",
    "open",
]

# Where each name that is no error lives. The names of errors are all in one module.
_HOMES = {
    "Checkpoint": "statedict.checkpoint",
    "Conversion": "statedict.ops.convert",
    "Inspection": "statedict.ops.inspect",
    "LazyTensor": "statedict.lazy_tensor",
    "Limits": "statedict.limits",
    "convert": "statedict.ops.convert",
    "inspect": "statedict.ops.inspect",
    "open": "statedict.checkpoint",
}

if not TYPE_CHECKING:  # a type checker that saw it would believe in any name

    def __getattr__(name):
        """The public name, imported from its module and kept."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOMES.get(name, "statedict.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, whether they were used yet or not."""
    return sorted(__all__)
