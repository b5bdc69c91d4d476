"""The error that is shown to users as one sentence, and a one-line form of other errors."""


class UserError(ValueError):
    """A mistake that a user can make and fix; the message contains the value and how to fix it."""


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    message = str(error.msg if isinstance(error, SyntaxError) else error)  # without its place
    return f"{type(error).__name__}: {message.strip().partition(chr(10))[0]}".removesuffix(": ")
