"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input. The message is one line: what was found and where, what is accepted, and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
