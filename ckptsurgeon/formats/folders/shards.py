"""How a checkpoint is cut into shards, and what a folder of them is called, as Hugging Face's libraries do both. Pure.

Tensors are taken in their order, until the next one would make the shard larger than it may be; one tensor is never cut, and one that is
larger than a shard has a file of its own. Tied tensors are in one file, with the first of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from ckptsurgeon.formats.layout import OutTensor

USUAL_SIZE = 5 * 10**9  # of huggingface_hub
INDEX = ".index.json"
_OURS = re.compile(
    r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?|\.metadata|ckptsurgeon\.json|__\d+_\d+\.distcp"
)


def split(
    tensors: Sequence[OutTensor], most: int, tied: Callable[[OutTensor], Iterable[Hashable]], written_once: bool
) -> list[list[OutTensor]]:
    """Tensors as shards of at most `most` bytes, in order.

    Args:
        tied: returns what ties a tensor: tensors that have one of these values in common are in one file.
        written_once: whether tensors of one storage are written once; else each of them counts.

    >>> a, b, c = (OutTensor(name, "U8", (size,), number) for number, (name, size) in enumerate([("a", 6), ("b", 2), ("c", 20)]))
    >>> [[tensor.name for tensor in shard] for shard in split([a, c, b], 8, lambda tensor: [tensor.storage], False)]
    [['c'], ['a', 'b']]
    """
    shards: list[list[OutTensor]] = []
    current: list[OutTensor] = []
    size = 0
    for group in _groups(tensors, tied):
        own = {tensor.storage: tensor for tensor in group}.values() if written_once else group
        nbytes = sum(tensor.nbytes for tensor in own)
        if nbytes > most:
            shards.append(group)
            continue
        if current and size + nbytes > most:
            shards.append(current)
            current, size = [], 0
        current += group
        size += nbytes
    return [*shards, current] if current or not shards else shards


def _groups(tensors: Sequence[OutTensor], tied: Callable[[OutTensor], Iterable[Hashable]]) -> list[list[OutTensor]]:
    """Groups of tied tensors, in the order of the first tensor of each group."""
    number_of: dict[Hashable, int] = {}
    groups: dict[int, list[OutTensor]] = {}
    for number, tensor in enumerate(tensors):
        marks = list(tied(tensor))
        known = sorted({number_of[mark] for mark in marks if mark in number_of})
        kept = known[0] if known else number
        group = groups.setdefault(kept, [])
        for joined in known[1:]:
            group += groups.pop(joined)
            number_of.update({mark: kept for mark, own in number_of.items() if own == joined})
        group.append(tensor)
        number_of.update(dict.fromkeys(marks, kept))
    return list(groups.values())


def file_name(pattern: str, number: int, count: int) -> str:
    """What a shard is called; `number` counts from 0.

    >>> file_name("model{}.safetensors", 0, 3), file_name("model{}.safetensors", 0, 1)
    ('model-00001-of-00003.safetensors', 'model.safetensors')
    """
    return pattern.format(f"-{number + 1:05d}-of-{count:05d}" if count > 1 else "")


def index_text(weight_map: Mapping[str, str], total_size: int) -> str:
    """The index of several shards: which file each key is in."""
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint as this program writes it into a folder.

    >>> is_checkpoint_file("model-00001-of-00002.safetensors"), is_checkpoint_file(".metadata"), is_checkpoint_file("config.json")
    (True, True, False)
    """
    return _OURS.fullmatch(name) is not None
