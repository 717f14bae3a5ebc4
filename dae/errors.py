"""The one error that a user can mend."""


class InputError(Exception):
    """What the user gave cannot be used. One line: the file or flag, and what to do."""


def one_line(error: BaseException, most: int = 120) -> str:
    """The message of another library's error, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__
