"""On which GPUs a target's kernels have run: what may be said of it.

``runs.json`` has a list for each target: the cards, and the commit and date of the run. ``python
benchmarks/first_hour.py --accept FILE`` adds to it from a file that a user sent, if everything in that passed.
"""

import json
import pathlib
from typing import TypedDict

FILE = pathlib.Path(__file__).with_name("runs.json")

NEVER_RUN = "compiled and emulated, never run on such a GPU"
"""All that may be said of a target without a run."""


class Run(TypedDict):
    """One run that passed: name of the card, commit of the sources, and the day."""

    card: str
    commit: str
    date: str


def runs_of(target: str) -> list[Run]:
    """The recorded runs of a target's kernels; none: :data:`NEVER_RUN`."""
    return json.loads(FILE.read_text()).get(target, [])
