"""Writes README's tables of endpoints and parameters from `gateway.parameters`: `python -m scripts.api_tables`."""

import json
import re
from pathlib import Path

from gateway.parameters import ENDPOINTS, PARAMETERS, Handling, Parameter

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- api tables -->", "<!-- end of api tables -->"


def tables() -> str:
    """Both tables as Markdown."""
    lines = ["| endpoint | of | |", "| --- | --- | --- |"]
    for endpoint in ENDPOINTS:
        refused = "refused, 404 `unknown_url`" if not endpoint.note else f"refused: {endpoint.note}"
        said = endpoint.note if endpoint.handling is Handling.SUPPORTED else refused
        lines.append(f"| `{endpoint.address}` | {endpoint.origin} | {said or 'supported'} |")
    lines += ["", "| parameter | in | of | | |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(parameter) for parameter in PARAMETERS]
    return "\n".join(lines)


def documented(readme: str) -> str:
    """The tables as they stand in the README."""
    return readme.split(BEGIN)[1].split(END)[0].strip()


def _row(parameter: Parameter) -> str:
    bodies = ", ".join(_name(body.__name__) for body in parameter.bodies)
    handling = parameter.handling.value
    if parameter.harmless:
        handling += " but for " + ", ".join(f"`{json.dumps(value)}`" for value in parameter.harmless)
    return f"| `{parameter.name}` | {bodies} | {parameter.origin} | {handling} | {parameter.note} |"


def _name(body: str) -> str:
    """`ChatFields` -> `chat`"""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", body.removesuffix("Fields")).lower()


if __name__ == "__main__":
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}")
