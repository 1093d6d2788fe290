"""The allow-list: every global that the opcode machine knows, what it makes of it, and why it is harmless.

This is the only table of names; whatever stands outside it becomes an `Inert` stand-in. No entry imports or calls what it
names: each builds one of our own values from the arguments, or refuses them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ckptsurgeon.dtypes import BY_STORAGE_CLASS, BY_TORCH, DType
from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.limits import allowed, exceeded
from ckptsurgeon.formats.pickle_values import (
    Encoded,
    Global,
    Inert,
    NumpyArray,
    NumpyDType,
    PickledDict,
    StorageClass,
    StorageRef,
    TensorRef,
    TupleKey,
)

MAX_INT = (1 << 63) - 1


def _tensor_v2(args: tuple[Any, ...]) -> TensorRef | Inert:
    storage, offset, shape, stride = args[:4]
    if type(storage) is Inert:  # pickle.dump of a tensor: its storage would come from a call
        return Inert("torch._utils._rebuild_tensor_v2", args)
    if type(storage) is not StorageRef or storage.dtype is None:
        raise FormatError("a tensor's storage has no dtype")
    return _tensor(storage, storage.dtype, offset, shape, stride)


def _tensor_v3(args: tuple[Any, ...]) -> TensorRef | Inert:
    storage, offset, shape, stride, _requires_grad, _hooks, dtype = args[:7]
    if type(storage) is Inert:
        return Inert("torch._utils._rebuild_tensor_v3", args)
    if type(storage) is not StorageRef or type(dtype) is not DType:
        raise FormatError("a tensor's storage or dtype is not one")
    return _tensor(storage, dtype, offset, shape, stride)


def _tensor(storage: StorageRef, dtype: DType, offset: Any, shape: Any, stride: Any) -> TensorRef:
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > 64:
        raise FormatError("a tensor's shape and stride are not two tuples of one length")
    reach, empty, numel = 0, False, 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            raise FormatError("a tensor's shape or stride has something other than non-negative integers")
        if size > MAX_INT or step > MAX_INT:
            raise FormatError("a tensor's shape or stride overflows 64 bits")
        if size == 0:
            empty = True
        reach += (size - 1) * step
        numel *= size
        if numel > MAX_INT or reach > MAX_INT:
            raise FormatError("a tensor's shape overflows 64 bits")
    if type(offset) is not int or not 0 <= offset <= MAX_INT:
        raise FormatError("a tensor's offset is not a non-negative integer")
    held = storage.numel * (1 if storage.dtype is None else storage.dtype.size)
    if not empty and (offset + reach + 1) * dtype.size > held:
        raise FormatError(f"a tensor of shape {shape} reaches beyond its storage of {held} bytes")
    return TensorRef(storage, dtype, offset, shape, stride)


def _first(args: tuple[Any, ...]) -> Any:
    return args[0]


def _subclass(args: tuple[Any, ...]) -> Any:
    # torch._tensor._rebuild_from_type_v2(func, type, args, state): what `func` rebuilds, wrapped in a Tensor subclass.
    function, kind, inner = args[0], args[1], args[2]
    name = kind.name if type(kind) is Global else "a tensor subclass"
    plain = name in PLAIN_TENSORS and type(function) is Global and function.name.startswith("torch._utils.")
    return construct(function, inner) if plain else Inert(name, args)


def _dict(args: tuple[Any, ...]) -> PickledDict:
    result = PickledDict()
    if args:
        pairs = args[-1]
        if isinstance(pairs, dict):
            result.update(pairs)
        elif type(pairs) in (list, tuple):
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise FormatError("an OrderedDict is not made of pairs")
                set_item(result, pair[0], pair[1])
    return result


def _defaultdict(args: tuple[Any, ...]) -> PickledDict:
    return _dict(args[1:])


def _members(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args and type(args[0]) in (list, tuple) else ()


def _text(args: tuple[Any, ...]) -> str:
    return ":".join(str(arg) for arg in args if type(arg) in (str, int))[:200]


def _complex(args: tuple[Any, ...]) -> complex:
    return complex(*[float(arg) for arg in args[:2]])


def _encode(args: tuple[Any, ...]) -> Encoded:
    return Encoded(args[0]) if type(args[0]) is str else Encoded("")


def _numpy_dtype(args: tuple[Any, ...]) -> NumpyDType:
    return NumpyDType(args[0]) if type(args[0]) is str else NumpyDType("?")


_SCALARS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    dtype, data = args[0], args[1] if len(args) > 1 else b""
    raw = data.text.encode("latin1", "replace") if type(data) is Encoded and len(data.text) <= 16 else data
    form = _SCALARS.get(dtype.code) if type(dtype) is NumpyDType else None
    if form is None or type(raw) is not bytes or len(raw) != struct.calcsize(form):
        return Inert("numpy scalar", args)
    return struct.unpack((">" if dtype.byteorder == ">" else "<") + form, raw)[0]


def _numpy_array(_args: tuple[Any, ...]) -> NumpyArray:
    return NumpyArray()


def _numpy_buffer(args: tuple[Any, ...]) -> NumpyArray:
    return NumpyArray(args[2] if len(args) > 2 else ())


# name -> (what we build, why that is harmless)
ALLOWED: dict[str, tuple[Callable[[tuple[Any, ...]], Any], str]] = {
    "collections.OrderedDict": (_dict, "the state_dict itself"),
    "collections.defaultdict": (_defaultdict, "a plain dict; its factory is never called"),
    "collections.Counter": (_dict, "a plain dict (training loops keep counts)"),
    "builtins.dict": (_dict, "a plain dict"),
    "builtins.set": (_members, "a plain container"),
    "builtins.frozenset": (_members, "a plain container"),
    "builtins.complex": (_complex, "a number"),
    "torch._utils._rebuild_tensor": (_tensor_v2, "a tensor over a storage (before torch 0.4)"),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, "a tensor over a typed storage"),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, "a tensor over an untyped storage"),
    "torch._utils._rebuild_parameter": (_first, "a Parameter is its tensor"),
    "torch._utils._rebuild_parameter_with_state": (_first, "a Parameter is its tensor"),
    "torch._tensor._rebuild_from_type_v2": (_subclass, "a tensor with attributes"),
    "torch.nn.parameter.Parameter": (_first, "a Parameter is its tensor (before torch 0.4)"),
    "torch.Size": (_members, "a tuple of integers"),
    "torch.device": (_text, "the name of a device"),
    "torch.serialization._get_layout": (_text, "the name of a memory layout"),
    "_codecs.encode": (_encode, "how protocol 2 spells bytes; kept as text, never encoded"),
    "numpy.dtype": (_numpy_dtype, "the name of a dtype"),
    "numpy.core.multiarray.scalar": (_numpy_scalar, "a number"),
    "numpy._core.multiarray.scalar": (_numpy_scalar, "a number"),
    "numpy.core.multiarray._reconstruct": (_numpy_array, "an array; its bytes are left alone"),
    "numpy._core.multiarray._reconstruct": (_numpy_array, "an array; its bytes are left alone"),
    "numpy._core.numeric._frombuffer": (_numpy_buffer, "an array; its bytes are left alone"),
    "numpy.core.numeric._frombuffer": (_numpy_buffer, "an array; its bytes are left alone"),
}
# Named as an argument of one of the above, never built.
PLAIN_TENSORS = frozenset({"torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Buffer"})
NAMED_ONLY = PLAIN_TENSORS | {"numpy.ndarray"}
# Old spellings: Python 2's module names, and torch modules that moved (as torch.load itself maps them).
RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
UNTYPED = ("UntypedStorage", "_UntypedStorage")


def resolve(module: str, name: str) -> tuple[Any, bool]:
    """What stands for the global `module.name`, and whether it is on the allow-list."""
    if len(module) + len(name) > (most := allowed("global-characters")):
        raise exceeded("global-characters", f"a pickle names a global of more than {most} characters", len(module) + len(name))
    module = RENAMED_MODULES.get(module, module)
    if module in STORAGE_MODULES:
        if name in UNTYPED:
            return StorageClass(None), True
        if name in BY_STORAGE_CLASS:
            return StorageClass(BY_STORAGE_CLASS[name]), True
        if module == "torch" and name in BY_TORCH:
            return BY_TORCH[name], True
    full = f"{module}.{name}"
    return Global(full), full in ALLOWED or full in NAMED_ONLY


def construct(function: Any, args: Any) -> Any:
    """What a call of `function` on `args` stands for: one of our own values, or an `Inert` stand-in."""
    if type(args) is not tuple:
        raise FormatError("a pickle calls something with arguments that are no tuple")
    if type(function) is not Global:
        return Inert(describe(function), args)
    entry = ALLOWED.get(function.name)
    if entry is None:
        return Inert(function.name, args)
    try:
        return entry[0](args)
    except (IndexError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise FormatError(f"a pickle gives {function.name} arguments that it does not take") from error


def describe(value: Any) -> str:
    """A few words for a value of the machine, safe to show."""
    if type(value) in (Inert, Global):
        return str(value.name)
    return "a value of type " + type(value).__name__


SCALARS = (str, int, float, bool, type(None), bytes)
OTHER_KEYS = (Inert, Global, DType, TensorRef, Encoded, TupleKey)


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """`target[key] = value`, for a key that can be hashed cheaply and is not there yet."""
    kind = type(key)
    if kind is tuple:
        key = TupleKey(key_text(key))
    elif kind is int and not -MAX_INT <= key <= 2 * MAX_INT:
        raise FormatError("a dict in the pickle has an integer key of more than 64 bits")  # many of one hash would make it very slow
    elif kind not in SCALARS and kind not in OTHER_KEYS:
        raise FormatError(f"a dict in the pickle has a key of type {kind.__name__}")
    if key in target:
        raise FormatError("a dict in the pickle has a key twice", key=key_text(key)[:200])
    target[key] = value


def key_text(key: Any) -> str:
    """A dict's key as a name, short unless it is text itself."""
    kind = type(key)
    if kind is str:
        return str(key)
    if kind is tuple:
        return f"({', '.join(key_text(part)[:40] if type(part) is not tuple else '(…)' for part in key[:8])})"
    if kind is TupleKey:
        return str(key.text)
    return str(key[:40] if kind is bytes else key) if kind in SCALARS else f"<{describe(key)}>"
