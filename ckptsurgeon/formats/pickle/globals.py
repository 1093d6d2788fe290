"""The allow-list: every global that the opcode machine knows, the value that it builds for it, and why that is harmless.

This is the only table of names; every other global becomes an `Inert` stand-in. No entry imports or calls the global that it
names: each builds a value of `values.py` from the arguments, or refuses them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ckptsurgeon.dtypes import BY_STORAGE_CLASS, BY_TORCH, QUANTIZED, DType
from ckptsurgeon.errors import FormatError, UnsafeError
from ckptsurgeon.formats.pickle.values import (
    Encoded,
    Global,
    Inert,
    NumpyArray,
    NumpyDType,
    Opaque,
    PickledDict,
    StorageClass,
    StorageRef,
    TensorRef,
    TupleKey,
)
from ckptsurgeon.limit_table import allowed, exceeded

MAX_INT = (1 << 63) - 1


def _tensor_v2(args: tuple[Any, ...]) -> TensorRef | Inert:
    storage, offset, shape, stride, *rest = args  # rest: requires_grad, hooks and metadata
    if type(storage) is Inert:  # pickle.dump of a tensor: its storage would come from a call
        return Inert("torch._utils._rebuild_tensor_v2", args)
    if type(storage) is not StorageRef or storage.dtype is None:
        raise FormatError("a tensor's storage has no dtype")
    return _tensor(storage, storage.dtype, offset, shape, stride, rest[2:])


def _tensor_v3(args: tuple[Any, ...]) -> TensorRef | Inert:
    storage, offset, shape, stride, _requires_grad, _hooks, dtype, *rest = args
    if type(storage) is Inert:
        return Inert("torch._utils._rebuild_tensor_v3", args)
    if type(storage) is not StorageRef or type(dtype) is not DType:
        raise FormatError("a tensor's storage or dtype is not one")
    return _tensor(storage, dtype, offset, shape, stride, rest)


def _tensor(storage: StorageRef, dtype: DType, offset: Any, shape: Any, stride: Any, metadata: list[Any]) -> TensorRef:
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > 64:
        raise FormatError("a tensor's shape and stride are not two tuples of one length")
    return view(storage, dtype, offset, shape, stride, extent(shape, stride), _lazy(*metadata) if metadata else ())


def extent(shape: tuple[Any, ...], stride: tuple[Any, ...]) -> int:
    """How many elements of its storage a tensor spans, 0 for an empty one. FormatError for an impossible shape and stride."""
    reach, empty, numel = 1, False, 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            raise FormatError("a tensor's shape or stride has something other than non-negative integers")
        if size > MAX_INT or step > MAX_INT:
            raise FormatError("a tensor's shape or stride overflows 64 bits")
        if size == 0:
            empty = True
        reach += (size - 1) * step
        numel *= size
        if numel > MAX_INT or reach > MAX_INT + 1:
            raise FormatError("a tensor's shape overflows 64 bits")
    return 0 if empty else reach


def view(
    storage: StorageRef, dtype: DType, offset: Any, shape: tuple[int, ...], stride: tuple[int, ...], reach: int, lazy: tuple[str, ...] = ()
) -> TensorRef:
    """A tensor that spans `reach` elements of its storage (see `extent`). FormatError where the storage is shorter."""
    if type(offset) is not int or not 0 <= offset <= MAX_INT:
        raise FormatError("a tensor's offset is not a non-negative integer")
    if dtype.kind == "quantized":
        raise FormatError("a plain tensor has the storage of a quantized one")
    held = storage.numel if storage.dtype is None else storage.numel * storage.dtype.size
    if reach and (offset + reach) * dtype.size > held:
        raise FormatError(f"a tensor of shape {shape} reaches beyond its storage of {held} bytes")
    return TensorRef(storage, dtype, offset, shape, stride, lazy)


LAZY = ("conj", "neg")


def _lazy(metadata: Any) -> tuple[str, ...]:
    """The lazy bits of a tensor: what torch does to its values when they are used. Other names in the metadata are for other devices, and
    torch ignores them too."""
    if not metadata:
        return ()
    if type(metadata) is not PickledDict:
        raise FormatError("a tensor's metadata is no dict")
    bits = tuple(name for name in LAZY if name in metadata)
    if any(metadata[name] is not True for name in bits):  # torch uses only the name, and only writes True
        raise FormatError("a tensor's metadata says of a lazy bit something other than True")
    return bits


# Setting one of these attributes changes a tensor's values, its class, or the values of tensors that share its memory.
_REPLACING = frozenset({"data", "real", "imag", "__class__"})


def _parameter(args: tuple[Any, ...]) -> Any:
    return _as_parameter(args[0])


def _as_parameter(tensor: Any) -> Any:
    if type(tensor) is TensorRef:
        return replace(tensor, parameter=True)
    if type(tensor) is not Inert:
        raise FormatError("a Parameter is made of something other than a tensor")
    return tensor


def _parameter_with_state(args: tuple[Any, ...]) -> Any:
    tensor, _requires_grad, _hooks, state = args
    return _with_state(_as_parameter(tensor), state)


def _subclass(args: tuple[Any, ...]) -> Any:
    # torch._tensor._rebuild_from_type_v2(func, type, args, state): what `func` rebuilds, wrapped in a Tensor subclass.
    function, kind, inner, state = args
    name = kind.name if type(kind) is Global else "a tensor subclass"
    if name not in PLAIN_TENSORS or type(function) is not Global or not function.name.startswith("torch._utils."):
        if any(map(_replaces, _parts(state))):  # it would write into memory that other tensors may have too
            raise FormatError("a tensor's state replaces its values")
        return Inert(name, args)
    tensor = construct(function, inner)
    return _with_state(replace(tensor, parameter=False) if type(tensor) is TensorRef else tensor, state)


def _with_state(tensor: Any, state: Any) -> Any:
    """The tensor without the attributes in `state`, which are no weights; FormatError where setting them would change its values."""
    if any(attributes and (type(attributes) is not PickledDict or _replaces(attributes)) for attributes in _parts(state)):
        raise FormatError("a tensor's state replaces its values")
    return tensor


def _parts(state: Any) -> tuple[Any, ...]:
    """The attributes of an object's dict, and those of its slots."""
    return state if type(state) is tuple and len(state) == 2 else (state,)


def _replaces(attributes: Any) -> bool:
    return type(attributes) is PickledDict and not _REPLACING.isdisjoint(attributes)


def _dict(args: tuple[Any, ...]) -> PickledDict | Inert:
    result = PickledDict()
    if args:
        pairs = args[-1]
        if type(pairs) is PickledDict:
            result.update(pairs)
        elif type(pairs) in (list, tuple):
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise FormatError("an OrderedDict is not made of pairs")
                set_item(result, pair[0], pair[1])
        else:
            return Inert("builtins.dict", args)
    return result


def _counter(args: tuple[Any, ...]) -> PickledDict | Inert:
    # Counter(iterable) counts the members, also where these are pairs; Counter(dict) copies the dict.
    return _dict(args) if not args or type(args[-1]) is PickledDict else Inert("collections.Counter", args)


def _size(args: tuple[Any, ...]) -> tuple[Any, ...] | Inert:
    (numbers,) = args or ((),)
    if type(numbers) not in (list, tuple) or any(type(number) is not int for number in numbers):
        return Inert("torch.Size", args)
    return tuple(numbers)


def _opaque(what: str) -> Callable[[tuple[Any, ...]], Opaque]:
    return lambda _args: Opaque(what)


def _encode(args: tuple[Any, ...]) -> Encoded:
    # Python imports any other codec by its name, and a codec need not return bytes.
    text, codec = args
    if type(text) is not str or type(codec) is not str or codec not in CODECS:
        found = f"the codec {codec[:40]!r}" if type(codec) is str else "something other than text"
        raise UnsafeError(f"the pickle encodes by {found}, where Python's pickle writes bytes by {' or '.join(CODECS)}")
    if not text.isascii():
        text.encode(codec)  # raises for text that the codec can't encode, as Python does
    return Encoded(text, codec)


_SCALARS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    dtype, data = args[0], args[1] if len(args) > 1 else b""
    raw = data.raw if type(data) is Encoded and len(data.text) <= 16 else data
    form = _SCALARS.get(dtype.code) if type(dtype) is NumpyDType else None
    if form is None or type(raw) is not bytes or len(raw) != struct.calcsize(form):
        return Inert("numpy scalar", args)
    return struct.unpack((">" if dtype.byteorder == ">" else "<") + form, raw)[0]


def _numpy_array(_args: tuple[Any, ...]) -> NumpyArray:
    return NumpyArray()


def _numpy_buffer(args: tuple[Any, ...]) -> NumpyArray:
    return NumpyArray(args[2] if len(args) > 2 else ())


# By name: the function that builds the value, and why that is harmless.
ALLOWED: dict[str, tuple[Callable[[tuple[Any, ...]], Any], str]] = {
    "collections.OrderedDict": (_dict, "the state_dict itself"),
    "collections.defaultdict": (lambda args: _dict(args[1:]), "a plain dict; its factory is never called"),
    "collections.Counter": (_counter, "a plain dict (training loops keep counts)"),
    "builtins.dict": (_dict, "a plain dict"),
    "builtins.set": (_opaque("a set"), "a plain container; its members are left alone"),
    "builtins.frozenset": (_opaque("a set"), "a plain container; its members are left alone"),
    "builtins.complex": (lambda args: complex(*map(float, args[:2])), "a number"),
    "torch._utils._rebuild_tensor": (_tensor_v2, "a tensor over a storage (before torch 0.4)"),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, "a tensor over a typed storage"),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, "a tensor over an untyped storage"),
    "torch._utils._rebuild_parameter": (_parameter, "a Parameter is its tensor"),
    "torch._utils._rebuild_parameter_with_state": (_parameter_with_state, "a Parameter is its tensor"),
    "torch._tensor._rebuild_from_type_v2": (_subclass, "a tensor with attributes"),
    "torch.nn.parameter.Parameter": (_parameter, "a Parameter is its tensor (before torch 0.4)"),
    "torch.Size": (_size, "a tuple of integers"),
    "torch.device": (_opaque("a device"), "the name of a device"),
    "torch.serialization._get_layout": (_opaque("a memory layout"), "the name of a memory layout"),
    "_codecs.encode": (_encode, "how protocol 2 spells bytes, by one of two codecs that are built in"),
    "numpy.dtype": (lambda args: NumpyDType(args[0] if type(args[0]) is str else "?"), "the name of a dtype"),
    "numpy.core.multiarray.scalar": (_numpy_scalar, "a number"),
    "numpy._core.multiarray.scalar": (_numpy_scalar, "a number"),
    "numpy.core.multiarray._reconstruct": (_numpy_array, "an array; its bytes are left alone"),
    "numpy._core.multiarray._reconstruct": (_numpy_array, "an array; its bytes are left alone"),
    "numpy._core.numeric._frombuffer": (_numpy_buffer, "an array; its bytes are left alone"),
    "numpy.core.numeric._frombuffer": (_numpy_buffer, "an array; its bytes are left alone"),
}
# NEWOBJ may create those that are classes. It does not call `__init__`, so some of them are empty at first.
FILLED_LATER = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict", "builtins.set"})
CLASSES = FILLED_LATER | {
    "builtins.frozenset", "builtins.complex", "torch.nn.parameter.Parameter", "torch.Size", "torch.device", "numpy.dtype",
}  # fmt: skip
CODECS = ("latin1", "utf-8")
# Names that are arguments of the above, and are never called.
PLAIN_TENSORS = frozenset({"torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Buffer"})
NAMED_ONLY = PLAIN_TENSORS | {"numpy.ndarray"}
# Old spellings: Python 2's module names, and torch modules that moved (as torch.load itself maps them).
RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_BY_STORAGE_CLASS = BY_STORAGE_CLASS | QUANTIZED
UNTYPED = ("UntypedStorage", "_UntypedStorage")


def resolve(module: str, name: str) -> tuple[Any, bool]:
    """The value for the global `module.name`, and whether it is on the allow-list."""
    if len(module) + len(name) > (most := allowed("global-characters")):
        raise exceeded("global-characters", f"a pickle names a global of more than {most} characters", len(module) + len(name))
    module = RENAMED_MODULES.get(module, module)
    if module in STORAGE_MODULES:
        if name in UNTYPED:
            return StorageClass(None), True
        if name in _BY_STORAGE_CLASS:
            return StorageClass(_BY_STORAGE_CLASS[name]), True
        if module == "torch" and name in BY_TORCH:
            return BY_TORCH[name], True
    full = f"{module}.{name}"
    return Global(full), full in ALLOWED or full in NAMED_ONLY


def construct(function: Any, args: Any) -> Any:
    """The value of a call of `function` with `args`: one of the allow-list's values, or an `Inert` stand-in."""
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


def create(kind: Any, args: Any) -> Any:
    """The value that NEWOBJ makes of the class `kind`: an object from `__new__`, without `__init__`."""
    if type(kind) is Global and kind.name in ALLOWED and type(args) is tuple:
        if kind.name not in CLASSES:
            return Inert(kind.name, args)
        args = () if kind.name in FILLED_LATER else args
    return construct(kind, args)


def describe(value: Any) -> str:
    """A value of the machine in a few words that are safe to show."""
    if type(value) in (Inert, Global):
        return str(value.name)
    if type(value) is Opaque:
        return value.what
    return "a value of type " + type(value).__name__


SCALARS = (str, int, float, bool, type(None), bytes)
OTHER_KEYS = (Inert, Global, DType, TensorRef, Encoded, TupleKey, Opaque)


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """`target[key] = value`, for a key that can be hashed cheaply and is not there yet."""
    kind = type(key)
    if kind is tuple:
        key = TupleKey(key_text(key))
    elif kind is int and not -MAX_INT <= key <= 2 * MAX_INT:
        raise FormatError("a dict in the pickle has an integer key of more than 64 bits")  # many keys of one hash would make it very slow
    elif kind not in SCALARS and kind not in OTHER_KEYS:
        raise FormatError(f"a dict in the pickle has a key of type {kind.__name__}")
    if key in target:
        raise FormatError("a dict in the pickle has a key twice", key=key_text(key)[:200])
    target[key] = value


def set_items(target: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
    """`set_item` for each key and value of two lists; all at once where the keys are texts, as nearly always."""
    if set(map(type, keys)) == {str} and len(set(keys)) == len(keys) and target.keys().isdisjoint(keys):
        target.update(zip(keys, values, strict=True))
    else:
        for key, value in zip(keys, values, strict=True):
            set_item(target, key, value)


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
