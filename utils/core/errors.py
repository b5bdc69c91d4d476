"""The one error that a user is shown as a sentence, and other errors on one line."""


class UserError(ValueError):
    """A mistake that a user can make and fix; the message names the value and the way out."""


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    message = str(error.msg if isinstance(error, SyntaxError) else error)  # without its place
    return f"{type(error).__name__}: {message.strip().partition(chr(10))[0]}".removesuffix(": ")
