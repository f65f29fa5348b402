"""Progress of what is done in stages that cannot be counted within."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def stages(total: int) -> Iterator[Callable[[str], object]]:
    """A progress bar, and what is to be called at the beginning of each of its ``total`` stages, with its name."""
    begun = iter(range(total))
    with tqdm(total=total, unit="stage", dynamic_ncols=True) as bar:

        def begin(what: str) -> None:
            bar.update(next(begun) - bar.n)
            bar.set_description(what)

        yield begin
        bar.update(total - bar.n)
