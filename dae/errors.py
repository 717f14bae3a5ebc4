"""The one error that a user can mend, and some helpers for lines that a user reads."""


class InputError(Exception):
    """What the user gave cannot be used. One line: the file or flag, and what to do.

    Names in it may be a stranger's: it is printed, logged and put on pages in printable characters.
    """

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))


def one_line(error: BaseException, most: int = 120) -> str:
    """The message of another library's error, on one line of at most so many characters."""
    return printable(" ".join(str(error).split())[:most]) or type(error).__name__


def printable(text: str) -> str:
    """The text with escapes in place of what a terminal obeys, or cannot show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """2, "case" -> "2 cases"."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
