"""A sandboxed Jinja environment in which every render has a budget: of loop turns, calls, characters and time.

    class Budgeted     the base of both environments: tracked text (sandbox.py) and plain text (jinja.py)

Nothing that a template does may take long or fill the memory, however hostile it is. What is made is paid for by its
size, and before it is made where one step can make anything (limits.py). What is compared, hashed or printed is walked
first: a list that holds the same list twice, and so on thirty times, has a billion items for `==` and thirty for
everyone else.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.data.chat_template.sandbox_checks import CHECKS, check_method, check_size
from tunesmith.data.chat_template.tracked_str import MAX_CHARS, LostOrigin, TooLarge

MAX_WORK = 1_000_000  # loop turns, calls, list items, and CHARS_PER_TICK characters each
CHARS_PER_TICK = 100
MAX_SECONDS = 10.0
BETWEEN_CHECKS = 100  # of the limits, in work
REMEMBERED = 1_000  # attributes known to be safe, or not
CONTAINERS = (list, tuple, dict)

# Filters that templates may use. FREE ones do not look into what they are given; LISTED ones get a list, no iterator.
FREE = frozenset(
    re.findall(
        r"[+\w]+", "length count first last list items map select selectattr reject rejectattr d default reverse attr +"
    )
)
USABLE = FREE - {"+"} | set(
    re.findall(
        r"\w+",
        "abs float int max min unique wordcount sort groupby dictsort string safe trim upper lower capitalize title"
        " replace join indent format tojson",
    )
)
LISTED = frozenset({"join", "list", "max", "min", "sort", "unique", "groupby"})

# Attributes whose result has no origin, or that build things of any size.
_CLOSED = {
    str: {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode", "format_map"},
    int: set(dir(int)),
    float: set(dir(float)),
    bytes: set(dir(bytes)),
}
_OF_A_DICT = frozenset(dir(dict))


class NoFolding(CodeGenerator):
    """Nothing is computed while a template is compiled: no budget would bound it."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class Budgeted(ImmutableSandboxedEnvironment):
    code_generator_class = NoFolding
    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(
        self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]], **settings: Any
    ) -> None:
        """`filters` that templates may use; they are guarded here, and the tests too. `functions` that they know."""
        super().__init__(**settings)
        refused = {name: _refusal(f"the filter {name!r}") for name in FILTERS}
        self.filters = refused | {name: self._guarded(name, make) for name, make in filters.items()}
        self.filters |= {"tick": self._ticked, "walk": self.walked, "sum": self._sum}
        self.tests = {name: self._guarded_test(test) for name, test in self.tests.items()}
        self.globals["lipsum"] = _refusal("lipsum()")
        self.globals |= functions
        self.known = tuple(self.globals.values())
        self.functions = {type(known) for known in self.known}
        self._safe: set[tuple[type, str]] = set()
        self.start_budget()

    def start_budget(self) -> None:
        self.work, self.checked, self.deadline = 0, 0, time.monotonic() + MAX_SECONDS

    def tick(self, work: int = 1) -> None:
        self.work += work
        if self.work > self.checked:
            self._check()

    def _check(self) -> None:
        self.checked = self.work + BETWEEN_CHECKS
        if self.work > MAX_WORK:
            raise TooLarge(f"more than {MAX_WORK} loop turns, calls and list items")
        if time.monotonic() > self.deadline:
            raise TooLarge(f"a render of more than {MAX_SECONDS:.0f} seconds")

    def charge(self, made: Any) -> Any:
        """Give back what was made, after paying for its size: what a render can hold stays bounded."""
        if isinstance(made, str):
            self.work += 1 + len(made) // CHARS_PER_TICK
        else:
            self.work += 1 + len(made) if isinstance(made, CONTAINERS) else 1
        if self.work > self.checked:
            self._check()
        return made

    def walked(self, value: Any) -> Any:
        """Give back a value after paying for all that it holds, as often as it holds it."""
        if isinstance(value, CONTAINERS):
            todo: list[Any] = [value]
            while todo:
                item = todo.pop()
                inside = [*item, *item.values()] if isinstance(item, dict) else item
                self.tick(1 + len(inside) + sum(len(i) for i in inside if isinstance(i, str)) // CHARS_PER_TICK)
                todo += [inner for inner in inside if isinstance(inner, CONTAINERS)]
        return value

    def bounded(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of an output, none too many."""
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_CHARS:
                raise TooLarge(f"an output of more than {MAX_CHARS} characters")
            yield piece

    # ---- filters and tests

    def _guarded(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays before for what it looks at, and after for what it has made."""
        skipped = 1 if hasattr(make, "jinja_pass_arg") else 0  # a context, or the environment
        check, free, listed = CHECKS.get(name), name in FREE, name in LISTED

        @functools.wraps(make)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value = args[skipped]
            if listed and not isinstance(value, (*CONTAINERS, str)):
                value = self.charge(list(value))
                args = (*args[:skipped], value, *args[skipped + 1 :])
            if not free:
                for given in (*args[skipped:], *kwargs.values()):
                    self.walked(given)
            if check is not None:
                check(*args[skipped:], **kwargs)
            return self.charge(make(*args, **kwargs))

        return guarded

    def _guarded_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, CONTAINERS):
                    self.walked(value)
            return test(*args, **kwargs)

        return guarded

    def _ticked(self, value: Any) -> Any:
        return self.charge(value)

    def _sum(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            raise LostOrigin("sum with an attribute")
        for value in values:
            start = self.charge(self.charge(start) + value)
        return start

    # ---- what the sandbox asks

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        check_size(operator, left, right)
        return self.charge(self.binop(operator, left, self.walked(right) if operator == "%" else right))

    def binop(self, operator: str, left: Any, right: Any) -> Any:
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is not Macro:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                check_method(owner, __obj.__name__, args)
            for value in (owner if isinstance(owner, (list, tuple)) else None, *args, *kwargs.values()):
                if isinstance(value, CONTAINERS):
                    __self.walked(value)
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `map`
        self.tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `select` and `reject`
        self.tick()
        return super().call_test(*args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(self._open(obj), self.walked(argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_A_DICT:  # a field of a message: quickly what jinja does slowly
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(self._open(obj), attribute)

    def _open(self, obj: Any) -> Any:
        """The functions that every template knows are for calling; what else they have is Python's."""
        if type(obj) in self.functions and any(obj is known for known in self.known):
            raise SecurityError("the attributes of a function are closed")
        return obj

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        place = type(obj), attr  # all that the answer depends on, which it takes long to find
        if place not in self._safe:
            if len(self._safe) == REMEMBERED:
                self._safe.clear()
            if not super().is_safe_attribute(obj, attr, value):
                raise SecurityError(f"the attribute {attr!r} of a {type(obj).__name__} is closed")
            for kind, closed in _CLOSED.items():
                if isinstance(obj, kind) and attr in closed:
                    raise LostOrigin(f"{kind.__name__}.{attr}")
            self._safe.add(place)
        return True

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            raise LostOrigin(f"str.{value.__name__}")


def _refusal(construct: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise LostOrigin(construct)

    return refuse
