"""The one exception that reaches users as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can put right: the message says what was wrong, where, and what to do.

    The command line prints the message alone and exits with code 2.
    """


def nearest(name: str, known) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest entry of ``known``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
