"""A sandboxed Jinja environment in which each render has a budget: loop turns, calls, characters
and time.

    LimitedEnvironment   base of the tracked (tracked_env.py) and plain (jinja_env.py) environments
    CostTransformer      rewrites a syntax tree so that loops, `+`, `~` and comparisons pay

No template may run long or fill the memory, however hostile it is. What it makes is charged by its
size, and checked before where one step can make anything (`sandbox_checks.py`). What it compares,
hashes or prints is walked first: a list that holds the same list twice, thirty levels deep, has a
billion items for `==`, but only thirty lists to build."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.data.chat_template.sandbox_checks import (
    FILTER_CHECKS,
    STEPS_PER_TICK,
    check_binop,
    check_method,
    check_number,
    estimate_ticks,
)
from tunesmith.data.chat_template.tracked_str import MAX_CHARS, RenderLimitError, UntrackedTextError

MAX_WORK = 500_000  # loop turns, calls, list items, and CHARS_PER_TICK characters each
CHARS_PER_TICK = 100
READ_CHARS_PER_TICK = 1_000  # of a text that is compared or searched
MAX_SECONDS = 10.0  # of processor time: the limit must not depend on what else the machine does
CHECK_INTERVAL = 100  # units of work between two checks of the limits
MAX_CACHED_ATTRIBUTES = 1_000
CONTAINERS = (list, tuple, dict)

# Filters that templates may use. Shallow ones do not look into their arguments, so that these are
# not walked. List filters take a list in place of an iterator.
SHALLOW_FILTERS = frozenset({
    "length", "count", "first", "last", "list", "items", "map", "select", "selectattr", "reject",
    "rejectattr", "d", "default", "reverse", "attr", "+",
})  # fmt: skip
_DEEP_FILTERS = frozenset({
    "abs", "float", "int", "max", "min", "unique", "wordcount", "sort", "groupby", "dictsort",
    "string", "safe", "trim", "upper", "lower", "capitalize", "title", "replace", "join", "indent",
    "format", "tojson",
})  # fmt: skip
ALLOWED_FILTERS = (SHALLOW_FILTERS - {"+"}) | _DEEP_FILTERS
LIST_FILTERS = frozenset({"join", "list", "max", "min", "sort", "unique", "groupby"})

# Attributes whose result has no origin, or can have any size.
_CLOSED_STR_ATTRIBUTES = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode",
    "format_map",
}  # fmt: skip
_CLOSED_ATTRIBUTES = {
    str: _CLOSED_STR_ATTRIBUTES,
    int: set(dir(int)),
    float: set(dir(float)),
    bytes: set(dir(bytes)),
}
_DICT_ATTRIBUTES = frozenset(dir(dict))
FORMAT_METHODS = ("format", "format_map")
_MISSING = object()


class NoConstantFolding(CodeGenerator):
    """Compile without computing constants: no budget would bound that."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoConstantFolding
    intercepted_binops = frozenset({"*", "/", "//", "%", "**"})

    def __init__(
        self,
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
        **settings: Any,
    ) -> None:
        """`filters` and `functions` are those that templates may use; filters and tests are guarded
        here."""
        super().__init__(**settings)
        self.filters = {name: _make_refusal(f"the filter {name!r}") for name in FILTERS}
        for name, function in filters.items():
            self.filters[name] = self._guard_filter(name, function)
        self.filters["tick"] = self.charge
        self.filters["walk"] = self._charge_operand
        self.filters["read"] = self._charge_read
        self.filters["sum"] = self._sum_values
        self.tests = {name: self._guard_test(test) for name, test in self.tests.items()}
        self.globals["lipsum"] = _make_refusal("lipsum()")
        self.globals |= functions
        self.global_values = tuple(self.globals.values())
        self.function_types = {type(value) for value in self.global_values}
        self._safe_attributes: set[tuple[type, str]] = set()
        self.start_budget()

    def start_budget(self) -> None:
        self.work = 0
        self.char_work = 0  # the part of it that is for characters
        self.next_check = 0
        self.deadline = time.thread_time() + MAX_SECONDS

    @property
    def num_steps(self) -> int:
        """Loop turns, calls and list items, without the work for characters."""
        return self.work - self.char_work

    def tick(self, work: int = 1) -> None:
        self.work += work
        if self.work > self.next_check:
            self._check_limits()

    def _check_limits(self) -> None:
        self.next_check = self.work + CHECK_INTERVAL
        if self.work > MAX_WORK:
            raise RenderLimitError(f"more than {MAX_WORK} loop turns, calls and list items")
        if time.thread_time() > self.deadline:
            raise RenderLimitError(f"a render of more than {MAX_SECONDS:.0f} s of a processor")

    def charge(self, value: Any) -> Any:
        """Charge for the size of a new value and return it, so that a render holds a bounded
        amount."""
        if isinstance(value, str):
            char_work = len(value) // CHARS_PER_TICK
            self.work += 1 + char_work
            self.char_work += char_work
        elif isinstance(value, CONTAINERS):
            self.work += 1 + len(value)
        else:
            self.work += 1
        if self.work > self.next_check:
            self._check_limits()
        return value

    def charge_contents(self, value: Any) -> Any:
        """Charge for everything inside a value, as often as it is inside, and return the value."""
        if isinstance(value, CONTAINERS):
            todo: list[Any] = [value]
            while todo:
                item = todo.pop()
                children = [*item, *item.values()] if isinstance(item, dict) else item
                num_chars = sum(len(child) for child in children if isinstance(child, str))
                self.char_work += num_chars // CHARS_PER_TICK
                self.tick(1 + len(children) + num_chars // CHARS_PER_TICK)
                todo += [child for child in children if isinstance(child, CONTAINERS)]
        return value

    def _charge_operand(self, value: Any) -> Any:
        return self.charge_contents(self._charge_read(value))

    def _charge_read(self, value: Any) -> Any:
        """Charge for a text that is compared or searched, as often as it is, and return the
        value."""
        if isinstance(value, str):
            self.char_work += len(value) // READ_CHARS_PER_TICK
            self.tick(len(value) // READ_CHARS_PER_TICK)
        return value

    def limit_output(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of an output. Raises RenderLimitError if they get too long."""
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_CHARS:
                raise RenderLimitError(f"an output of more than {MAX_CHARS} characters")
            yield piece

    # ---- filters and tests

    def _guard_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter: charge before for what it looks at, and after for what it made."""
        # some filters get a context or the environment first
        num_skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
        check = FILTER_CHECKS.get(name)
        is_shallow = name in SHALLOW_FILTERS
        needs_list = name in LIST_FILTERS

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
            self.tick(estimate_ticks(name, value, (*args[num_skipped + 1 :], *kwargs.values())))
            return self.charge(function(*args, **kwargs))

        return run_filter

    def _guard_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run_test(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                check_number(value)
                self.charge_contents(value)
            return test(*args, **kwargs)

        return run_test

    def _sum_values(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            raise UntrackedTextError("sum with an attribute")
        for value in values:
            start = self.charge(self.charge(start) + value)
        return start

    # ---- hooks of the sandbox

    def call_binop(self, *args: Any, **_: Any) -> Any:
        _, operator, first, second = args
        check_binop(operator, first, second)
        if operator == "%":
            self.charge_contents(second)
        return self.charge(self.apply_binop(operator, first, second))

    def apply_binop(self, operator: str, first: Any, second: Any) -> Any:
        return self.binop_table[operator](first, second)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is not Macro:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                check_method(owner, __obj.__name__, args)
                __self.tick(len(owner) // STEPS_PER_TICK)
                __self.tick(estimate_ticks(__obj.__name__, owner, (*args, *kwargs.values())))
            if isinstance(owner, (list, tuple)):
                __self.charge_contents(owner)
            for value in (*args, *kwargs.values()):
                __self.charge_contents(value)
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:  # once per item of `map`
        self.tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:  # once per item of `select`
        self.tick()
        return super().call_test(*args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(self._refuse_function(obj), self.charge_contents(argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        # a field of a message, looked up faster than by jinja
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        # once found safe, nothing but the value is looked up
        if (type(obj), attribute) in self._safe_attributes:
            value = getattr(obj, attribute, _MISSING)
            if value is not _MISSING:
                return value
        return super().getattr(self._refuse_function(obj), attribute)

    def _refuse_function(self, obj: Any) -> Any:
        """Refuse the attributes of global functions, which may only be called, and return other
        objects."""
        if type(obj) in self.function_types and any(obj is value for value in self.global_values):
            raise SecurityError("the attributes of a function are closed")
        return obj

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr  # the slow answer depends on nothing else
        if key not in self._safe_attributes:
            if len(self._safe_attributes) == MAX_CACHED_ATTRIBUTES:
                self._safe_attributes.clear()
            if not super().is_safe_attribute(obj, attr, value):
                raise SecurityError(f"the attribute {attr!r} of a {type(obj).__name__} is closed")
            for kind, closed_names in _CLOSED_ATTRIBUTES.items():
                if isinstance(obj, kind) and attr in closed_names:
                    raise UntrackedTextError(f"{kind.__name__}.{attr}")
            # global functions stay closed, and `format` depends on the value
            if type(obj) not in self.function_types and attr not in FORMAT_METHODS:
                self._safe_attributes.add(key)
        return True

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in FORMAT_METHODS:
            raise UntrackedTextError(f"str.{value.__name__}")


def _make_refusal(construct: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UntrackedTextError(construct)

    return refuse


class CostTransformer(NodeTransformer):
    """Rewrite a syntax tree so that its work is charged: `+` and `~` chains become one filter call
    each, and loop turns, slices and comparisons pay as calls do anyway."""

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a literal key is only looked up
            node.arg = self.visit(node.arg)
        return self.apply_filter("tick", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        is_single = len(node.ops) == 1
        has_literal = is_single and nodes.Const in (type(node.expr), type(node.ops[0].expr))
        node.expr = self._visit_operand(node.expr, should_walk=not has_literal)
        for operand in node.ops:
            operand.expr = self._visit_operand(operand.expr, should_walk=not has_literal)
        return node

    def _visit_operand(self, node: nodes.Expr, *, should_walk: bool) -> nodes.Expr:
        """Charge for the contents of an operand; next to a literal, nothing deep is compared."""
        if isinstance(node, nodes.Const):
            return node
        return self.apply_filter("walk" if should_walk else "read", self.visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        for pair in node.items:
            pair.key = self.apply_filter("walk", self.visit(pair.key))
            pair.value = self.visit(pair.value)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        terms: list[nodes.Expr] = []
        first_term: nodes.Expr = node
        while isinstance(first_term, nodes.Add):
            terms.append(first_term.right)
            first_term = first_term.left
        return self._make_chain("+", [first_term, *reversed(terms)], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._make_chain("~", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(self._make_tick(node.lineno), node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(self._make_tick(node.lineno), lineno=node.lineno))
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is not supported in chat templates", node.lineno)

    def _make_tick(self, line: int) -> nodes.Expr:
        return self.apply_filter("tick", nodes.Const(True, lineno=line))

    def _make_chain(self, name: str, terms: list[nodes.Expr], line: int) -> nodes.Expr:
        chain = nodes.List([self.visit(term) for term in terms], lineno=line)
        return self.apply_filter(name, chain)

    def apply_filter(self, name: str, value: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
