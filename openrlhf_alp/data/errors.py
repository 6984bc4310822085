"""Why problem sets could not be prepared; each message says what to do.

DataError
  SourceError         a file or hub dataset cannot be read
  UnknownFormatError  no format fits its rows
  TokenizerError      prompts cannot be counted in tokens
  ComparisonError     labels cannot be checked
  OutputError         the result may not be written there
"""


class DataError(Exception):
    """Nothing was prepared."""


class SourceError(DataError):
    """A source cannot be read at all. A broken row of it is not an error, it is rejected."""


class UnknownFormatError(DataError):
    """No format fits the rows; the message lists the fields found and the fields known."""


class TokenizerError(DataError):
    """There is no tokenizer, or it has no chat template for messages."""


class ComparisonError(DataError):
    """The worker processes could not be started: no fault of any label."""


class OutputError(DataError):
    """A wrong name, or files that may not be replaced."""
