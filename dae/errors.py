"""The one error that a user can mend, and two helpers for lines that a user reads."""


class InputError(Exception):
    """What the user gave cannot be used. One line: the file or flag, and what to do."""


def one_line(error: BaseException, most: int = 120) -> str:
    """The message of another library's error, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def counted(number: int, noun: str) -> str:
    """2, "case" -> "2 cases"."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
