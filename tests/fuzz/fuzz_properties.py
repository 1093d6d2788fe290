"""What hypothesis draws, and how a broken contract is told apart from another: shared by the tests and the longer runs."""

from __future__ import annotations

import traceback
from pathlib import Path
from random import Random

from fuzz_contracts import CONTRACTS
from fuzz_mutators import MUTATORS
from fuzz_seeds import READERS
from hypothesis import strategies as st

HERE = Path(__file__).parent
PRODUCT = "/ckptsurgeon/"


@st.composite
def mutated(draw: st.DrawFn, reader: str) -> bytes:
    """A seed of that reader, changed some times."""
    seeds = READERS[reader]()
    data = seeds[draw(st.sampled_from(sorted(seeds)))]
    random: Random = draw(st.randoms(use_true_random=False))
    for _ in range(draw(st.integers(1, 4))):
        data = MUTATORS[reader](random, data)
    return data


def broken(reader: str, data: bytes, folder: Path) -> BaseException | None:
    """What breaks the reader's contract, if anything does; a person's Ctrl-C goes on."""
    try:
        CONTRACTS[reader](data, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 whatever it is, it is a finding
        return error
    return None


def place(error: BaseException) -> str:
    """Where it broke, so that each fault is kept once: the error's kind and the product's innermost line, else its words."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PRODUCT in frame.filename and "/tests/" not in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else str(error)[:60]
    return f"{type(error).__name__} {where}"
