"""How much reading a header may cost: one table of named limits, which the user can raise. No reader has a bound of its own.

`allowed` is the current bound; `exceeded` is the error, whose hint is the option that raises the limit. A limit is checked before the work
is done or the memory is used. No limit makes reading less strict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

from ckptsurgeon import sizes
from ckptsurgeon.arguments import checked
from ckptsurgeon.errors import CheckpointError, LimitError
from ckptsurgeon.sizes import GB, MB


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit: its `name` as in `--limit name=…`, its `default`, what it `bounds`, and the `most` that it can be raised to.

    A large file may use more: with `per_byte`, this multiple of the pickle's length (of the file's, for what is deflated) is allowed where
    it is larger than the limit.
    """

    name: str
    default: int
    bounds: str
    per_byte: float = 0
    most: int = 1 << 62

    @property
    def in_bytes(self) -> bool:
        """Whether it counts bytes."""
        return self.name.endswith("bytes")


TABLE: tuple[Limit, ...] = (
    Limit("pickle-bytes", GB, "the pickle of a torch file"),
    Limit("pickle-steps", 200_000_000, "the opcodes of one pickle"),
    Limit("pickle-memo", 50_000_000, "the values that one pickle keeps to use again"),
    Limit("pickle-copies", MB, "the values that a pickle uses as arguments again and again", per_byte=1),
    Limit("integer-bytes", 4_096, "one integer of a pickle"),
    Limit("global-characters", 1000, "the name of a global that a pickle asks for"),
    Limit("nesting", 64, "containers within containers", most=150),  # some readers of nested values are recursive
    Limit("tensors", 4_000_000, "the tensors of one file, or of all shards"),
    Limit("dense-keys", 20_000, "the keys of a torch file's state_dicts (torch writes some 100 bytes for each)", per_byte=1 / 40),
    Limit("containers", 100_000, "the dicts, lists and tuples of a torch file that have values of their own", per_byte=1 / 8),
    Limit("globals", 10_000, "the names that a pickle asks for beyond the allow-list"),
    Limit("name-characters", MB, "the dotted names of all values of a torch file", per_byte=4),
    Limit("json-bytes", 100_000_000, "a safetensors header (as its own library has it), an index, a skeleton"),
    Limit("dcp-metadata-bytes", 64 * MB, "the .metadata of torch.distributed.checkpoint, some 143 for each chunk of a tensor"),
    Limit("shards", 10_000, "the files that one index names"),
    Limit("zip-entries", 4_000_000, "the entries of a zip archive"),
    Limit("zip-directory-bytes", GB // 2, "the directory of a zip archive"),
    Limit("inflated-bytes", MB, "what a deflated pickle inflates to", per_byte=1),
    Limit("view-bytes", GB, "what a tensor that repeats stored elements (stride 0) comes to, or its storage where that is more"),
    Limit("claimed-bytes", 16 * GB, "what all tensors of a file, or of all shards, come to beyond the storages they are in", per_byte=16),
    Limit("inflated-data-bytes", 16 * GB, "what all deflated storages of a file inflate to", per_byte=16),
    Limit("extra-state-bytes", 64 * MB, "one _extra_state"),
    Limit("label-bytes", 64 * MB, "a list of tokens or labels"),
    Limit("toml-bytes", MB, "a rules file, or the settings of a project"),
    Limit("toml-nesting", 32, "what such a file nests, or the parts of one dotted key", most=150),
    Limit("toml-keys", 100_000, "the keys of such a file, dotted ones part by part, and the values in its lists"),
    Limit("choices", 200_000, "what all patterns of a call, or of one rules file, have to choose from: {a,b}, {0..11}"),
    Limit("match-segments", 65, "the segments of a key that matching looks at; longer keys are left as they are", most=1000),
    Limit("match-characters", 1000, "the characters of such a key", most=100_000),
    Limit("regex-seconds", 2, "one regular expression of a rule, over all keys"),
    Limit("all-regex-seconds", 20, "all regular expressions of a call"),
    Limit("metadata-entries", 1_000_000, "the entries of torch's _metadata where it is written out"),
)
BY_NAME: Mapping[str, Limit] = MappingProxyType({limit.name: limit for limit in TABLE})
_raised: ContextVar[Mapping[str, int]] = ContextVar("ckptsurgeon-limits", default=MappingProxyType({}))


def allowed(name: str, nbytes: int = 0) -> int:
    """The current bound of a limit, for a pickle of `nbytes` bytes (or another length that it grows with)."""
    limit = BY_NAME[name]
    return max(_raised.get().get(name, limit.default), int(nbytes * limit.per_byte))


def current() -> dict[str, int]:
    """The limits that are not at their defaults, for a worker thread or process, which runs `with limits(**current())`."""
    return {name.replace("-", "_"): value for name, value in _raised.get().items()}


@checked
@contextmanager
def limits(**bounds: int | str) -> Iterator[None]:
    """Read with other limits, for the time of a `with` block: larger for a file that is trusted, or smaller.

    Args:
        bounds: limits by name (those of `--limit`, with `_`), as a number or as text such as `"2GB"`.

    Returns:
        A context manager.

    Raises:
        ArgumentError: a value is no number and no text.
        CheckpointError: there is no such limit, or the value is no amount.

    >>> from ckptsurgeon import open
    >>> with limits(pickle_bytes="2GB", tensors=10_000_000):
    ...     len(open("fixtures/net_params.pkl"))
    10
    """
    raised = dict(_bound(name.replace("_", "-"), value) for name, value in bounds.items())
    token = _raised.set(MappingProxyType({**_raised.get(), **raised}))
    try:
        yield
    finally:
        _raised.reset(token)


def _bound(name: str, value: int | str) -> tuple[str, int]:
    limit = BY_NAME.get(name)
    if limit is None:
        from ckptsurgeon.hints import close_names

        close = close_names(name, BY_NAME) if name else []
        raise CheckpointError(
            f"there is no limit {name!r}", hint=f"is it {' or '.join(close)}?" if close else f"the limits are {', '.join(BY_NAME)}"
        )
    number = sizes.parsed(value) if isinstance(value, str) else value
    if type(number) is not int or not 0 < number <= limit.most:
        largest = f" up to {limit.most}" if limit.most < 1 << 62 else ""
        hint = f"a whole number above zero{largest}, such as {shown(limit, limit.default)}"
        raise CheckpointError(f"{value!r} is no amount for the limit {name}", hint=hint)
    return name, number


def shown(limit: Limit, value: int) -> str:
    """A bound as a user writes it.

    >>> shown(BY_NAME["pickle-bytes"], 2 * 10**9), shown(BY_NAME["tensors"], 1024)
    ('2GB', '1024')
    """
    return sizes.exact(value) if limit.in_bytes else str(value)


def exceeded(name: str, reason: str, needed: int = 0, *, path: str | None = None, key: str | None = None) -> LimitError:
    """The error for an exceeded limit, with the option that allows `needed`, or four times the current bound where `needed` is not
    known."""
    limit = BY_NAME[name]
    needed = needed or allowed(name) * 4
    bound = min(_round_up(needed), limit.most)
    if bound < needed and bound <= allowed(name):
        return LimitError(reason, path=path, key=key, hint=f"this is beyond what the limit {name} can be raised to; do not trust the file")
    words = shown(limit, bound)
    python = f"with ckptsurgeon.limits({name.replace('-', '_')}={words if words.isdecimal() else repr(words)})"
    return LimitError(reason, path=path, key=key, hint=f"where the file is trusted: --limit {name}={words} (in Python: {python})")


def _round_up(number: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that is at least `number`.

    >>> _round_up(1), _round_up(30), _round_up(1001)
    (1, 50, 2000)
    """
    power = int("1" + "0" * (len(str(number)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


class Budget:
    """How much of each limit the pickle of `path`, of `nbytes` bytes, has used so far."""

    def __init__(self, path: str | None, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self.spent: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def spend(self, name: str, amount: int, words: str) -> None:
        """Add `amount` to the use of a limit; LimitError with `words`, in which `{}` is the bound, where it is exceeded."""
        spent = self.spent[name] = self.spent.get(name, 0) + amount
        most = self.most.get(name)
        if most is None:
            most = self.most[name] = allowed(name, self.nbytes)
        if spent > most:
            raise exceeded(name, words.format(f"{most:,}"), max(spent, most * 4), path=self.path)
