"""The syntax tree of a chat template, rewritten so that its work is paid for.

    Bounding().visit(tree)     `+` and `~` become one call; loop turns, slices and comparisons pay, as calls do anyway

The filters `tick`, `walk`, `+` and `~` that it writes are those of budget.py.
"""

from __future__ import annotations

from jinja2 import TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer


class CostTransformer(NodeTransformer):
    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a literal key is only looked up
            node.arg = self.visit(node.arg)
        return self.apply_filter("tick", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        has_literal = len(node.ops) == 1 and nodes.Const in (
            type(node.expr),
            type(node.ops[0].expr),
        )
        node.expr = self._visit_operand(node.expr, should_walk=not has_literal)
        for operand in node.ops:
            operand.expr = self._visit_operand(operand.expr, should_walk=not has_literal)
        return node

    def _visit_operand(self, node: nodes.Expr, *, should_walk: bool) -> nodes.Expr:
        """Beside a literal there is nothing deep to compare; the literal itself is only
        compared."""
        if isinstance(node, nodes.Const):
            return node
        return self.apply_filter("walk", self.visit(node)) if should_walk else self.visit(node)

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
        return self.apply_filter(
            name, nodes.List([self.visit(term) for term in terms], lineno=line)
        )

    def apply_filter(self, name: str, value: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
