"""What is added to a template's code, so that loops and macros pay into the budget of its environment."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

_MACRO_STEPS = 10


class Instrument(NodeTransformer):
    """Makes each turn of a loop or macro pay for itself and its literal text, and `~` for what it builds.

    The added calls reach the environment by a node that no template can spell, so that none can replace them.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        args = [cast(nodes.Expr, node.iter), nodes.Const(_literal_length(node))]
        node.iter = _call_environment("metered", args, node.lineno)
        return self._pay_first(node) if node.recursive else node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._pay_first(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._pay_first(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call_environment("concat_checked", node.nodes, node.lineno)

    def _pay_first(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        price: list[nodes.Expr] = [nodes.Const(_literal_length(node)), nodes.Const(_MACRO_STEPS)]
        node.body.insert(0, nodes.ExprStmt(_call_environment("spend", price, node.lineno), lineno=node.lineno))
        return node


def _literal_length(node: nodes.Node) -> int:
    return sum(len(text.data) for text in node.find_all(nodes.TemplateData))


def _call_environment(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=lineno)


class Metered:
    """An iterable that pays for each item; as long as what it wraps, for `loop.length`.

    spend: called with the literal text of one turn, in characters, and its step.
    """

    def __init__(self, spend: Callable[[int, int], None], values: Any, literal: int) -> None:
        self._spend, self._values, self._literal = spend, values, literal

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._spend(self._literal, 1)
            yield value
