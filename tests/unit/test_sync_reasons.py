"""The reasons for a worker's state, and the guide that explains them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvindex.sync.reasons import Reason

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "operating.md"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_the_guide_has_every_reason_under_its_state(reason):
    """The texts must be equal, with dots in place of the facts."""
    section = GUIDE.read_text().partition(f"\n## A pod is {reason.state}\n")[2].partition("\n## ")[0]
    reasons = " ; ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    assert re.sub(r"\{\w+\}", "...", reason.template) in reasons
