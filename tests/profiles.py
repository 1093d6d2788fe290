"""How many examples hypothesis tries: the profiles `dev`, `ci` and `long`, and `examples(n)` for a test that names its own number.

`ci` tries the same examples in every run, so that a failure there can be repeated; it is the profile where CI is set (GitHub sets it), and
`.ci/run` names it. Elsewhere it is `dev`: a quarter as many, others in every run. `HYPOTHESIS_PROFILE=long pytest tests/rules` tries twenty
times as many as `ci`.
"""

from __future__ import annotations

import os

from hypothesis import settings

USUAL = 100  # hypothesis' own number, against which a profile's is a factor
FEWEST = 10  # of which no factor leaves less

settings.register_profile("dev", deadline=None, max_examples=USUAL // 4)
settings.register_profile("ci", deadline=None, max_examples=USUAL, derandomize=True, database=None, print_blob=True)
settings.register_profile("long", deadline=None, max_examples=20 * USUAL)


def load() -> None:
    """Load the profile that the environment names."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def examples(number: int) -> int:
    """As many examples as the profile makes of `number`: `@settings(max_examples=examples(400))`."""
    return max(min(number, FEWEST), number * settings.default.max_examples // USUAL)
