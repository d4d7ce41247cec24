"""A load experiment as a TOML file: who asks, how often, how much. Knows no server and no Locust."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from loadtest.adapters import CatalogError
from loadtest.plan import Arrivals, Endpoint, Limits, PromptKind, Stage, mode_name

Popularity = Literal["uniform", "zipf", "weights"]

SHORT_SECONDS, SHORT_RAMP_SECONDS = 6.0, 1.0
SHORT_USERS = 4
SHORT_RATE = 2.0
SHORT_INPUT_TOKENS, SHORT_OUTPUT_TOKENS = 60, 12


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment. Every choice of adapters is run with every number of users, or at every rate."""

    about: str
    adapters: tuple[Literal["base", "all"] | int, ...]
    users: tuple[int, ...] = ()
    """Closed loop: users who send again when their last answer is complete."""
    rates: tuple[float, ...] = ()
    """Open loop: requests a second, sent by a schedule made in advance. Either these or `users`."""
    arrivals: Arrivals = "poisson"
    seconds: float = 120.0
    """Length of a stage, its ramp included."""
    ramp_seconds: float = 5.0
    think_seconds: float = 0.0
    input_tokens: tuple[int, int] = (64, 64)
    """Least and most, drawn evenly."""
    output_tokens: tuple[int, int] = (32, 32)
    ignore_eos: bool = False
    prompts: PromptKind = "words"
    shared_prefix_tokens: int = 0
    popularity: Popularity = "uniform"
    zipf_alpha: float = 1.0
    weights: tuple[float, ...] = ()
    """With popularity `weights`: one for each adapter; the last holds for all further ones."""
    endpoint: Endpoint = "chat"
    limits: Limits = Limits()
    """What a request must keep to count into the goodput of an open loop."""
    warm_up: bool = True
    seed: int = 0

    def shortened(self, offered: int) -> "Experiment":
        """The same shape for a small machine: short stages, few users, short texts, at most the adapters offered."""
        adapters = [min(choice, offered) if isinstance(choice, int) else choice for choice in self.adapters]
        return msgspec.structs.replace(
            self,
            adapters=tuple(dict.fromkeys(adapters)),
            users=tuple(dict.fromkeys(min(users, SHORT_USERS) for users in self.users)),
            rates=tuple(dict.fromkeys(min(rate, SHORT_RATE) for rate in self.rates)),
            seconds=min(self.seconds, SHORT_SECONDS),
            ramp_seconds=min(self.ramp_seconds, SHORT_RAMP_SECONDS),
            input_tokens=_capped(self.input_tokens, SHORT_INPUT_TOKENS),
            output_tokens=_capped(self.output_tokens, SHORT_OUTPUT_TOKENS),
            shared_prefix_tokens=min(self.shared_prefix_tokens, SHORT_INPUT_TOKENS),
        )

    def stages(self, base: str, adapters: Sequence[str]) -> tuple[Stage, ...]:
        """In order, choices of adapters outermost. Raises CatalogError when the server offers too few adapters."""
        planned: list[Stage] = []
        for choice in self.adapters:
            count = {"base": 0, "all": len(adapters)}[choice] if isinstance(choice, str) else choice
            if choice != "base" and not 0 < count <= len(adapters):
                raise CatalogError(
                    f"the experiment wants {choice} adapters of {base}; the server offers {len(adapters)} "
                    "(--short takes what there is)"
                )
            models = tuple(adapters[:count]) if count else (base,)
            mode, weights = mode_name(count), self.weights_of(len(models))
            planned += [Stage(mode, users, models, count, weights) for users in self.users]
            planned += [Stage(f"{mode}, {rate:g}/s", 0, models, count, weights, rate) for rate in self.rates]
        return tuple(planned)

    def weights_of(self, count: int) -> tuple[float, ...]:
        """How often each of so many adapters is drawn; empty: all alike."""
        match self.popularity:
            case "uniform":
                return ()
            case "zipf":
                return tuple(1 / (rank + 1) ** self.zipf_alpha for rank in range(count))
            case "weights":
                return (self.weights + self.weights[-1:] * count)[:count]


def read_experiment(name: str) -> Experiment:
    """The experiment of that name, or in that TOML file. Raises CatalogError saying what is wrong with it."""
    path = Path(name)
    if path.suffix == ".toml":
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(f"{name} cannot be read: {error}") from None
    else:
        packaged = files("loadtest") / "experiments" / f"{name}.toml"
        if name not in experiment_names():
            known = ", ".join(experiment_names())
            raise CatalogError(
                f"there is no experiment {name!r}; there are {known}, or the path of a .toml file"
            )
        text = packaged.read_text()
    try:
        experiment = msgspec.toml.decode(text, type=Experiment)
    except msgspec.DecodeError as error:
        raise CatalogError(f"experiment {name}: {error}") from None
    if problem := _problem(experiment):
        raise CatalogError(f"experiment {name}: {problem}")
    return experiment


def experiment_names() -> list[str]:
    """The packaged experiments."""
    entries = (files("loadtest") / "experiments").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml"))


def _problem(experiment: Experiment) -> str | None:
    for option in ("input_tokens", "output_tokens"):
        least, most = getattr(experiment, option)
        if not 1 <= least <= most:
            return f"{option} must be [least, most] with 1 <= least <= most"
    if not experiment.adapters or any(isinstance(c, int) and c < 1 for c in experiment.adapters):
        return 'adapters must be a list of "base", "all" and numbers from 1'
    if bool(experiment.users) == bool(experiment.rates):
        return "give either users (closed loop) or rates (open loop)"
    if min((*experiment.users, 1)) < 1 or not all(rate > 0 for rate in experiment.rates):
        return "users must be from 1 and rates above 0"
    if not experiment.seconds > experiment.ramp_seconds >= 0 or experiment.think_seconds < 0:
        return "seconds must be more than ramp_seconds, and no time negative"
    if (experiment.popularity == "weights") != bool(experiment.weights):
        return 'weights go with popularity = "weights", and it with them'
    if not all(weight > 0 for weight in experiment.weights):
        return "weights must be above 0"
    if experiment.shared_prefix_tokens < 0:
        return "shared_prefix_tokens cannot be negative"
    return None


def _capped(bounds: tuple[int, int], most: int) -> tuple[int, int]:
    return (min(bounds[0], most), min(bounds[1], most))
