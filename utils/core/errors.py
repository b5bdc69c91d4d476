"""The one error that a user is shown as a sentence."""


class UserError(ValueError):
    """A mistake that a user can make and mend; the message names the value and the way out."""
