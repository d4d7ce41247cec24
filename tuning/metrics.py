"""Scores an answer against what a row accepts, whoever gave it. Knows tasks and rows, no model."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

from rouge_score import rouge_scorer, tokenizers

from tuning.tasks import Metric, Row, Task

METRIC_NAMES: dict[Metric, str] = {
    "label": "accuracy",
    "exact": "exact match",
    "json": "exact JSON",
    "entity_f1": "entity F1",
    "rouge_l": "ROUGE-L F",
    "rouge_l_code": "ROUGE-L F (code tokens)",
    "number": "accuracy",
}
"""What a table calls each metric."""


def mean_score(task: Task, rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Mean of `score` over rows and answers, in [0, 1]. Raises ValueError for none or unequal counts."""
    if not rows:
        raise ValueError("no rows to score")
    return sum(score(task, row, answer) for row, answer in zip(rows, answers, strict=True)) / len(rows)


def score(task: Task, row: Row, answer: str) -> float:
    """How right `answer` is, in [0, 1]: the best over everything the row accepts."""
    measure = _MEASURES[task.metric]
    return max(measure(task, accepted, answer) for accepted in row.accepted)


def majority_share(rows: Sequence[Row]) -> float:
    """What always giving the most frequent target would score, in [0, 1]."""
    return Counter(row.target for row in rows).most_common(1)[0][1] / len(rows)


def normalise(text: str) -> str:
    """Lower case, first non-empty line, single spaces, no punctuation or quotes around it."""
    lines = [line for line in text.splitlines() if line.strip()]
    first = " ".join(lines[0].split()) if lines else ""
    return first.casefold().strip(" \t.,;:!?'\"`*()[]{}<>")


def named_label(answer: str, labels: Sequence[str]) -> str | None:
    """The one label that the answer names, normalised; None when it names none or several.

    A label inside a longer one that is named too does not count (`work` inside `network` neither).
    """
    text = answer.casefold()
    spans: list[tuple[int, int, str]] = []
    for label in map(normalise, labels):
        spans += [(m.start(), m.end(), label) for m in re.finditer(rf"(?<!\w){re.escape(label)}(?!\w)", text)]
    outermost = {
        label
        for start, end, label in spans
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
    }
    return outermost.pop() if len(outermost) == 1 else None


def _label(task: Task, accepted: str, answer: str) -> float:
    wanted = _plain(normalise(accepted))
    if _plain(normalise(answer)) == wanted:
        return 1.0
    labels = task.labels or (accepted,)
    named = named_label(answer, labels)
    return float(named is not None and _plain(named) == wanted)


def _plain(label: str) -> str:
    return re.sub(r"[\s_\-/]+", "_", label)


def _exact(_task: Task, accepted: str, answer: str) -> float:
    code = bare_code(answer)
    first_statement = re.split(r";|\n\s*\n", code, maxsplit=1)[0]
    return float(_flat(accepted) in (_flat(code), _flat(first_statement)))


def _flat(text: str) -> str:
    """One statement on one line; quote style does not matter."""
    return normalise(" ".join(text.split()).replace('"', "'"))


def bare_code(answer: str) -> str:
    """The first fenced block when there is one, without a shebang and comment lines."""
    fenced = re.search(r"```\w*\n?(.*?)(?:```|\Z)", answer, flags=re.DOTALL)
    code = fenced[1] if fenced else answer
    return "\n".join(line for line in code.strip().splitlines() if not line.startswith("#")).strip()


def _json(_task: Task, accepted: str, answer: str) -> float:
    return float(_folded(first_json(answer)) == _folded(json.loads(accepted)))


def first_json(text: str) -> object | None:
    """The first JSON object in the text, parsed; None when there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (json.JSONDecodeError, RecursionError):
            continue
    return None


def _folded(value: object) -> object:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _folded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_folded(item) for item in value]
    return value


def _entity_f1(_task: Task, accepted: str, answer: str) -> float:
    wanted, given = _entities(json.loads(accepted)), _entities(first_json(answer))
    if not wanted and not given:
        return 1.0 if first_json(answer) is not None else 0.0
    hits = (wanted & given).total()
    return 2 * hits / (wanted.total() + given.total())


def _entities(value: object) -> Counter[tuple[str, str]]:
    if not isinstance(value, dict):
        return Counter()
    return Counter(
        (str(kind), " ".join(name.casefold().split()))
        for kind, names in value.items()
        if isinstance(names, list)
        for name in names
        if isinstance(name, str)
    )


class _CodeTokenizer(tokenizers.Tokenizer):
    """Words and single punctuation marks, so that flags and pipes count; rouge-score's own drops them."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)


_PROSE = rouge_scorer.RougeScorer(["rougeL"])
_CODE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())


def _rouge_l(_task: Task, accepted: str, answer: str) -> float:
    return _PROSE.score(accepted, answer)["rougeL"].fmeasure


def _rouge_l_code(_task: Task, accepted: str, answer: str) -> float:
    return _CODE.score(accepted, bare_code(answer))["rougeL"].fmeasure


def _number(_task: Task, accepted: str, answer: str) -> float:
    wanted, given = last_number(accepted), last_number(answer)
    return float(wanted is not None and wanted == given)


def last_number(text: str) -> float | None:
    """The last number in the text, thousands separators ignored; None without one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


_MEASURES: dict[Metric, Callable[[Task, str, str], float]] = {
    "label": _label,
    "exact": _exact,
    "json": _json,
    "entity_f1": _entity_f1,
    "rouge_l": _rouge_l,
    "rouge_l_code": _rouge_l_code,
    "number": _number,
}
