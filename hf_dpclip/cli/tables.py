"""Tables of names and values: framed in a terminal, plain text anywhere else."""

import sys


def print_table(title: str, rows: dict[str, str]) -> None:
    """Prints one row per entry, aligned."""
    if sys.stdout.isatty():
        return _print_framed(title, rows)
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:{width}}  {value}")


def _print_framed(title: str, rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in rows.items():
        table.add_row(*row)
    # Values may have square brackets, which are not markup.
    Console(markup=False).print(table)
