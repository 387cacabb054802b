"""Functions the model may call: how they are described to it, and how a call is run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, validate_call
from pydantic.errors import PydanticUserError

from .errors import RequestError
from .events import ToolCall, ToolResult

Function = Callable[..., Any]

# Under these keys of a schema stand values, not schemas.
_VALUES = ("const", "default", "enum", "examples")


@dataclass(frozen=True)
class Tool:
    """A tool as the model is told of it.

    Attributes:
        definition: as OpenAI's interface has it.
        function: None if its calls are run by whoever reads the events.
    """

    definition: Mapping[str, Any]
    function: Function | None = None

    @property
    def name(self) -> str:
        return str(self.definition["function"]["name"])

    @classmethod
    def of(cls, given: Function | Mapping[str, Any]) -> Tool:
        """From an annotated function, or a definition with or without `{"type": "function"}` around it.

        A function's docstring is its description; its parameters are described by their annotations, for which
        pydantic's `Field(description=...)` may be used.

        Raises:
            RequestError: it is neither, or an annotation has no JSON schema.
        """
        if isinstance(given, Mapping):
            inner = given.get("function", given)
            if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
                raise RequestError(f"tools: expected a definition with a name, found {given!r}")
            return cls({"type": "function", "function": dict(inner)})
        if not callable(given):
            raise RequestError(f"tools: expected functions or definitions, found {given!r}")
        name = getattr(given, "__name__", "")
        if not name.isidentifier():  # a lambda, a partial
            raise RequestError(f"tools: expected a function with a name, found {given!r}\nhint: define one with def")
        if inspect.iscoroutinefunction(given):
            raise RequestError(f"tools: {name}: expected a plain function, found a coroutine\nhint: use asyncio.run")
        try:
            checked = validate_call(given)
            schema = TypeAdapter[Any](given).json_schema()  # type: ignore[arg-type]
        except (PydanticUserError, TypeError, NameError) as e:
            raise RequestError(f"tools: {name}: expected annotations that have a JSON schema, found {e}") from e
        if schema.get("type") != "object":
            raise RequestError(f"tools: {name}: expected parameters that can be named, found positional ones")
        described = {"name": name, "description": inspect.getdoc(given) or "", "parameters": _without_titles(schema)}
        return cls({"type": "function", "function": described}, checked)

    def run(self, call: ToolCall) -> ToolResult:
        """Run a call. Whatever goes wrong is the result: the model can mend its arguments."""
        assert self.function is not None
        try:
            arguments = json.loads(call.arguments)
            if not isinstance(arguments, dict):
                raise ValueError(f"arguments: expected a JSON object, found {call.arguments}")
            value = self.function(**arguments)
            content = value if isinstance(value, str) else TypeAdapter(Any).dump_json(value).decode()
        except ValidationError as e:
            wrong = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors()]
            return ToolResult(call.id, f"error: {'; '.join(wrong)}", failed=True)
        except Exception as e:  # the function is the user's and may raise anything
            return ToolResult(call.id, f"error: {type(e).__name__}: {e}", failed=True)
        return ToolResult(call.id, content)


def tools_of(given: Sequence[Function | Mapping[str, Any] | Tool]) -> list[Tool]:
    """Tools of one conversation.

    Raises:
        RequestError: two have the same name, or see `Tool.of`.
    """
    tools = [tool if isinstance(tool, Tool) else Tool.of(tool) for tool in given]
    for n, tool in enumerate(tools):
        if tool.name in [other.name for other in tools[:n]]:
            raise RequestError(f"tools: expected different names, found {tool.name} twice")
    return tools


def calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """Calls in a message of the assistant that can be answered, which takes an id."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if call.get("id") is not None:
            calls.append(ToolCall(call["id"], function["name"], text))
    return calls


def run_call(tools: Sequence[Tool], call: ToolCall) -> ToolResult:
    """Run a call of one of these tools; an unknown name is a result, too."""
    found = [tool for tool in tools if tool.name == call.name]
    if not found:
        names = ", ".join(tool.name for tool in tools)
        return ToolResult(call.id, f"error: expected one of {names}, found {call.name}", failed=True)
    return found[0].run(call)


def read_tools(file: Path) -> list[Tool]:
    """Definitions from a JSON file: a list, or an object with the list as `tools`.

    Raises:
        RequestError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RequestError(f"{file}: expected a JSON file with a list of tools, found {e}") from e
    found = content.get("tools") if isinstance(content, dict) else content
    if not isinstance(found, Sequence) or isinstance(found, str):
        what = "an object without the list `tools`" if isinstance(content, dict) else type(found).__name__
        raise RequestError(f"{file}: expected a list of tools, found {what}")
    return [Tool.of(tool) for tool in found]


def _without_titles(schema: Any) -> Any:
    """A schema without the titles that pydantic derives from names; a property called title stays, and so do values."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    return {key: value if key in _VALUES else _without_titles(value) for key, value in kept.items()}
