"""Errors that a user can mend: their message names the argument, its value and what to do.

The command line prints them as one line and ends with code 2. Any other exception is a defect of ours (or of a library) and keeps its traceback.
"""


class UserError(ValueError):
    """An argument, a file or a model is not as it has to be. `argument`: the one that the message begins with, where callers may know it by another name."""

    def __init__(self, message: str = "", argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument

    def called(self, name: str) -> "UserError":
        """The same error about an argument of this name."""
        return type(self)(name + str(self).removeprefix(self.argument), name)


class UserTypeError(UserError, TypeError):
    """An argument is of a type that is not taken."""


class UserFileError(UserError, FileNotFoundError):
    """A file or directory that an argument names is not there, or cannot be read."""
