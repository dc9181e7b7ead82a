"""Errors that a user can fix: their message names the argument, its value and what to do.

The command line prints them as one line and ends with code 2. Any other exception is a defect of ours (or of a library) and keeps its traceback.
"""


class UserError(ValueError):
    """An argument, a file or a model cannot be used as it is.

    `argument`: the argument's name at the beginning of the message, where callers may know it by another name (`called`).
    """

    def __init__(self, message: str = "", argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument

    def called(self, name: str) -> "UserError":
        """The same error, about an argument of another name."""
        return type(self)(name + str(self).removeprefix(self.argument), name)


class UserTypeError(UserError, TypeError):
    """An argument has the wrong type."""


class UserFileError(UserError, FileNotFoundError):
    """An argument names a file or directory that does not exist or cannot be read."""


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise for a setting that is none of these."""
    if value not in choices:
        raise UserError(f"{name}={value!r}: pass one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    """Raise for a setting that is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name}={value!r}: pass a number of at least {low:g}" + (f" and at most {high:g}" if high < float("inf") else ""))


def check_count(name: str, value: object, least: int, optional: bool = False) -> None:
    """Raise for a setting that is no whole number of at least `least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: pass an integer of at least {least}{' or None' if optional else ''}")


def check_flag(name: str, value: object) -> None:
    """Raise for a setting that is neither True nor False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: pass True or False")
