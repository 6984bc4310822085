"""The one table from the core's errors to HTTP."""

import re
from pathlib import Path

import services.rollout
from services.common.idempotent import RequestIdError
from services.rollout.errors import ERRORS, SPECS

RAISED = re.compile(r'(?:Ledger|Generate|Weights|Transfer)Error\(\s*"(\w+)"')


def test_the_table_has_a_row_for_every_code_that_the_core_raises_and_no_other() -> None:
    (root,) = services.rollout.__path__
    sources = [path.read_text() for path in Path(root).rglob("*.py")]
    raised = {code for source in sources for code in RAISED.findall(source)}
    # Of both services: what request ids stand for.
    of_ids = {ERRORS[kind].code for kind in RequestIdError.__subclasses__()}
    # The worker returns `transfer_failed` as a value instead of raising it in one place.
    assert raised | {"transfer_failed"} | of_ids == set(SPECS)
