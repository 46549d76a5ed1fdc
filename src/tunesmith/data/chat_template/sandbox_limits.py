"""A sandboxed Jinja environment in which every render has a budget: of loop turns, calls,
characters and time.

    class Budgeted     the base of both environments: tracked text (sandbox.py) and plain text (jinja.py)

Nothing that a template does may take long or fill the memory, however hostile it is. What is made
is paid for by its size, and before it is made where one step can make anything (limits.py). What is
compared, hashed or printed is walked first: a list that holds the same list twice, and so on thirty
times, has a billion items for `==` and thirty for everyone else."""

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

from tunesmith.data.chat_template.sandbox_checks import FILTER_CHECKS, check_method, check_size
from tunesmith.data.chat_template.tracked_str import MAX_CHARS, RenderLimitError, UntrackedTextError

MAX_WORK = 1_000_000  # loop turns, calls, list items, and CHARS_PER_TICK characters each
CHARS_PER_TICK = 100
MAX_SECONDS = 10.0
CHECK_INTERVAL = 100  # of the limits, in work
MAX_SAFE_ATTRIBUTES = 1_000  # attributes known to be safe, or not
CONTAINERS = (list, tuple, dict)

# Filters that templates may use. FREE ones do not look into what they are given; LISTED ones get a
# list, no iterator.
SHALLOW_FILTERS = frozenset(
    re.findall(
        r"[+\w]+",
        "length count first last list items map select selectattr reject rejectattr d default reverse attr +",
    )
)
ALLOWED_FILTERS = SHALLOW_FILTERS - {"+"} | set(
    re.findall(
        r"\w+",
        "abs float int max min unique wordcount sort groupby dictsort string safe trim upper lower capitalize title"
        " replace join indent format tojson",
    )
)
LIST_FILTERS = frozenset({"join", "list", "max", "min", "sort", "unique", "groupby"})

# Attributes whose result has no origin, or that build things of any size.
_CLOSED_ATTRIBUTES = {
    str: {
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "translate",
        "maketrans",
        "encode",
        "format_map",
    },
    int: set(dir(int)),
    float: set(dir(float)),
    bytes: set(dir(bytes)),
}
_DICT_ATTRIBUTES = frozenset(dir(dict))


class NoConstantFolding(CodeGenerator):
    """Nothing is computed while a template is compiled: no budget would bound it."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoConstantFolding
    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(
        self,
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
        **settings: Any,
    ) -> None:
        """`filters` that templates may use; they are guarded here, and the tests too. `functions`
        that they know."""
        super().__init__(**settings)
        refused = {name: _make_refusal(f"the filter {name!r}") for name in FILTERS}
        self.filters = refused | {
            name: self._guard_filter(name, function) for name, function in filters.items()
        }
        self.filters |= {
            "tick": self._charge_value,
            "walk": self.charge_contents,
            "sum": self._sum_values,
        }
        self.tests = {name: self._guard_test(test) for name, test in self.tests.items()}
        self.globals["lipsum"] = _make_refusal("lipsum()")
        self.globals |= functions
        self.global_values = tuple(self.globals.values())
        self.function_types = {type(value) for value in self.global_values}
        self._safe_attributes: set[tuple[type, str]] = set()
        self.start_budget()

    def start_budget(self) -> None:
        self.work, self.next_check, self.deadline = 0, 0, time.monotonic() + MAX_SECONDS

    def tick(self, work: int = 1) -> None:
        self.work += work
        if self.work > self.next_check:
            self._check_limits()

    def _check_limits(self) -> None:
        self.next_check = self.work + CHECK_INTERVAL
        if self.work > MAX_WORK:
            raise RenderLimitError(f"more than {MAX_WORK} loop turns, calls and list items")
        if time.monotonic() > self.deadline:
            raise RenderLimitError(f"a render of more than {MAX_SECONDS:.0f} seconds")

    def charge(self, value: Any) -> Any:
        """Give back what was made, after paying for its size: what a render can hold stays
        bounded."""
        if isinstance(value, str):
            self.work += 1 + len(value) // CHARS_PER_TICK
        else:
            self.work += 1 + len(value) if isinstance(value, CONTAINERS) else 1
        if self.work > self.next_check:
            self._check_limits()
        return value

    def charge_contents(self, value: Any) -> Any:
        """Give back a value after paying for all that it holds, as often as it holds it."""
        if isinstance(value, CONTAINERS):
            todo: list[Any] = [value]
            while todo:
                item = todo.pop()
                children = [*item, *item.values()] if isinstance(item, dict) else item
                self.tick(
                    1
                    + len(children)
                    + sum(len(text) for text in children if isinstance(text, str)) // CHARS_PER_TICK
                )
                todo += [child for child in children if isinstance(child, CONTAINERS)]
        return value

    def limit_output(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of an output, none too many."""
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_CHARS:
                raise RenderLimitError(f"an output of more than {MAX_CHARS} characters")
            yield piece

    # ---- filters and tests

    def _guard_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays before for what it looks at, and after for what it has made."""
        num_skipped = (
            1 if hasattr(function, "jinja_pass_arg") else 0
        )  # a context, or the environment
        check, is_shallow, needs_list = (
            FILTER_CHECKS.get(name),
            name in SHALLOW_FILTERS,
            name in LIST_FILTERS,
        )

        @functools.wraps(function)
        def run_filter(*args: Any, **kwargs: Any) -> Any:
            value = args[num_skipped]
            if needs_list and not isinstance(value, (*CONTAINERS, str)):
                value = self.charge(list(value))
                args = (*args[:num_skipped], value, *args[num_skipped + 1 :])
            if not is_shallow:
                for argument in (*args[num_skipped:], *kwargs.values()):
                    self.charge_contents(argument)
            if check is not None:
                check(*args[num_skipped:], **kwargs)
            return self.charge(function(*args, **kwargs))

        return run_filter

    def _guard_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run_test(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, CONTAINERS):
                    self.charge_contents(value)
            return test(*args, **kwargs)

        return run_test

    def _charge_value(self, value: Any) -> Any:
        return self.charge(value)

    def _sum_values(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            raise UntrackedTextError("sum with an attribute")
        for value in values:
            start = self.charge(self.charge(start) + value)
        return start

    # ---- what the sandbox asks

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        check_size(operator, left, right)
        return self.charge(
            self.apply_binop(
                operator, left, self.charge_contents(right) if operator == "%" else right
            )
        )

    def apply_binop(self, operator: str, first: Any, second: Any) -> Any:
        return self.binop_table[operator](first, second)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is not Macro:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                check_method(owner, __obj.__name__, args)
            for value in (
                owner if isinstance(owner, (list, tuple)) else None,
                *args,
                *kwargs.values(),
            ):
                if isinstance(value, CONTAINERS):
                    __self.charge_contents(value)
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `map`
        self.tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `select` and `reject`
        self.tick()
        return super().call_test(*args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(self._refuse_function(obj), self.charge_contents(argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if (
            type(obj) is dict and attribute not in _DICT_ATTRIBUTES
        ):  # a field of a message: quickly what jinja does slowly
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(self._refuse_function(obj), attribute)

    def _refuse_function(self, obj: Any) -> Any:
        """The functions that every template knows are for calling; what else they have is
        Python's."""
        if type(obj) in self.function_types and any(obj is value for value in self.global_values):
            raise SecurityError("the attributes of a function are closed")
        return obj

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr  # all that the answer depends on, which it takes long to find
        if key not in self._safe_attributes:
            if len(self._safe_attributes) == MAX_SAFE_ATTRIBUTES:
                self._safe_attributes.clear()
            if not super().is_safe_attribute(obj, attr, value):
                raise SecurityError(f"the attribute {attr!r} of a {type(obj).__name__} is closed")
            for kind, closed_names in _CLOSED_ATTRIBUTES.items():
                if isinstance(obj, kind) and attr in closed_names:
                    raise UntrackedTextError(f"{kind.__name__}.{attr}")
            self._safe_attributes.add(key)
        return True

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            raise UntrackedTextError(f"str.{value.__name__}")


def _make_refusal(construct: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UntrackedTextError(construct)

    return refuse
