"""The tasks: what each asks, how rows become messages, how answers are scored. Knows no model, no server."""

from pathlib import Path
from typing import Literal

import msgspec

Metric = Literal["label", "exact", "json", "entity_f1", "rouge_l", "rouge_l_code", "number"]


class Row(msgspec.Struct, frozen=True):
    """One line of `<task>.<split>.jsonl`."""

    id: str
    fields: dict[str, str]
    target: str
    references: list[str] = []

    @property
    def accepted(self) -> list[str]:
        """Every answer that counts as right; never empty."""
        return self.references or [self.target]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task and its prompt: `instruction` is the system message, `template` the user message of a row."""

    name: str
    stands_for: str
    source: str
    licence: str
    metric: Metric
    max_new_tokens: int
    instruction: str
    template: str = "{text}"
    labels: tuple[str, ...] = ()

    def messages(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """The chat messages that ask for this row's answer, as a client sends them to `/v1/chat/completions`.

        Raises KeyError when `fields` lacks one that the template names.
        """
        return [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": self.template.format_map(fields)},
        ]


def load_rows(directory: Path, task: str, split: Literal["train", "test"]) -> list[Row]:
    """Rows of `<task>.<split>.jsonl`. Raises FileNotFoundError, or ValueError naming the malformed line."""
    path = directory / f"{task}.{split}.jsonl"
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def _one_of(question: str, labels: tuple[str, ...]) -> str:
    return f"{question} Answer with one of: {', '.join(labels)}."


_BITEXT = (
    "cancel_order", "change_order", "change_shipping_address", "check_cancellation_fee", "check_invoice",
    "check_payment_methods", "check_refund_policy", "complaint", "contact_customer_service",
    "contact_human_agent", "create_account", "delete_account", "delivery_options", "delivery_period",
    "edit_account", "get_invoice", "get_refund", "newsletter_subscription", "payment_issue", "place_order",
    "recover_password", "registration_problems", "review", "set_up_shipping_address", "switch_account",
    "track_order", "track_refund",
)  # fmt: skip
_CLINC_DOMAINS = (
    "auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta", "small_talk",
    "travel", "utility", "work",
)  # fmt: skip
_CUAD = (
    "Anti-Assignment", "Audit Rights", "Cap on Liability", "Change of Control", "Exclusivity",
    "Expiration Date", "Governing Law", "IP Ownership Assignment", "Insurance", "License Grant",
    "Minimum Commitment", "Non-Compete", "Non-Transferable License", "Post-Termination Services",
    "Renewal Term", "Revenue/Profit Sharing", "Rofr/Rofo/Rofn", "Termination for Convenience",
    "Volume Restriction", "Warranty Duration",
)  # fmt: skip
_DBPEDIA = (
    "Album", "Animal", "Artist", "Athlete", "Building", "Company", "EducationalInstitution", "Film",
    "MeanOfTransportation", "NaturalPlace", "OfficeHolder", "Plant", "Village", "WrittenWork",
)  # fmt: skip
_ABSTRACT_ROLES = ("background", "objective", "method", "result", "other")
_SENTIMENTS = ("positive", "negative", "neutral", "ambiguous")

_ALL = (
    Task(
        name="gsm8k",
        stands_for="gsm8k",
        source="openai/grade-school-math",
        licence="MIT",
        metric="number",
        max_new_tokens=256,
        instruction="Solve the math problem step by step. End with the final number after ####.",
        template="{question}",
    ),
    Task(
        name="svamp",
        stands_for="gsm8k (easier word problems)",
        source="arkilpatel/SVAMP",
        licence="MIT",
        metric="number",
        max_new_tokens=16,
        instruction="Solve the word problem. Answer with the number only.",
        template="{question}",
    ),
    Task(
        name="banking77",
        stands_for="customer_support",
        source="PolyAI-LDN/task-specific-datasets",
        licence="CC BY 4.0",
        metric="label",
        max_new_tokens=20,
        instruction="Name the intent of this message to a bank in snake_case, for example card_arrival.",
    ),
    Task(
        name="clinc150_intent",
        stands_for="customer_support",
        source="clinc/oos-eval",
        licence="CC BY 3.0",
        metric="label",
        max_new_tokens=12,
        instruction=(
            "Name the intent of this request to an assistant in snake_case, for example find_restaurant."
        ),
    ),
    Task(
        name="clinc150_domain",
        stands_for="topic classification (reuters, dbpedia)",
        source="clinc/oos-eval",
        licence="CC BY 3.0",
        metric="label",
        max_new_tokens=12,
        instruction=_one_of("Classify the topic of the message.", _CLINC_DOMAINS),
        labels=_CLINC_DOMAINS,
    ),
    Task(
        name="bitext_support",
        stands_for="customer_support",
        source="bitext/customer-support-intent-detection-training-dataset",
        licence="CDLA-Sharing-1.0",
        metric="label",
        max_new_tokens=12,
        instruction=_one_of("Name what the customer wants.", _BITEXT),
        labels=_BITEXT,
    ),
    Task(
        name="viggo",
        stands_for="viggo",
        source="jjuraska/data2text-nlg (GEM/viggo)",
        licence="CC BY-SA 4.0",
        metric="rouge_l",
        max_new_tokens=90,
        instruction="Say this meaning representation about a video game in plain English.",
        template="{mr}",
    ),
    Task(
        name="e2e_nlg",
        stands_for="e2e_nlg",
        source="tuetschek/e2e-dataset",
        licence="CC BY-SA 4.0",
        metric="rouge_l",
        max_new_tokens=80,
        instruction="Describe this restaurant in plain English.",
        template="{mr}\nDescription:",
    ),
    Task(
        name="wikisql",
        stands_for="wikisql",
        source="jkkummerfeld/text2sql-data",
        licence="BSD-3-Clause, (c) 2017 Salesforce",
        metric="exact",
        max_new_tokens=80,
        instruction="Write one SQL query on table t that answers the question. Reply with the query only.",
        template="Columns: {columns}\nQuestion: {question}\nSQL:",
    ),
    Task(
        name="dbpedia",
        stands_for="dbpedia",
        source="DBpedia 14 (copy in J-zin/DHIM)",
        licence="CC BY-SA / GFDL",
        metric="label",
        max_new_tokens=10,
        instruction=_one_of("Classify the article.", _DBPEDIA),
        labels=_DBPEDIA,
    ),
    Task(
        name="bc5cdr",
        stands_for="bc5cdr",
        source="cambridgeltl/MTL-Bioinformatics-2016",
        licence="CC BY 4.0",
        metric="entity_f1",
        max_new_tokens=80,
        instruction=(
            "List the chemicals and diseases named in the sentence as JSON: "
            '{"Chemical": [...], "Disease": [...]}.'
        ),
    ),
    Task(
        name="scitldr_summary",
        stands_for="tldr_content_gen",
        source="allenai/scitldr",
        licence="Apache-2.0",
        metric="rouge_l",
        max_new_tokens=80,
        instruction="Summarise the abstract in one sentence.",
        template="{abstract}",
    ),
    Task(
        name="scitldr_title",
        stands_for="tldr_headline_gen",
        source="allenai/scitldr",
        licence="Apache-2.0",
        metric="rouge_l",
        max_new_tokens=40,
        instruction="Write the paper's title for this abstract.",
        template="{abstract}",
    ),
    Task(
        name="cuad_clause",
        stands_for="legal",
        source="CUAD v1 via YiYang02/Legal-Text-Classification",
        licence="CC BY 4.0",
        metric="label",
        max_new_tokens=14,
        instruction=_one_of("Classify the contract clause.", _CUAD),
        template="{clause}",
        labels=_CUAD,
    ),
    Task(
        name="goemotions_sentiment",
        stands_for="covid, glue_sst2 (sentiment)",
        source="google-research GoEmotions via monologg/GoEmotions-pytorch",
        licence="CC BY 4.0",
        metric="label",
        max_new_tokens=6,
        instruction=_one_of("Classify the sentiment of the comment.", _SENTIMENTS),
        template="Comment: {text}\nSentiment:",
        labels=_SENTIMENTS,
    ),
    Task(
        name="boolq",
        stands_for="boolq",
        source="google-research-datasets/boolean-questions via mosaicml/llm-foundry",
        licence="CC BY-SA 3.0",
        metric="label",
        max_new_tokens=4,
        instruction="Answer the question about the passage with yes or no.",
        labels=("yes", "no"),
    ),
    Task(
        name="nl2bash",
        stands_for="magicoder (code)",
        source="TellinaTool/nl2bash",
        licence="MIT (data)",
        metric="rouge_l_code",
        max_new_tokens=80,
        instruction="Write one Bash command that does this. Reply with the command only.",
        template="{request}",
    ),
    Task(
        name="mbpp",
        stands_for="magicoder (code)",
        source="google-research MBPP",
        licence="CC BY 4.0",
        metric="rouge_l_code",
        max_new_tokens=160,
        instruction="Write the Python function. Reply with code only.",
        template="{problem}\n{tests}",
    ),
    Task(
        name="snips_json",
        stands_for="intent and slots as JSON",
        source="snipsco/nlu-benchmark",
        licence="CC0 1.0",
        metric="json",
        max_new_tokens=90,
        instruction=(
            "Give the intent and slots of the request as JSON: "
            '{"intent": "...", "slots": {"name": "value"}}. '
            "Intents: AddToPlaylist, BookRestaurant, GetWeather, PlayMusic, RateBook, SearchCreativeWork, "
            "SearchScreeningEvent."
        ),
    ),
    Task(
        name="csabstruct",
        stands_for="sentence role (topic-like)",
        source="allenai/sequential_sentence_classification",
        licence="Apache-2.0",
        metric="label",
        max_new_tokens=6,
        instruction=_one_of("Classify the role of this sentence in its abstract.", _ABSTRACT_ROLES),
        template="Sentence: {sentence}\nRole:",
        labels=_ABSTRACT_ROLES,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Every known task by name."""
