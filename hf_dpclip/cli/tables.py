"""Tables of names and values: framed in a terminal, plain where another program reads."""

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
        # As it is: square brackets in values are no markup.
        table.add_row(*row)
    Console(markup=False).print(table)
