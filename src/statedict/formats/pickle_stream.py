"""The values inside ``data.pkl`` as instructions of protocol 2, in the spelling that torch's weights-only reader knows."""

from __future__ import annotations

import struct

from statedict.manifest import Opaque, TorchValue

__all__ = ["PickleStream", "Refused"]


class Refused(Exception):
    """A leaf that the weights-only reader doesn't take."""

    def __init__(self, value: object, kind: str) -> None:
        super().__init__(kind)
        self.value = value
        self.kind = kind


class PickleStream:
    """The bytes of one pickle, and the names that it has looked up already."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[str, int] = {}

    def op(self, code: bytes) -> None:
        """Instructions as they are."""
        self.out += code

    def look_up(self, module: str, name: str) -> None:
        """A class or function by its name, from the memo after the first time."""
        key = f"{module} {name}"
        at = self._memo.get(key)
        if at is None:
            at = self._memo[key] = len(self._memo)
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self.out += b"q" + bytes([at])
        else:
            self.out += b"h" + bytes([at])

    def call(self, module: str, name: str, args: bytes) -> None:
        """A call whose arguments are written already, as one tuple's instructions."""
        self.look_up(module, name)
        self.out += args + b"R"

    def text(self, text: str) -> None:
        """A text."""
        raw = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + len(raw).to_bytes(4, "little") + raw

    def integer(self, number: int) -> None:
        """A whole number of up to 255 bytes, which is what the reader takes."""
        if 0 <= number < 256:
            self.out += b"K" + bytes([number])
        elif -(1 << 31) <= number < 1 << 31:
            self.out += b"J" + number.to_bytes(4, "little", signed=True)
        else:
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise Refused(number, "an integer of more than 255 bytes")
            self.out += b"\x8a" + bytes([len(raw)]) + raw

    def value(self, value: object) -> None:
        """An inert value. Those nest little (a file's own nesting is in its containers), so this recurses."""
        if value is None:
            self.op(b"N")
        elif value is True or value is False:
            self.op(b"\x88" if value else b"\x89")
        elif type(value) is int:
            self.integer(value)
        elif type(value) is float:
            self.op(b"G" + struct.pack(">d", value))
        elif type(value) is str:
            self.text(value)
        elif type(value) in (bytes, bytearray):
            self._bytes(value)  # type: ignore[arg-type]
        elif type(value) is complex:
            self.look_up("__builtin__", "complex")
            self.op(b"G" + struct.pack(">d", value.real) + b"G" + struct.pack(">d", value.imag) + b"\x86R")
        elif isinstance(value, TorchValue):
            self._torch_value(value)
        else:
            self._collection(value)

    def _bytes(self, value: bytes | bytearray) -> None:
        if type(value) is bytearray:
            self.look_up("__builtin__", "bytearray")
        self.look_up("_codecs", "encode")
        self.text(value.decode("latin-1"))
        self.text("latin1")
        self.op(b"\x86R")
        if type(value) is bytearray:
            self.op(b"\x85R")

    def _torch_value(self, value: TorchValue) -> None:
        if value.kind == "dtype":
            self.look_up("torch", str(value.value))
        elif value.kind == "Size":
            self.look_up("torch", "Size")
            self.value(value.value)
            self.op(b"\x85R")
        elif value.kind == "device":
            name, _, index = str(value.value).partition(":")
            self.look_up("torch", "device")
            self.text(name)
            if index:
                self.integer(int(index))
            self.op(b"\x86R" if index else b"\x85R")
        elif value.kind == "layout":
            self.look_up("torch.serialization", "_get_layout")
            self.text(str(value.value))
            self.op(b"\x85R")
        elif value.kind == "qscheme":
            self.look_up("torch", str(value.value).removeprefix("torch."))
        else:
            raise Refused(value, f"torch.{value.kind}")

    def _collection(self, value: object) -> None:
        kind = type(value)
        if kind is tuple:
            self.op(b"(")
            for item in value:  # type: ignore[attr-defined]
                self.value(item)
            self.op(b"t")
        elif kind is list or kind is set:
            if kind is set:
                self.look_up("__builtin__", "set")
            self.op(b"](")
            for item in sorted(value, key=repr) if kind is set else value:  # type: ignore[call-overload, union-attr]
                self.value(item)
            self.op(b"e\x85R" if kind is set else b"e")
        elif kind is dict or kind.__name__ == "OrderedDict":
            if kind is dict:
                self.op(b"}")
            else:
                self.call("collections", "OrderedDict", b")")
            self.op(b"(")
            for key, item in value.items():  # type: ignore[attr-defined]
                self.value(key)
                self.value(item)
            self.op(b"u")
        else:
            name = value.type if isinstance(value, Opaque) else kind.__name__
            raise Refused(value, name)
