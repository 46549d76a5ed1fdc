"""The syntax tree of a chat template, rewritten so that its work is paid for.

    Bounding().visit(tree)     `+` and `~` become one call; loop turns, slices and comparisons pay, as calls do anyway

The filters `tick`, `walk`, `+` and `~` that it writes are those of budget.py.
"""

from __future__ import annotations

from jinja2 import TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer


class Bounding(NodeTransformer):
    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a literal key is only looked up
            node.arg = self.visit(node.arg)
        return self.filtered("tick", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        literal = len(node.ops) == 1 and nodes.Const in (type(node.expr), type(node.ops[0].expr))
        node.expr = self._compared(node.expr, walk=not literal)
        for operand in node.ops:
            operand.expr = self._compared(operand.expr, walk=not literal)
        return node

    def _compared(self, node: nodes.Expr, *, walk: bool) -> nodes.Expr:
        """Beside a literal there is nothing deep to compare; the literal itself is only compared."""
        if isinstance(node, nodes.Const):
            return node
        return self.filtered("walk", self.visit(node)) if walk else self.visit(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        for pair in node.items:
            pair.key = self.filtered("walk", self.visit(pair.key))
            pair.value = self.visit(pair.value)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        terms: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            terms.append(left.right)
            left = left.left
        return self._chain("+", [left, *reversed(terms)], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._chain("~", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(self._tick(node.lineno), node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(self._tick(node.lineno), lineno=node.lineno))
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is not supported in chat templates", node.lineno)

    def _tick(self, line: int) -> nodes.Expr:
        return self.filtered("tick", nodes.Const(True, lineno=line))

    def _chain(self, name: str, terms: list[nodes.Expr], line: int) -> nodes.Expr:
        return self.filtered(name, nodes.List([self.visit(term) for term in terms], lineno=line))

    def filtered(self, name: str, value: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
