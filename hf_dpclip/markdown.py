"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table_row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*titles: object) -> str:
    """The two lines above the rows."""
    return f"{table_row(*titles)}\n{table_row(*['---'] * len(titles))}"


def table(titles: Sequence, rows: Iterable[Sequence]) -> str:
    """A whole table."""
    return "\n".join([table_head(*titles), *(table_row(*row) for row in rows)])
