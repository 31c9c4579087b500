"""Runs chat templates that nobody has reviewed, within bounds.

Templates come with models, and a model directory is not code that its user chose to run. Jinja's
immutable sandbox keeps them from Python's internals and from changing what they are given; this
module adds bounds on time and memory, charged per render: loops, calls, operators, filters and
output all pay into one `Budget`, and operations whose result can be much larger than their
operands are measured before they run. What remains: a single operation on values of up to
`SIZE_MAX` cannot be interrupted, so the deadline may be passed by a fraction of a second; and a
template still decides what the model is told.

Filters, globals and extensions are the ones that transformers gives templates, less those that no
chat format needs. Runs in worker threads; the budget is per thread.
"""

import functools
import json
import re
import string
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from heedful_server.text.budget import Budget, size_of

SOURCE_MAX_CHARS = 256 << 10

_INT_MAX_BITS = 1 << 14
_INDENT_MAX = 64
_STRFTIME_MAX_CHARS = 64

_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max"),
    *("min", "reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr"),
    *("sort", "string", "title", "trim", "unique", "upper", "urlencode", "wordcount"),
)
# They pad or repeat far beyond their operands, or lead to bytes; no chat format needs them.
_UNSAFE_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode", "to_bytes"}
)
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*[\d*]")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        self._local = threading.local()
        self.filters = {name: self._charged(self.filters[name]) for name in _FILTERS}
        self.filters |= {
            "tojson": self._to_json,
            "join": self._charged(self._join),
            "replace": self._charged(self._replace),
            "indent": self._charged(self._indent),
            "_metered_loop": self._metered_loop,
            "_metered_output": self._metered_output,
            "_metered_concat": self._charged("".join),
            "_metered_value": self._metered_value,
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": _new_dict,
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compile_bounded(self, source: str) -> jinja2.Template:
        """Compile a template; constant parts of it are computed within a budget too."""
        self._local.budget = Budget()
        return self.from_string(source)

    def render_bounded(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render a template of this environment.

        Raises:
            SecurityError: it reached for something unsafe or used up its budget.
            Exception: whatever else the template runs into.
        """
        self._local.budget = Budget()
        text = template.render(variables)
        self._spend(len(text))
        return text

    def _spend(self, amount: int) -> None:
        budget: Budget = self._local.budget
        budget.spend(amount)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        metered: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        metered.set_environment(self)
        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Say whether a template may read an attribute."""
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call something from a template; the result is charged."""
        __self._spend(0)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "join":
                return __self._metered_value(__self._join(args[0], __obj.__self__))
            if __obj.__name__ == "replace":
                return __self._metered_value(__self._replace(__obj.__self__, *args))
        return __self._metered_value(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe a value; a slice is a new value and charged as one."""
        item = super().getitem(obj, argument)
        return self._metered_value(item) if isinstance(argument, slice) else item

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after a look at how large its result can be."""
        self._spend(_binop_size(operator, left, right))
        return self._metered_value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a bounded form of `str.format` and `str.format_map`, None for any other value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            fields = list(string.Formatter().parse(pattern))
            if any(spec for _, _, spec, _ in fields):
                raise SecurityError("format specifications are not available to chat templates")
            self._spend(len(pattern) + len(fields) * size_of([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # wraps() keeps jinja2's marks for functions that want the environment or the context.
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            return self._metered_value(function(*args, **kwargs))

        return charged

    def _metered_value(self, value: Any) -> Any:
        if isinstance(value, Iterator):
            return self._metered_loop(value)
        self._spend(size_of(value))
        return value

    def _metered_loop(self, items: Iterable[Any], cost: int = 1) -> Iterator[Any]:
        for item in items:
            self._spend(cost)
            yield item

    def _metered_output(self, value: Any) -> str:
        self._spend(size_of(value))
        return str(value)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in value]
        parts = [self._metered_output(item) for item in value]
        self._spend(len(d) * len(parts))
        return str(d).join(parts)

    def _replace(self, text: str, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self._spend(len(text) + times * len(new))
        return text.replace(old, new, times)

    def _indent(
        self, s: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        indent = width if isinstance(width, str) else " " * max(0, min(width, _INDENT_MAX))
        lines = str(s).splitlines(keepends=True)
        self._spend(len(s) + len(indent) * len(lines))
        kept = [line if not blank and not line.strip() else indent + line for line in lines]
        return "".join(kept if first else lines[:1] + kept[1:])

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and indent > _INDENT_MAX:
            raise SecurityError(f"tojson indents by at most {_INDENT_MAX}")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return "".join(self._metered_output(chunk) for chunk in encoder.iterencode(value))


class _Meter(NodeTransformer):
    """Rewrites a template so that loops, `~`, displays and output are charged."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2 names visitors so
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not available", node.lineno)
        literals = [item.data for item in node.find_all(nodes.TemplateData)]
        literals += [
            item.value for item in node.find_all(nodes.Const) if isinstance(item.value, str)
        ]
        cost = nodes.Const(1 + sum(map(len, literals)))
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_metered_loop", cost)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        parts = [_filtered(part, "_metered_output") for part in node.nodes]
        return _filtered(nodes.List(parts, lineno=node.lineno), "_metered_concat")

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            item if isinstance(item, nodes.TemplateData) else _filtered(item, "_metered_output")
            for item in node.nodes
        ]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_metered_value")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_metered_value")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        # A tuple that is assigned to names its targets; it is no value.
        return node if node.ctx == "store" else _filtered(node, "_metered_value")


class _GenerationBlock(Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's tokens for trainers."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block; names set in it stay in it."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _SafeNamespace(Namespace):
    """Jinja's namespace without private names, and printed without its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _binop_size(operator: str, left: Any, right: Any) -> int:
    """Return an upper bound of the result's size, 0 where it cannot exceed the operands much."""
    if operator == "%" and isinstance(left, str):
        if _PERCENT_WIDTH.search(left):
            raise SecurityError("format widths are not available to chat templates")
        return len(left) + left.count("%") * size_of(right)
    if operator == "*" and isinstance(left, int) and isinstance(right, int):
        return _int_size(left.bit_length() + right.bit_length())
    if operator == "*" and isinstance(left, int):
        return max(0, left) * size_of(right)
    if operator == "*" and isinstance(right, int):
        return size_of(left) * max(0, right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return _int_size(left.bit_length() * max(0, right))
    return 0


def _int_size(bits: int) -> int:
    if bits > _INT_MAX_BITS:
        raise SecurityError(f"it makes a number of more than {_INT_MAX_BITS} bits")
    return 1


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name!r}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _STRFTIME_MAX_CHARS:
        raise SecurityError("strftime_now: the pattern is too long")
    return datetime.now().astimezone().strftime(pattern)
