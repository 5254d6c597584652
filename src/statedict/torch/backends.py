"""Copies between the host and a device: on a stream of their own where the device has streams, one after the other elsewhere."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from statedict.errors import Unsupported

__all__ = ["Backend", "Streams", "Synchronous", "as_bytes", "backend_of"]


class Backend(Protocol):
    """Copies between a device and the host, carried out in their order. Safe to use from several threads.

    Both memories of a copy stay allocated until it is done, whether or not the caller still has them.
    """

    def pinned(self, nbytes: int) -> torch.Tensor:
        """A host buffer [nbytes] of uint8, pinned where the device has use for that."""

    def to_host(self, host_buffer: torch.Tensor, device_bytes: torch.Tensor) -> None:
        """Begin to copy the device's bytes as everything enqueued so far leaves them; all uint8 and of one size."""

    def to_device(self, device_bytes: torch.Tensor, host_buffer: torch.Tensor) -> None:
        """Begin to copy to the device, behind everything enqueued so far."""

    def record(self) -> object:
        """A mark behind every copy begun so far."""

    def wait(self, mark: object) -> None:
        """Return once every copy before the mark is done; at once if it was waited for before."""


class Streams:
    """The backend of CUDA, ROCm and XPU: copies on a stream of their own, beside the device's other work.

    Every copy comes after what is enqueued on the current stream of its own thread, and on the stream that was current where
    this object was made: a thread that only reads has another current stream than the caller's.
    """

    def __init__(self, device: torch.device) -> None:
        # Any: torch.cuda and torch.xpu have these names in common, but no type.
        self._module: Any = torch.xpu if device.type == "xpu" else torch.cuda
        index = device.index if device.index is not None else self._module.current_device()
        self._device = torch.device(device.type, index)
        self._side = self._module.Stream(self._device)
        self._caller = self._module.current_stream(self._device)

    @torch.inference_mode(False)
    def pinned(self, nbytes: int) -> torch.Tensor:
        """Pinned memory; where the system grants no more of that, plain memory, which is slower and nothing else."""
        try:
            # Inside, so that no context is made on another device: each takes some hundred MiB of it.
            with self._module.device(self._device):
                return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def to_host(self, host_buffer: torch.Tensor, device_bytes: torch.Tensor) -> None:
        """Begin to copy to the host."""
        self._copy(host_buffer, device_bytes, device_bytes)

    def to_device(self, device_bytes: torch.Tensor, host_buffer: torch.Tensor) -> None:
        """Begin to copy to the device."""
        self._copy(device_bytes, host_buffer, device_bytes)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, device_bytes: torch.Tensor) -> None:
        for stream in {self._caller, self._module.current_stream(self._device)}:
            self._side.wait_stream(stream)
        with self._module.stream(self._side):
            target.copy_(source, non_blocking=True)
        # Else the allocator gives the memory to others as soon as its tensor is gone, copy or no copy. Of pinned memory it knows.
        device_bytes.record_stream(self._side)

    def record(self) -> object:
        """An event on the stream of the copies."""
        event = self._module.Event()
        event.record(self._side)
        return event

    def wait(self, mark: Any) -> None:
        """Wait for the event; other threads run meanwhile."""
        mark.synchronize()


class Synchronous:
    """The backend of every other device: a copy is done when its call returns, so there is nothing to wait for."""

    @torch.inference_mode(False)
    def pinned(self, nbytes: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def to_host(self, host_buffer: torch.Tensor, device_bytes: torch.Tensor) -> None:
        """Copy to the host."""
        host_buffer.copy_(device_bytes)

    def to_device(self, device_bytes: torch.Tensor, host_buffer: torch.Tensor) -> None:
        """Copy to the device."""
        device_bytes.copy_(host_buffer)

    def record(self) -> object:
        """No mark is needed."""
        return None

    def wait(self, mark: object) -> None:
        """Nothing."""


def backend_of(device: torch.device) -> Backend:
    """The backend for a device. Raises ``Unsupported`` for ``meta``, which has no bytes, and for a device that isn't there."""
    if device.type == "meta":
        raise Unsupported("tensors on the meta device have no bytes", hint="Give them memory first: to_empty(device=…)")
    if device.type not in ("cuda", "xpu"):
        return Synchronous()
    try:
        return Streams(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"the device '{device}' can't be used: {reason}", hint="Choose another device") from error


@torch.inference_mode(False)
def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage's memory, on whatever device, as a tensor [nbytes] of uint8: a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
