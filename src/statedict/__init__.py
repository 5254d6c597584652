"""Save, load, open, inspect, compare and convert checkpoints without running a byte of them.

    with statedict.open("model.pth") as ckpt:
        ckpt["fc1.weight"][0:2].numpy()
    print(statedict.inspect("model.pth"))

Importing this package imports nothing else: each name below is fetched when it is first used.
"""

# Nothing is imported here, not even from the standard library: `python -m statedict` runs this file before `__main__`
# can drop the current folder from the import path, and a `typing.py` that lies beside a download must not run.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from statedict import rules as rules
    from statedict.checkpoint import Checkpoint, open
    from statedict.doors import (
        TrainingState,
        filter_state_dict,
        load,
        load_into,
        load_model_safely,
        load_training_state,
        save,
        save_training_state,
    )
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
    from statedict.io.engine import Engine
    from statedict.lazy_tensor import LazyTensor
    from statedict.limits import Limits
    from statedict.ops.average import Averaging, average
    from statedict.ops.chapter import compare_state_dicts, inspect_state_dict
    from statedict.ops.compare import compare
    from statedict.ops.comparing.comparison import Comparison
    from statedict.ops.convert import Conversion, convert
    from statedict.ops.diagnose import Diagnosis, diagnose
    from statedict.ops.diagnosing.probes import Probe
    from statedict.ops.inspect import Inspection, inspect
    from statedict.ops.load_report import LoadReport
    from statedict.ops.remapping import remap
    from statedict.ops.transfers import ReadReport, SaveReport
    from statedict.runs.catalogue import Step
    from statedict.runs.policies import Best, Every, Latest, Minutes, Steps, Within
    from statedict.runs.saving import Saved
    from statedict.runs.training_run import Restored, TrainingRun
    from statedict.runs.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "Averaging",
    "Best",
    "Checkpoint",
    "Comparison",
    "Conversion",
    "CorruptFile",
    "Diagnosis",
    "Engine",
    "Every",
    "FileError",
    "FormatError",
    "Inspection",
    "KeyMismatch",
    "KeyNotFound",
    "Latest",
    "LazyTensor",
    "LimitExceeded",
    "Limits",
    "LoadReport",
    "Minutes",
    "MissingDependency",
    "Probe",
    "ReadReport",
    "Restored",
    "RuleError",
    "RunError",
    "SaveReport",
    "Saved",
    "SpecMismatch",
    "StateDictError",
    "Step",
    "StepExists",
    "StepNotFound",
    "Steps",
    "TargetExists",
    "TrainingRun",
    "TrainingState",
    "Uncommitted",
    "UnknownFormat",
    "UnsafeContent",
    "Unsupported",
    "Verification",
    "Within",
    "__version__",
    "average",
    "compare",
    "compare_state_dicts",
    "convert",
    "diagnose",
    "filter_state_dict",
    "inspect",
    "inspect_state_dict",
    "load",
    "load_into",
    "load_model_safely",
    "load_training_state",
    "open",
    "remap",
    "rules",
    "save",
    "save_training_state",
]

# Where each name that is no error lives. The names of errors are all in one module.
_HOMES = {
    "Averaging": "statedict.ops.average",
    "Best": "statedict.runs.policies",
    "Checkpoint": "statedict.checkpoint",
    "Comparison": "statedict.ops.comparing.comparison",
    "Conversion": "statedict.ops.convert",
    "Diagnosis": "statedict.ops.diagnose",
    "Engine": "statedict.io.engine",
    "Every": "statedict.runs.policies",
    "Inspection": "statedict.ops.inspect",
    "Latest": "statedict.runs.policies",
    "LazyTensor": "statedict.lazy_tensor",
    "Limits": "statedict.limits",
    "LoadReport": "statedict.ops.load_report",
    "Minutes": "statedict.runs.policies",
    "Probe": "statedict.ops.diagnosing.probes",
    "ReadReport": "statedict.ops.transfers",
    "Restored": "statedict.runs.training_run",
    "SaveReport": "statedict.ops.transfers",
    "Saved": "statedict.runs.saving",
    "Step": "statedict.runs.catalogue",
    "Steps": "statedict.runs.policies",
    "TrainingRun": "statedict.runs.training_run",
    "TrainingState": "statedict.doors",
    "Verification": "statedict.runs.verification",
    "Within": "statedict.runs.policies",
    "average": "statedict.ops.average",
    "compare": "statedict.ops.compare",
    "compare_state_dicts": "statedict.ops.chapter",
    "convert": "statedict.ops.convert",
    "diagnose": "statedict.ops.diagnose",
    "filter_state_dict": "statedict.doors",
    "inspect": "statedict.ops.inspect",
    "inspect_state_dict": "statedict.ops.chapter",
    "load": "statedict.doors",
    "load_into": "statedict.doors",
    "load_model_safely": "statedict.doors",
    "load_training_state": "statedict.doors",
    "open": "statedict.checkpoint",
    "remap": "statedict.ops.remapping",
    "rules": "statedict.rules",
    "save": "statedict.doors",
    "save_training_state": "statedict.doors",
}

if not TYPE_CHECKING:  # a type checker that saw it would believe in any name

    def __getattr__(name):
        """The public name, imported from its module and kept."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = import_module(_HOMES.get(name, "statedict.errors"))
        value = home if name == "rules" else getattr(home, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, whether they were used yet or not."""
    return sorted(__all__)
