import json
import logging

from services.common.logging import JsonFormatter, enter_request


def test_a_record_is_one_json_line_with_its_extras_and_request_id() -> None:
    enter_request({"x-request-id": "r-9"})
    record = logging.makeLogRecord(
        {"name": "x", "levelname": "INFO", "msg": "two\nlines %s", "args": ("a",), "status": 200}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["msg"] == "two\nlines a"
    assert parsed["status"] == 200
    assert parsed["request_id"] == "r-9"
