"""The one exception type for mistakes a user can fix."""


class InputError(ValueError):
    """Bad input, configuration or environment.

    The message names the offending value, the limit it breaks and the remedy. Command-line entry
    points print it without a traceback and exit with status 2 (`data.cli.run`).
    """
