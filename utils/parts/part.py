"""What every part answers."""

from torch import nn


class Part(nn.Module):
    """Base of all parts. `kind` is its name in `PARTS`.

    `adaptive` parts decide with the data at hand how long they work: their `macs` is the most that a pass can take.
    """

    kind: str
    adaptive = False

    def options(self) -> dict:
        """The JSON values from which the constructor builds the same structure again."""
        raise NotImplementedError

    def macs(self, length: int) -> int:
        """Multiply-adds for one sequence of `length` tokens (of the part at its place in the model)."""
        raise NotImplementedError
