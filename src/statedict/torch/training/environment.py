"""What the results of a training depend on beside its state: versions, threads, flags, devices. Recorded, and compared on resume.

torch promises equal bits only for equal versions, platforms and settings ("Reproducibility" in its notes, torch 2.13).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Difference", "compare", "record"]

# Values for which the device must be there, or torch be built for it, raise these where it isn't.
_ABSENT = (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError)


class Difference(NamedTuple):
    """Something that is another than when the step was saved."""

    name: str
    saved: object
    here: object

    def __str__(self) -> str:
        return f"{self.name}: {self.saved!r} in the step, {self.here!r} here"


# Any: torch's own annotations leave these out.
_CUDA: Any = torch.cuda
_BACKENDS: Any = torch.backends
_UTILS: Any = torch.utils


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


_FACTS: Mapping[str, Callable[[], object]] = {
    "torch": lambda: str(torch.__version__),
    "numpy": lambda: np.__version__,
    "python": platform.python_version,
    "platform": lambda: f"{platform.system()} {platform.machine()}",
    "cpu_capability": lambda: torch.backends.cpu.get_cpu_capability(),
    "threads": torch.get_num_threads,
    "interop_threads": torch.get_num_interop_threads,
    "world_size": _world_size,
    "default_dtype": lambda: str(torch.get_default_dtype()),
    "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "fill_uninitialized_memory": lambda: bool(_UTILS.deterministic.fill_uninitialized_memory),
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "mkldnn": lambda: bool(torch.backends.mkldnn.enabled),
}
_GPU_FACTS: Mapping[str, Callable[[], object]] = {
    "cuda": lambda: torch.version.cuda,
    "hip": lambda: torch.version.hip,
    "cudnn": torch.backends.cudnn.version,
    "gpus": _gpus,
    "cudnn_deterministic": lambda: bool(torch.backends.cudnn.deterministic),
    "cudnn_benchmark": lambda: bool(torch.backends.cudnn.benchmark),
    "fp16_reduced_precision": lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    "bf16_reduced_precision": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    "sdp_backends": lambda: [
        _BACKENDS.cuda.flash_sdp_enabled(),
        _BACKENDS.cuda.mem_efficient_sdp_enabled(),
        _BACKENDS.cuda.math_sdp_enabled(),
    ],
    "cublas_workspace": lambda: os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    "nccl_algo": lambda: os.environ.get("NCCL_ALGO"),
}


def record() -> dict[str, object]:
    """The environment, JSON-ready. What concerns GPUs only where CUDA is in use: asking for it would start its driver."""
    found = {name: _value(ask) for name, ask in _FACTS.items()}
    if torch.cuda.is_available() and _CUDA.is_initialized():
        found |= {name: _value(ask) for name, ask in _GPU_FACTS.items()}
    return found


def _value(ask: Callable[[], object]) -> object:
    try:
        value = ask()
    except _ABSENT:
        return None
    return value if isinstance(value, (bool, int, float, str, list, type(None))) else str(value)


def compare(saved: Mapping[str, object], here: Mapping[str, object]) -> list[Difference]:
    """What differs. What only one of them knows counts if it is something."""
    names = dict.fromkeys([*saved, *here])
    return [Difference(name, saved.get(name), here.get(name)) for name in names if saved.get(name) != here.get(name)]
