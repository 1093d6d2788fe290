"""A checkpoint as the target's library reads it: its tensors under the target's keys, those that are cut, joined or turned without data.

What `verify` and `check --against` hold against a target. Names, shapes and dtypes only.
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
    """A checkpoint as it is read.

    Attributes:
        checkpoint: its tensors by the names that they are read under.
        names: by such a name, the file's own, for those that are read as they are.
        converted: what the library does with the file's names; nothing where all are taken as they are.
        naming: whose words these are; None where all names are taken as they are.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str] = field(default_factory=dict)
    converted: Converted = NOTHING
    naming: Naming | None = None

    def forgiven(self, findings: Iterable[Finding]) -> list[Finding]:
        """Findings, without the errors for keys that the library does not miss."""
        naming = self.naming
        if naming is None:
            return list(findings)
        return [
            replace(found, message=f"{found.message}; {naming.library} does not ask for it", level="note")
            if found.code == "missing" and found.key is not None and naming.may_lack(found.key)
            else found
            for found in findings
        ]

    def notes(self) -> list[Finding]:
        """That the library's conversions were followed, and which could not be."""
        if self.naming is None:
            return []
        found = self.converted
        words = conversions_in_words(self.naming.library, len(found.renamed), len(found.made), len(found.ignored))
        return [Finding("conversions", words, None, "note"), *not_converted(self.naming.library, found.refused)]


def read_by_library(source: Checkpoint, target: Checkpoint) -> AsRead:
    """A checkpoint as the target's library reads it; as it is where the target has none, or where the library would change nothing."""
    naming = target.naming
    if naming is None or same_names(source, target):
        return AsRead(source)
    found = naming.convert({key: tensor.shape for key, tensor in source.items()})
    if found == NOTHING:
        return AsRead(source)
    parts = {name for made in found.made.values() for name in made.names}
    names = {found.renamed.get(key, key): key for key in source if key not in parts and key not in found.ignored}
    tensors = {name: source[key] for name, key in names.items()}
    for key, made in found.made.items():
        dtypes = {source[name].dtype for name in made.names}
        dtype = dtypes.pop() if len(dtypes) == 1 else target[key].dtype
        tensors[key] = TensorMeta(key, dtype, made.shape, contiguous_stride(made.shape))
    return AsRead(replace(source, tensors=tensors, ties=()), names, found, naming)
