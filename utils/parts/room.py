"""Building what a file asks for without letting it take the machine: options are checked, and so is every allocation, beforehand."""

import inspect
import json
import math
import types
import typing

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils import CompanionError

LARGEST_TENSOR = 2**24  # numbers; larger ones only in a file that stores as many
MOST = 2**32  # for any whole number among the options: seeds have 32 bits
PASSES = ("unrolled", "max_iterations", "iterations", "cycles", "rounds", "max_steps", "num_ffns", "highways")
MOST_PASSES = 10_000


class RoomError(CompanionError):
    """A file asks for more than its tensors could fill."""


class Room(TorchDispatchMode):
    """Inside the block no tensor larger than `largest` is made, no more than `total` numbers by factories, in at most `calls` calls.

    What is asked for is seen before it is allocated. Raises RoomError.
    """

    def __init__(self, largest: int, total: int, calls: int):
        super().__init__()
        self.largest, self.total, self.calls = largest, total, calls

    @classmethod
    def of(cls, declared: int, tensors: int) -> "Room":
        """Room for the parts of a file that stores so many numbers in so many tensors."""
        return cls(max(LARGEST_TENSOR, declared), 2 * declared + 2**22, 2000 + 100 * tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See what a call will allocate, and then call."""
        factory, size = asked(func, args)
        self.calls -= 1
        self.total -= size if factory else 0
        if size > self.largest or self.total < 0 or self.calls < 0:
            raise RoomError("the options of a part ask for more memory or work than the tensors of the file could fill")
        return func(*args, **(kwargs or {}))


def asked(func, args: tuple) -> tuple[bool, int]:
    """Whether a call is a factory, and how many numbers it allocates, seen from its arguments."""
    name = func.overloadpacket.__name__
    numbers = [arg for arg in args if type(arg) in (int, float)]
    lists = [arg for arg in args if isinstance(arg, list | tuple) and all(type(n) is int for n in arg)]
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if name == "repeat":
        return False, tensors[0].numel() * math.prod(lists[0])
    if name == "arange":
        return True, int(max((abs(n) for n in numbers), default=0))
    if name == "eye":
        return True, int(numbers[0] * numbers[-1])
    if lists and (not tensors or name.startswith("new_")):
        return True, math.prod(lists[0])
    try:
        return False, math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:  # no element-wise call
        return False, 0


# --- options --------------------------------------------------------------------------------------------------------


def check_options(made: type, options: object, what: str) -> None:
    """Raise CompanionError unless these are JSON values of sensible size and of the types that the constructors say."""
    if not isinstance(options, dict):
        raise CompanionError(f"options of {what}: no table")
    known = hints(made)
    for name, value in options.items():
        _check_value(value, f"option {name!r} of {what}")
        if not fits(value, known.get(name, inspect.Parameter.empty)):
            raise CompanionError(f"option {name!r} of {what} cannot be {str(value)[:40]!r}")
        if name in PASSES and type(value) is int and value > MOST_PASSES:
            raise CompanionError(f"option {name!r} of {what} must be at most {MOST_PASSES}, got {value}")


def hints(made: type) -> dict[str, object]:
    """Name -> type of every option, from the constructors of a part and of those that it inherits from."""
    constructors = [
        base.__init__ for base in reversed(made.__mro__) if base.__module__.startswith("utils.") and "__init__" in vars(base)
    ]
    return {name: parameter.annotation for one in constructors for name, parameter in inspect.signature(one).parameters.items()}


def fits(value: object, hint: object) -> bool:
    """Whether a JSON value is of that type: a list where a sequence is asked for, no true for a 1; whole numbers are numbers, too."""
    if hint is inspect.Parameter.empty:
        return True
    if hint is float:
        return type(value) in (int, float)
    if typing.is_typeddict(hint):
        named = typing.get_type_hints(hint)
        return isinstance(value, dict) and set(value) == set(named) and all(fits(value[name], named[name]) for name in named)
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if inner:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    return type(value) is hint


def _check_value(value: object, what: str, depth: int = 0) -> None:
    if isinstance(value, dict | list | tuple):
        if depth == 3 or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
            raise CompanionError(f"{what} is nested too deeply, or not named by texts")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_value(inner, what, depth + 1)
    elif type(value) is int:
        if abs(value) >= MOST:
            raise CompanionError(f"{what} must lie below 2^32, got {str(value)[:20]}")
    elif type(value) is float:
        if not math.isfinite(value):
            raise CompanionError(f"{what} is {value}")
    elif not (value is None or isinstance(value, bool | str)):
        raise CompanionError(f"{what} is no JSON value, but a {type(value).__name__}")


def check_came_back(given: dict, made: dict, what: str) -> None:
    """Raise CompanionError unless a part says of itself what it was made from: 1 is not 1.0, and neither is true."""
    for name, value in given.items():
        if name not in made or canonical(made[name]) != canonical(value):
            raise CompanionError(f"option {name!r} of {what} cannot be {str(value)[:40]}")


def canonical(value: object) -> str:
    """JSON with sorted names."""
    return json.dumps(value, sort_keys=True)
