"""Arms of other makes behind the interface of every arm."""
