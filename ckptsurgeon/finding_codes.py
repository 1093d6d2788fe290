"""Every code that `check` reports, as data: its name, what it means, why it matters, and what to do.

A code is stable: programs and settings name it, so it never gets another meaning; a new kind of finding gets a new code. The hundreds are
the families (read, safe, fits, finite, allowed), so that a prefix such as `CK2` names a whole one. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """A kind of finding. `option` turns its check on; it is empty where the check is always done."""

    code: str
    name: str
    meaning: str
    why: str
    todo: str
    option: str = ""


TABLE: tuple[Code, ...] = (
    Code(
        "CK100",
        "unchecked",
        "The check could not be finished, for a reason that does not lie in the file.",
        "What was not checked may hold anything.",
        "Run it again when nothing writes to the file; the message says what stopped it.",
    ),
    Code(
        "CK101",
        "unreadable",
        "The file is missing, is no regular file, may not be read, or ends before its header says.",
        "Whoever loads it gets an error, at the latest when the last tensor is read.",
        "Correct the path, or copy or download the file again.",
    ),
    Code(
        "CK102",
        "malformed",
        "The bytes are no checkpoint of a known format, hold no state_dict, or contradict themselves.",
        "Two programs may see two different files in it, and most see none.",
        "Save it again by torch.save(model.state_dict(), …) or safetensors' save_file; keep what is no checkpoint away from the gate.",
    ),
    Code(
        "CK103",
        "too-costly",
        "Its header would cost more to read than a header may.",
        "A small file can be made so that reading it takes all memory or hours.",
        "Where the file is trusted, raise the limit that the message names (--limit); otherwise delete it.",
    ),
    Code(
        "CK104",
        "ambiguous-root",
        "It is not clear which of its nested dicts holds the weights, or the one named is not there.",
        "Weights and their moving average look alike, and only one of them is meant.",
        "Name it: --root model.",
    ),
    Code(
        "CK105",
        "lfs-pointer",
        "It is a Git LFS pointer: a few lines of text in the place of the file itself.",
        "The weights are not there; what was committed or downloaded is a note of where they are.",
        "git lfs install, then git lfs pull; in CI, check out with LFS.",
    ),
    Code(
        "CK106",
        "wrong-checksum",
        "The data of a tensor is not what the zip archive's own checksum says; a note where there is no checksum.",
        "Bits have flipped on a disk or on the way, and torch.load does not look.",
        "Copy or download it again, and compare with where it came from.",
        "--full",
    ),
    Code(
        "CK107",
        "not-looked-at",
        "Other files with a checkpoint's suffix stand in a Hugging Face folder beside its one checkpoint. Only a note.",
        "They were not checked, and some programs load them too.",
        "Give them by name to have them checked.",
    ),
    Code(
        "CK108",
        "one-rank",
        "The file is one rank's part of a checkpoint of several (DTensors, .distcp, ZeRO, Megatron), or a folder of them; a note where "
        "it is one of Hugging Face's shards.",
        "Its tensors are pieces: a load of one rank's file fails, or takes a part for the whole.",
        "Join the parts with the library that wrote them (the message says how), and check what that gives.",
    ),
    Code(
        "CK201",
        "unsafe",
        "The file asks for code beyond tensors and plain values: a class or function by its name. A whole pickled model does.",
        "torch.load without weights_only, and pickle.load, import and call whatever is named, which can do anything that you can.",
        "Save the state_dict alone, or take the weights out: ckptsurgeon merge net.pt -o clean.safetensors. Never load a stranger's.",
    ),
    Code(
        "CK202",
        "not-carried",
        "A value among the weights is no tensor that can be told without running code, such as a sparse tensor or an object.",
        "It is lost, or has to be run, wherever the weights go.",
        "Save it as a plain dense tensor, or outside the state_dict.",
    ),
    Code(
        "CK203",
        "quantised",
        "A weight is held as codes, and means something only together with the scales beside it. Only a note.",
        "Whoever casts, averages or compares the codes as if they were values gets a model that answers nonsense, and no error.",
        "Load it by the library that quantised it; fp8 and int8 become values by ckptsurgeon merge net.pt -o out.pt --dequantize.",
    ),
    Code(
        "CK301",
        "missing",
        "A key of the target is not in the file, and no loading code of the target's makes it of what is there.",
        "A strict load_state_dict fails; one that is not strict leaves random weights there.",
        "ckptsurgeon diff net.pt module:Net shows whether it was renamed; merge fills it in.",
        "--against",
    ),
    Code(
        "CK302",
        "unexpected",
        "A key of the file is not in the target, and no loading code of the target's takes it.",
        "A strict load_state_dict fails; one that is not strict drops trained weights.",
        "ckptsurgeon diff net.pt module:Net shows whether it was renamed; merge --drop leaves it out.",
        "--against",
    ),
    Code(
        "CK303",
        "wrong-shape",
        "A tensor has another shape than the target's.",
        "load_state_dict fails, strict or not.",
        "Build the model with the file's sizes, or let merge adapt it: ckptsurgeon diff net.pt module:Net shows how.",
        "--against",
    ),
    Code(
        "CK304",
        "other-dtype",
        "A tensor has another dtype than the target's. A warning: it loads.",
        "load_state_dict casts it without a word, which can lose precision or overflow.",
        "Save it in the target's dtype (ckptsurgeon merge net.pt module:Net -o out.pt --dtype target), or name the expected ones: --dtype.",
        "--against",
    ),
    Code(
        "CK401",
        "not-finite",
        "A tensor has values that are NaN or infinite.",
        "The training had diverged when it was saved, and one NaN can make every output NaN.",
        "Take an earlier checkpoint. A mask that is meant to have -inf can be left out of the file, or the file ignored by its path.",
        "--finite",
    ),
    Code(
        "CK501",
        "too-large",
        "The file, or a checkpoint's files together, are larger than allowed.",
        "A repository keeps every version for ever, and hosts refuse large files.",
        "Keep it in Git LFS or outside the repository, save it in half precision, or without the optimizer's state.",
        "--max-size",
    ),
    Code(
        "CK502",
        "format",
        "The checkpoint is of a format that is not allowed here, told by its content and not by its suffix.",
        "A team that agreed on safetensors never has to ask whether a pickle is safe.",
        "Convert it: ckptsurgeon merge net.pt -o net.safetensors.",
        "--allow",
    ),
    Code(
        "CK503",
        "dtype",
        "A tensor has a dtype that is not among the expected ones.",
        "One float64 among halves doubles the memory, or breaks the kernel that expects another.",
        "Cast it: ckptsurgeon merge net.pt -o out.pt --dtype F16.",
        "--dtype",
    ),
)
BY_CODE: dict[str, Code] = {row.code: row for row in TABLE}
UNREAD = "CK1"  # the family of findings about files that can't be read


def named(words: str) -> tuple[Code, ...]:
    """The codes that match a code, the beginning of one, or a name; none where there is no such code.

    >>> [row.code for row in named("CK2")], [row.code for row in named("missing")], named("CK9")
    (['CK201', 'CK202', 'CK203'], ['CK301'], ())
    """
    text = words.strip()
    if not text.upper().startswith("CK"):
        return tuple(row for row in TABLE if row.name == text.lower())
    return tuple(row for row in TABLE if row.code.startswith(text.upper()))


def is_reported(code: str, select: Iterable[str], ignore: Iterable[str]) -> bool:
    """Whether findings of a code are reported. `select` and `ignore` are whole codes; an empty `select` means all.

    `ignore` overrides `select`. A file that can't be read is reported whatever is selected, since nothing else could be checked in it.

    >>> is_reported("CK201", ["CK501"], []), is_reported("CK102", ["CK501"], []), is_reported("CK102", [], ["CK102"])
    (False, True, False)
    """
    chosen = set(select)
    return code not in set(ignore) and (not chosen or code in chosen or code.startswith(UNREAD))
