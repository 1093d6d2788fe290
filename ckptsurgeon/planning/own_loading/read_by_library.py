"""A checkpoint as the target's library reads it: the tensors have the target's keys; those that the library cuts or joins have no data.

`verify` and `check --against` compare it with the target. Names, shapes and dtypes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ckptsurgeon.loading import Converted, Naming
from ckptsurgeon.planning.own_loading.conversions import conversions_in_words, not_converted, same_names
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride

NOTHING = Converted()


@dataclass(frozen=True)
class AsRead:
    """A checkpoint as a library reads it.

    Attributes:
        checkpoint: the tensors, by the names that the library gives them.
        names: by such a name, the file's own name, for tensors that the library only renames.
        converted: what the library does with the file's names; empty where it changes nothing.
        naming: the library's conversions; None where it changes nothing.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str] = field(default_factory=dict)
    converted: Converted = NOTHING
    naming: Naming | None = None

    def forgiven(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings; errors for missing keys that the library does not require become notes."""
        naming = self.naming
        if naming is None:
            return list(findings)
        return [
            replace(finding, message=f"{finding.message}; {naming.library} does not ask for it", level="note")
            if finding.code == "missing" and finding.key is not None and naming.may_lack(finding.key)
            else finding
            for finding in findings
        ]

    def notes(self) -> list[Finding]:
        """A note that the library's conversions were applied, and errors for those that could not be."""
        if self.naming is None:
            return []
        done = self.converted
        words = conversions_in_words(self.naming.library, len(done.renamed), len(done.made), len(done.ignored))
        return [Finding("conversions", words, None, "note"), *not_converted(self.naming.library, done.refused)]


def read_by_library(source: Checkpoint, target: Checkpoint) -> AsRead:
    """A checkpoint as the target's library reads it; unchanged where the target has no library, or where the library changes nothing."""
    naming = target.naming
    if naming is None or same_names(source, target):
        return AsRead(source)
    conversion = naming.convert({key: tensor.shape for key, tensor in source.items()})
    if conversion == NOTHING:
        return AsRead(source)
    parts = {name for made in conversion.made.values() for name in made.names}
    names = {conversion.renamed.get(key, key): key for key in source if key not in parts and key not in conversion.ignored}
    tensors = {name: source[key] for name, key in names.items()}
    for key, made in conversion.made.items():
        dtypes = {source[name].dtype for name in made.names}
        dtype = dtypes.pop() if len(dtypes) == 1 else target[key].dtype
        tensors[key] = TensorMeta(key, dtype, made.shape, contiguous_stride(made.shape))
    return AsRead(replace(source, tensors=tensors, ties=()), names, conversion, naming)
