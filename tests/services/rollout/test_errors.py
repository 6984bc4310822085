"""The one table from the core's errors to HTTP."""

import re
from pathlib import Path

import services.rollout
from services.rollout.errors import SPECS

RAISED = re.compile(r'(?:Ledger|Generate|Weights|Transfer)Error\(\s*"(\w+)"')


def test_the_table_has_a_row_for_every_code_that_the_core_raises_and_no_other() -> None:
    (root,) = services.rollout.__path__
    sources = [path.read_text() for path in Path(root).rglob("*.py")]
    raised = {code for source in sources for code in RAISED.findall(source)}
    # The worker returns `transfer_failed` as a value instead of raising it in one place.
    assert raised | {"transfer_failed"} == set(SPECS)
