"""The inputs of the load: the same for the same seed, no two alike, none seen by an earlier run. Knows no server."""

import random

from loadtest.plan import PromptKind

NONCE_WORDS = 3


class Prompts:
    """Prompt number `index` of a run, as a pure function of (kind, tokens, seed, nonce).

    Every prompt opens with words that spell its index and the nonce, so two prompts of a run, and the same prompt
    of two runs, differ from the first words on: a prefix cache can only save what the chat template puts before.
    """

    def __init__(
        self,
        kind: PromptKind,
        tokens: int,
        seed: int,
        nonce: str,
        *,
        most: int | None = None,
        shared_tokens: int = 0,
    ) -> None:
        """`tokens`: approximate length of a `words` prompt; `tasks` prompts are as long as they were written.

        With `most` the length is drawn from `tokens` to `most`. `shared_tokens`: words of an opening that belongs
        to the prompt's owner (`text`), on top of that length.
        """
        if tokens < 1:
            raise ValueError("a prompt needs at least one token")
        self._kind: PromptKind = kind
        self._tokens = tokens
        self._most = most or tokens
        self._shared_tokens = shared_tokens
        self._nonce_text = nonce
        self._seed = seed
        self._nonce = random.Random(nonce).choices(WORDS, k=NONCE_WORDS)

    def text(self, index: int, owner: str = "") -> str:
        """The text of prompt `index`, from 0; with a shared opening, that of `owner`."""
        if not self._shared_tokens:
            return self._own_text(index)
        opening = random.Random(f"{self._seed}/{self._nonce_text}/{owner}").choices(
            WORDS, k=self._shared_tokens
        )
        return f"{' '.join(opening)} {self._own_text(index)}"

    def _own_text(self, index: int) -> str:
        source = random.Random(f"{self._seed}/{index}")
        head = _spell(index) + self._nonce
        if self._kind == "tasks":
            return f"Reference {' '.join(head)}.\n{source.choice(TASK_INPUTS)}"
        tokens = self._tokens if self._most == self._tokens else source.randint(self._tokens, self._most)
        fill = source.choices(WORDS, k=max(0, tokens - len(head)))
        return " ".join(head + fill)


def _spell(index: int) -> list[str]:
    """The index in base len(WORDS), with words for digits: two words for the first 51,984 prompts."""
    high, low = divmod(index, len(WORDS))
    return [*(_spell(high) if high >= len(WORDS) else [WORDS[high]]), WORDS[low]]


# Short everyday words: with a space before them each is one token for the usual byte-pair vocabularies.
WORDS = tuple(
    """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea kid body
    information back parent face others level office door health person art war history party result change morning
    reason research girl guy moment air teacher force education foot boy age policy music market sense nation plan
    college interest death experience effect use class control field development role effort rate heart drug show
    leader light voice wife police mind price report decision son view relationship town road arm difference value
    building action season society tax director position player record paper space ground form event matter center
    couple site project base star table need court oil situation cost industry figure street image phone data
    picture practice piece land product doctor wall patient worker news test movie north love step opportunity
    future message film order bank blood army media pressure meeting window skill stock analysis answer card deal
    glass green blue red white black small large early late high low long short open close hard soft fast slow
    """.split()  # noqa: SIM905
)

TASK_INPUTS = (
    "My card was charged twice for the same coffee on Friday. How do I get one of them back?",
    "I typed the wrong account number for a transfer an hour ago. Can it still be stopped?",
    "The app shows a different exchange rate from the one I was promised when I changed dollars to euros.",
    "How long does a new card take to reach me if I order it today and live abroad?",
    "Somebody used my phone to log in. Please lock everything until I have a new one.",
    "What time do I have to leave to catch the 9:40 train if the traffic is as bad as it was yesterday?",
    "Set an alarm for six on weekdays and half past eight on Saturdays.",
    "Is there a vegetarian place near the museum that still has a table for four tonight?",
    "Remind me to water the tomatoes when I get home and to buy string on the way.",
    "Play something quiet, no singing, for about an hour, then turn the lights off.",
    "name[The Copper Kettle] food[Portuguese] price[moderate] area[harbour] family friendly[yes]",
    "name[Blue Lantern] type[tea room] rating[5 out of 5] near[the old observatory]",
    "inform(title[Valley of Lanterns], genre[puzzle, adventure], year[2016], has multiplayer[no])",
    "request explanation(title[Iron Orchard], rating[poor], platform[console])",
    "subject: Lake Verrin | relation: outflow | object: River Anso",
    "subject: Ilse Marten | relation: designed | object: the Havel footbridge",
    "Doctor Amal Reyes of the Northern Institute spoke in Lisbon on Tuesday about the Celt glacier survey.",
    "Kestrel Motors will close its plant in Ostrava and move the work to Lyon, its chairman Paul Idris said.",
    "The patients who received the higher dose reported nausea, and two developed mild kidney injury.",
    "A rash appeared within days of starting the new antibiotic and faded once it was stopped.",
    "Two hours of my life that I will not get back; the dog was the best actor in it.",
    "A warm, funny film that trusts its audience, and the last ten minutes are perfect.",
    "The delivery came three days late, the box was open, and nobody answers the phone.",
    "I have used this kettle every morning for two years and it still looks new. Wonderful.",
    "Premise: A man is repairing a bicycle outside a shop. Hypothesis: Somebody is working outdoors.",
    "Premise: The committee has not met since March. Hypothesis: The committee met last week.",
    "Question 1: How can I learn to swim as an adult? Question 2: Is it possible to learn swimming after thirty?",
    "Sentence: The keys to the cabinet is on the table. Is the sentence good English?",
    "Mia had 24 stickers. She gave a third of them to Ben and bought 10 more. How many has she now?",
    "A train covers 180 km in 2.5 hours. At the same speed, how far does it go in 4 hours?",
    "Table orders(id, customer, city, total). Question: What is the largest total of any customer in Porto?",
    "Table players(name, team, goals, year). Question: How many players scored more than ten goals in 2019?",
    "Write a function that returns the second largest number in a list, or None if there is none.",
    "Write a function that counts the vowels in a string, upper and lower case alike.",
    "Headline: City council votes to keep the night buses running through the winter. Write the first paragraph.",
    "Scientists found that the mural, thought to be medieval, was painted over in the last century. "
    "Write a headline for this.",
    "The tenant shall keep the premises in good repair and return them in the state in which they were received. "
    "What kind of clause is this?",
    "Either party may end this agreement with ninety days' written notice. What kind of clause is this?",
    "The sky looked clear when they set off, but by noon. How does the story go on?",
    "Oil prices fell for the third day as stocks rose by more than traders had expected. "
    "What is this article about?",
)
