"""Makes sure at run time that no pickle becomes an object of a class: it could name any function of any module."""

import sys


class UnpicklingRefusedError(Exception):
    """Something in this process tried to read a pickle that names a class or a function."""


def refuse_unpickling() -> None:
    """From here on, for this process and what is forked from it, and for good: an audit hook cannot be removed.

    It sees pickle in C and in Python, and so `torch.load`, joblib and NumPy's object arrays; numbers, texts and lists
    need no name and pass. `torch.load(weights_only=True)` has a reader of its own, which makes nothing but tensors.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        module, name = arguments
        raise UnpicklingRefusedError(
            f"a pickle names {module}.{name}, and this process reads none: no message, checkpoint or data file of "
            "Retort is a pickle. Find out where it comes from."
        )
