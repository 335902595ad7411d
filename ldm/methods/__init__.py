"""What can be learned: one file for each method.

`METHODS` says how the tensors of a concept are checked where they enter, by the name of the method: a function of
{name: tensor} that raises `ValueError` with a sentence that is read on after the file's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ldm.methods import prospect

METHODS: dict[str, Callable[[Mapping[str, Tensor]], None]] = {
    "prospect": prospect.check_tensors,
    "textual-inversion": prospect.check_tensors,
}
