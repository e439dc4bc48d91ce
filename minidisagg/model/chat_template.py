"""Chat templates, in the environment that transformers gives them, and the form in which a template wants content.

A message's content is a text or a list of parts, as OpenAI has it. Most templates write it out and want a text; those
of models that see images too go through its parts, and would find none in a text. Which one a template is shows in
its syntax tree (an idea of vLLM's). Content is left as the client sent it where the template can take it so.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PICKING = {"selectattr", "rejectattr", "map"}  # filters that look into the parts
_PASSING = {"list", "reverse", "select", "reject", "default", "d"}  # and those that hand them on
_FIELDS = ("type", "text")


class ChatTemplate:
    """A compiled template. Raises `jinja2.TemplateError` where it is none."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        tree = environment.parse(source)
        self._takes_parts = _goes_through_parts(tree)
        self._takes_text = not self._takes_parts or any(test.name == "string" for test in tree.find_all(nodes.Test))
        self._template = environment.from_string(tree)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tokens: Mapping[str, str]
    ) -> str:
        """The prompt; `tokens` are the special ones by role. Raises whatever the template's own code does."""
        return self._template.render(
            messages=[self._message(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What is None is left out, as many templates would write it."""
        given = {key: value for key, value in message.items() if value is not None}
        return given | {"content": self._content(given["content"])} if "content" in given else given

    def _content(self, content: Any) -> Any:
        if isinstance(content, list) and not self._takes_parts:
            return "\n".join(part["text"] for part in content)  # as vLLM joins them
        if isinstance(content, str) and not self._takes_text:
            return [{"type": "text", "text": content}]
        return content


def _goes_through_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, picks of it, or reads a field of one of its items."""
    names: set[str] = set()  # of variables and of macros' parameters that hold a content

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name():
                return node.name in names
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem(arg=nodes.Slice()):
                return is_content(node.node)
            case nodes.Getitem():
                return _constant(node.arg) == "content"
            case nodes.Filter():
                return node.name in _PICKING | _PASSING and is_content(node.node)
            case nodes.CondExpr():
                return is_content(node.expr1) or is_content(node.expr2)
            case nodes.Or() | nodes.And():
                return is_content(node.left) or is_content(node.right)
        return False

    def is_item(node: nodes.Node) -> bool:
        return isinstance(node, nodes.Getitem) and isinstance(_constant(node.arg), int) and is_content(node.node)

    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    known = -1
    while known < len(names):  # a name may get its content from another one
        known = len(names)
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
                names.add(assignment.target.name)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                given = [*zip(macros[call.node.name], call.args, strict=False)]
                given += [(pair.key, pair.value) for pair in call.kwargs]
                names.update(name for name, value in given if is_content(value))
    return (
        any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
        or any(picked.name in _PICKING and is_content(picked) for picked in tree.find_all(nodes.Filter))
        or any(read.attr in _FIELDS and is_item(read.node) for read in tree.find_all(nodes.Getattr))
        or any(_constant(read.arg) in _FIELDS and is_item(read.node) for read in tree.find_all(nodes.Getitem))
    )


def _constant(node: nodes.Node) -> object:
    return node.value if isinstance(node, nodes.Const) else None


# ---------------------------------------------------------------- what templates may call


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is all that it is.

    A call block as in transformers, so that what is set inside stays inside.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML and has other defaults."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # templates may name the argument
    return datetime.datetime.now().strftime(format)
