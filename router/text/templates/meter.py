"""A sandbox that renders chat templates on the event loop for as long as that is certain to be short.

A template can loop, call itself, or make a text of gigabytes out of a few characters. Here each turn of a loop, each
call, filter and operation looks at the clock, and only those run whose cost and result are small whatever they are
given. Anything else raises Elsewhere, and the whole is rendered by a process that can be ended (`template_process.py`).
So what is not listed here is slower, never wrong.

Nothing is computed while a template is compiled: `9**9**9` would take for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter, thread_time
from types import BuiltinMethodType, FunctionType
from typing import Any, NoReturn

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.utils import Namespace

from tandem.router.text.templates.costs import (
    MAX_ITEMS,
    MAX_PRODUCT,
    MAX_TEXT,
    SCALARS,
    Elsewhere,
    check_joined,
    check_method,
    check_replaced,
    check_tree,
    is_small,
)
from tandem.router.text.templates.tree import EACH, SCALAR, SUM, TEXT_FILTERS, WRITABLE, Metered

INLINE_S = 0.01
"""Processor time of rendering on the event loop."""
MAX_INDENT = 16

_SHORT_FILTERS = (
    "abs", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map", "reject",
    "rejectattr", "select", "selectattr",
)  # fmt: skip
_SHORT_TESTS = (
    "boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable", "lower",
    "mapping", "none", "number", "odd", "sequence", "string", "test", "true", "undefined", "upper",
)  # fmt: skip
_COMPARING_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne",
)  # fmt: skip


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that stops before it takes long. For one thread."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(
        self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]], **options: Any
    ) -> None:
        """`filters` and `functions` are those of the template beyond Jinja's own; they take next to no time for what is
        small."""
        super().__init__(optimized=False, **options)
        self._until = self._seconds = self._started = 0.0
        own = {**self.filters, **filters}
        self.filters = {name: self._refusing(each) for name, each in own.items()}
        for name in _SHORT_FILTERS:
            self.filters[name] = self._short(own[name])
        for name in TEXT_FILTERS:
            self.filters[name] = self._of_text(own[name])
        for name, each in filters.items():
            self.filters[name] = self._writing(each)
        self.filters |= {"join": self._join, "replace": self._replace_filter, "indent": self._indent}
        self.filters |= {"string": self._string, EACH: self._each, WRITABLE: self._writable}
        self.filters |= {SCALAR: self._scalar, SUM: self._sum}
        tests: dict[str, Any] = {**self.tests}
        self.tests = {name: self._refusing(each) for name, each in tests.items()}
        self.tests |= {name: self._short(tests[name]) for name in _SHORT_TESTS}
        self.tests |= {name: self._comparing(tests[name]) for name in _COMPARING_TESTS}
        self.tests["in"] = lambda value, items: tests["in"](self._scalar(value), items)
        self.globals |= functions
        self._functions = {id(each) for each in (*functions.values(), self.globals["range"])}

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        """Changes the tree. Raises what Jinja and Python raise."""
        tree = Metered().visit(tree)
        template = jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))
        # Names under which compiled templates find what joins the pieces of a text.
        template.root_render_func.__globals__.update(
            concat=self._concat, str_join=self._concat, markup_join=self._refuse
        )
        return template

    def rendered(self, template: jinja2.Template, context: Mapping[str, Any], seconds: float) -> str:
        """`seconds`: of processor time. Raises Elsewhere, and what templates raise."""
        self._seconds, self._started = seconds, thread_time()
        self._until = perf_counter() + seconds
        try:
            return self._concat(list(template.root_render_func(template.new_context(dict(context)))))
        except (RecursionError, MemoryError) as error:
            raise Elsewhere from error

    # What compiled templates call

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """The result of `left operator right`. Raises Elsewhere where it might be large or take long."""
        self._tick()
        kind = type(left)
        if operator == "+" and kind is type(right) and (kind is str or kind is list):
            if len(left) + len(right) > (MAX_TEXT if kind is str else MAX_ITEMS):
                raise Elsewhere
            return left + right
        if operator == "**" or not (is_small(left) and is_small(right)):
            raise Elsewhere
        return self.binop_table[operator](left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template calls, if it is known to be short. Raises Elsewhere otherwise."""
        __self._tick()
        kind = type(__obj)
        if kind is BuiltinMethodType:
            check_method(__obj, args, kwargs)
        elif kind is FunctionType:
            if id(__obj) not in __self._functions or not SCALARS.issuperset(map(type, args)):
                raise Elsewhere
        elif kind is not jinja2.runtime.Macro and not (__obj is Namespace and not args):
            raise Elsewhere
        return super().call(__context, __obj, *args, **kwargs)

    def _tick(self) -> None:
        if perf_counter() > self._until:
            self._late()

    def _late(self) -> None:
        """Reading the processor time of a thread takes longer than reading the clock."""
        left = self._seconds - (thread_time() - self._started)
        if left <= 0:
            raise Elsewhere
        self._until = perf_counter() + left

    def _concat(self, pieces: Iterable[Any]) -> str:
        texts = [piece if type(piece) is str else str(self._writable(piece)) for piece in pieces]
        if sum(map(len, texts)) > MAX_TEXT:
            raise Elsewhere
        return "".join(texts)

    def _each(self, items: Any) -> _Each:
        self._tick()
        return _Each(items, self._tick)

    def _writable(self, value: Any) -> Any:
        """The value. Raises Elsewhere unless writing, comparing or hashing it is short: it may hold itself many times
        over."""
        if type(value) not in SCALARS:
            check_tree(value)
        return value

    def _scalar(self, value: Any) -> Any:
        if type(value) not in SCALARS:
            raise Elsewhere
        return value

    @jinja2.pass_context
    def _sum(self, context: jinja2.runtime.Context, *parts: Any) -> Any:
        """What `+` makes of them, one after the other."""
        self._tick()
        if all(type(part) is str for part in parts):
            if sum(map(len, parts)) > MAX_TEXT:
                raise Elsewhere
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def _string(self, value: Any) -> str:
        return str(self._writable(value))

    @jinja2.pass_eval_context
    def _join(self, context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        self._tick()
        if attribute is not None:
            raise Elsewhere
        texts = [str(self._writable(each)) for each in self._each(value)]
        check_joined(str(self._writable(d)), texts)
        return str(d).join(texts)

    @jinja2.pass_eval_context
    def _replace_filter(self, context: Any, s: Any, old: Any, new: Any, count: Any = None) -> str:
        self._tick()
        if count is not None or type(s) is not str:
            raise Elsewhere
        check_replaced(s, old, new)
        return s.replace(old, new)

    def _indent(self, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> str:
        self._tick()
        if type(s) is not str or type(width) is not int or width > MAX_INDENT or len(s) > MAX_TEXT // MAX_INDENT:
            raise Elsewhere
        return jinja2.filters.do_indent(s, width, first, blank)

    def _short(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Items of what it returns are counted as those of a loop are."""
        tick = self._tick

        def metered(*args: Any, **kwargs: Any) -> Any:
            tick()
            found = function(*args, **kwargs)
            return self._counted(found) if isinstance(found, Iterator) else found

        return _passing_as(function, metered)

    def _of_text(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`trim` takes characters that it looks for."""

        def metered(value: Any, *args: Any, **kwargs: Any) -> Any:
            """Calls the filter on a scalar. Raises Elsewhere for other values, and where it would look for too many
            characters."""
            self._tick()
            if type(value) not in SCALARS or kwargs:
                raise Elsewhere
            if args and (type(value) is not str or type(args[0]) is not str or len(args[0]) * len(value) > MAX_PRODUCT):
                raise Elsewhere
            return function(value, *args)

        return metered

    def _writing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that writes a value, such as `tojson`."""

        def metered(value: Any, *args: Any, **kwargs: Any) -> Any:
            """Calls the filter on a value that is small with all that it contains. Raises Elsewhere otherwise."""
            self._tick()
            for option in (*args, *kwargs.values()):
                if type(option) is int and option > MAX_INDENT:
                    raise Elsewhere
                check_tree(option, MAX_INDENT * 8)
            check_tree(value)
            return function(value, *args, **kwargs)

        return metered

    def _comparing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any) -> Any:
            """Calls the test on values that are short to compare. Raises Elsewhere otherwise."""
            self._tick()
            for each in args:
                self._writable(each)
            return function(*args)

        return metered

    def _refusing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _passing_as(function, lambda *args, **kwargs: self._refuse())

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Elsewhere

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._tick()
            yield item


class _Each:
    """What a loop goes through."""

    __slots__ = ("_items", "_tick")

    def __init__(self, items: Any, tick: Callable[[], None]) -> None:
        self._items = items
        self._tick = tick

    def __iter__(self) -> Iterator[Any]:
        tick = self._tick
        for item in self._items:
            tick()
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _passing_as(function: Callable[..., Any], metered: Callable[..., Any]) -> Callable[..., Any]:
    """`metered`, which gets the same first argument from Jinja as `function`."""
    if (passed := getattr(function, "jinja_pass_arg", None)) is not None:
        metered.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return metered
