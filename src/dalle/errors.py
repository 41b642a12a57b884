"""The one exception that means "the user can fix this": entry points print it as one line and exit with 1."""


class UserError(Exception):
    """Says in one line what is wrong and what to do about it."""
