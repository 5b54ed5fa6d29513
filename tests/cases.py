"""Many cases in one launch of ranks: a failure says which case it was."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def case(name: object) -> Iterator[None]:
    """Note the case in whatever is raised inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in case {name}")
        raise
